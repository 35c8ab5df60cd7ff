"""Spherical k-means, apart from its heavy pass over the rows.

The pass (nearest centroid of every row, sums and counts) belongs to `index`, which does it on
shards; here are the parts that see k centroids only.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Sums(NamedTuple):
    """What an assignment of rows says of their centroids. Adds up over shards."""

    sums: NDArray[np.float64]
    """Sum of the rows of each centroid, (k, d). Rows are float16, so float64 sums are exact
    below 2^29 rows a centroid whatever the order, and the number of shards leaves no trace."""
    counts: NDArray[np.int64]
    """Rows of each centroid, (k,)."""

    def objective(self, centroids: NDArray[np.float32]) -> float:
        """Mean similarity of a row and its centroid.

        From the sums, since sum_i x_i . c = (sum_i x_i) . c: as exact as they are.
        """
        return float((self.sums * centroids).sum() / self.counts.sum())

    def mean_similarity(self, centroids: NDArray[np.float32]) -> float:
        """Mean similarity of a row and any centroid."""
        return float(self.sums.sum(axis=0) @ centroids.mean(axis=0) / self.counts.sum())

    def imbalance(self) -> float:
        """Sum of k n_c^2 / N^2: 1 if all centroids have equally many rows, k if one has all."""
        shares = self.counts / self.counts.sum()
        return float(len(shares) * (shares**2).sum())


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


def spread_rows(rows: NDArray[np.float32], n: int, *, seed: int, restart: int) -> NDArray[np.int64]:
    """`n` of the rows, far apart: k-means++ (Arthur and Vassilvitskii, 2007).

    Each is drawn in proportion to 1 - its similarity to the nearest one drawn before, half its
    squared distance; rows that equal one of those are drawn last.

    Args:
        rows: unit norm, (m, d), m >= n.
        n: how many.
        seed: of the draws.
        restart: of k-means; another gives other rows.

    Cost: 2 m n d operations.
    """
    rng = np.random.default_rng([seed, restart, 2])
    drawn = np.empty(n, dtype=np.int64)
    drawn[0] = rng.integers(len(rows))
    distance = np.full(len(rows), 2.0)
    for i in range(1, n):
        newest = drawn[i - 1]
        distance = np.minimum(distance, np.maximum(1 - rows @ rows[newest], 0))
        distance[newest] = -1
        weight = np.maximum(distance, 0)
        if weight.any():
            drawn[i] = rng.choice(len(rows), p=weight / weight.sum())
        else:
            drawn[i] = rng.choice(np.flatnonzero(distance == 0))
    return drawn


def rotate(rows: Tensor) -> Tensor:
    """Rows turned by an orthogonal matrix, always the same one, (n, d) float32.

    Turned by it, every coordinate says about as much of a distance as any other, which is what
    pruning by the first few needs. The matrix is the Kronecker product of two random ones, after
    random signs, so that turning a row costs d (a + b) products instead of d^2, where d = a b.
    """
    n, width = rows.shape
    signs, small, large = _turns(width)
    turned = (rows * signs).reshape(-1, len(large)) @ large
    turned = turned.reshape(n, len(small), len(large)).transpose(1, 2)
    return (turned.reshape(-1, len(small)) @ small).reshape(n, width)


@functools.cache
def _turns(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Signs (d,) and two random orthogonal matrices, (a, a) and (b, b)."""
    rng = np.random.default_rng(0)
    small = max(a for a in range(1, math.isqrt(width) + 1) if width % a == 0)
    signs = rng.choice(np.array([-1, 1], dtype=np.float32), width)
    one, other = (
        torch.from_numpy(np.linalg.qr(rng.standard_normal((a, a)))[0].astype(np.float32))
        for a in (small, width // small)
    )
    return torch.from_numpy(signs), one, other


PRUNED_LOW, PRUNED_HIGH = 0.95, 0.97
LOWEST_DEPTH = 16


def first_depth(width: int) -> int | None:
    """Coordinates that a pruned pass looks at first; None where rows are too short for one."""
    return max(LOWEST_DEPTH, width // 8) if width >= 2 * LOWEST_DEPTH else None


def next_depth(depth: int, width: int, pruned: float) -> int:
    """Coordinates to look at first in the next pass.

    Fewer when nearly all pairs were pruned by them, more when too few were: the rule and the
    bounds of FAISS's SuperKMeans, here so that all shards follow one.

    Args:
        depth: coordinates of the last pass.
        width: d.
        pruned: share of the pairs (row, centroid) that needed no more than those coordinates.
    """
    if pruned > PRUNED_HIGH:
        depth = round(depth * 0.8)
    elif pruned < PRUNED_LOW:
        depth = round(depth * 1.2)
    return min(max(depth, LOWEST_DEPTH), width // 2)


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
