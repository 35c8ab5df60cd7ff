"""Clusterings of small collections find what is plainly there, and refuse large ones."""

import numpy as np
import pytest

from tac_ray.algorithm import small
from tac_ray.algorithm.kmeans import normalize_rows
from tac_ray.algorithm.small import cluster_small


def three_bands(n_outliers: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three tight groups of unit rows, and rows that belong to none."""
    rng = np.random.default_rng(0)
    centers = np.eye(3, 8)
    group = np.repeat(np.arange(3), 40)
    rows = centers[group] + rng.normal(0, 0.03, (120, 8))
    far = -np.abs(rng.standard_normal((n_outliers, 8)))
    return normalize_rows(np.concatenate([rows, far])), group


@pytest.mark.parametrize("method", ["agglomerative", "spectral", "dbscan"])
def test_groups_that_lie_apart_are_found(method):
    rows, group = three_bands()
    found = cluster_small(rows, 3, method, seed=0)
    pairs = set(zip(found.tolist(), group.tolist(), strict=True))
    assert len(pairs) == len(set(found.tolist())) == 3


def test_dbscan_leaves_out_rows_that_lie_alone():
    rows, _ = three_bands(n_outliers=4)
    found = cluster_small(rows, 3, "dbscan", seed=0)
    assert found.max() == 2
    assert (found[:120] >= 0).mean() > 0.9
    assert (found[120:] == -1).all()


def test_the_same_seed_gives_the_same_clusters():
    rows = normalize_rows(np.random.default_rng(1).standard_normal((200, 8)))
    one, again = (cluster_small(rows, 12, "spectral", seed=3) for _ in range(2))
    np.testing.assert_array_equal(one, again)


def test_a_large_collection_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(small, "MOST_ROWS", 100)
    rows, _ = three_bands()
    with pytest.raises(ValueError, match=r"n_images=120 should be <= 100 .*spectral.* kmeans"):
        cluster_small(rows, 3, "spectral", seed=0)


def test_more_clusters_than_rows_are_refused():
    rows, _ = three_bands()
    with pytest.raises(ValueError, match=r"n_images=120 should be >= n_centroids=121"):
        cluster_small(rows, 121, "agglomerative", seed=0)
