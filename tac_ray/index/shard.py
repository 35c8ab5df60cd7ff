"""One shard: the rows of some parts, in memory, with FAISS over them."""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from tac_ray.algorithm.kmeans import Sums
from tac_ray.artifacts.manifest import Part
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.storage import Folder
from tac_ray.artifacts.store import resident_gb

BLOCK_ROWS = 4096
"""Rows widened to float32 at a time. Blocks are cut at parts, and each runs on one thread, so
neither the number of shards nor of threads enters the bits."""

TIED_QUERIES = 64
"""Queries searched again at a time: 64 x 32,768 results are 25 MB."""


@dataclass(frozen=True)
class PartSource:
    """Where the rows of one part lie: side by side in one or more artifacts."""

    index: int
    first_row: int
    columns: tuple[tuple[str, Part], ...]
    """Folder and file of each artifact; rows are concatenated as [first, second]."""

    @property
    def n_rows(self) -> int:
        """Rows of the part."""
        return self.columns[0][1].rows

    def load(self) -> torch.Tensor:
        """The rows, (n, d) float16, d being the sum of the columns' widths."""
        arrays = [
            matrix(Folder(folder).read_table(part.name, ["embedding"]).column("embedding"))
            for folder, part in self.columns
        ]
        return torch.from_numpy(np.concatenate(arrays, axis=1))


class Shard:
    """Rows of some parts, float16 at rest.

    Memory: 2 n d bytes, and for each thread a block of 4 BLOCK_ROWS (d + k) bytes.
    """

    def __init__(self, n_threads: int) -> None:
        self._threads = ThreadPoolExecutor(n_threads, initializer=_single_threaded_blas)
        self._parts: list[tuple[PartSource, torch.Tensor]] = []
        self._active: list[torch.Tensor | None] = []
        self._assignment: list[NDArray[np.int32]] = []
        self._lock = threading.Lock()

    def load(self, sources: list[PartSource]) -> float:
        """Take the rows of these parts in place of those held; gives resident memory in GB.

        Raises:
            ValueError: a row is not finite or is zero.
        """
        self._parts = []
        self._parts = [(source, source.load()) for source in sources]
        for source, rows in self._parts:
            bad = ~torch.isfinite(rows).all(dim=1) | (rows == 0).all(dim=1)
            if bad.any():
                row = source.first_row + int(bad.nonzero()[0, 0])
                raise ValueError(
                    f"embedding of row {row} is zero or not finite; {int(bad.sum())} such rows in "
                    f"part {source.index}; remove the artifact and embed again"
                )
        self.use_rows(None)
        return resident_gb()

    def use_rows(self, rows: NDArray[np.int64] | None) -> None:
        """Let `assign` see only these global rows; None for all."""
        self._active, self._assignment = [], []
        for source, part in self._parts:
            chosen = None
            if rows is not None:
                local = rows - source.first_row
                inside = local[(local >= 0) & (local < len(part))]
                chosen = part[torch.from_numpy(inside)]
            self._active.append(chosen)
            n = len(part if chosen is None else chosen)
            self._assignment.append(np.full(n, -1, dtype=np.int32))

    def assign(self, centroids: NDArray[np.float32]) -> tuple[Sums, int]:
        """Nearest centroid of every active row by inner product.

        Returns:
            Sums for the next centroids, and how many rows moved since the last call.
        """
        k, d = centroids.shape
        sums, counts = np.zeros((k, d)), np.zeros(k, dtype=np.int64)
        blocks = []
        for i, (_, part) in enumerate(self._parts):
            active = self._active[i]
            rows = part if active is None else active
            blocks += [
                (i, start, rows[start : start + BLOCK_ROWS])
                for start in range(0, len(rows), BLOCK_ROWS)
            ]

        def one(block: tuple[int, int, torch.Tensor]) -> tuple[int, float, int]:
            i, start, rows = block
            wide = rows.float()
            similarity, nearest = faiss.knn(
                wide.numpy(), centroids, 1, metric=faiss.METRIC_INNER_PRODUCT
            )
            ids = nearest[:, 0]
            before = self._assignment[i][start : start + len(ids)]
            moved = int((before != ids).sum())
            before[:] = ids
            present, block_sums, block_counts = _sum_by_id(wide, ids)
            with self._lock:
                sums[present] += block_sums
                counts[present] += block_counts
            return i, float(similarity.astype(np.float64).sum()), moved

        objective = [0.0] * len(self._parts)
        moved = 0
        for i, value, n in self._threads.map(one, blocks):
            objective[i] += value
            moved += n
        return Sums(sums, counts, objective), moved

    def assignment(self) -> list[NDArray[np.int32]]:
        """Centroid of every row at the last `assign`, a part at a time."""
        return self._assignment

    def rows(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Those of the global rows that this shard holds: their numbers and embeddings."""
        found, values = [np.zeros(0, dtype=np.int64)], []
        for source, part in self._parts:
            local = rows - source.first_row
            inside = local[(local >= 0) & (local < len(part))]
            found.append(inside + source.first_row)
            values.append(part[torch.from_numpy(inside)].float().numpy())
        embeddings = np.concatenate(values) if values else np.zeros((0, 0), dtype=np.float32)
        return np.concatenate(found), embeddings

    def search(self, source: PartSource, n: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The `n` most similar rows of this shard for every row of a part.

        Returns:
            similarity and global row, each (rows of the part, at most n), best first, ties by
            row number.

        Cost: 2 n_queries n_rows d operations; memory a part widened to float32 a thread.
        """
        if not self._parts:
            nothing = np.zeros((source.n_rows, 0))
            return nothing.astype(np.float32), nothing.astype(np.int64)
        queries = source.load()
        blocks = [queries[i : i + BLOCK_ROWS] for i in range(0, len(queries), BLOCK_ROWS)]

        def one(block: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            wide = block.float().numpy()
            found = []
            for held, part in self._parts:
                similarity, row = _top_rows(wide, part.float().numpy(), n)
                found.append((similarity, row + held.first_row))
            return merge_top(found, n)

        results = list(self._threads.map(one, blocks))
        return (
            np.concatenate([similarity for similarity, _ in results]),
            np.concatenate([row for _, row in results]),
        )


def _top_rows(
    queries: NDArray[np.float32], rows: NDArray[np.float32], n: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Best `n` rows of each query, ties by row number also at the cut.

    FAISS keeps any of the rows that are tied for the last places, so queries with such a tie are
    searched again for all rows.
    """
    metric = faiss.METRIC_INNER_PRODUCT
    if n >= len(rows):
        return merge_top([faiss.knn(queries, rows, len(rows), metric=metric)], n)
    similarity, row = merge_top([faiss.knn(queries, rows, n + 1, metric=metric)], n + 1)
    tied = np.flatnonzero(similarity[:, n - 1] == similarity[:, n])
    similarity, row = similarity[:, :n].copy(), row[:, :n].copy()
    for some in np.array_split(tied, len(tied) // TIED_QUERIES + 1):
        if len(some):
            every = faiss.knn(queries[some], rows, len(rows), metric=metric)
            similarity[some], row[some] = merge_top([every], n)
    return similarity, row


def merge_top(
    found: Iterable[tuple[NDArray[np.float32], NDArray[np.int64]]], n: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The best `n` of several result lists: larger similarity first, ties by row number."""
    lists = list(found)
    similarity = np.concatenate([s for s, _ in lists], axis=1)
    row = np.concatenate([r for _, r in lists], axis=1)
    order = np.lexsort((row, -similarity), axis=1)[:, :n]
    return np.take_along_axis(similarity, order, 1), np.take_along_axis(row, order, 1)


def _sum_by_id(
    rows: torch.Tensor, ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Distinct ids, and for each the exact float64 sum and the number of its rows."""
    present, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(present), rows.shape[1], dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(inverse), rows.double())
    return present, sums.numpy(), counts


def _single_threaded_blas() -> None:
    faiss.omp_set_num_threads(1)
