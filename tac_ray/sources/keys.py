"""The keys of a bucket, listed by many calls at a time, also when they lie under one flat prefix.

ListObjectsV2 gives 1,000 keys a call and each call needs the last key of the one before, so a flat
prefix looks sequential. It is not: a call may start after any string. A range of keys that is
being listed is cut at a string half way to its end, and whoever is idle takes the upper half.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Generic, TypeVar

from botocore.config import Config
from botocore.session import get_session

from tac_ray.artifacts.storage import S3_CLIENT

PAGE_KEYS = 1000
"""Keys a call, the most that S3 gives."""
CALLS_IN_FLIGHT = 16
"""Calls of one process at a time."""

_FIRST, _LAST = 0x20, 0x7F
"""Characters between which cuts are tried; keys with others lie in the range above the cut."""

_MOST_CUTS = 8
"""Empty halves that are dropped at most: enough to bisect one character."""

Key = dict[str, Any]
"""Key, Size and ETag, as S3 says them."""


T = TypeVar("T")


@dataclass
class KeyRange:
    """Keys k with after < k <= until."""

    after: str
    until: str


@dataclass(frozen=True)
class Bucket:
    """The keys of one bucket under a prefix."""

    client: Any
    """A botocore client, which threads may share."""
    name: str
    prefix: str

    @classmethod
    def at(cls, url: str) -> "Bucket":
        """Bucket and prefix of an s3:// url; a prefix is a folder."""
        name, _, prefix = url.removeprefix("s3://").partition("/")
        session = get_session()
        # Times are not needed, and parsing them takes three quarters of a call.
        session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=str)
        client = session.create_client("s3", config=Config(**S3_CLIENT))
        return cls(client, name, f"{prefix}/" if prefix else "")

    @property
    def whole(self) -> KeyRange:
        """All keys under the prefix."""
        return KeyRange(self.prefix, self.prefix + "\U0010ffff")

    def page(self, after: str, n: int = PAGE_KEYS) -> tuple[list[Key], bool]:
        """The first `n` keys after a string, and whether there are more. One call."""
        start = {"StartAfter": after} if after else {}
        answer = self.client.list_objects_v2(
            Bucket=self.name, Prefix=self.prefix, MaxKeys=n, **start
        )
        return answer.get("Contents", []), bool(answer.get("IsTruncated"))

    def cut(self, keys: KeyRange) -> KeyRange | None:
        """Take the upper half off `keys` and give it back; None where nothing was found to take.

        Half of the strings, not of the keys: how the keys lie between is not known. An empty upper
        half is dropped and the lower one cut again. About a dozen calls.
        """
        # Keys often share a long start: find its end by bisection before cutting there.
        low, high = _shared(keys.after, keys.until), len(keys.after)
        while low < high:
            n = (low + high) // 2
            end = min(keys.until, keys.after[:n] + chr(_LAST))
            if self._any_in(KeyRange(end, keys.until)):
                high = n
            else:
                low, keys.until = n + 1, end
        for _ in range(_MOST_CUTS):
            middle = midpoint(keys.after, keys.until)
            if middle is None:
                return None
            upper = KeyRange(middle, keys.until)
            keys.until = middle
            if self._any_in(upper):
                return upper
        return None

    def _any_in(self, keys: KeyRange) -> bool:
        return self._first_in(keys) is not None

    def _first_in(self, keys: KeyRange) -> str | None:
        found, _ = self.page(keys.after, 1)
        return found[0]["Key"] if found and found[0]["Key"] <= keys.until else None

    def ranges(self, n: int) -> list[KeyRange]:
        """The prefix in up to about `n` ranges, in order, each with a key in it."""
        parts = [self.whole]
        _, more = self.page(self.prefix)
        while more and len(parts) < n:
            cuts: list[KeyRange] = []
            for keys in parts:
                # From its first key, which tells where keys begin to differ.
                first = self._first_in(keys)
                beyond = KeyRange(first or keys.after, keys.until)
                upper = self.cut(beyond)
                cuts.append(KeyRange(keys.after, beyond.until))
                if upper is not None:
                    cuts.append(upper)
            more = len(cuts) > len(parts)
            parts = cuts
        return parts

    def consume(self, keys: KeyRange, reader: Callable[[Iterator[Sequence[Key]]], T]) -> list[T]:
        """Read a range with CALLS_IN_FLIGHT readers, who take halves off each other's ranges.

        Args:
            keys: what to list.
            reader: called, in threads, with the pages of a run of keys in order.

        Returns:
            What the readers gave, in no order; the runs are disjoint and hold all keys.
        """
        return _Crew(self, reader).run(keys)


def midpoint(low: str, high: str) -> str | None:
    """A string between two, about half way in the characters where keys differ; None if none is.

    Strings compare by code points, which is the order of S3's keys.
    """
    n = _shared(low, high)
    top = min(ord(high[n]), _LAST)
    while True:
        digit = ord(low[n]) if n < len(low) else _FIRST - 1
        if top - digit > 1:
            return low[:n] + chr((digit + top) // 2)
        if n >= len(low):
            return None
        n, top = n + 1, _LAST


def _shared(low: str, high: str) -> int:
    """Characters that two strings share at their start."""
    n = 0
    while n < min(len(low), len(high)) and low[n] == high[n]:
        n += 1
    return n


@dataclass(eq=False)
class _Busy:
    """A range that someone is listing."""

    keys: KeyRange
    n_pages: int = 0
    being_cut: bool = False


@dataclass
class _Crew(Generic[T]):
    """Readers that list a range together."""

    bucket: Bucket
    reader: Callable[[Iterator[Sequence[Key]]], T]
    _busy: list[_Busy] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _results: list[T] = field(default_factory=list)

    def run(self, keys: KeyRange) -> list[T]:
        first = _Busy(keys)
        self._busy.append(first)
        with ThreadPoolExecutor(CALLS_IN_FLIGHT) as threads:
            others = [None] * (CALLS_IN_FLIGHT - 1)
            for _ in threads.map(self._read, [first, *others]):
                pass
        return self._results

    def _read(self, mine: _Busy | None) -> None:
        try:
            while mine is not None or (mine := self._take()) is not None:
                self._results.append(self.reader(self._pages(mine)))
                mine = None
        except BaseException:
            with self._changed:  # the others have nothing left to do
                self._busy.clear()
                self._changed.notify_all()
            raise

    def _pages(self, mine: _Busy) -> Iterator[Sequence[Key]]:
        keys, more = mine.keys, True
        while more:
            page, more = self.bucket.page(keys.after)
            with self._changed:
                inside = _until(page, keys.until)
                more = more and len(inside) == len(page) and mine in self._busy
                if inside:
                    keys.after = inside[-1]["Key"]
                mine.n_pages += 1
                if not more and mine in self._busy:
                    self._busy.remove(mine)
                self._changed.notify_all()
            yield inside

    def _take(self) -> _Busy | None:
        """The upper half of a range that someone else is listing; None when all are done."""
        while True:
            with self._changed:
                if not self._busy:
                    return None
                ready = [b for b in self._busy if b.n_pages and not b.being_cut]
                if not ready:
                    self._changed.wait()
                    continue
                # The one that has the most pages behind it is likely to have the most before it.
                victim = max(ready, key=attrgetter("n_pages"))
                victim.being_cut = True
                copy = KeyRange(victim.keys.after, victim.keys.until)
            upper = self.bucket.cut(copy)
            with self._changed:
                victim.n_pages = 0
                victim.being_cut = False
                if victim not in self._busy or copy.until <= victim.keys.after:
                    continue  # it was faster than the cut
                victim.keys.until = copy.until
                if upper is None:
                    continue
                taken = _Busy(upper)
                self._busy.append(taken)
                return taken


def _until(page: Sequence[Key], last: str) -> Sequence[Key]:
    """The keys of a page up to `last`."""
    if not page or page[-1]["Key"] <= last:
        return page
    return [key for key in page if key["Key"] <= last]
