"""Spherical k-means over the shards (Eq. 3)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from tac_ray.algorithm.kmeans import next_centroids, normalize_rows, random_rows
from tac_ray.index.group import ShardGroup, objective

_SAMPLE = 1 << 31
"""Stands for the sample where random rows are drawn for a restart."""


@dataclass(frozen=True)
class Iteration:
    """One pass of one restart."""

    restart: int
    iteration: int
    objective: float
    """Mean similarity of a row and its centroid."""
    moved: float
    """Share of the rows that changed centroid."""
    n_empty: int


@dataclass(frozen=True)
class Fit:
    """The best restart."""

    centroids: NDArray[np.float32]
    """Unit norm, (k, d)."""
    assignment: list[NDArray[np.int32]]
    """Nearest centroid of every row, a part at a time."""
    objective: float
    iterations: list[dict[str, float]]


def fit(
    index: ShardGroup,
    n_centroids: int,
    *,
    seed: int,
    restarts: int,
    max_iterations: int,
    tolerance: float,
    max_points_per_centroid: int | None,
    on_iteration: Callable[[str], None],
) -> Fit:
    """Cluster the rows the shards hold; the restart with the best objective wins.

    Centroids start as random rows by (seed, restart). A restart stops when no row moves or the
    objective improves by less than `tolerance` of itself. The final assignment is one pass over
    all rows, also when the fit saw a sample.

    Raises:
        ValueError: fewer rows than centroids.
    """
    n_rows = index.n_rows
    visible: NDArray[np.int64] | None = None
    if max_points_per_centroid is not None and n_rows > max_points_per_centroid * n_centroids:
        n_visible = max_points_per_centroid * n_centroids
        visible = random_rows(n_rows, n_visible, seed=seed, restart=_SAMPLE)
    index.use_rows(visible)
    best, best_score = None, (False, -np.inf)
    log: list[dict[str, float]] = []
    for restart in range(restarts):
        pool = n_rows if visible is None else len(visible)
        start = random_rows(pool, n_centroids, seed=seed, restart=restart)
        centroids = normalize_rows(index.rows(start if visible is None else visible[start]))
        rng = np.random.default_rng([seed, restart, 1])
        previous = -np.inf
        for iteration in range(max_iterations):
            sums, n_moved = index.assign(centroids)
            value = objective(sums)
            used = centroids
            centroids, n_empty = next_centroids(sums, centroids, rng=rng)
            log.append(asdict(Iteration(restart, iteration, value, n_moved / pool, n_empty)))
            on_iteration(f"restart {restart + 1}/{restarts}, objective {value:.4f}")
            # Centroids with empty clusters serve when there is nothing better: fewer distinct
            # rows than centroids.
            if (n_empty == 0, value) > best_score:
                best, best_score = used, (n_empty == 0, value)
            settled = n_moved == 0 or value - previous <= tolerance * abs(value)
            if settled and not n_empty:
                break
            previous = value
    assert best is not None
    index.use_rows(None)
    sums, _ = index.assign(best)
    return Fit(best, index.assignment(), objective(sums), log)
