"""Clusters of a collection from the graph of its neighbors, in images and in words.

Two images are joined if either is a neighbor of the other, by their embeddings or by their text
counterparts; how strongly, the images say. The graph is cut into K clusters by the eigenvectors of
its normalized adjacency. n images, m edges of each kind from an image, K clusters.
"""

from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.stats
import torch
from numpy.typing import NDArray
from torch import Tensor

from tac_ray.algorithm.kmeans import normalize_rows
from tac_ray.algorithm.lanczos import Eigenvectors, fewest_rows, leading_eigenvectors

BATCH_EDGES = 100_000
"""Edges weighed at a time: 4 d bytes each."""
DENSE_ROWS = 1_000
"""Rows up to which all eigenvectors are computed: Lanczos wants many more rows than vectors."""
REGULARIZATION = 0.1
"""Weight of a thin edge from every row to all others, as a share of the mean weight of a row (Amini
et al., 2013): without it a few rows far from all others are a cluster."""
MOST_PASSES = 200
"""Passes over the rows until clusters no longer change."""


def edge_weights(images: Tensor, neighbor_row: Tensor) -> Tensor:
    """How alike the two ends of every edge look, (n, m) float32.

    The similarity of embeddings from which the collection's mean is taken, so that what all images
    share counts for nothing; negative ones are 0.

    Args:
        images: unit-norm embeddings, (n, d).
        neighbor_row: the other end of each edge, (n, m) int64.

    Cost: 2 n m d operations.
    """
    centered = torch.nn.functional.normalize(images.float() - images.float().mean(dim=0), dim=1)
    batch_rows = max(1, BATCH_EDGES // neighbor_row.shape[1])
    found = [
        torch.einsum("nd,nmd->nm", centered[start : start + len(rows)], centered[rows])
        for start, rows in zip(
            range(0, len(images), batch_rows), neighbor_row.split(batch_rows), strict=True
        )
    ]
    return torch.cat(found).clamp_min(0)


def share_in_words(standing: NDArray[np.floating], n_nouns: int, significance: float) -> float:
    """Share of the images that words say something about: for which one noun stands out.

    A noun stands out if its similarity is an outlier among those of all nouns by Grubbs' test
    (1950). Similarities to nouns that have nothing to do with an image are as good as draws from
    one normal distribution, and the largest of them is no outlier.

    Args:
        standing: of the most similar noun: how many standard deviations (of the sample) it is
            above the mean of all nouns' similarities, (n,).
        n_nouns: nouns compared.
        significance: of the test, such as 0.05: the share that it would find where no word fits.

    Returns:
        0 with fewer than three nouns, among which nothing is an outlier.
    """
    if n_nouns < 3:
        return 0.0
    t = scipy.stats.t.isf(significance / n_nouns, n_nouns - 2)
    critical = (n_nouns - 1) / np.sqrt(n_nouns) * np.sqrt(t**2 / (n_nouns - 2 + t**2))
    return float((standing > critical).mean())


def join_edges(*kinds: tuple[NDArray[np.integer], NDArray[np.floating]]) -> scipy.sparse.csr_array:
    """The graph of edges of several kinds, whose weights add up, (n, n) float64, symmetric.

    Args:
        kinds: the other end of each edge (n, m) and its weight (n, m). An edge that both ends
            name has the larger weight of the two; one from a row to itself has none.
    """
    n = len(kinds[0][0])
    total = scipy.sparse.csr_array((n, n))
    for ends, weights in kinds:
        starts = np.repeat(np.arange(n, dtype=np.int32), ends.shape[1])
        stops = ends.reshape(-1).astype(np.int32)
        weight = np.where(stops == starts, 0.0, weights.reshape(-1))
        total = total + scipy.sparse.csr_array((weight, (starts, stops)), shape=(n, n))
    return scipy.sparse.csr_array(total.maximum(total.T))


class Cut(NamedTuple):
    """Clusters of the rows of a graph."""

    cluster_id: NDArray[np.int64]
    """(n,)."""
    eigenvalues: NDArray[np.float64]
    """The K largest of the normalized adjacency, largest first; K ones: K parts without an edge
    between them."""
    residual: float
    """How far the eigenvectors are from exact ones; see `Eigenvectors`."""


def cut(graph: scipy.sparse.csr_array, n_clusters: int, *, balance: float) -> Cut:
    """Spectral clustering in K clusters.

    The K leading eigenvectors of the normalized adjacency (Ng, Jordan, Weiss, 2001), their rows to
    unit length, and k-means over these that begins with the clusters that a pivoted QR
    factorization of the eigenvectors names (Damle, Minden, Ying, 2019): many random starts end in
    worse places at K = 200. No random number enters.

    Args:
        graph: symmetric weights, (n, n), n > K.
        n_clusters: K.
        balance: how much more equal cluster sizes are worth; see `balanced_clusters`.

    Cost: 17 n K^2 operations a restart of Lanczos, 2 n K^2 for the factorization and as much for
    each pass of k-means. Memory: 8 n (4 K + edges of a row) bytes; 24 n^2 where n <= 2 K or so.
    """
    found = _eigenvectors(graph, n_clusters)
    rows = normalize_rows(found.vectors)
    start = _cluster_by_pivots(found.vectors)
    cluster_id = balanced_clusters(
        torch.from_numpy(rows), torch.from_numpy(start), n_clusters, balance=balance
    )
    return Cut(cluster_id.numpy(), found.values, found.residual)


def _eigenvectors(graph: scipy.sparse.csr_array, k: int) -> Eigenvectors:
    """Of the adjacency and a thin edge between all rows, normalized."""
    weight: NDArray[np.float64] = np.asarray(graph.sum(axis=1)).reshape(-1)
    n = len(weight)
    thin = REGULARIZATION * (weight.mean() or 1.0) / n  # images that have nothing in common
    scale: NDArray[np.float64] = 1 / np.sqrt(weight + thin * n)[:, None]
    if n <= max(DENSE_ROWS, fewest_rows(k)):
        dense = scale * (graph.toarray() + thin) * scale.T
        values, vectors = scipy.linalg.eigh(dense, subset_by_index=(n - k, n - 1))
        return Eigenvectors(values[::-1], vectors[:, ::-1], residual=0.0)

    def multiply(x: NDArray[np.float64]) -> NDArray[np.float64]:
        scaled = scale * x
        return scale * (graph @ scaled + thin * scaled.sum(axis=0))

    return leading_eigenvectors(multiply, n, k)


def _cluster_by_pivots(vectors: NDArray[np.float64]) -> NDArray[np.int64]:
    """The cluster of each row: of K rows that differ most, the one it is nearest to."""
    k = vectors.shape[1]
    pivots = scipy.linalg.qr(vectors.T, mode="r", pivoting=True)[-1]
    left, _, right = scipy.linalg.svd(vectors[pivots[:k]].T)
    return np.abs(vectors @ (left @ right)).argmax(axis=1)


def balanced_clusters(rows: Tensor, start: Tensor, n_clusters: int, *, balance: float) -> Tensor:
    """Spherical k-means that also wants clusters of equal sizes.

    It seeks the largest mean similarity of a row and its centroid + balance x entropy of the
    cluster sizes, the term that L_Bal is of the heads (Eq. 15): a row goes to the cluster with the
    largest similarity - balance x log(size), which is what the sum gains by it.

    Args:
        rows: unit norm, (n, d) float32.
        start: clusters to begin with, (n,) int64.
        n_clusters: K.
        balance: 0 is k-means; above 0.5 or so sizes decide more than similarity.

    Returns:
        The clusters of the best pass, (n,) int64.

    Cost: 2 n K d operations a pass, MOST_PASSES at most.
    """
    cluster_id = best = start
    best_worth = -torch.inf
    prices = torch.zeros(n_clusters)
    for n_passes in range(MOST_PASSES):
        sums = torch.zeros(n_clusters, rows.shape[1]).index_add_(0, cluster_id, rows)
        similarity = rows @ torch.nn.functional.normalize(sums, dim=1).T
        sizes = torch.bincount(cluster_id, minlength=n_clusters)
        mean = similarity.gather(1, cluster_id[:, None]).double().mean()
        worth = mean + balance * torch.special.entr(sizes.double() / len(rows)).sum()
        if worth > best_worth:
            best, best_worth = cluster_id, worth
        # All rows move at once, so sizes would swing if prices followed them all the way.
        prices = prices.lerp(balance * torch.log(sizes + 1.0), 2 / (n_passes + 2))
        before, cluster_id = cluster_id, (similarity - prices).argmax(dim=1)
        if torch.equal(cluster_id, before):
            break
    return best
