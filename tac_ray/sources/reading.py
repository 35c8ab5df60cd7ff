"""The bytes of listed images: objects, members of tars, rows of Parquet files."""

import functools
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tac_ray.artifacts.storage import UNREACHABLE, filesystem, patiently
from tac_ray.sources.tables import columns_in

READS_IN_FLIGHT = 32
"""Requests of one process at a time."""
BYTES_IN_FLIGHT = 64 << 20
"""Stop asking for more while this much is on its way or waits to be decoded."""
_UNKNOWN_BYTES = 256 << 10
"""What an image of unknown size is taken for."""
_TAR_REQUEST_BYTES = 8 << 20
_ATTEMPTS = 5
_FIRST_WAIT_S = 0.2
_FINAL = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    *UNREACHABLE,  # after minutes of attempts
)
"""Errors that another attempt cannot mend."""

WHERE = ("uri", "member", "offset", "size", "etag")
"""Columns of a listing that say where the bytes of an image are."""


class Read(NamedTuple):
    """The bytes of one image, or why there are none."""

    row: int
    data: bytes | None
    error: str
    seconds: float
    """This image's share of the time its request took."""


@dataclass(frozen=True)
class _Request:
    """Bytes that are fetched by one call: a file, a stretch of a tar, some rows of Parquet."""

    rows: list[int]
    uri: str
    spans: list[tuple[int, int]] | None = None
    """First and last byte of each row in a tar."""
    members: list[int] | None = None
    """Rows of a Parquet file."""
    size: int | None = None
    etag: str | None = None


def read_images(listed: pa.Table) -> Iterator[Read]:
    """Read listed images, READS_IN_FLIGHT requests and BYTES_IN_FLIGHT ahead of who takes them.

    Network errors, 5xx and broken connections are tried again with growing pauses. Neighboring
    members of a tar come with one request.

    Args:
        listed: rows with the columns WHERE.

    Returns:
        One result a row, in any order.
    """
    waiting: deque[tuple[_Request, Future[list[Read]]]] = deque()
    ahead = 0
    with ThreadPoolExecutor(READS_IN_FLIGHT) as readers:
        for request in _requests(listed):
            while waiting and (
                len(waiting) >= 2 * READS_IN_FLIGHT or ahead + _weight(request) > BYTES_IN_FLIGHT
            ):
                done, result = waiting.popleft()
                yield from result.result()
                ahead -= _weight(done)
            waiting.append((request, readers.submit(_fetch, request)))
            ahead += _weight(request)
        while waiting:
            yield from waiting.popleft()[1].result()


def _weight(request: _Request) -> int:
    return request.size or _UNKNOWN_BYTES * len(request.rows)


def _requests(listed: pa.Table) -> Iterator[_Request]:
    tar: list[tuple[int, int, int]] = []  # row, first and last byte of neighbors in one tar
    tar_uri = ""
    tables: dict[tuple[str, str | None], list[tuple[int, int]]] = {}
    columns = [listed[name].to_pylist() for name in WHERE]
    for row, (uri, member, offset, size, etag) in enumerate(zip(*columns, strict=True)):
        if member is None:
            yield _Request([row], uri, size=size)
        elif offset is None:
            tables.setdefault((uri, etag), []).append((row, int(member)))
        else:
            if tar and (uri != tar_uri or not 0 <= offset + size - tar[0][1] <= _TAR_REQUEST_BYTES):
                yield _of_tar(tar_uri, tar)
                tar = []
            tar_uri = uri
            tar.append((row, offset, offset + size))
    if tar:
        yield _of_tar(tar_uri, tar)
    for (uri, etag), found in tables.items():
        rows, members = zip(*found, strict=True)
        yield _Request(list(rows), uri, members=list(members), etag=etag)


def _of_tar(uri: str, found: Sequence[tuple[int, int, int]]) -> _Request:
    size = found[-1][2] - found[0][1]
    return _Request([f[0] for f in found], uri, spans=[f[1:] for f in found], size=size)


def _fetch(request: _Request) -> list[Read]:
    start = time.perf_counter()
    found: list[bytes | None] = [None] * len(request.rows)
    error = ""
    for attempt in range(_ATTEMPTS):
        try:
            found = patiently(lambda: _get(request))
            error = ""
            break
        except _FINAL as failed:
            error = _reason(failed)
            break
        except Exception as failed:  # whatever a store's client raises, the image is quarantined
            error = _reason(failed)
            if attempt + 1 < _ATTEMPTS:
                time.sleep(_FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1.5))
    seconds = (time.perf_counter() - start) / len(request.rows)
    return [
        Read(row, data, error if data is None else "", seconds)
        for row, data in zip(request.rows, found, strict=True)
    ]


def _reason(error: Exception) -> str:
    """What went wrong without the path, which `uri` says: equal reasons read the same."""
    what = error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"{type(error).__name__}: {what}"


def _get(request: _Request) -> list[bytes | None]:
    if request.members is not None:
        return list(_parquet_images(request.uri, request.etag, request.members))
    fs, path = filesystem(request.uri)
    if request.spans is None:
        data: bytes = fs.cat_file(path)  # type: ignore[assignment]
        if request.size is not None and len(data) != request.size:
            raise OSError(
                f"{len(data)} bytes were read and {request.size} were listed; it has changed "
                "since, or was cut short"
            )
        return [data]
    start, end = request.spans[0][0], request.spans[-1][1]
    data = fs.cat_file(path, start=start, end=end)  # type: ignore[assignment]
    if len(data) != end - start:
        raise OSError(f"{len(data)} bytes of a tar were read instead of {end - start}")
    return [data[first - start : last - start] for first, last in request.spans]


def _parquet_images(uri: str, etag: str | None, members: Sequence[int]) -> Iterator[bytes | None]:
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        groups = pq.ParquetFile(file).metadata
        ends, end = [], 0
        for group in range(groups.num_row_groups):
            end += groups.row_group(group).num_rows
            ends.append(end)
    for member in members:
        group = next(i for i, end in enumerate(ends) if member < end)
        images = _row_group(uri, etag, group)
        found: Any = images[member - (ends[group] - len(images))]
        yield found.as_py() or b""


@functools.lru_cache(maxsize=1)
def _row_group(uri: str, etag: str | None, group: int) -> pa.ChunkedArray:
    """Images of a row group of a file in the state of `etag`.

    The next batch of rows is likely to need the same one.
    """
    column = columns_in(uri).image
    if column is None:
        raise FileNotFoundError(f"{uri} has no column of images")
    fs, path = filesystem(uri)
    with fs.open(path, "rb") as file:
        table = pq.ParquetFile(file).read_row_group(group, columns=[column])
    name, _, inner = column.partition(".")
    found = table[name]
    if inner:
        found = pa.chunked_array([chunk.field(inner) for chunk in found.chunks], pa.binary())
    return found
