"""Agreement of clusters with labels, from a contingency table: ACC, NMI, ARI.

Row i, column j of the table counts the images of cluster i with label j, so a table adds up over
parts and N enters nowhere else.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import mutual_info_score

Table = NDArray[np.int64]


def contingency(
    cluster_id: NDArray[np.integer], label_id: NDArray[np.integer], n_clusters: int, n_labels: int
) -> Table:
    """Counts (n_clusters, n_labels) of rows with that cluster and that label."""
    flat = cluster_id.astype(np.int64) * n_labels + label_id
    return np.bincount(flat, minlength=n_clusters * n_labels).reshape(n_clusters, n_labels)


def match_clusters(table: Table) -> NDArray[np.int64]:
    """For each cluster the label matched to it so that most images agree, -1 for none.

    Clusters and labels may differ in number; each is used at most once (Hungarian method).
    """
    clusters, labels = linear_sum_assignment(table, maximize=True)
    matched = np.full(table.shape[0], -1, dtype=np.int64)
    matched[clusters] = labels
    return matched


def accuracy(table: Table) -> float:
    """Share of images whose cluster is matched to their label (ACC)."""
    clusters, labels = linear_sum_assignment(table, maximize=True)
    return float(table[clusters, labels].sum() / table.sum())


def classification_accuracy(table: Table) -> float:
    """Share of images whose cluster has the number of their label, without any matching."""
    return float(np.trace(table) / table.sum())


def normalized_mutual_information(table: Table) -> float:
    """Mutual information over the arithmetic mean of the two entropies (NMI)."""
    mean_entropy = (_entropy(table.sum(axis=0)) + _entropy(table.sum(axis=1))) / 2
    if mean_entropy == 0:
        return 1.0
    return float(mutual_info_score(None, None, contingency=table) / mean_entropy)


def adjusted_rand_index(table: Table) -> float:
    """Rand index corrected for chance (ARI; Hubert and Arabie, 1985)."""
    if table.sum() < 2:
        return 1.0
    same_both = _pairs(table).sum()
    same_cluster, same_label = _pairs(table.sum(axis=1)).sum(), _pairs(table.sum(axis=0)).sum()
    expected = same_cluster * same_label / _pairs(table.sum())
    largest = (same_cluster + same_label) / 2
    return 1.0 if largest == expected else float((same_both - expected) / (largest - expected))


def scores(table: Table) -> dict[str, float]:
    """ACC, NMI and ARI, each as a share of 1."""
    return {
        "acc": accuracy(table),
        "nmi": normalized_mutual_information(table),
        "ari": adjusted_rand_index(table),
    }


def _entropy(counts: NDArray[np.int64]) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _pairs(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    exact = np.asarray(counts, dtype=np.float64)
    return exact * (exact - 1) / 2
