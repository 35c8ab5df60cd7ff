"""Clusters that are found again keep their ids."""

import numpy as np
import pytest

from tac_ray.algorithm.matching import match


def test_clusters_in_another_order_get_their_old_ids():
    shared = np.zeros((4, 4), dtype=int)
    shared[[0, 1, 2, 3], [2, 0, 3, 1]] = [5, 7, 9, 3]
    shared[0, 0] = 2
    found = match(shared)
    assert found.new_id.tolist() == [2, 0, 3, 1]
    assert (found.kept, found.new, found.gone) == ([0, 1, 2, 3], [], [])
    assert found.split == found.merged == {}


def test_a_cluster_that_falls_apart_and_two_that_become_one():
    # Old cluster 0 becomes later 0 and 1; old 1 and 2 become later 2; later 3 has new images only.
    shared = np.array([[30, 0, 0], [20, 0, 0], [0, 10, 25], [0, 0, 0]])
    found = match(shared)
    assert found.new_id[0] == 0
    assert found.new_id[2] == 2
    assert sorted(found.new_id.tolist()) == [0, 1, 2, 3]
    assert (found.kept, found.new, found.gone) == ([0, 2], [1, 3], [1])
    assert found.split == {0: sorted([0, int(found.new_id[1])])}
    assert found.merged == {2: [1, 2]}


def test_a_pair_with_few_common_images_is_not_the_same_cluster():
    shared = np.full((3, 3), 10) + np.diag([15, 1, 1])
    found = match(shared)
    assert found.kept == [0]
    assert found.new == found.gone == [1, 2]


def test_most_images_keep_their_id():
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 20, (6, 6))
    shared[np.arange(6), rng.permutation(6)] += 200
    new_id = match(shared).new_id
    assert shared[np.arange(6), new_id].sum() == shared.max(axis=1).sum()


def test_fewer_clusters_than_before_are_refused():
    with pytest.raises(ValueError, match="K=2 should be >= K_old=3"):
        match(np.zeros((2, 3), dtype=int))
