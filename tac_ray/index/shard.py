"""One shard: the rows of some parts, in memory, with FAISS over them."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tac_ray.algorithm.kmeans import Sums, rotate
from tac_ray.artifacts.manifest import Part
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.storage import Folder
from tac_ray.artifacts.store import own_memory_gb
from tac_ray.index.found import Found, merge_top, write_neighbors
from tac_ray.index.lists import JoinPlan, ListedRows, Lists, gathered, join_group, places_of_groups

BLOCK_ROWS = 4096
"""Queries searched at a time. Blocks are cut at parts, and each runs on one thread, so neither the
number of shards nor of threads enters the bits."""

CACHED_ROWS = 512
"""Rows of float64 that a core's cache holds beside what they are added to."""

PRUNED_BATCH = 256
"""Rows that FAISS prunes together: what it keeps of them and 1024 centroids, 1 MB, stays in the
cache of a core, which its own 4096 do not."""

TIED_QUERIES = 64
"""Queries searched again at a time: 64 x 32,768 results are 25 MB."""


SEGMENT_ROWS = 25_000
"""Rows that stay together on a shard, at most: what is searched in one go. Parts are cut into equal
segments, so neither does the number of shards enter the bits, nor does a part have to be small for
the shards to have equally many rows."""


@dataclass(frozen=True)
class PartSource:
    """Where the rows of a part, or of a segment of it, lie: side by side in artifacts."""

    index: int
    """Number of the part."""
    first_row: int
    """Global number of the first row."""
    n_rows: int
    columns: tuple[tuple[str, Part], ...]
    """Folder and file of each artifact; rows are concatenated as [first, second]."""
    skip: int = 0
    """Rows of the part before these."""

    def load(self) -> torch.Tensor:
        """The rows, (n, d) float16, d being the sum of the columns' widths."""
        arrays = []
        for folder, part in self.columns:
            column = Folder(folder).read_table(part.name, ["embedding"]).column("embedding")
            arrays.append(matrix(column.slice(self.skip, self.n_rows)))
        return torch.from_numpy(np.concatenate(arrays, axis=1))

    def local(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the sorted global rows that lie here, counted from the first."""
        first, last = np.searchsorted(rows, [self.first_row, self.first_row + self.n_rows])
        return rows[first:last] - self.first_row

    def segments(self) -> list["PartSource"]:
        """The rows in equal runs of at most SEGMENT_ROWS."""
        cuts = np.linspace(0, self.n_rows, -(-self.n_rows // SEGMENT_ROWS) + 1).astype(int)
        return [
            replace(self, first_row=self.first_row + first, n_rows=last - first, skip=first)
            for first, last in pairwise(cuts.tolist())
        ]


GPU_MOST = 2048
"""Results a query that FAISS finds on a GPU; beyond, and where only faiss-cpu is there, torch."""


class Pass(NamedTuple):
    """One pass over the rows of a shard, or of all. Adds up over shards."""

    sums: Sums
    moved: int
    """Rows that have another centroid than before."""
    n_pairs: int = 0
    """Pairs of a row and a centroid that a pruned pass looked at."""
    n_pruned: int = 0
    """Those that it left after their first coordinates."""

    def plus(self, other: "Pass") -> "Pass":
        """Both together."""
        sums = Sums(self.sums.sums + other.sums.sums, self.sums.counts + other.sums.counts)
        rest = (mine + theirs for mine, theirs in zip(self[1:], other[1:], strict=True))
        return Pass(sums, *rest)


@dataclass
class _Held:
    """Rows of one segment, and what k-means knows of them."""

    source: PartSource
    rows: Tensor
    """All of them, (n, d) float16, on the shard's device."""
    active: Tensor
    """Those that k-means sees."""
    centroid: NDArray[np.int32]
    """Of each active row; -1 before the first pass."""
    rotated: Tensor | None = None
    """The active rows, rotated; made by the first pruned pass."""


class Shard:
    """Rows of some segments, float16 at rest, on the GPU of the actor if it was given one.

    Memory: 2 n d bytes, as much again while passes are pruned, 16 k d bytes of sums, and for each
    thread 4 SEGMENT_ROWS (d + 1024) bytes. A join needs no more.
    """

    def __init__(self, n_threads: int, on_gpu: bool) -> None:
        on_gpu = on_gpu and torch.cuda.is_available()
        self._device = torch.device("cuda" if on_gpu else "cpu")
        # A GPU takes one block after the other.
        self._threads = ThreadPoolExecutor(1 if on_gpu else n_threads, initializer=_single_threaded)
        self._parts: list[_Held] = []
        self._sums: Sums | None = None
        self._lock = threading.Lock()

    def memory_gb(self) -> float:
        """Memory of this process, GB."""
        return own_memory_gb()

    def load(self, sources: list[PartSource]) -> None:
        """Take the rows of these parts in place of those held.

        Raises:
            ValueError: a row is not finite or is zero.
        """
        self._parts, self._sums = [], None
        # On one thread, so that what reading needs beside the rows is there once.
        for source in sources:
            rows = source.load()
            bad = ~torch.isfinite(rows).all(dim=1) | (rows == 0).all(dim=1)
            if bad.any():
                row = source.first_row + int(bad.nonzero()[0, 0])
                raise ValueError(
                    f"embedding of row {row} is zero or not finite; {int(bad.sum())} such rows in "
                    f"part {source.index}; remove the artifact and embed again"
                )
            rows = rows.to(self._device)
            self._parts.append(_Held(source, rows, rows, _unassigned(rows)))

    def use_rows(self, rows: NDArray[np.int64] | None) -> None:
        """Let `assign` see only these global rows, sorted; None for all."""
        self._sums = None
        for held in self._parts:
            held.active, held.rotated = held.rows, None
            if rows is not None:
                held.active = held.rows[torch.from_numpy(held.source.local(rows)).to(self._device)]
            held.centroid = _unassigned(held.active)

    def assign(self, centroids: NDArray[np.float32], depth: int | None) -> Pass:
        """Nearest centroid of every active row.

        Args:
            centroids: unit norm, (k, d).
            depth: None compares every row with every centroid. A number lets FAISS's pruned pass
                leave a pair after so many coordinates if the rest is unlikely to make it the
                nearest; it starts from the centroids of the pass before, and is for CPUs.

        Returns:
            Sums of the rows of each centroid, how many rows moved, and what was pruned.

        Cost: 2 n k d operations, or about 2 n k depth; sums cost d for each row that moved.
        """
        if self._sums is None or self._sums.sums.shape != centroids.shape:
            self._sums = Sums(np.zeros(centroids.shape), np.zeros(len(centroids), dtype=np.int64))
            for held in self._parts:
                held.centroid = _unassigned(held.active)
        total = self._sums
        near: _Exact | _Pruned
        near = _Exact(centroids, self._device) if depth is None else _Pruned(centroids, depth)

        def one(held: _Held) -> tuple[int, int, int]:
            centroid, n_pairs, n_pruned = near(held)
            moved = np.flatnonzero(held.centroid != centroid)
            present, sums, counts = _difference(held, moved, centroid)
            with self._lock:
                total.sums[present] += sums
                total.counts[present] += counts
            held.centroid = centroid
            return len(moved), n_pairs, n_pruned

        done = list(self._threads.map(one, self._parts))
        so_far = Sums(total.sums.copy(), total.counts.copy())
        return Pass(so_far, *(sum(figures) for figures in zip((0, 0, 0), *done, strict=True)))

    def assignment(self) -> list[NDArray[np.int32]]:
        """Centroid of every active row at the last `assign`, a segment at a time."""
        return [held.centroid for held in self._parts]

    def rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings of those of the sorted global rows that this shard holds, (n, d) float32."""
        found = [np.zeros((0, 0), dtype=np.float32)]
        for held in self._parts:
            local = torch.from_numpy(held.source.local(rows)).to(self._device)
            if len(local):
                found.append(held.rows[local].float().cpu().numpy())
        return np.concatenate(found[1:] or found)

    def search(self, queries: PartSource | NDArray[np.float16], n: int) -> Found:
        """The `n` most similar rows of this shard for every row of a part, or for other rows.

        Returns:
            similarity and global row, each (queries, at most n), best first, ties by row number.

        Cost: 2 n_queries n_rows d operations; memory a part widened to float32 a thread.
        """
        rows = queries.load() if isinstance(queries, PartSource) else torch.tensor(queries)
        if not self._parts:
            nothing = np.zeros((len(rows), 0))
            return nothing.astype(np.float32), nothing.astype(np.int64)
        blocks = rows.to(self._device).split(BLOCK_ROWS)

        def one(block: Tensor) -> Found:
            found = []
            for held in self._parts:
                similarity, row = top_rows(block, held.rows, n)
                found.append((similarity, row + held.source.first_row))
            return merge_top(found, n)

        similarity, row = zip(*self._threads.map(one, blocks), strict=True)
        return np.concatenate(similarity), np.concatenate(row)

    def to_groups(self, plan: JoinPlan) -> Any:
        """The rows of this shard in each group of lists, by segment; one answer a group."""
        segments = []
        for held in self._parts:
            rows = held.source.first_row + np.arange(held.source.n_rows)
            segments.append((held.rows, rows, places_of_groups(rows, plan)))

        def of_group(group: int) -> list[ListedRows]:
            found = []
            for embedding, rows, places in segments:
                mine = embedding[torch.from_numpy(places[group]).to(embedding.device)]
                row = rows[places[group]]
                found.append(ListedRows(mine.cpu().numpy(), row, plan.of_row[row]))
            return found

        if plan.n_groups == 1:  # Ray takes a single answer as it is
            return of_group(0)
        # And several one after the other, each stored before the next is made.
        return (of_group(group) for group in range(plan.n_groups))

    def gather(self, *pieces: list[ListedRows]) -> ListedRows:
        """The rows of one group, of which each shard had some."""
        return gathered(piece for shard in pieces for piece in shard)

    def join(
        self, group: int, groups: list[Any], plan: JoinPlan, n: int, first_rows: list[int]
    ) -> Any:
        """The `n` best rows of each row of a group, by what `gather` made of all groups.

        Returns:
            How many rows; then global rows, sorted, with similarity and best rows, an answer for
            each of the runs of rows that begin at `first_rows`.

        Cost: 2 d operations for each pair of a row and a row of its n_probe lists, and
        2 d n_lists a row to find those. Memory: for each thread 40 bytes for each of
        MOST_CANDIDATES, 20 for each of JOIN_ROWS x LIST_ROWS pairs, and a list in float32; what is
        found of the group, 12 n bytes a row, twice.
        """
        lists = Lists(groups, plan, self._device)
        own = lists.group(group)
        by_row = np.argsort(own.row)
        found = [own.row, *join_group(own, lists, n, self._threads.map)]
        found = [column[by_row] for column in found]
        cuts = np.searchsorted(found[0], first_rows[1:])
        runs = zip(*(np.split(column, cuts) for column in found), strict=True)
        return [len(own.row), *runs]

    def write_joined(
        self,
        folder: Folder,
        sources: list[PartSource],
        n: int,
        exclude: str,
        *found: tuple[NDArray[Any], ...],
    ) -> list[Part]:
        """Write neighboring parts from what `join` found for their rows in each group."""

        def write(source: PartSource) -> Part:
            mine = []
            for row, *columns in found:
                ends = [source.first_row, source.first_row + source.n_rows]
                run = slice(*np.searchsorted(row, ends))
                mine.append([row[run], *(column[run] for column in columns)])
            row, similarity, best = (np.concatenate(column) for column in zip(*mine, strict=True))
            order = np.argsort(row)
            best_rows = similarity[order], best[order]
            return write_neighbors(folder, source.index, source.first_row, n, exclude, *best_rows)

        return list(self._threads.map(write, sources))


def top_rows(queries: Tensor, rows: Tensor, n: int) -> Found:
    """Best `n` of the rows for each query, on the device they are on.

    Ties go to the smaller row, also at the cut: FAISS keeps any of the rows that are tied for the
    last places, so queries with such a tie are searched again for all rows.

    Args:
        queries: (m, d) float16.
        rows: (r, d) float16.
        n: how many, at most.

    Returns:
        similarity float32 and row int64, each (m, min(n, r)), best first.

    Cost: 2 m r d operations. Memory on CPU: 4 (m + r) d bytes.
    """
    if not rows.is_cuda:
        queries, rows = queries.float(), rows.float()
    if n >= len(rows):
        return merge_top([_search(queries, rows, len(rows))], n)
    similarity, row = merge_top([_search(queries, rows, n + 1)], n + 1)
    tied = np.flatnonzero(similarity[:, n - 1] == similarity[:, n])
    similarity, row = similarity[:, :n].copy(), row[:, :n].copy()
    for some in np.array_split(tied, len(tied) // TIED_QUERIES + 1):
        if len(some):
            every = _search(queries[torch.from_numpy(some).to(rows.device)], rows, len(rows))
            similarity[some], row[some] = merge_top([every], n)
    return similarity, row


def _search(queries: Tensor, rows: Tensor, n: int) -> Found:
    metric = faiss.METRIC_INNER_PRODUCT
    if not rows.is_cuda:
        return faiss.knn(queries.numpy(), rows.numpy(), n, metric=metric)
    if n > GPU_MOST or not hasattr(faiss, "StandardGpuResources"):  # as faiss-cpu has none
        similarity, row = (queries.float() @ rows.float().T).topk(n)
    else:
        memory = _gpu_memory()  # first: it puts another knn_gpu in the place of FAISS's
        similarity, row = faiss.knn_gpu(memory, queries, rows, n, metric=metric)
    return similarity.cpu().numpy(), row.cpu().numpy()


@functools.cache
def _gpu_memory() -> Any:
    """FAISS's working memory on this process's GPU."""
    # Importing it lets FAISS take torch tensors.
    import faiss.contrib.torch_utils

    return faiss.StandardGpuResources()


class _Wide(threading.local):
    """Memory of each thread for the rows of a segment in float32, kept from one to the next."""

    buffer = torch.empty(0)

    def rows(self, like: Tensor) -> Tensor:
        """Room for as many rows, (n, d) float32."""
        if self.buffer.numel() < like.numel():
            self.buffer = torch.empty(like.numel())
        return self.buffer[: like.numel()].view(like.shape)


_WIDE = _Wide()


class _Exact:
    """Nearest centroids of a segment, compared with all; of equally near ones the first."""

    def __init__(self, centroids: NDArray[np.float32], device: torch.device) -> None:
        self._centroids = torch.from_numpy(centroids).to(device)

    def __call__(self, held: _Held) -> tuple[NDArray[np.int32], int, int]:
        if held.active.is_cuda:
            blocks = held.active.split(BLOCK_ROWS)
            found = [(rows.float() @ self._centroids.T).argmax(dim=1) for rows in blocks]
            nearest = torch.cat(found).cpu().numpy()
        else:
            rows = _WIDE.rows(held.active).copy_(held.active).numpy()
            metric = faiss.METRIC_INNER_PRODUCT
            nearest = faiss.knn(rows, self._centroids.numpy(), 1, metric=metric)[1][:, 0]
        return nearest.astype(np.int32), 0, 0


class _Pruned:
    """Nearest centroids of a segment by FAISS's pruned pass, on rotated rows.

    FAISS compares L2 distances, which for centroids of one norm finds the largest inner product.
    """

    def __init__(self, centroids: NDArray[np.float32], depth: int) -> None:
        width = centroids.shape[1]
        self._centroids = rotate(torch.from_numpy(centroids))
        self._depth = depth
        # faiss's own stubs lack these four.
        self._parameters = faiss.SuperKMeansParameters()  # type: ignore[attr-defined]
        self._parameters.x_batch = PRUNED_BATCH
        significance = self._parameters.ad_epsilon_factor / width
        self._thresholds = faiss.vector_to_array(
            faiss.precompute_ad_thresholds(width, significance)  # type: ignore[attr-defined]
        )

    def __call__(self, held: _Held) -> tuple[NDArray[np.int32], int, int]:
        if held.rotated is None:
            runs = held.active.split(CACHED_ROWS)
            held.rotated = torch.cat([rotate(rows.float()).half() for rows in runs])
        rows = _WIDE.rows(held.rotated).copy_(held.rotated)
        nearest, before = held.centroid.copy(), held.centroid.astype(np.int64)
        distance = np.empty(len(rows), dtype=np.float32)
        faiss.fvec_L2sqr_by_idx(  # type: ignore[attr-defined]
            faiss.swig_ptr(distance),
            faiss.swig_ptr(rows.numpy()),
            faiss.swig_ptr(self._centroids.numpy()),
            faiss.swig_ptr(before),
            rows.shape[1],
            len(rows),
            1,
        )
        n_pairs, n_pruned = faiss.super_kmeans_assign_iteration(  # type: ignore[attr-defined]
            rows.numpy(),
            self._centroids.numpy(),
            distance,
            nearest,
            self._depth,
            self._thresholds,
            self._parameters,
        )
        return nearest, n_pairs, n_pruned


def _difference(
    held: _Held, moved: NDArray[np.int64], after: NDArray[np.int32]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """What moving rows between centroids changes: ids, and of each its sum and its count.

    Exact, so that sums kept up to date have the bits of sums made anew.

    Args:
        held: the rows, and the centroids they leave.
        moved: which of them move, (m,).
        after: centroids of all rows from now on, (n,).
    """
    ids = np.stack([held.centroid[moved], after[moved]])
    present, inverse = np.unique(ids, return_inverse=True)
    place = torch.from_numpy(inverse.reshape(ids.shape)).to(held.active.device)
    which = torch.from_numpy(moved).to(held.active.device)
    sums = torch.zeros(
        len(present), held.active.shape[1], dtype=torch.float64, device=held.active.device
    )
    for i in range(0, len(moved), CACHED_ROWS):
        run = slice(i, i + CACHED_ROWS)
        rows = held.active[which[run]].double()
        sums.index_add_(0, place[0, run], rows, alpha=-1)
        sums.index_add_(0, place[1, run], rows)
    counts = np.bincount(place[1].cpu().numpy(), minlength=len(present))
    counts -= np.bincount(place[0].cpu().numpy(), minlength=len(present))
    # Rows that had none leave -1.
    known = present >= 0
    return present[known].astype(np.int64), sums.cpu().numpy()[known], counts[known]


def _unassigned(rows: Tensor) -> NDArray[np.int32]:
    return np.full(len(rows), -1, dtype=np.int32)


def _single_threaded() -> None:
    """Let FAISS and torch compute on the calling thread alone."""
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
