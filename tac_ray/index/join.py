"""Neighbors of a collection in itself as a join: each row with the rows of its nearest lists.

    k-means -> lists -> a sample says how many to join -> rows to their lists -> join -> parts

A search for one row after the other multiplies a vector with each list that it visits. Here rows
that lie together visit a list together, in one product of matrices.
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
from tac_ray.index.found import Found, sort_key, write_neighbors
from tac_ray.index.group import ShardGroup
from tac_ray.index.kmeans import fit
from tac_ray.index.shard import PartSource

LISTS_PER_ROOT = 2.0
"""Lists are this times sqrt(N): finding the list of a row costs about as much as the join then."""
LIST_SAMPLE = 64
"""Rows a list that its centroid is fitted on."""
LIST_ITERATIONS = 8
GROUP_ROWS = 1 << 14
"""Rows whose lists one task joins, at least."""
MOST_GROUPS = 256
JOIN_ROWS = 4096
"""Rows of a group that visit lists together."""
FIRST_PROBES = 3
"""Lists whose rows are all looked at, to know how near the others have to be."""
WIDE_LISTS = 512
"""Lists a task keeps in float32."""
SAMPLE = 1000
"""Rows whose neighbors tune the join, and as many that measure its recall."""


@dataclasses.dataclass(frozen=True)
class JoinPlan:
    """Which rows meet which: those of the lists that are nearest to a row."""

    centroids: NDArray[np.float32]
    """Of the lists, (n_lists, d)."""
    of_row: NDArray[np.int32]
    """List of each row, (N,)."""
    group: NDArray[np.int32]
    """Group of each list, (n_lists,)."""
    n_probe: int
    """Lists that each row is joined with, those with the nearest centroids."""

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
    order = np.argsort(-(index.rows(one.rows) @ lists.centroids.T), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(len(lists.centroids))[None], axis=1)
    # How near to each sampled row the lists of its neighbors are.
    ranks = np.take_along_axis(rank, of_row[one.neighbors], axis=1)
    n_probe = _fewest(ranks, recall)
    plan = JoinPlan(lists.centroids, of_row, _groups(lists.centroids, sizes), n_probe)
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
        one, other = (Sample(self.rows[i::2], self.neighbors[i::2]) for i in (0, 1))
        return one, other

    def recall(self, found: NDArray[np.int64]) -> float:
        """Share of the true neighbors among those found for these rows, (m, n)."""
        hits = [
            len(np.intersect1d(mine, true))
            for mine, true in zip(found, self.neighbors, strict=True)
        ]
        return sum(hits) / self.neighbors.size


def _fewest(ranks: NDArray[np.int64], recall: float) -> int:
    """The fewest lists that hold enough of the neighbors."""
    n_lists = int(ranks.max()) + 1
    for n_probe in range(1, n_lists):
        share = (ranks < n_probe).mean(axis=1)
        if share.mean() - 2 * share.std() / math.sqrt(len(share)) >= recall:
            return n_probe
    return n_lists


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

    Cost: 2 d operations for each pair of a row and a row of its n_probe lists, and 2 N n_lists d to
    find those. Peak memory a task: 4 d bytes a row of WIDE_LISTS lists, and 20 bytes a candidate of
    JOIN_ROWS rows; in the object store of all nodes 2 N d + 12 N (n + 1) bytes.
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
    torch.set_num_threads(1)
    own: _Rows = ray.get(groups[group])
    lists = _Lists(groups, plan, torch.device("cuda" if ray.get_gpu_ids() else "cpu"))
    # Rows are sorted by list, and lists that lie together meet the same others.
    runs = [own.take(slice(i, i + JOIN_ROWS)) for i in range(0, len(own.row), JOIN_ROWS)]
    similarity, best = zip(*(_join_run(run, lists, plan, n) for run in runs), strict=True)
    part = np.searchsorted([source.first_row for source in sources], own.row, side="right") - 1
    found = own.row, np.concatenate(similarity), np.concatenate(best)
    answers = [tuple(column[part == i] for column in found) for i in range(len(sources))]
    return answers if len(answers) > 1 else answers[0]


def _join_run(own: _Rows, lists: "_Lists", plan: JoinPlan, n: int) -> Found:
    """The `n` best rows of some rows.

    The first FIRST_PROBES lists give most of the best; of the others only what is better than the
    n-th of those is kept.
    """
    queries = torch.tensor(own.embedding).to(lists.device).float()
    probes = _probes(queries.cpu().numpy(), lists.sizes, plan, n)
    found = _Candidates(len(own.row), n)
    for probed in (probes[:, :FIRST_PROBES], probes[:, FIRST_PROBES:]):
        if not probed.size:
            continue
        by_list = np.argsort(probed, axis=None, kind="stable")
        ids, starts = np.unique(probed.reshape(-1)[by_list], return_index=True)
        visitors = by_list // probed.shape[1]
        worst = found.worst.to(lists.device)
        for list_id, mine in zip(ids, np.split(visitors, starts[1:]), strict=True):
            rows, row = lists[int(list_id)]
            if len(row):
                which = torch.from_numpy(mine)
                on_device = which.to(lists.device)
                similarity = queries[on_device] @ rows.T
                query, place = torch.nonzero(similarity >= worst[on_device, None], as_tuple=True)
                found.add(
                    mine[query.cpu().numpy()],
                    similarity[query, place].cpu().numpy(),
                    row[place.cpu().numpy()],
                )
        found.select()
    return found.similarity, found.row


def _probes(
    queries: NDArray[np.float32], sizes: NDArray[np.int64], plan: JoinPlan, n: int
) -> NDArray[np.int64]:
    """The lists that each query visits, nearest first: so many that there are `n` rows in them."""
    n_probe = plan.n_probe
    while True:
        metric = faiss.METRIC_INNER_PRODUCT
        probes = faiss.knn(queries, plan.centroids, n_probe, metric=metric)[1]
        if n_probe == len(sizes) or sizes[probes].sum(axis=1).min() >= n:
            return probes
        n_probe = min(2 * n_probe, len(sizes))


class _Candidates:
    """Rows that may be among the `n` best of some queries."""

    def __init__(self, n_queries: int, n: int) -> None:
        self.similarity = np.full((n_queries, n), -np.inf, dtype=np.float32)
        self.row = np.zeros((n_queries, n), dtype=np.int64)
        self._found: list[tuple[NDArray[Any], ...]] = []

    @property
    def worst(self) -> Tensor:
        """Similarity of the n-th best of each query so far, (n_queries,)."""
        return torch.from_numpy(self.similarity[:, -1].copy())

    def add(
        self, query: NDArray[np.int64], similarity: NDArray[np.float32], row: NDArray[np.int64]
    ) -> None:
        """More of them, each (m,)."""
        self._found.append((query, similarity, row))

    def select(self) -> None:
        """Keep the best: larger similarity first, ties by row."""
        if not self._found:
            return
        n_queries, n = self.row.shape
        known = np.isfinite(self.similarity)
        query = np.broadcast_to(np.arange(n_queries)[:, None], known.shape)[known]
        kept = (query, self.similarity[known], self.row[known])
        query, similarity, row = (
            np.concatenate(column) for column in zip(kept, *self._found, strict=True)
        )
        self._found = []
        key = query.astype(np.uint64) << np.uint64(32) | sort_key(similarity)
        order = np.argsort(key)
        _sort_ties(order, key, row)
        query, similarity, row = query[order], similarity[order], row[order]
        place = np.arange(len(query)) - np.searchsorted(query, np.arange(n_queries))[query]
        best = place < n
        self.similarity[query[best], place[best]] = similarity[best]
        self.row[query[best], place[best]] = row[best]


def _sort_ties(order: NDArray[np.int64], key: NDArray[np.uint64], row: NDArray[np.int64]) -> None:
    """Bring those of equal keys into the order of their rows, in place.

    Few keys are equal, and a sort by key alone is many times as fast as one by both.
    """
    equal = key[order[1:]] == key[order[:-1]]
    tied = np.append(equal, False) | np.append(False, equal)
    some = order[tied]
    order[tied] = some[np.lexsort((row[some], key[some]))]


class _Lists:
    """Rows and row numbers of lists, as they are asked for; groups stay in the object store."""

    def __init__(self, groups: list[Any], plan: JoinPlan, device: torch.device) -> None:
        self.device = device
        self.sizes = np.bincount(plan.of_row, minlength=len(plan.centroids))
        self._groups, self._plan = groups, plan
        self._held: dict[int, _Rows] = {}
        self._wide: dict[int, tuple[Tensor, NDArray[np.int64]]] = {}

    def __getitem__(self, list_id: int) -> tuple[Tensor, NDArray[np.int64]]:
        if list_id in self._wide:
            return self._wide[list_id]
        group = int(self._plan.group[list_id])
        if group not in self._held:
            self._held[group] = ray.get(self._groups[group])
        held = self._held[group]
        first, last = np.searchsorted(held.list_id, [list_id, list_id + 1])
        if len(self._wide) >= WIDE_LISTS:
            self._wide.pop(next(iter(self._wide)))
        rows = torch.tensor(held.embedding[first:last]).to(self.device).float()
        self._wide[list_id] = rows, held.row[first:last]
        return self._wide[list_id]


@ray.remote(num_cpus=0.5)
def _write_joined(
    folder: Folder, source: PartSource, n: int, exclude: str, *pieces: tuple[Any, ...]
) -> Part:
    row, similarity, best = (np.concatenate(column) for column in zip(*pieces, strict=True))
    order = np.argsort(row)
    return write_neighbors(
        folder, source.index, source.first_row, n, exclude, similarity[order], best[order]
    )
