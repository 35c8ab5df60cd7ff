"""Spherical k-means over the shards (Eq. 3)."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tac_ray.algorithm.kmeans import (
    first_depth,
    next_centroids,
    next_depth,
    normalize_rows,
    random_rows,
    spread_rows,
)
from tac_ray.index.group import ShardGroup
from tac_ray.index.shard import Pass

Seeding = Literal["random", "spread"]

PRUNE_CENTROIDS = 256
"""Centroids from which a pruned pass is faster than one that compares everything."""
PRUNE_TIGHT = 0.55
"""Rows have to be this times as far from their own centroid as from any, in mean squared distance:
looser clusters, which those of the first passes often are, leave too little to prune."""
SPREAD_ROWS = 10
"""Random rows a centroid that a k-means++ draw chooses from."""
_SAMPLE = 1 << 31
"""Stands for the sample where random rows are drawn for a restart."""


@dataclass(frozen=True)
class Iteration:
    """One pass of one restart."""

    restart: int
    objective: float
    """Mean similarity of a row and its centroid."""
    moved: float
    """Share of the rows that changed centroid."""
    n_empty: int
    imbalance: float
    """k sum n_c^2 / N^2, 1 where all centroids have equally many rows."""
    depth: int | None
    """Coordinates that a pruned pass looked at first; None where everything was compared."""
    seconds: float


@dataclass(frozen=True)
class Fit:
    """The best restart."""

    centroids: NDArray[np.float32]
    """Unit norm, (k, d)."""
    assignment: list[NDArray[np.int32]]
    """Nearest centroid of every row, a part at a time."""
    objective: float
    corrected: float
    """Share of the rows that the last pruned pass of a restart left at another centroid than the
    nearest, in the worst restart; the assignment has the nearest."""
    iterations: list[dict[str, Any]]
    """An `Iteration` a pass."""


def fit(
    index: ShardGroup,
    n_centroids: int,
    *,
    seed: int,
    restarts: int,
    max_iterations: int,
    tolerance: float,
    max_points_per_centroid: int | None,
    seeding: Seeding = "random",
    prune: bool = True,
    on_iteration: Callable[[str], None],
) -> Fit:
    """Cluster the rows the shards hold; the restart with the best objective wins.

    A restart stops when no row moves or the objective improves by less than `tolerance` of itself.
    The first passes of a restart compare every row with every centroid, and so does the pass that
    makes the final assignment, over all rows also when the fit saw a sample. The passes between
    may be pruned.

    Args:
        index: the shards.
        n_centroids: k.
        seed: of the starts.
        restarts: independent starts.
        max_iterations: passes a restart, at most.
        tolerance: share of the objective.
        max_points_per_centroid: fit on a sample of so many rows a centroid, at most.
        seeding: "random" starts from random rows, "spread" from a k-means++ draw among
            SPREAD_ROWS random rows a centroid.
        prune: use FAISS's pruned pass where it is faster: on CPU, from PRUNE_CENTROIDS centroids,
            once they are as tight as PRUNE_TIGHT.
        on_iteration: told after each pass.

    Raises:
        ValueError: fewer rows than centroids.
    """
    n_rows = index.n_rows
    visible: NDArray[np.int64] | None = None
    if max_points_per_centroid is not None and n_rows > max_points_per_centroid * n_centroids:
        n_visible = max_points_per_centroid * n_centroids
        visible = random_rows(n_rows, n_visible, seed=seed, restart=_SAMPLE)
    index.use_rows(visible)
    pool = np.arange(n_rows) if visible is None else visible
    width = index.width
    # Half the mean squared distance of a row and a centroid is this less their similarity: columns
    # that lie side by side have unit norm each.
    half = (1 + len(index.sources[0].columns)) / 2
    pruned_from = first_depth(width)
    if not prune or index.on_gpu or n_centroids < PRUNE_CENTROIDS:
        pruned_from = None
    log: list[dict[str, Any]] = []

    def look(restart: int, centroids: NDArray[np.float32], depth: int | None) -> tuple[Pass, float]:
        """One pass, and its objective."""
        began = time.perf_counter()
        done = index.assign(centroids, depth)
        value = done.sums.objective(centroids)
        figures = Iteration(
            restart=restart,
            objective=value,
            moved=done.moved / len(pool),
            n_empty=int((done.sums.counts == 0).sum()),
            imbalance=done.sums.imbalance(),
            depth=depth,
            seconds=round(time.perf_counter() - began, 4),
        )
        log.append(asdict(figures))
        on_iteration(f"restart {restart + 1}/{restarts}, objective {value:.4f}")
        return done, value

    best, best_score, corrected = None, (False, -np.inf), 0.0
    for restart in range(restarts):
        centroids = _start(index, pool, n_centroids, seeding, seed=seed, restart=restart)
        rng = np.random.default_rng([seed, restart, 1])
        previous, depth, used = -np.inf, None, centroids
        for _ in range(max_iterations):
            done, value = look(restart, centroids, depth)
            used = centroids
            centroids, n_empty = next_centroids(done.sums, centroids, rng=rng)
            # Centroids with empty clusters serve when there is nothing better: fewer distinct
            # rows than centroids.
            if (n_empty == 0, value) > best_score:
                best, best_score = used, (n_empty == 0, value)
            settled = done.moved == 0 or value - previous <= tolerance * abs(value)
            if settled and not n_empty:
                break
            previous = value
            if depth is None:
                if half - value < PRUNE_TIGHT * (half - done.sums.mean_similarity(used)):
                    depth = pruned_from
            else:
                depth = next_depth(depth, width, done.n_pruned / done.n_pairs)
        if depth is not None:
            corrected = max(corrected, look(restart, used, None)[0].moved / len(pool))
    assert best is not None
    index.use_rows(None)
    done = index.assign(best)
    return Fit(best, index.assignment(), done.sums.objective(best), corrected, log)


def _start(
    index: ShardGroup,
    pool: NDArray[np.int64],
    n_centroids: int,
    seeding: Seeding,
    *,
    seed: int,
    restart: int,
) -> NDArray[np.float32]:
    """Rows to start from, (k, d), unit norm."""
    n = n_centroids
    if seeding == "spread":
        n = max(n, min(len(pool), SPREAD_ROWS * n_centroids))
    rows = random_rows(len(pool), n, seed=seed, restart=restart)
    start = normalize_rows(index.rows(pool[rows]))
    if seeding == "random":
        return start
    return start[spread_rows(start, n_centroids, seed=seed, restart=restart)]
