"""Eq. 3: mean directions, re-seeded where a cluster is empty."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tac_ray.algorithm.kmeans import (
    Sums,
    first_depth,
    next_centroids,
    next_depth,
    normalize_rows,
    random_rows,
    rotate,
    spread_rows,
)

K, WIDTH = 5, 8


def unit_rows(n: int, *, seed: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(seed).standard_normal((n, WIDTH))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def one_pass(rows: NDArray[np.float32], centroids: NDArray[np.float32]) -> Sums:
    similarity = rows.astype(float) @ centroids.astype(float).T
    nearest = similarity.argmax(axis=1)
    sums = np.zeros(centroids.shape)
    np.add.at(sums, nearest, rows)
    counts = np.bincount(nearest, minlength=len(centroids))
    return Sums(sums, counts)


def sums_with_counts(counts: list[int], *, seed: int = 0) -> Sums:
    sums = unit_rows(len(counts), seed=seed).astype(float) * np.array(counts)[:, None]
    return Sums(sums, np.array(counts))


def test_random_rows_are_distinct_sorted_and_set_by_seed_and_restart():
    rows = random_rows(1000, 50, seed=3, restart=2)
    assert len(set(rows.tolist())) == 50
    assert rows.tolist() == sorted(rows.tolist())
    assert rows.min() >= 0
    assert rows.max() < 1000
    assert np.array_equal(rows, random_rows(1000, 50, seed=3, restart=2))
    others = [random_rows(1000, 50, seed=s, restart=r) for s, r in [(3, 1), (2, 2), (2, 3)]]
    assert all(not np.array_equal(rows, other) for other in others)


def test_random_rows_reach_every_row():
    assert random_rows(7, 7, seed=0, restart=0).tolist() == list(range(7))
    seen = {int(row) for seed in range(60) for row in random_rows(10, 2, seed=seed, restart=0)}
    assert seen == set(range(10))


def test_fewer_rows_than_centroids_is_refused_with_both_values():
    with pytest.raises(ValueError, match=r"n_images=40 should be >= n_centroids=50; lower"):
        random_rows(40, 50, seed=0, restart=0)


def test_normalize_rows_divides_by_the_norm_and_leaves_zero_rows():
    rows = normalize_rows(np.array([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]]))
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0], [0, -1]], rtol=1e-6)


def test_next_centroids_are_the_mean_directions():
    rows, previous = unit_rows(80, seed=1), unit_rows(K, seed=2)
    centroids, n_empty = next_centroids(
        one_pass(rows, previous), previous, rng=np.random.default_rng(0)
    )
    assert n_empty == 0
    assert centroids.dtype == np.float32
    for cluster in range(K):
        total = [0.0] * WIDTH
        for row in rows.tolist():
            similarities = [
                sum(a * b for a, b in zip(row, c, strict=True)) for c in previous.tolist()
            ]
            if similarities.index(max(similarities)) == cluster:
                total = [t + x for t, x in zip(total, row, strict=True)]
        norm = math.sqrt(sum(t * t for t in total))
        assert centroids[cluster].tolist() == pytest.approx([t / norm for t in total], abs=1e-6)


def test_an_empty_cluster_splits_one_with_rows_to_spare():
    total = sums_with_counts([4, 0, 1, 1, 0])
    previous = unit_rows(K, seed=9)
    before = normalize_rows(total.sums)
    centroids, n_empty = next_centroids(total, previous, rng=np.random.default_rng(0))
    assert n_empty == 2
    assert np.isfinite(centroids).all()
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, rtol=1e-6)
    # Only cluster 0 has more than one row, so both empty ones start beside it.
    for cluster in (0, 1, 4):
        assert centroids[cluster] @ before[0] > 0.999
        assert not np.array_equal(centroids[cluster], before[0])
    assert len({tuple(row) for row in centroids[[0, 1, 4]].tolist()}) == 3
    np.testing.assert_allclose(centroids[[2, 3]], before[[2, 3]], rtol=1e-6)


def test_the_halves_of_a_split_stand_on_opposite_sides_of_the_old_centroid():
    total = sums_with_counts([9, 0])
    before = normalize_rows(total.sums)[0].astype(float)
    centroids, _ = next_centroids(total, unit_rows(2, seed=9), rng=np.random.default_rng(0))
    first, second = (row.astype(float) - before for row in centroids)
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    assert cosine < -0.99


def test_splits_are_drawn_in_proportion_to_surplus_rows():
    # Surpluses 30, 10 and 0, so cluster 0 gives in three of four draws and cluster 2 never.
    total = sums_with_counts([31, 11, 1, 0])
    before = normalize_rows(total.sums)
    rng = np.random.default_rng(0)
    donors = []
    for _ in range(400):
        centroids, _ = next_centroids(total, unit_rows(4, seed=9), rng=rng)
        donors.append(int((before[:3] @ centroids[3]).argmax()))
    share = np.bincount(donors, minlength=3) / len(donors)
    assert share[2] == 0
    assert share[0] == pytest.approx(0.75, abs=0.08)


def test_splits_follow_the_generator_they_are_given():
    total, previous = sums_with_counts([5, 5, 0, 5, 0]), unit_rows(K, seed=9)
    draws = [
        next_centroids(total, previous, rng=np.random.default_rng(seed))[0]
        for seed in (1, 1, 2, 3, 4)
    ]
    assert np.array_equal(draws[0], draws[1])
    assert any(not np.array_equal(draws[0], other) for other in draws[2:])


def test_without_rows_to_spare_an_empty_cluster_keeps_its_place():
    total, previous = sums_with_counts([1, 0, 1, 0, 1]), unit_rows(K, seed=9)
    centroids, n_empty = next_centroids(total, previous, rng=np.random.default_rng(0))
    assert n_empty == 2
    np.testing.assert_array_equal(centroids[[1, 3]], previous[[1, 3]])
    np.testing.assert_allclose(
        centroids[[0, 2, 4]], normalize_rows(total.sums)[[0, 2, 4]], rtol=1e-6
    )


def test_k_means_fills_an_empty_cluster_and_ends_better_than_without_it():
    rows = unit_rows(60, seed=5)
    start = rows[[0, 1, 0]]  # of two equal centroids the first takes all rows
    centroids, rng = start, np.random.default_rng(0)
    objectives, n_empties = [], []
    for _ in range(15):
        total = one_pass(rows, centroids)
        objectives.append(total.objective(centroids))
        centroids, n_empty = next_centroids(total, centroids, rng=rng)
        n_empties.append(n_empty)
    assert n_empties[0] == 1
    assert n_empties[-1] == 0
    assert (one_pass(rows, centroids).counts > 0).all()
    two = start[:2]
    for _ in range(15):
        two, _ = next_centroids(one_pass(rows, two), two, rng=rng)
    assert objectives[-1] > one_pass(rows, two).objective(two)


def test_objective_and_imbalance_follow_from_the_sums():
    rows, centroids = unit_rows(60, seed=1), unit_rows(K, seed=2)
    total = one_pass(rows, centroids)
    best = (rows.astype(float) @ centroids.T.astype(float)).max(axis=1)
    assert total.objective(centroids) == pytest.approx(best.mean(), abs=1e-7)
    every = rows.astype(np.float64) @ centroids.T
    assert total.mean_similarity(centroids) == pytest.approx(every.mean(), abs=1e-7)
    assert sums_with_counts([3, 3, 3]).imbalance() == pytest.approx(1)
    assert sums_with_counts([9, 0, 0]).imbalance() == pytest.approx(3)


def test_spread_rows_take_one_of_each_cluster_where_random_rows_do_not():
    # Ten tight clusters, the first with most of the rows.
    centers = unit_rows(10, seed=3)
    cluster = np.concatenate([np.zeros(400, dtype=int), np.repeat(np.arange(1, 10), 5)])
    noise = np.random.default_rng(0).normal(0, 0.01, (len(cluster), WIDTH))
    rows = normalize_rows(centers[cluster] + noise)
    reached = []
    for restart in range(20):
        drawn = spread_rows(rows, 10, seed=1, restart=restart)
        assert len(set(drawn.tolist())) == 10
        reached.append(len(set(cluster[drawn])))
    assert np.mean(reached) > 9
    random = [cluster[random_rows(len(rows), 10, seed=1, restart=r)] for r in range(20)]
    assert np.mean([len(set(found)) for found in random]) < 4


def test_spread_rows_are_distinct_also_among_copies():
    rows = np.tile(unit_rows(2, seed=0), (6, 1))
    drawn = spread_rows(rows, 12, seed=0, restart=0)
    assert sorted(drawn.tolist()) == list(range(12))
    assert not np.array_equal(rows[drawn[0]], rows[drawn[1]])


@pytest.mark.parametrize("width", [64, 96, 37])
def test_a_rotation_keeps_inner_products_and_spreads_them(width):
    turn = rotate(torch.eye(width)).numpy()
    np.testing.assert_allclose(turn @ turn.T, np.eye(width), atol=1e-5)
    assert np.abs(turn).max() < 0.75
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((5, width)).astype(np.float32))
    np.testing.assert_allclose(rotate(rows), rows.numpy() @ turn, atol=1e-5)


def test_depth_follows_the_share_that_was_pruned():
    assert (first_depth(31), first_depth(32), first_depth(512)) == (None, 16, 64)
    assert next_depth(64, 512, 0.99) == 51
    assert next_depth(64, 512, 0.96) == 64
    assert next_depth(64, 512, 0.5) == 77
    assert next_depth(17, 512, 1.0) == 16
    assert next_depth(250, 512, 0.0) == 256
