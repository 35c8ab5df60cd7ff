"""Which clusters of one run are those of an earlier one, by the images that both saw."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment


@dataclass(frozen=True)
class Matching:
    """New ids of clusters, by which those that are found again keep their old one."""

    new_id: NDArray[np.int64]
    """Of each cluster of the later run, (K,): a permutation."""
    kept: list[int]
    """Ids that mean the same cluster in both runs."""
    new: list[int]
    """Ids of clusters that the earlier run did not have."""
    gone: list[int]
    """Old ids of clusters that are not found again; `new` may have taken their numbers."""
    split: dict[int, list[int]]
    """Old id -> ids of the clusters that most of its images make up."""
    merged: dict[int, list[int]]
    """Id -> old ids of the clusters of which most images are in it."""


def match(shared: NDArray[np.int64]) -> Matching:
    """Match clusters so that as many images as possible keep their id (Hungarian method).

    A pair of clusters is one and the same if most of the images of either that both runs saw are in
    the other.

    Args:
        shared: images in cluster i of the later run and j of the earlier, (K, K_old), K >= K_old.

    Raises:
        ValueError: the later run has fewer clusters.
    """
    n_later, n_earlier = shared.shape
    if n_later < n_earlier:
        raise ValueError(f"K={n_later} should be >= K_old={n_earlier}, or ids would be lost")
    later, earlier = linear_sum_assignment(shared, maximize=True)
    from_earlier = 2 * shared > shared.sum(axis=1, keepdims=True)
    into_later = 2 * shared > shared.sum(axis=0, keepdims=True)
    same = (from_earlier | into_later)[later, earlier]
    new_id = np.full(n_later, -1)
    new_id[later[same]] = earlier[same]
    new_id[new_id < 0] = np.setdiff1d(np.arange(n_later), earlier[same])
    kept = sorted(earlier[same].tolist())

    def several(most: NDArray[np.bool_], ids: NDArray[np.int64]) -> dict[int, list[int]]:
        """Columns of which several rows say so."""
        found = {j: sorted(ids[most[:, j]].tolist()) for j in range(most.shape[1])}
        return {j: rows for j, rows in found.items() if len(rows) > 1}

    by_later = several(into_later.T, np.arange(n_earlier))
    return Matching(
        new_id=new_id,
        kept=kept,
        new=sorted(set(range(n_later)) - set(kept)),
        gone=sorted(set(range(n_earlier)) - set(kept)),
        split=several(from_earlier, new_id),
        merged={int(new_id[i]): old for i, old in sorted(by_later.items())},
    )
