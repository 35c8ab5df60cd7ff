"""What several clusterings of the same images say of each other."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import adjusted_mutual_info_score


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
