"""What several clusterings of the same images say of each other."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_mutual_info_score

BATCH_ROWS = 65_536


def mean_agreement(clusterings: Sequence[NDArray[np.integer]]) -> NDArray[np.float64]:
    """How far each clustering agrees with the others, without labels.

    Agreement of two is their adjusted mutual information: 0 is what chance gives, 1 is the same
    clusters under any names (Vinh, Epps and Bailey, Information Theoretic Measures for Clusterings
    Comparison, 2010). Choosing by the mean over pairs is stability as a criterion, ours in this
    form.

    Args:
        clusterings: cluster_id of the same N rows, C times (N,).

    Returns:
        Mean over the other clusterings, (C,).

    Raises:
        ValueError: fewer than two clusterings.

    Cost: C^2 / 2 comparisons of O(N K) operations; memory 16 K^2 bytes.
    """
    n = len(clusterings)
    if n < 2:
        raise ValueError(
            f"n_clusterings={n} should be >= 2, to agree with one another; give more candidates"
        )
    agreement = np.zeros((n, n))
    for i in range(n):
        for j in range(i):
            found = adjusted_mutual_info_score(clusterings[i], clusterings[j])
            agreement[i, j] = agreement[j, i] = found
    return agreement.sum(axis=1) / (n - 1)


def most_agreed(clusterings: Sequence[NDArray[np.integer]]) -> int:
    """Which clustering agrees most with the others; of equal ones the first.

    Args:
        clusterings: cluster_id of the same N rows, C times (N,), C at least 2.
    """
    return int(mean_agreement(clusterings).argmax())


def co_association(
    clusterings: Sequence[NDArray[np.integer]], neighbor_row: NDArray[np.integer]
) -> NDArray[np.float32]:
    """Share of the clusterings that put an image and its neighbor into one cluster.

    Cut as a graph, these weights give the consensus. Source: evidence accumulation (Fred and Jain,
    Combining Multiple Clusterings Using Evidence Accumulation, 2005), which counts all pairs;
    counting the edges of a neighbor graph alone, so that it scales, is ours.

    Args:
        clusterings: cluster_id of the same N rows, C times (N,), C at least 1.
        neighbor_row: rows of each image's neighbors, (N, m).

    Returns:
        Weight of each edge, (N, m) float32, from 0 to 1. An image whose neighbors all are elsewhere
        has no edge left: whoever cuts the graph gives it a small one.

    Cost: C N m comparisons; memory 4 N m bytes.
    """
    together = np.zeros(neighbor_row.shape, dtype=np.float32)
    for start in range(0, len(together), BATCH_ROWS):
        rows = slice(start, start + BATCH_ROWS)
        for cluster_id in clusterings:
            together[rows] += cluster_id[neighbor_row[rows]] == cluster_id[rows, None]
    return together / np.float32(len(clusterings))
