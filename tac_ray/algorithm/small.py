"""Clusterings for small collections, beside k-means: those of the paper's Table IV."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN, AgglomerativeClustering, SpectralClustering

SmallMethod = Literal["agglomerative", "spectral", "dbscan"]

MOST_ROWS = 30_000
"""Rows up to which these methods are run: they hold distances of all pairs, 8 n^2 bytes."""
SPECTRAL_NEIGHBORS = 10
DENSE_ROWS = 5
"""Rows within the radius that make a place dense, for DBSCAN."""
RADII = 60
"""Radii tried for DBSCAN."""


def cluster_small(
    rows: NDArray[np.float32], n_clusters: int, method: SmallMethod, *, seed: int
) -> NDArray[np.int64]:
    """A cluster for each row by scikit-learn.

    Args:
        rows: unit norm, (n, d).
        n_clusters: how many. DBSCAN finds as many as its radius makes; the radius is tried out
            until it makes about so many, as in the paper.
        method: "agglomerative" (Ward's), "spectral" (on the graph of ten neighbors) or "dbscan".
        seed: of spectral clustering's first vector.

    Returns:
        Clusters from 0 on, (n,); -1 for rows that DBSCAN leaves out.

    Raises:
        ValueError: more than MOST_ROWS rows, fewer rows than clusters, or no radius that gives
            DBSCAN a cluster.

    Cost: O(n^2 d) operations, O(n^2) memory.
    """
    check_small(len(rows), method)
    if n_clusters > len(rows):
        raise ValueError(
            f"n_images={len(rows)} should be >= n_centroids={n_clusters}; lower --n-centroids"
        )
    if method == "agglomerative":
        return AgglomerativeClustering(n_clusters, linkage="ward").fit_predict(rows)
    if method == "spectral":
        spectral = SpectralClustering(
            n_clusters,
            affinity="nearest_neighbors",
            n_neighbors=min(SPECTRAL_NEIGHBORS, len(rows)),
            assign_labels="cluster_qr",
            random_state=seed,
        )
        return spectral.fit_predict(rows)
    return _dbscan(rows, n_clusters)


def check_small(n_rows: int, method: str) -> None:
    """Refuse a collection that is not small.

    Raises:
        ValueError: more than MOST_ROWS rows.
    """
    if n_rows > MOST_ROWS:
        raise ValueError(
            f"n_images={n_rows} should be <= {MOST_ROWS} for --centroid-method {method}, which is "
            "there to compare with; use --centroid-method kmeans"
        )


def _dbscan(rows: NDArray[np.float32], n_clusters: int) -> NDArray[np.int64]:
    """DBSCAN with the radius that comes nearest to the wanted number of clusters."""
    distance = np.clip(1 - rows @ rows.T, 0, None)
    nearest = np.partition(distance, min(DENSE_ROWS, len(rows) - 1), axis=1)[:, : DENSE_ROWS + 1]
    radii = np.quantile(nearest.max(axis=1), np.linspace(0, 1, RADII))
    best = None
    # From wide to narrow: of two radii that do equally well the wider leaves fewer rows out.
    for radius in radii[::-1]:
        found = DBSCAN(eps=max(radius, 1e-9), min_samples=DENSE_ROWS, metric="precomputed")
        labels = found.fit_predict(distance)
        n_found = int(labels.max()) + 1
        if n_found and (best is None or abs(n_found - n_clusters) < abs(best[0] - n_clusters)):
            best = n_found, labels
    if best is None:
        raise ValueError(
            f"DBSCAN finds no {DENSE_ROWS} rows near each other among n_images={len(rows)}; "
            "use --centroid-method kmeans"
        )
    return best[1]
