"""Spherical k-means, apart from its heavy pass over the rows.

The pass (nearest centroid of every row, sums and counts) belongs to `index`, which does it on
shards; here are the parts that see k centroids only.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Sums(NamedTuple):
    """What one pass over rows says of their centroids. Adds up over shards."""

    sums: NDArray[np.float64]
    """Sum of the rows of each centroid, (k, d). Rows are float16, so float64 sums are exact
    below 2^29 rows a centroid whatever the order, and the number of shards leaves no trace."""
    counts: NDArray[np.int64]
    """Rows of each centroid, (k,)."""
    objective: list[float]
    """Sum of similarities of each part, in part order."""


def random_rows(n_rows: int, n: int, *, seed: int, restart: int) -> NDArray[np.int64]:
    """`n` distinct row numbers, sorted, the same for the same (seed, restart).

    Raises:
        ValueError: fewer rows than asked for.
    """
    if n > n_rows:
        raise ValueError(
            f"n_images={n_rows} should be >= n_centroids={n}; lower --n-clusters or --n-centroids"
        )
    rng = np.random.default_rng([seed, restart])
    return np.sort(rng.choice(n_rows, size=n, replace=False, shuffle=False))


def normalize_rows(rows: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows divided by their L2 norm, float32; zero rows stay zero."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norm > 0, norm, 1)).astype(np.float32)


def next_centroids(
    total: Sums, previous: NDArray[np.float32], *, rng: np.random.Generator
) -> tuple[NDArray[np.float32], int]:
    """Unit-norm mean directions (Eq. 3), with empty clusters re-seeded.

    An empty cluster splits a cluster drawn in proportion to its surplus of rows: the two start a
    small, opposite step apart and share the rows in the next pass. The published code leaves the
    mean of no rows, which is NaN.

    Args:
        total: sums over all rows.
        previous: centroids of the pass, (k, d).
        rng: draws which clusters are split, and along which direction.

    Returns:
        Centroids (k, d) float32 and how many clusters were empty.
    """
    # Rows that cancel out leave their centroid where it was.
    has_direction = total.sums.any(axis=1, keepdims=True)
    centroids = np.where(has_direction, normalize_rows(total.sums), previous)
    empty = np.flatnonzero(total.counts == 0)
    if len(empty):
        surplus = np.maximum(total.counts - 1, 0).astype(float)
        if not surplus.any():
            return centroids, len(empty)
        donors = rng.choice(len(surplus), size=len(empty), p=surplus / surplus.sum())
        steps = normalize_rows(rng.normal(size=(len(empty), centroids.shape[1]))) / 1024
        for cluster, donor, step in zip(empty, donors, steps, strict=True):
            centroids[cluster] = centroids[donor] + step
            centroids[donor] -= step
        centroids = normalize_rows(centroids)
    return centroids, len(empty)
