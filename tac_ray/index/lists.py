"""What a shard does in a join: rows are brought to their lists, and lists meet."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from tac_ray.index.found import Found, sort_key

JOIN_ROWS = 4096
"""Rows of a group that visit lists together."""
LIST_ROWS = 1024
"""Rows of a list that are compared at a time."""
MOST_CANDIDATES = 1 << 22
"""Pairs that wait for a selection: so many rows may be equally similar, as copies of one are."""
FIRST_PROBES = 3
"""Lists whose rows are all looked at, to know how near the others have to be."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class ListedRows:
    """Rows of some lists, sorted by list and row."""

    embedding: NDArray[np.float16]
    """(n, d)"""
    row: NDArray[np.int64]
    """Their global numbers, (n,)."""
    list_id: NDArray[np.int32]
    """The list of each, (n,)."""

    def take(self, which: Any) -> "ListedRows":
        """Some of them: a slice, or their places."""
        return ListedRows(self.embedding[which], self.row[which], self.list_id[which])


def places_of_groups(row: NDArray[np.int64], plan: JoinPlan) -> list[NDArray[np.int64]]:
    """Which of some global rows lie in each group: their places among them."""
    group = plan.group[plan.of_row[row]]
    ends = np.cumsum(np.bincount(group, minlength=plan.n_groups))
    return np.split(np.argsort(group, kind="stable"), ends[:-1])


def gathered(pieces: Iterable[ListedRows]) -> ListedRows:
    """The rows of one group from all shards."""
    columns = zip(*((piece.embedding, piece.row, piece.list_id) for piece in pieces), strict=True)
    everything = ListedRows(*(np.concatenate(column) for column in columns))
    return everything.take(np.lexsort((everything.row, everything.list_id)))


class Lists:
    """Rows and row numbers of lists, as they are asked for; groups stay in the object store."""

    def __init__(self, groups: list[Any], plan: JoinPlan, device: torch.device) -> None:
        self.device, self.plan = device, plan
        self.sizes = np.bincount(plan.of_row, minlength=len(plan.centroids))
        self._groups = groups
        self._held: dict[int, ListedRows] = {}

    def group(self, group: int) -> ListedRows:
        """All rows of a group."""
        if group not in self._held:
            self._held[group] = ray.get(self._groups[group])
        return self._held[group]

    def __getitem__(self, list_id: int) -> tuple[Tensor, NDArray[np.int64]]:
        held = self.group(int(self.plan.group[list_id]))
        mine = slice(*np.searchsorted(held.list_id, [list_id, list_id + 1]))
        return torch.tensor(held.embedding[mine]).to(self.device).float(), held.row[mine]


Map = Callable[[Callable[[ListedRows], Found], list[ListedRows]], Iterable[Found]]


def join_group(own: ListedRows, lists: Lists, n: int, run_all: Map) -> Found:
    """The `n` best rows of each row of a group.

    Args:
        own: the rows.
        lists: where the others are.
        n: how many.
        run_all: applies a function to each of several runs of rows, such as a thread pool's map.

    Returns:
        similarity and global row, each (rows, n), best first, ties by row number.
    """
    if not len(own.row):  # all lists of the group are empty
        return np.zeros((0, n), dtype=np.float32), np.zeros((0, n), dtype=np.int64)
    # Rows are sorted by list, and lists that lie together meet the same others.
    runs = [own.take(slice(i, i + JOIN_ROWS)) for i in range(0, len(own.row), JOIN_ROWS)]
    similarity, best = zip(*run_all(lambda run: _join_run(run, lists, n), runs), strict=True)
    return np.concatenate(similarity), np.concatenate(best)


def _join_run(own: ListedRows, lists: Lists, n: int) -> Found:
    """The `n` best rows of some rows.

    The first FIRST_PROBES lists give most of the best, each about `n` for a row; of the others only
    what is as good as the n-th of those is kept.
    """
    queries = torch.tensor(own.embedding).to(lists.device).float()
    probes = _probes(queries.cpu().numpy(), lists, n)
    found = _Candidates(len(own.row), n)
    first, others = np.split(probes, [FIRST_PROBES], axis=1)
    for probed in (first, others):
        if not probed.size:
            break
        by_list = np.argsort(probed, axis=None, kind="stable")
        ids, starts = np.unique(probed.reshape(-1)[by_list], return_index=True)
        visitors = by_list // probed.shape[1]
        worst = found.worst.to(lists.device)
        for list_id, mine in zip(ids, np.split(visitors, starts[1:]), strict=True):
            rows, row = lists[int(list_id)]
            which = torch.from_numpy(mine).to(lists.device)
            visiting = queries[which]
            for i in range(0, len(row), LIST_ROWS):
                block = slice(i, i + LIST_ROWS)
                similarity = visiting @ rows[block].T
                least = _nth_best(similarity, n) if probed is first else worst[which]
                query, place = torch.nonzero(similarity >= least[:, None], as_tuple=True)
                found.add(
                    mine[query.cpu().numpy()],
                    similarity[query, place].cpu().numpy(),
                    row[block][place.cpu().numpy()],
                )
        found.select()
    return found.similarity, found.row


def _probes(queries: NDArray[np.float32], lists: Lists, n: int) -> NDArray[np.int64]:
    """The lists that each query visits, nearest first: so many that there are `n` rows in them."""
    n_probe = lists.plan.n_probe
    while True:
        metric = faiss.METRIC_INNER_PRODUCT
        probes = faiss.knn(queries, lists.plan.centroids, n_probe, metric=metric)[1]
        if n_probe == len(lists.sizes) or lists.sizes[probes].sum(axis=1).min() >= n:
            return probes
        n_probe = min(2 * n_probe, len(lists.sizes))


def _nth_best(similarity: Tensor, n: int) -> Tensor:
    """The n-th largest of each row; the least of a row that is no longer."""
    n = min(n, similarity.shape[1])
    if similarity.is_cuda:
        return similarity.topk(n).values[:, -1]
    # Several times as fast as torch's.
    return torch.from_numpy(np.partition(similarity.numpy(), -n, axis=1)[:, -n])


class _Candidates:
    """Rows that may be among the `n` best of some queries."""

    def __init__(self, n_queries: int, n: int) -> None:
        self.similarity = np.full((n_queries, n), -np.inf, dtype=np.float32)
        self.row = np.zeros((n_queries, n), dtype=np.int64)
        self._found: list[tuple[NDArray[Any], ...]] = []
        self._n_found = 0

    @property
    def worst(self) -> Tensor:
        """Similarity of the n-th best of each query so far, (n_queries,)."""
        return torch.from_numpy(self.similarity[:, -1].copy())

    def add(
        self, query: NDArray[np.int64], similarity: NDArray[np.float32], row: NDArray[np.int64]
    ) -> None:
        """More of them, each (m,)."""
        self._found.append((query, similarity, row))
        self._n_found += len(query)
        if self._n_found > MOST_CANDIDATES:
            self.select()

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
        self._found, self._n_found = [], 0
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
