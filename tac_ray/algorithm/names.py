"""Names for clusters, from the nouns their images retrieve."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment


def noun_salience(weights: NDArray[np.floating], sizes: NDArray[np.integer]) -> NDArray[np.float64]:
    """How much each noun sets each cluster apart, (K, M).

    With w the mean retrieval weight of a noun over a cluster's images and u its mean over the
    whole collection, salience is w log(w / u): the noun's term in the divergence of the cluster
    from the collection. A noun that is everywhere scores nothing, however strong it is, and so
    does one that a handful of the cluster's images retrieve.

    Args:
        weights: sum of retrieval weights over each cluster's images, (K, M).
        sizes: images of each cluster, (K,).
    """
    in_cluster = weights / np.maximum(sizes, 1)[:, None]
    overall = weights.sum(axis=0) / max(sizes.sum(), 1)
    ratio = np.divide(
        in_cluster, overall, out=np.ones_like(in_cluster, dtype=float), where=in_cluster > 0
    )
    return in_cluster * np.log(ratio)


def name_clusters(
    salience: NDArray[np.floating], nouns: list[str], *, n_candidates: int = 8
) -> tuple[list[str], list[list[str]]]:
    """A name for every cluster, no two the same, and the runners-up of each.

    Names are the assignment of distinct nouns that maximizes the summed salience. A cluster for
    which no noun speaks is called "cluster 7" after its id.

    Args:
        salience: (K, M), larger is better.
        nouns: M distinct nouns.
        n_candidates: strongest nouns of each cluster that may name it; runners-up are these
            without the name.

    Returns:
        K names and K lists of runners-up, strongest first.
    """
    n_clusters = len(salience)
    n_candidates = min(n_candidates, len(nouns))
    top = np.argsort(-salience, axis=1, kind="stable")[:, :n_candidates]
    candidates, column = np.unique(top, return_inverse=True)
    column = column.reshape(top.shape)
    # One private column for each cluster at no gain lets every cluster stay without a noun.
    gain = np.full((n_clusters, len(candidates) + n_clusters), -1.0)
    rows = np.arange(n_clusters)
    gain[rows[:, None], column] = np.take_along_axis(salience, top, axis=1)
    gain[rows, len(candidates) + rows] = 0.0
    _, chosen = linear_sum_assignment(gain, maximize=True)
    names, runners_up = [], []
    for cluster, choice in enumerate(chosen):
        speaking = [nouns[j] for j in top[cluster] if salience[cluster, j] > 0]
        named = choice < len(candidates) and gain[cluster, choice] > 0
        name = nouns[candidates[choice]] if named else f"cluster {cluster}"
        names.append(name)
        runners_up.append([noun for noun in speaking if noun != name])
    return names, runners_up
