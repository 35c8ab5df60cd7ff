"""Choosing among clusterings, and joining them."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from tac_ray.algorithm import agreement
from tac_ray.algorithm.agreement import co_association, mean_agreement, most_agreed

ONE = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
RENAMED = np.array([2, 2, 2, 0, 0, 0, 1, 1, 1])
OTHER = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])


def test_agreement_is_the_mean_over_the_others():
    rng = np.random.default_rng(0)
    clusterings = [rng.integers(4, size=60) for _ in range(4)]
    clusterings[1] = np.where(rng.random(60) < 0.7, clusterings[0], clusterings[1])
    found = mean_agreement(clusterings)
    for i, mine in enumerate(clusterings):
        others = [other for j, other in enumerate(clusterings) if j != i]
        expected = np.mean([adjusted_mutual_info_score(mine, other) for other in others])
        assert found[i] == pytest.approx(expected, abs=1e-12)


def test_names_of_clusters_do_not_matter():
    assert mean_agreement([ONE, RENAMED]) == pytest.approx([1, 1])
    assert mean_agreement([ONE, OTHER])[0] < 0


def test_the_odd_one_out_is_not_chosen():
    assert most_agreed([OTHER, ONE, RENAMED]) == 1
    near = np.array([0, 0, 0, 1, 1, 1, 2, 2, 1])
    assert most_agreed([near, OTHER, ONE, ONE]) == 2


def test_of_equal_ones_the_first_is_chosen():
    assert most_agreed([ONE, RENAMED, ONE]) == 0


def test_one_clustering_agrees_with_nobody():
    with pytest.raises(ValueError, match="n_clusterings=1 should be >= 2"):
        mean_agreement([ONE])


def test_co_association_counts_the_clusterings_that_agree():
    neighbors = np.array([[1, 3], [0, 2], [3, 0], [2, 1]])
    clusterings = [
        np.array([0, 0, 1, 0]),
        np.array([5, 5, 5, 6]),
        np.array([1, 2, 2, 1]),
        np.array([1, 1, 1, 1]),
    ]
    found = co_association(clusterings, neighbors)
    assert found.dtype == np.float32
    assert found.tolist() == [[0.75, 0.75], [0.75, 0.75], [0.25, 0.5], [0.25, 0.5]]


def test_co_association_does_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(1)
    clusterings = [rng.integers(3, size=50).astype(np.int32) for _ in range(3)]
    neighbors = rng.integers(50, size=(50, 4)).astype(np.int32)
    whole = co_association(clusterings, neighbors)
    assert 0 < whole.mean() < 1
    monkeypatch.setattr(agreement, "BATCH_ROWS", 7)
    assert np.array_equal(co_association(clusterings, neighbors), whole)
