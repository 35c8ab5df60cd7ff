"""A folder on a local path or on `s3://`, through fsspec."""

import io
import logging
import os
import posixpath
import random
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote_to_bytes

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import ConnectionError as StoreConnectionError
from botocore.exceptions import HTTPClientError
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

S3_CLIENT: dict[str, Any] = {
    # Not "adaptive", which slows all calls down after each throttled one.
    "retries": {"max_attempts": 10, "mode": "standard"},
    "max_pool_connections": 64,
    "connect_timeout": 10,
    "read_timeout": 60,
}
"""Settings of every client of S3."""


OUTAGE_S = 300
"""How long a store may be out of reach before a run gives up."""
_LONGEST_PAUSE_S = 10
UNREACHABLE = (HTTPClientError, StoreConnectionError, ConnectionError, TimeoutError)
"""Errors of the way to a store, which say nothing of what was asked for."""

T = TypeVar("T")


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns, begun again for OUTAGE_S while the store cannot be reached.

    The clients of stores try again too, but give up after a minute, or at once when many calls of
    theirs failed.
    """
    begun, n_failed = time.monotonic(), 0
    while True:
        try:
            return call()
        except UNREACHABLE as error:
            n_failed += 1
            passed = time.monotonic() - begun
            if passed > OUTAGE_S:
                raise
            logging.getLogger(__name__).warning(
                "%s: %s; trying again for %.0f s", type(error).__name__, error, OUTAGE_S - passed
            )
            time.sleep(random.uniform(0.5, 1) * min(_LONGEST_PAUSE_S, 2**n_failed))


def is_local(path: str) -> bool:
    """Whether `path` names a local file or folder rather than an object store."""
    return "://" not in path or path.startswith("file://")


def absolute(path: str) -> str:
    """Local paths made absolute, urls without a trailing slash."""
    if path.startswith("file://"):
        path = os.fsdecode(unquote_to_bytes(path.removeprefix("file://")))
    if is_local(path):
        return str(Path(path).expanduser().resolve())
    return path.rstrip("/")


def local_uri(path: str) -> str:
    """A local path as text that can be stored: itself, or percent-encoded if not valid UTF-8."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return f"file://{quote(os.fsencode(path))}"
    return path


def filesystem(path: str) -> tuple[AbstractFileSystem, str]:
    """The fsspec filesystem of `path`, without listing cache, and the path inside it.

    S3 takes endpoint, region, credentials and profile from the standard AWS variables, and tries
    again on throttling, 5xx and broken connections.
    """
    if is_local(path):
        return fsspec.filesystem("file"), absolute(path)
    if path.startswith("s3://"):
        # Not by url_to_fs, which takes "::" in a key for a chain of filesystems.
        fs = fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=S3_CLIENT)
        return fs, path.removeprefix("s3://")
    fs, inner = fsspec.url_to_fs(path)
    return fs, str(inner)


@dataclass(frozen=True)
class Folder:
    """A folder of files written whole: a reader sees a complete file or none."""

    path: str

    def join(self, *names: str) -> str:
        """Path of a file or folder inside."""
        return posixpath.join(self.path, *names)

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        fs, path = filesystem(self.join(name))
        return patiently(lambda: bool(fs.exists(path)))

    def read(self, name: str) -> bytes:
        """Bytes of a file.

        Raises:
            FileNotFoundError: no such file.
        """
        fs, path = filesystem(self.join(name))
        return patiently(lambda: fs.cat_file(path))  # type: ignore[no-any-return]

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole: rename over the old one locally, one PUT on an object store."""
        target = self.join(name)
        fs, path = filesystem(target)
        if not is_local(target):
            patiently(lambda: fs.pipe_file(path, data))
            return
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        part = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
        try:
            part.write_bytes(data)
            part.replace(final)
        finally:
            part.unlink(missing_ok=True)

    def remove(self, name: str = "") -> None:
        """Remove a file or a folder with all it holds; nothing happens if it is not there."""
        target = self.join(name) if name else self.path
        fs, path = filesystem(target)
        if is_local(target) and Path(path).is_dir():
            shutil.rmtree(path)
        elif fs.exists(path):
            fs.rm(path, recursive=True)

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A Parquet file as a table."""
        return table_from(pa.BufferReader(self.read(name)), columns)


def table_bytes(table: pa.Table, *, plain: bool = False) -> bytes:
    """A table as a Parquet file.

    Args:
        table: what to write.
        plain: uncompressed and without dictionary, for embeddings, which neither shortens but
            both slow to read.
    """
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none" if plain else "zstd", use_dictionary=not plain)
    return buffer.getvalue()


def table_from(file: Any, columns: list[str] | None = None) -> pa.Table:
    """A table from a Parquet file, open or in memory.

    On this thread alone: those of Arrow, which pyarrow.parquet.read_table would use, let go of the
    file after the table is there. Where Python has begun to exit by then, they cannot have its lock
    to do so, and that ends a process that has done all its work with code 134.
    """
    return pq.ParquetFile(file).read(columns=columns, use_threads=False)


def array_bytes(array: NDArray[Any]) -> bytes:
    """An array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def array_from(data: bytes) -> NDArray[Any]:
    """An array from the bytes of a .npy file; pickled objects are refused."""
    return np.load(io.BytesIO(data), allow_pickle=False)  # type: ignore[no-any-return]
