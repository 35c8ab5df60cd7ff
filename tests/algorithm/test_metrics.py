"""ACC, NMI and ARI against hand-computed tables, scikit-learn and brute force."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from tac_ray.algorithm.metrics import (
    accuracy,
    adjusted_rand_index,
    classification_accuracy,
    contingency,
    match_clusters,
    normalized_mutual_information,
    scores,
)

SHAPES = [(4, 4), (6, 4), (3, 5), (1, 4), (5, 1)]


def random_table(
    n_clusters: int, n_labels: int, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    label_id = rng.integers(n_labels, size=70)
    cluster_id = np.where(
        rng.random(70) < 0.5, label_id % n_clusters, rng.integers(n_clusters, size=70)
    )
    return cluster_id, label_id, contingency(cluster_id, label_id, n_clusters, n_labels)


def plain_accuracy(table: NDArray[np.int64]) -> float:
    size = max(table.shape)
    padded = np.zeros((size, size), dtype=int)
    padded[: table.shape[0], : table.shape[1]] = table
    best = max(
        sum(padded[row, column] for row, column in enumerate(order))
        for order in itertools.permutations(range(size))
    )
    return best / table.sum()


def plain_adjusted_rand(table: NDArray[np.int64]) -> Fraction:
    counts = [[int(x) for x in row] for row in table]
    both = sum(math.comb(x, 2) for row in counts for x in row)
    rows = sum(math.comb(sum(row), 2) for row in counts)
    columns = sum(math.comb(sum(column), 2) for column in zip(*counts, strict=True))
    expected = Fraction(rows * columns, math.comb(sum(map(sum, counts)), 2))
    return (both - expected) / (Fraction(rows + columns, 2) - expected)


def test_contingency_counts_rows_of_a_cluster_and_a_label():
    cluster_id = np.array([0, 0, 2, 2, 2, 0], dtype=np.int32)
    label_id = np.array([1, 1, 0, 1, 0, 0], dtype=np.int16)
    table = contingency(cluster_id, label_id, 4, 2)
    assert table.tolist() == [[1, 2], [0, 0], [2, 1], [0, 0]]


def test_contingency_of_parts_adds_up_and_does_not_overflow_small_integers():
    rng = np.random.default_rng(0)
    cluster_id = rng.integers(200, size=500).astype(np.uint8)
    label_id = rng.integers(200, size=500).astype(np.uint8)
    whole = contingency(cluster_id, label_id, 200, 200)
    parts = [
        contingency(c, i, 200, 200)
        for c, i in zip(np.split(cluster_id, 5), np.split(label_id, 5), strict=True)
    ]
    assert np.array_equal(whole, np.sum(parts, axis=0))
    expected = np.zeros((200, 200), dtype=int)
    np.add.at(expected, (cluster_id.astype(int), label_id.astype(int)), 1)
    assert np.array_equal(whole, expected)


def test_scores_of_a_table_by_hand():
    # I = H(label) - H(label | cluster); pairs: 9 together, 12 in a cluster, 13 in a label of 28.
    table = np.array([[3, 1], [0, 4]])
    of_label = -(3 / 8 * math.log(3 / 8) + 5 / 8 * math.log(5 / 8))
    given_cluster = -0.5 * (0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    nmi = (of_label - given_cluster) / ((of_label + math.log(2)) / 2)
    expected = {"acc": 7 / 8, "nmi": nmi, "ari": 48 / 97}
    assert scores(table) == pytest.approx(expected, rel=1e-12)


def test_scores_of_renamed_labels_are_perfect():
    table = np.array([[0, 0, 5], [7, 0, 0], [0, 2, 0]])
    assert scores(table) == pytest.approx({"acc": 1, "nmi": 1, "ari": 1}, rel=1e-12)


def test_scores_of_independent_clusters():
    table = np.array([[2, 2], [2, 2]])
    # Pairs: 4 together, 12 in a cluster, 12 in a label of 28.
    expected = {"acc": 0.5, "nmi": 0, "ari": (4 - 144 / 28) / (12 - 144 / 28)}
    assert scores(table) == pytest.approx(expected, abs=1e-12)


def test_scores_of_one_cluster_and_one_label():
    assert scores(np.array([[9]])) == {"acc": 1.0, "nmi": 1.0, "ari": 1.0}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n_clusters", "n_labels"), SHAPES)
def test_nmi_and_ari_match_scikit_learn(n_clusters: int, n_labels: int, seed: int):
    cluster_id, label_id, table = random_table(n_clusters, n_labels, seed=seed)
    nmi = normalized_mutual_info_score(label_id, cluster_id)
    assert normalized_mutual_information(table) == pytest.approx(nmi, abs=1e-12)
    ari = adjusted_rand_score(label_id, cluster_id)
    assert adjusted_rand_index(table) == pytest.approx(ari, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n_clusters", "n_labels"), SHAPES)
def test_accuracy_matches_all_permutations(n_clusters: int, n_labels: int, seed: int):
    _, _, table = random_table(n_clusters, n_labels, seed=seed)
    assert accuracy(table) == pytest.approx(plain_accuracy(table), rel=1e-12)


def test_matching_is_not_greedy():
    # Greedy would take 10 and leave 0; together 9 + 8 is best.
    table = np.array([[10, 9], [8, 0]])
    assert match_clusters(table).tolist() == [1, 0]
    assert accuracy(table) == pytest.approx(17 / 27)


def test_clusters_beyond_the_labels_match_none():
    table = np.array([[1, 0], [0, 9], [8, 1]])
    assert match_clusters(table).tolist() == [-1, 1, 0]
    assert accuracy(table) == pytest.approx(17 / 19)


def test_labels_beyond_the_clusters_stay_unmatched():
    table = np.array([[1, 5, 2], [6, 4, 0]])
    assert match_clusters(table).tolist() == [1, 0]
    assert accuracy(table) == pytest.approx(11 / 18)


def test_classes_are_not_matched():
    table = np.array([[1, 6], [5, 8]])
    assert classification_accuracy(table) == pytest.approx(9 / 20)
    assert accuracy(table) == pytest.approx(11 / 20)


def test_scores_of_a_hundred_million_images():
    table = np.array([[30_000_000, 5_000_001], [4_000_000, 61_000_000]])
    exact = float(plain_adjusted_rand(table))
    assert adjusted_rand_index(table) == pytest.approx(exact, rel=1e-12)
    joint = [[x / 100_000_001 for x in row] for row in table.tolist()]
    cluster, label = [sum(row) for row in joint], [sum(row) for row in zip(*joint, strict=True)]
    information = sum(
        x * math.log(x / (cluster[i] * label[j]))
        for i, row in enumerate(joint)
        for j, x in enumerate(row)
    )
    entropies = [-sum(x * math.log(x) for x in margin) for margin in (cluster, label)]
    nmi = information / (sum(entropies) / 2)
    assert normalized_mutual_information(table) == pytest.approx(nmi, rel=1e-9)
