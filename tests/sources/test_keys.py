"""Keys of a bucket, listed by ranges that are cut while they are read."""

import bisect
import random
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest

from tac_ray.sources.keys import PAGE_KEYS, Bucket, Key, KeyRange, midpoint


class FakeS3:
    """ListObjectsV2 over some keys, in the order of their UTF-8 bytes as S3 has them."""

    def __init__(self, keys: list[str], latency_s: float = 0.0) -> None:
        self.keys, self.latency_s = sorted(set(keys)), latency_s
        self.n_calls = self.in_flight = self.most_in_flight = 0
        self._lock = threading.Lock()

    def list_objects_v2(self, **asked: Any) -> dict[str, Any]:
        after, prefix = asked.get("StartAfter", ""), asked["Prefix"]
        with self._lock:
            self.n_calls += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        time.sleep(self.latency_s)
        first = max(bisect.bisect_right(self.keys, after), bisect.bisect_left(self.keys, prefix))
        last = bisect.bisect_left(self.keys, prefix + "\U0010ffff")
        stop = min(last, first + asked["MaxKeys"])
        with self._lock:
            self.in_flight -= 1
        page = [{"Key": key} for key in self.keys[first:stop]]
        return {"IsTruncated": stop < last} | ({"Contents": page} if page else {})


def listed(bucket: Bucket, n_ranges: int) -> list[list[str]]:
    """The keys of each run that a reader was given."""

    def read(pages: Iterator[Sequence[Key]]) -> list[str]:
        return [key["Key"] for page in pages for key in page]

    return [run for keys in bucket.ranges(n_ranges) for run in bucket.consume(keys, read)]


def words(n: int, letters: str, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(n)]


BUCKETS = {
    "numbers": [f"in/img_{i:08d}.jpg" for i in range(30_000)],
    "classes": [f"in/n{i % 40:08d}/{i}.JPEG" for i in range(30_000)],
    "one long folder": ["in/a.jpg", "in/z.jpg", *(f"in/m{'m' * 200}/{i}" for i in range(20_000))],
    "most at the end": [f"in/{'z' * (i % 3)}{i * i}" for i in range(20_000)],
    "other languages": [f"in/{word}.jpg" for word in words(8_000, "äßжя猫犬é \U0001f408", 1)],
    "odd characters": [f"in/{word}" for word in words(8_000, "\t\n !\"'~\x7f/..", 2)],
    "random": [f"in/{word}" for word in words(20_000, "0123456789abcdef", 3)],
    "few": ["in/1", "in/2"],
    "one page": [f"in/{i:04d}" for i in range(1000)],
    "none": ["elsewhere/1"],
}


@pytest.mark.parametrize("n_ranges", [1, 4])
@pytest.mark.parametrize("keys", BUCKETS.values(), ids=BUCKETS)
def test_every_key_is_listed_once(keys, n_ranges):
    others = ["i", "in", "in.jpg", "inner/1.jpg", "in0"]  # "in/" is the prefix
    client = FakeS3([*keys, *others])
    runs = listed(Bucket(client, "bucket", "in/"), n_ranges)
    expected = sorted({key for key in keys if key.startswith("in/")})
    assert sorted(key for run in runs for key in run) == expected
    assert all(run == sorted(run) for run in runs)
    # Cutting costs calls, but not as many as listing.
    assert client.n_calls <= 3 * len(expected) / PAGE_KEYS + 600


def test_all_keys_of_a_bucket_without_a_prefix_are_listed():
    keys = ["1.jpg", "é.jpg", *(f"f{i}" for i in range(5_000))]
    found = listed(Bucket(FakeS3(keys), "bucket", ""), 4)
    assert sorted(key for run in found for key in run) == sorted(keys)


def test_calls_are_made_many_at_a_time_where_one_range_holds_all_keys():
    client = FakeS3(BUCKETS["one long folder"] + BUCKETS["numbers"], latency_s=0.01)
    listed(Bucket(client, "bucket", "in/"), 1)
    assert client.most_in_flight >= 4


def test_ranges_share_the_keys():
    bucket = Bucket(FakeS3(BUCKETS["numbers"]), "bucket", "in/")
    ranges = bucket.ranges(8)
    assert 8 <= len(ranges) <= 16
    assert all(low.until <= high.after for low, high in pairwise(ranges))
    held = [sum(r.after < key <= r.until for key in BUCKETS["numbers"]) for r in ranges]
    assert sum(held) == 30_000
    assert min(held) > 0
    assert max(held) <= 15_000


def test_an_error_of_one_reader_ends_the_listing():
    bucket = Bucket(FakeS3(BUCKETS["numbers"]), "bucket", "in/")

    def read(pages: Iterator[Sequence[Key]]) -> None:
        next(pages)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        bucket.consume(KeyRange("in/", "in/\U0010ffff"), read)


def test_the_midpoint_lies_between():
    rng = random.Random(0)
    some = sorted({*words(500, "abc\x20\x7f~é猫", 4), *words(500, "0123", 5)})
    for _ in range(3000):
        low, high = sorted(rng.sample(some, 2))
        middle = midpoint(low, high)
        assert middle is None or low < middle < high
    assert midpoint("in/", "in/\U0010ffff") is not None
    assert midpoint("a", "a\x20") is None
