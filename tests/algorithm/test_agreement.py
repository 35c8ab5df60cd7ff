"""How far clusterings agree."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from tac_ray.algorithm.agreement import mean_agreement

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


def test_one_clustering_agrees_with_nobody():
    with pytest.raises(ValueError, match="n_clusterings=1 should be >= 2"):
        mean_agreement([ONE])
