"""Names of clusters: salient, distinct, and none where no noun speaks."""

import itertools
import math

import numpy as np
import pytest

from tac_ray.algorithm.names import name_clusters, noun_salience


def test_salience_by_hand():
    # Means over images: animal 0.8 in both; dog 0.2 against 0.1 overall; cat the same.
    salience = noun_salience(np.array([[8.0, 2, 0], [8, 0, 2]]), np.array([10, 10]))
    expected = [[0, 0.2 * math.log(2), 0], [0, 0, 0.2 * math.log(2)]]
    np.testing.assert_allclose(salience, expected, atol=1e-12)


def test_salience_weighs_clusters_by_their_images():
    weights, sizes = np.array([[3.0, 1.0], [2.0, 24.0]]), np.array([4, 26])
    salience = noun_salience(weights, sizes)
    for cluster, noun in itertools.product(range(2), range(2)):
        inside = weights[cluster, noun] / sizes[cluster]
        overall = (weights[0, noun] + weights[1, noun]) / 30
        assert salience[cluster, noun] == pytest.approx(inside * math.log(inside / overall))
    assert salience[0, 1] < 0 < salience[0, 0]


def test_salience_of_an_empty_cluster_and_of_an_unused_noun_is_zero():
    salience = noun_salience(np.array([[2.0, 0, 0], [0, 0, 0]], dtype=np.float32), np.array([4, 0]))
    assert salience.dtype == np.float64
    np.testing.assert_array_equal(salience, np.zeros((2, 3)))


def test_a_noun_that_is_everywhere_names_no_cluster():
    weights = np.array([[9.0, 1, 0, 0], [9, 0, 1, 0], [9, 0, 0, 1]])
    salience = noun_salience(weights, np.array([10, 10, 10]))
    names, runners_up = name_clusters(salience, ["animal", "dog", "cat", "fish"])
    assert names == ["dog", "cat", "fish"]
    assert runners_up == [[], [], []]


def test_names_are_distinct_and_their_summed_salience_is_the_largest():
    # Both clusters like "dog" most; giving it to the second loses less.
    salience = np.array([[1.0, 0.9, 0.1], [0.8, 0.2, 0.1]])
    names, runners_up = name_clusters(salience, ["dog", "hound", "pet"])
    assert names == ["hound", "dog"]
    assert runners_up == [["dog", "pet"], ["hound", "pet"]]


def test_runners_up_are_in_order_and_speak_for_the_cluster():
    salience = np.array([[0.1, 0.5, -0.2, 0.3, 0.0]])
    names, runners_up = name_clusters(salience, ["a", "b", "c", "d", "e"])
    assert names == ["b"]
    assert runners_up == [["d", "a"]]


def test_only_the_strongest_candidates_name_a_cluster_or_run_up():
    salience = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.95]])
    names, runners_up = name_clusters(salience, ["a", "b", "c", "d"], n_candidates=2)
    assert names == ["a", "d"]
    assert runners_up == [["b"], ["c"]]


def test_a_cluster_for_which_no_noun_speaks_is_named_by_its_number():
    salience = np.array([[0.4, 0.2], [0.0, 0.0], [-0.3, -0.1]])
    names, runners_up = name_clusters(salience, ["dog", "cat"])
    assert names == ["dog", "cluster 1", "cluster 2"]
    assert runners_up == [["cat"], [], []]


def test_more_clusters_than_nouns():
    salience = np.array([[0.5], [0.7], [0.6]])
    names, runners_up = name_clusters(salience, ["dog"])
    assert names == ["cluster 0", "dog", "cluster 2"]
    assert runners_up == [["dog"], [], ["dog"]]


def test_without_nouns_every_cluster_is_named_by_its_number():
    names, runners_up = name_clusters(np.zeros((2, 0)), [])
    assert names == ["cluster 0", "cluster 1"]
    assert runners_up == [[], []]


@pytest.mark.parametrize("seed", range(4))
def test_names_match_brute_force(seed: int):
    salience = np.random.default_rng(seed).normal(size=(4, 6))
    names, _ = name_clusters(salience, list("abcdef"))
    gains = np.maximum(salience, 0)
    best = max(
        sum(gains[cluster, noun] for cluster, noun in enumerate(choice))
        for choice in itertools.permutations(range(6), 4)
    )
    given = [(c, "abcdef".index(n)) for c, n in enumerate(names) if len(n) == 1]
    assert len(set(names)) == 4
    assert sum(salience[c, n] for c, n in given) == pytest.approx(best)
