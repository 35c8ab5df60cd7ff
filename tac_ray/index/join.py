"""Neighbors of a collection in itself as a join: rows in coarse lists, each list with a few others.

    k-means -> lists -> a sample says how many to join -> rows to their lists -> join -> parts

A search for every row on its own visits n_probe lists a row and multiplies a vector with each. Here
all rows of a list visit the same lists, in one product of matrices.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from tac_ray.algorithm.kmeans import random_rows
from tac_ray.artifacts.manifest import Part
from tac_ray.artifacts.storage import Folder
from tac_ray.index.group import ShardGroup, write_neighbors
from tac_ray.index.kmeans import fit
from tac_ray.index.shard import PartSource, top_rows

LISTS_PER_ROOT = 2.0
"""Lists are this times sqrt(N): finding the list of a row costs about as much as the join then."""
LIST_SAMPLE = 64
"""Rows a list that its centroid is fitted on."""
LIST_ITERATIONS = 8
GROUP_ROWS = 1 << 16
"""Rows whose lists one task joins, at least."""
MOST_GROUPS = 256
SAMPLE = 1000
"""Rows whose neighbors tune the join, and as many that measure its recall."""


@dataclasses.dataclass(frozen=True)
class JoinPlan:
    """Which rows meet which."""

    of_row: NDArray[np.int32]
    """List of each row, (N,)."""
    group: NDArray[np.int32]
    """Group of each list, (n_lists,)."""
    probes: NDArray[np.int32]
    """The lists that each list is joined with, nearest first, itself among them,
    (n_lists, n_probe)."""
    expected_recall: float
    """Share of the true neighbors of sampled rows that lie in those lists."""

    @property
    def n_groups(self) -> int:
        """How many groups of lists there are."""
        return int(self.group.max()) + 1


def plan_join(index: ShardGroup, n: int, *, recall: float, seed: int) -> tuple[JoinPlan, "Sample"]:
    """Lists of all rows, and how many of them each is joined with.

    Args:
        index: shards that hold the rows.
        n: neighbors of a row.
        recall: share of the true neighbors to be found. The number of lists is the least at which
            a sample says so with two standard errors to spare.
        seed: of lists and sample.

    Returns:
        The plan, and a second sample to measure the join with.

    Cost: 2 N n_lists d operations and a fit on LIST_SAMPLE rows a list; 4 SAMPLE N d for the
    samples. The driver holds 4 N bytes.
    """
    lists = fit(
        index,
        min(round(LISTS_PER_ROOT * math.sqrt(index.n_rows)), index.n_rows),
        seed=seed,
        restarts=1,
        max_iterations=LIST_ITERATIONS,
        tolerance=1e-3,
        max_points_per_centroid=LIST_SAMPLE,
        on_iteration=lambda _: None,
    )
    of_row = np.concatenate(lists.assignment)
    sizes = np.bincount(of_row, minlength=len(lists.centroids))
    sample = Sample.of(index, n, seed=seed)
    one, other = sample.halves()
    order = np.argsort(-(lists.centroids @ lists.centroids.T), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(len(order))[None], axis=1)
    # For each sampled row, how near its list the lists of its neighbors are.
    ranks = rank[of_row[one.rows][:, None], of_row[one.neighbors]]
    n_probe, expected = _fewest(ranks, recall)
    plan = JoinPlan(
        of_row,
        _groups(lists.centroids, sizes),
        order[:, :n_probe].astype(np.int32),
        expected,
    )
    return plan, other


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some rows and their true neighbors."""

    rows: NDArray[np.int64]
    """(m,)"""
    neighbors: NDArray[np.int64]
    """(m, n)"""

    @classmethod
    def of(cls, index: ShardGroup, n: int, *, seed: int) -> "Sample":
        """Random rows, and their neighbors by exact search."""
        rows = random_rows(index.n_rows, min(2 * SAMPLE, index.n_rows), seed=seed, restart=1 << 30)
        _, found = index.search(rows, n + 1)
        others = found != rows[:, None]
        others[others.all(axis=1), -1] = False
        return cls(rows, found[others].reshape(len(rows), -1))

    def halves(self) -> tuple["Sample", "Sample"]:
        """Two that have no row in common."""
        return tuple(Sample(self.rows[i::2], self.neighbors[i::2]) for i in (0, 1))  # type: ignore[return-value]

    def recall(self, found: NDArray[np.int64]) -> float:
        """Share of the true neighbors among those found for these rows, (m, n)."""
        hits = [
            len(np.intersect1d(mine, true))
            for mine, true in zip(found, self.neighbors, strict=True)
        ]
        return sum(hits) / self.neighbors.size


def _fewest(ranks: NDArray[np.int64], recall: float) -> tuple[int, float]:
    """The fewest lists that hold enough of the neighbors, and the share that they hold."""
    n_lists = int(ranks.max()) + 1
    for n_probe in range(1, n_lists):
        share = (ranks < n_probe).mean(axis=1)
        if share.mean() - 2 * share.std() / math.sqrt(len(share)) >= recall:
            return n_probe, float(share.mean())
    return n_lists, 1.0


def _groups(centroids: NDArray[np.float32], sizes: NDArray[np.int64]) -> NDArray[np.int32]:
    """A group for each list, of about equally many rows, near lists together.

    Halves the lists along their first principal direction until the parts are small enough. How
    many there are follows from N alone.
    """
    n_groups = min(MOST_GROUPS, max(1, int(sizes.sum()) // GROUP_ROWS))
    group = np.zeros(len(sizes), dtype=np.int32)

    def halve(lists: NDArray[np.int64], first: int, n: int) -> None:
        if n == 1:
            group[lists] = first
            return
        middle = centroids[lists] - centroids[lists].mean(axis=0)
        along = middle @ np.linalg.svd(middle, full_matrices=False)[2][0]
        lists = lists[np.argsort(along, kind="stable")]
        share = np.cumsum(sizes[lists]) / sizes[lists].sum()
        cut = int(np.searchsorted(share, (n // 2) / n)) + 1
        halve(lists[:cut], first, n // 2)
        halve(lists[cut:], first + n // 2, n - n // 2)

    halve(np.arange(len(sizes)), 0, n_groups)
    return group


def join_neighbors(
    folder: Folder, sources: list[PartSource], plan: JoinPlan, n: int, *, exclude: str, on_gpu: bool
) -> Iterator[Part]:
    """Write the neighbors of all rows, part by part, aligned with the sources.

    Only tasks without state, so that Ray repeats what a lost machine had done. Rows go to their
    lists once, through Ray's object store, which writes to disk what memory cannot hold.

    Args:
        folder: where the parts go.
        sources: the rows.
        plan: which lists meet.
        n: neighbors of a row.
        exclude: as in `ShardGroup.write_neighbors`.
        on_gpu: multiply on GPUs, one a task.

    Yields:
        The parts, in order.

    Cost: 2 N d operations for each row of the n_probe lists. Peak memory a task: 2 d bytes a row
    of the lists that its group meets; in the object store 2 N d + 12 N (n + 1) bytes.
    """
    n_groups = plan.n_groups
    spread = _to_groups.options(num_returns=n_groups)
    pieces = []
    shared = ray.put(plan)
    for source in sources:
        found = spread.remote(source, shared)
        pieces.append(found if n_groups > 1 else [found])
    groups = [_gather.remote(*mine) for mine in zip(*pieces, strict=True)]
    del pieces
    device = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
    joined = []
    for group in range(n_groups):
        task = _join.options(num_returns=len(sources), **device)
        found = task.remote(group, groups, shared, n + 1, sources)
        joined.append(found if len(sources) > 1 else [found])
    for source, mine in zip(sources, zip(*joined, strict=True), strict=True):
        yield ray.get(_write_joined.remote(folder, source, n, exclude, *mine))


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of some lists, sorted by list and row."""

    embedding: NDArray[np.float16]
    row: NDArray[np.int64]
    list_id: NDArray[np.int32]

    def sorted(self) -> "_Rows":
        return self.take(np.lexsort((self.row, self.list_id)))

    def take(self, which: Any) -> "_Rows":
        return _Rows(self.embedding[which], self.row[which], self.list_id[which])


@ray.remote(num_cpus=0.5)
def _to_groups(source: PartSource, plan: JoinPlan) -> Any:
    """The rows of a part, one answer a group."""
    rows = source.load().numpy()
    row = source.first_row + np.arange(len(rows))
    everything = _Rows(rows, row, plan.of_row[row])
    group = plan.group[everything.list_id]
    found = [everything.take(np.flatnonzero(group == i)) for i in range(plan.n_groups)]
    return found if len(found) > 1 else found[0]


@ray.remote(num_cpus=0.5)
def _gather(*pieces: _Rows) -> _Rows:
    return _Rows(
        np.concatenate([piece.embedding for piece in pieces]),
        np.concatenate([piece.row for piece in pieces]),
        np.concatenate([piece.list_id for piece in pieces]),
    ).sorted()


@ray.remote
def _join(group: int, groups: list[Any], plan: JoinPlan, n: int, sources: list[PartSource]) -> Any:
    """Best rows of each row of a group: for each part, its rows, similarities and best rows."""
    faiss.omp_set_num_threads(1)
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    own: _Rows = ray.get(groups[group])
    mine = np.unique(own.list_id)
    held = _meet(groups, plan, np.unique(plan.probes[mine]), device)
    similarity = np.full((len(own.row), n), -np.inf, dtype=np.float32)
    best = np.zeros((len(own.row), n), dtype=np.int64)
    for list_id in mine:
        first, last = np.searchsorted(own.list_id, [list_id, list_id + 1])
        queries = held[list_id][0] if list_id in held else torch.tensor(own.embedding[first:last])
        met = [held[other] for other in plan.probes[list_id] if other in held]
        found, place = top_rows(queries, torch.cat([rows for rows, _ in met]), n)
        similarity[first:last, : found.shape[1]] = found
        best[first:last, : found.shape[1]] = np.concatenate([row for _, row in met])[place]
    part = np.searchsorted([source.first_row for source in sources], own.row, side="right") - 1
    answers = []
    for i in range(len(sources)):
        which = np.flatnonzero(part == i)
        answers.append((own.row[which], similarity[which], best[which]))
    return answers if len(answers) > 1 else answers[0]


def _meet(
    groups: list[Any], plan: JoinPlan, lists: NDArray[np.int32], device: torch.device
) -> dict[int, tuple[Tensor, NDArray[np.int64]]]:
    """Rows and row numbers of some lists, one group in memory at a time."""
    held = {}
    for group in np.unique(plan.group[lists]):
        rows: _Rows = ray.get(groups[group])
        for list_id in lists[plan.group[lists] == group]:
            first, last = np.searchsorted(rows.list_id, [list_id, list_id + 1])
            if first < last:
                embedding = torch.tensor(rows.embedding[first:last]).to(device)
                held[int(list_id)] = (embedding, rows.row[first:last].copy())
        del rows
    return held


@ray.remote(num_cpus=0.5)
def _write_joined(
    folder: Folder, source: PartSource, n: int, exclude: str, *pieces: tuple[Any, ...]
) -> Part:
    row, similarity, best = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.argsort(row)
    return write_neighbors(folder, source, n, exclude, similarity[order], best[order])
