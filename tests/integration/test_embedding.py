"""Embedding a bucket over a bad network, killed and resumed, and its memory as it grows."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import psutil
import pyarrow.compute as pc
import pytest
from PIL import Image
from ray.exceptions import RayActorError

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.store import Store
from tac_ray.config import EmbedImagesConfig
from tac_ray.encoders.clip import Encoder, EncoderSpec
from tac_ray.encoders.decode import decode_image
from tac_ray.stages.embed_images import BATCH_ROWS, embed_images
from tac_ray.stages.list_images import list_images
from tests.memory import PeakMemory

pytestmark = pytest.mark.integration

TESTS = Path(__file__).parents[1]
BUCKET = "photos"


def picture(seed: int) -> bytes:
    """A PNG that no other seed gives."""
    rng = np.random.default_rng(seed)
    colors = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    from io import BytesIO

    buffer = BytesIO()
    colors.resize((40, 32)).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def script(name: str, *arguments: str) -> Iterator[str]:
    """A server of tests/ in a process of its own; its URL."""
    process = subprocess.Popen(
        [sys.executable, str(TESTS / name), *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


CREDENTIALS = {
    "aws_access_key_id": "test",
    "aws_secret_access_key": "test",
    "region_name": "us-east-1",
}


def aws(url: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def start(place: str, store: str, *encoder_and_counts: object, **environment: str):
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tests.integration.embed_job", place, store),
            *map(str, encoder_and_counts),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=TESTS.parent,
        env={**os.environ, **environment},
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 400) -> list[str]:
    output, _ = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, output
    return output.splitlines()


def kill_at(process: subprocess.Popen[str], n: int) -> None:
    """Kill the job once it has told of `n` images."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("done") and int(line.split()[1]) >= n:
            break
    else:
        pytest.fail("it ended before it could be killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def encoded(counts: Path) -> int:
    return sum(int(line) for line in counts.read_text().split())


def test_a_killed_job_on_a_bad_network_embeds_each_image_once(
    tiny_encoder_dir: Path, tmp_path: Path, s3_server: str, monkeypatch: pytest.MonkeyPatch
):
    counts = tmp_path / "counts"
    client = boto3.client("s3", endpoint_url=s3_server, **CREDENTIALS)
    client.create_bucket(Bucket=BUCKET)
    content = {f"in/{i % 7}/image {i:04d}.png": picture(i) for i in range(3000)}

    def put(key: str) -> None:
        client.put_object(Bucket=BUCKET, Key=key, Body=content[key])

    with ThreadPoolExecutor(4) as threads, script("faulty_proxy.py", s3_server) as proxy:
        list(threads.map(put, content))
        command = (
            f"s3://{BUCKET}/in",
            f"s3://{BUCKET}/store",
            f"local-dir:{tiny_encoder_dir}",
            counts,
        )
        for n in (random.randrange(1, 1200), random.randrange(1, 800)):
            kill_at(start(*command, **aws(proxy)), n)
            time.sleep(2)  # what is left of its cluster ends
        finish(start(*command, **aws(proxy)))
        # In flight at each of two kills: the two blocks an actor has and has not stored.
        assert 3000 <= encoded(counts) <= 3000 + 2 * 2 * BATCH_ROWS

        before = encoded(counts)
        changed = random.sample(sorted(content), 50)
        content |= {key: picture(10_000 + i) for i, key in enumerate(changed)}
        added = {f"in/{i % 7}/new {i:03d}.png": picture(20_000 + i) for i in range(200)}
        content |= added
        list(threads.map(put, [*changed, *added]))
        lines = finish(start(*command, **aws(proxy)))
    assert encoded(counts) - before == 250
    told = {line.split()[1]: line.split()[2] for line in lines if line.startswith("artifact")}
    for name, value in aws(s3_server).items():
        monkeypatch.setenv(name, value)
    embedded = Artifact.load(told["embed_images"])
    listed = Artifact.load(told["list_images"])
    facts = {name: embedded.facts[f"n_{name}"] for name in ("new", "reused", "failed")}
    assert facts == {"new": 250, "reused": 2950, "failed": 0}
    uris = listed.column("uri").to_pylist()
    assert uris == sorted(f"s3://{BUCKET}/{key}" for key in content)
    assert embedded.column("image_id").to_pylist() == list(range(3200))
    found = matrix(embedded.column("embedding")).astype(np.float32)

    spec = EncoderSpec(model=f"local-dir:{tiny_encoder_dir}", pretrained=None, precision="fp32")
    encoder: Encoder = spec.load()
    keys = [uri.removeprefix(f"s3://{BUCKET}/") for uri in uris]
    pixels = np.stack([decode_image(content[key], encoder.crop) for key in keys])
    expected = encoder.encode_images(pixels, batch_size=16)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    # The comparison would notice two images exchanged.
    assert np.abs(expected[1:] - expected[:-1]).max(axis=1).min() > 2e-3


def test_gpus_are_free_again_at_the_end(tiny_encoder_dir: Path, tmp_path: Path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.png").write_bytes(picture(i))
    command = (str(folder), str(tmp_path / "store"), f"local-dir:{tiny_encoder_dir}")
    lines = finish(start(*command, tmp_path / "counts", JOB_GPUS="2"))
    assert encoded(tmp_path / "counts") == 5
    assert lines[-1] == "gpus free 2"


def measure(place: str, store: str, *encoder_and_counts: object, **environment: str) -> PeakMemory:
    process = start(place, store, *encoder_and_counts, **environment)
    with PeakMemory(psutil.Process(process.pid)) as memory:
        finish(process)
    return memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tiny_encoder_dir: Path, tmp_path: Path):
    found = {}
    for n in (5_000, 50_000):
        folder = tmp_path / str(n)
        for i in range(n):
            if i % 1000 == 0:
                (folder / f"{i:06d}").mkdir(parents=True)
            (folder / f"{i // 1000 * 1000:06d}" / f"{i:06d}.png").write_bytes(TINY)
        counts = tmp_path / f"counts{n}"
        command = (
            str(folder),
            str(tmp_path / f"store{n}"),
            f"local-dir:{tiny_encoder_dir}",
            counts,
        )
        found[n] = measure(*command)
        assert encoded(counts) == n
    few, many = found.values()
    print(f"driver {few.root_mb:.0f} -> {many.root_mb:.0f} MB, largest worker ", end="")
    print(f"{few.largest_mb:.0f} -> {many.largest_mb:.0f} MB")
    assert many.root_mb < 1.1 * few.root_mb
    assert many.largest_mb < 1.1 * few.largest_mb


TINY = picture(0)


@pytest.mark.slow
def test_a_million_keys_are_listed_in_bounded_memory(tmp_path: Path):
    found = {}
    for n in (100_000, 1_000_000):
        with script("listing_server.py", "--keys", str(n), "--latency-ms", "50") as url:
            begun = time.perf_counter()
            found[n] = measure("s3://bucket/flat", str(tmp_path / str(n)), **aws(url))
            seconds = time.perf_counter() - begun
            with urllib.request.urlopen(f"{url}/stats") as answer:
                stats = json.load(answer)
            if n == 100_000:
                begun = time.perf_counter()
                client = boto3.client("s3", endpoint_url=url, **CREDENTIALS)
                pages = client.get_paginator("list_objects_v2")
                answers = pages.paginate(Bucket="bucket", Prefix="flat/")
                assert sum(len(answer["Contents"]) for answer in answers) == n
                peer_s = 10 * (time.perf_counter() - begun)
        listing = next((tmp_path / str(n)).glob("list_images-*"))
        artifact = Artifact.load(str(listing))
        assert artifact.n_rows == n
        uris = artifact.column("uri")
        assert uris[0].as_py() == "s3://bucket/flat/img_00000000.jpg"
        assert pc.count_distinct(uris).as_py() == n
        # Several callers at a time, with few calls beside those that list.
        assert stats["most_in_flight"] >= 8
        assert stats["n_requests"] < 1.5 * n / 1000 + 400
    few, many = found.values()
    print(f"1,000,000 keys: {seconds:.0f} s with the start of Ray; one caller, ten times 100,000: ")
    print(
        f"{peer_s:.0f} s. Driver {few.root_mb:.0f} -> {many.root_mb:.0f} MB, largest worker ",
        end="",
    )
    print(f"{few.largest_mb:.0f} -> {many.largest_mb:.0f} MB")
    assert many.root_mb < 1.1 * few.root_mb
    assert many.largest_mb < 1.5 * few.largest_mb


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dying(EncoderSpec):
    """An encoder whose process ends when it is loaded, as for lack of memory."""

    def load(self, device: str = "cpu") -> Encoder:
        os._exit(1)


def test_an_encoder_that_dies_again_and_again_ends_the_run(
    ray_cluster: None, tiny_encoder_dir: Path, silent_progress: Any, images: Path, tmp_path: Path
):
    options = {"model": f"local-dir:{tiny_encoder_dir}", "pretrained": None, "precision": "fp32"}
    store = Store(str(tmp_path), silent_progress)
    listing = list_images(store, str(images), labels="none")
    encoder = EncoderSpec(**options).load()
    with pytest.raises(RayActorError):
        embed_images(store, EmbedImagesConfig(), Dying(**options), encoder, listing)
