"""Neighbors of a collection in itself as a join: each row with the rows of its nearest lists.

    k-means -> lists -> a sample says how many to join -> rows to their lists -> join -> parts

A search for one row after the other multiplies a vector with each list that it visits. Here rows
that lie together visit a list together, in one product of matrices.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tac_ray.algorithm.kmeans import random_rows
from tac_ray.index.group import ShardGroup
from tac_ray.index.kmeans import fit
from tac_ray.index.lists import JoinPlan

LISTS_PER_ROOT = 2.0
"""Lists are this times sqrt(N): finding the list of a row costs about as much as the join then."""
LIST_SAMPLE = 64
"""Rows a list that its centroid is fitted on."""
LIST_ITERATIONS = 8
GROUP_ROWS = 1 << 14
"""Rows whose lists a shard joins at a time, at least."""
MOST_GROUPS = 256
SAMPLE = 500
"""Rows whose neighbors tune the join, and as many that measure its recall."""


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


@dataclass(frozen=True)
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

    Halves the lists along their first principal direction until the parts are small enough; groups
    stay empty where a list is larger than several. How many there are follows from N alone.
    """
    n_groups = min(MOST_GROUPS, max(1, int(sizes.sum()) // GROUP_ROWS))
    group = np.zeros(len(sizes), dtype=np.int32)

    def halve(lists: NDArray[np.int64], first: int, n: int) -> None:
        if n == 1 or len(lists) == 1:
            group[lists] = first
            return
        middle = centroids[lists] - centroids[lists].mean(axis=0)
        along = middle @ np.linalg.svd(middle, full_matrices=False)[2][0]
        lists = lists[np.argsort(along, kind="stable")]
        share = np.cumsum(sizes[lists]) / max(1, sizes[lists].sum())
        cut = min(int(np.searchsorted(share, (n // 2) / n)) + 1, len(lists) - 1)
        halve(lists[:cut], first, n // 2)
        halve(lists[cut:], first + n // 2, n - n // 2)

    halve(np.arange(len(sizes)), 0, n_groups)
    return group
