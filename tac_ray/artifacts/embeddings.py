"""The store of embeddings: every image that an encoder has ever seen, whatever run asked for it."""

import hashlib
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tac_ray.artifacts.schemas import matrix, matrix_column
from tac_ray.artifacts.storage import Folder, filesystem, patiently, table_bytes, table_from

KEY_BYTES = 16
Keys = NDArray[np.bytes_]
"""Keys of images, (n,) of KEY_BYTES bytes."""
FILES_IN_FLIGHT = 16

IDENTITY = ("uri", "member", "etag")
"""Columns of a listing that tell one state of one image from all others."""


def image_keys(listed: pa.Table) -> Keys:
    """What identifies the content of each listed image: a hash of its columns IDENTITY.

    128 bits, so that among 10^9 images two share one with a chance of 10^-21.
    """
    columns = [listed[name].to_pylist() for name in IDENTITY]
    digests = (
        hashlib.blake2b(repr(row).encode(), digest_size=KEY_BYTES).digest()
        for row in zip(*columns, strict=True)
    )
    return np.frombuffer(b"".join(digests), dtype=f"S{KEY_BYTES}")


@dataclass(frozen=True)
class EmbeddingStore:
    """The embeddings of one encoder: files of keys and embeddings that are only ever added.

    A file is written whole, so that an image is in the store with its embedding or not at all, and
    a run that was killed has lost what was in flight and nothing else. (Ray Data's own checkpoints
    hold the ids of written rows in files beside the data, so a kill between the two embeds twice.)
    """

    folder: Folder

    @classmethod
    def of(cls, store: str, encoder: str) -> "EmbeddingStore":
        """The part of a store that belongs to an encoder.

        Args:
            store: path of the store of artifacts.
            encoder: hash of its weights, preprocessing and precision.
        """
        return cls(Folder(Folder(store).join("embeddings", encoder[:16])))

    def names(self) -> list[str]:
        """Names of the files, sorted."""
        fs, path = filesystem(self.folder.path)
        if not patiently(lambda: fs.exists(path)):
            return []
        found: list[Any] = patiently(lambda: fs.ls(path, detail=False))
        return sorted(n for n in (str(f).rsplit("/", 1)[-1] for f in found) if n[0] != ".")

    def append(self, keys: Keys, embedding: NDArray[np.float16]) -> str:
        """Add embeddings (n, d) under their keys (n,); the name of their file."""
        name = f"{uuid.uuid4().hex}.parquet"
        # From the buffer: an item of such an array has lost the zeros it ended with.
        buffers = [None, pa.py_buffer(np.ascontiguousarray(keys))]
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(keys), buffers)
        table = pa.table({"key": column, "embedding": matrix_column(embedding)})
        self.folder.write(name, table_bytes(table, plain=True))
        return name

    def keys_in(self, name: str) -> Keys:
        """Keys of one file, (n,)."""
        fs, path = filesystem(self.folder.join(name))

        def read() -> pa.ChunkedArray:
            with fs.open(path, "rb") as file:
                return table_from(file, ["key"])["key"]

        column = patiently(read)
        return np.frombuffer(b"".join(column.to_pylist()), dtype=f"S{KEY_BYTES}")

    def read(self, places: "Places") -> NDArray[np.float16]:
        """Embeddings at some places, (n, d). Reads each file that holds one of them once."""
        order = np.argsort(places.file, kind="stable")
        files, starts = np.unique(places.file[order], return_index=True)
        rows = np.split(order, starts[1:])
        with ThreadPoolExecutor(FILES_IN_FLIGHT) as readers:
            tables = readers.map(self._embedding, (places.names[i] for i in files))
            out = None
            for mine, found in zip(rows, tables, strict=True):
                if out is None:
                    out = np.empty((len(order), found.shape[1]), dtype=np.float16)
                out[mine] = found[places.row[mine]]
        assert out is not None, "no places"
        return out

    def _embedding(self, name: str) -> NDArray[np.float16]:
        return matrix(self.folder.read_table(name, ["embedding"])["embedding"])


@dataclass(frozen=True)
class Places:
    """Where embeddings lie: file and row of each, (n,) int32."""

    names: Sequence[str]
    file: NDArray[np.int32]
    row: NDArray[np.int32]


@dataclass(frozen=True)
class Index:
    """What a store holds: keys in order, and where each lies. 24 bytes an image."""

    names: list[str]
    keys: Keys
    file: NDArray[np.int32]
    row: NDArray[np.int32]

    @classmethod
    def empty(cls) -> "Index":
        """Of a store that holds nothing."""
        none = np.empty(0, dtype=np.int32)
        return cls([], np.empty(0, dtype=f"S{KEY_BYTES}"), none, none)

    def extended(self, store: EmbeddingStore, names: list[str]) -> "Index":
        """With more files of the store."""
        with ThreadPoolExecutor(FILES_IN_FLIGHT) as readers:
            found = list(readers.map(store.keys_in, names))
        sizes = [len(keys) for keys in found]
        first = len(self.names)
        file = np.repeat(np.arange(first, first + len(names), dtype=np.int32), sizes)
        row = np.concatenate([np.arange(n, dtype=np.int32) for n in sizes] or [self.row[:0]])
        keys = np.concatenate([self.keys, *found])
        order = np.argsort(keys, kind="stable")
        return Index(
            [*self.names, *names],
            keys[order],
            np.concatenate([self.file, file])[order],
            np.concatenate([self.row, row])[order],
        )

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """Position of each key, (n,); -1 where it is not there."""
        if not len(self.keys):
            return np.full(len(keys), -1)
        found = np.searchsorted(self.keys, keys)
        found[found == len(self.keys)] = 0
        return np.where(self.keys[found] == keys, found, -1)

    def places(self, positions: NDArray[np.int64]) -> Places:
        """Where the embeddings at these positions lie."""
        return Places(self.names, self.file[positions], self.row[positions])
