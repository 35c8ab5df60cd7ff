"""Spherical k-means over shards against a plain loop."""

import numpy as np
import pytest

from tac_ray.algorithm.kmeans import normalize_rows, random_rows
from tac_ray.index import kmeans
from tac_ray.index.kmeans import fit

PARTS = [120, 120, 60]
N_ROWS = sum(PARTS)


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    return normalize_rows(np.random.default_rng(seed).standard_normal((n, d))).astype(np.float16)


@pytest.fixture
def loaded(in_process, make_artifact):
    """Makes a group of two shards that holds these rows."""

    def make(rows: np.ndarray, part_rows: list[int]):
        group = in_process(2)
        group.load([make_artifact(rows, part_rows)])
        return group

    return make


def run(group, k: int, **options):
    options = {
        "seed": 0,
        "restarts": 1,
        "max_iterations": 50,
        "tolerance": 0.0,
        "max_points_per_centroid": None,
        "on_iteration": lambda _: None,
        **options,
    }
    return fit(group, k, **options)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def lloyd(rows: np.ndarray, start: np.ndarray, iterations: int):
    """Plain spherical k-means in float64: centroids of the last pass, assignment, objectives."""
    rows = rows.astype(np.float64)
    centroids, objectives, before = unit(rows[start]), [], None
    for _ in range(iterations):
        similarity = rows @ centroids.T
        nearest = similarity.argmax(axis=1)
        objectives.append(similarity.max(axis=1).mean())
        if before is not None and (nearest == before).all():
            break
        before, used = nearest, centroids
        centroids = unit(np.stack([rows[nearest == k].sum(axis=0) for k in range(len(start))]))
    return (used if len(objectives) == iterations else centroids), nearest, objectives


@pytest.mark.parametrize(("seed", "max_iterations"), [(0, 50), (1, 50), (2, 4)])
def test_fit_equals_plain_lloyd_from_the_same_start(loaded, seed, max_iterations):
    rows = unit_rows(N_ROWS, 8)
    start = random_rows(N_ROWS, 6, seed=seed, restart=0)
    centroids, nearest, objectives = lloyd(rows, start, max_iterations)
    result = run(loaded(rows, PARTS), 6, seed=seed, max_iterations=max_iterations)
    assert not any(line["n_empty"] for line in result.iterations)
    assert len(result.iterations) == len(objectives) > 3
    np.testing.assert_allclose(
        [line["objective"] for line in result.iterations], objectives, atol=1e-6
    )
    np.testing.assert_array_equal(np.concatenate(result.assignment), nearest)
    assert [len(part) for part in result.assignment] == PARTS
    np.testing.assert_allclose(result.centroids, centroids, atol=1e-6)
    assert result.centroids.dtype == np.float32
    assert result.objective == pytest.approx(objectives[-1], abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_objective_never_falls(loaded, seed):
    result = run(loaded(unit_rows(N_ROWS, 8), PARTS), 10, seed=seed, restarts=2)
    assert not any(line["n_empty"] for line in result.iterations)
    for restart in range(2):
        values = [i["objective"] for i in result.iterations if i["restart"] == restart]
        assert len(values) > 3
        assert (np.diff(values) > -1e-7).all()
        assert values[-1] > values[0]


def test_a_fit_ends_when_no_row_moves_or_the_gain_is_below_the_tolerance(loaded):
    group = loaded(unit_rows(N_ROWS, 8), PARTS)
    settled = run(group, 6).iterations
    assert settled[0]["moved"] == 1
    assert settled[-1]["moved"] == 0 or settled[-1]["objective"] <= settled[-2]["objective"]
    assert all(line["moved"] > 0 for line in settled[:-1])
    early = run(group, 6, tolerance=0.02).iterations
    assert 1 < len(early) < len(settled)
    gain = np.diff([line["objective"] for line in early]) / [i["objective"] for i in early[1:]]
    assert gain[-1] <= 0.02 < gain[:-1].min(initial=1)


def test_the_best_restart_wins(loaded):
    result = run(loaded(unit_rows(N_ROWS, 8), PARTS), 6, restarts=5)
    last = {line["restart"]: line["objective"] for line in result.iterations}
    assert list(last) == [0, 1, 2, 3, 4]
    assert max(last.values()) > last[4] + 1e-4
    assert max(last.values()) > last[0] + 1e-4
    assert result.objective == pytest.approx(max(last.values()), abs=1e-9)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(loaded):
    group = loaded(unit_rows(N_ROWS, 8), PARTS)
    one, again, other = (run(group, 6, seed=seed).centroids for seed in (1, 1, 2))
    assert one.tobytes() == again.tobytes()
    assert one.tobytes() != other.tobytes()


def test_a_sample_is_fitted_and_all_rows_are_assigned(loaded, monkeypatch):
    rows = unit_rows(N_ROWS, 8)
    group = loaded(rows, PARTS)
    seen = []
    assign = group.assign

    def counted(centroids, depth=None):
        done = assign(centroids, depth)
        seen.append(int(done.sums.counts.sum()))
        return done

    monkeypatch.setattr(group, "assign", counted)
    result = run(group, 4, max_points_per_centroid=10)
    assert len(seen) > 2
    assert set(seen[:-1]) == {40}
    assert seen[-1] == N_ROWS
    nearest = (rows.astype(np.float64) @ result.centroids.T.astype(np.float64)).argmax(axis=1)
    np.testing.assert_array_equal(np.concatenate(result.assignment), nearest)
    seen.clear()
    run(group, 4, max_points_per_centroid=75)  # 300 rows are no more than 4 * 75
    assert set(seen) == {N_ROWS}


def test_a_sample_is_fitted_as_if_it_were_all(loaded):
    rows = unit_rows(N_ROWS, 8)
    visible = random_rows(N_ROWS, 80, seed=5, restart=1 << 31)
    sampled = run(loaded(rows, PARTS), 4, seed=5, max_points_per_centroid=20)
    alone = run(loaded(rows[visible], [50, 30]), 4, seed=5)
    np.testing.assert_allclose(sampled.centroids, alone.centroids, atol=1e-6)


def test_more_centroids_than_rows_is_refused_with_the_remedy(loaded):
    group = loaded(unit_rows(10, 4), [6, 4])
    with pytest.raises(ValueError, match=r"n_images=10 should be >= n_centroids=11; lower --n-"):
        run(group, 11)
    assert run(group, 10).objective == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_fewer_distinct_rows_than_centroids(loaded, seed):
    rows = np.tile(unit_rows(3, 8), (20, 1))
    result = run(loaded(rows, [40, 20]), 5, seed=seed, restarts=2, max_iterations=8)
    assert np.isfinite(result.centroids).all()
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-6)
    # Some centroids must stay without rows; every distinct row still has its own.
    assert max(line["objective"] for line in result.iterations) == pytest.approx(1, abs=1e-3)
    assert result.objective == pytest.approx(1, abs=1e-3)
    assert len(np.unique(np.concatenate(result.assignment))) == 3


def test_clusters_that_lose_all_rows_are_seeded_again(loaded):
    # Two of three starts are the same row, so one cluster has no rows at first.
    rng = np.random.default_rng(0)
    near = [np.repeat(np.eye(3)[[i]], 30, axis=0) for i in range(3)]
    rows = np.concatenate(near) + rng.normal(0, 0.02, (90, 3))
    rows[:60:2] = rows[0]
    rows = normalize_rows(rows).astype(np.float16)
    for seed in range(20):
        start = random_rows(90, 4, seed=seed, restart=0)
        if len(np.unique(rows[start], axis=0)) < 4:
            break
    result = run(loaded(rows, [50, 40]), 4, seed=seed)
    assert result.iterations[0]["n_empty"] > 0
    assert result.iterations[-1]["n_empty"] == 0
    assert len(np.unique(np.concatenate(result.assignment))) == 4


@pytest.mark.parametrize("value", [np.nan, 0])
def test_rows_without_direction_are_refused_before_the_fit(loaded, value):
    rows = unit_rows(N_ROWS, 8)
    rows[130] = value
    with pytest.raises(ValueError, match=r"row 130 is zero or not finite"):
        loaded(rows, PARTS)


def clustered_rows(n: int, d: int, n_centers: int, noise: float = 0.8) -> np.ndarray:
    rng = np.random.default_rng(7)
    centers = rng.standard_normal((n_centers, d))
    rows = centers[rng.integers(n_centers, size=n)] + noise * rng.standard_normal((n, d))
    return normalize_rows(rows).astype(np.float16)


def test_pruned_passes_end_as_well_and_the_assignment_is_exact(loaded, monkeypatch):
    rows = clustered_rows(900, 64, 50)
    group = loaded(rows, [500, 400])
    plain = run(group, 40, prune=False, max_iterations=12)
    monkeypatch.setattr(kmeans, "PRUNE_CENTROIDS", 40)
    pruned = run(group, 40, max_iterations=12)
    assert not any(line["depth"] for line in plain.iterations)
    depths = [line["depth"] for line in pruned.iterations]
    assert depths[0] is depths[-1] is None
    assert all(16 <= depth <= 32 for depth in depths[1:-1])
    assert pruned.objective > 0.999 * plain.objective
    assert pruned.corrected < 0.01
    nearest = (rows.astype(np.float64) @ pruned.centroids.T.astype(np.float64)).argmax(axis=1)
    np.testing.assert_array_equal(np.concatenate(pruned.assignment), nearest)
    assert plain.corrected == 0


def test_passes_over_loose_clusters_are_not_pruned(loaded, monkeypatch):
    monkeypatch.setattr(kmeans, "PRUNE_CENTROIDS", 40)
    result = run(loaded(unit_rows(900, 64), [500, 400]), 40, max_iterations=6)
    assert [line["depth"] for line in result.iterations] == [None] * 6


def test_starts_that_are_spread_find_more_of_the_clusters(loaded):
    group = loaded(clustered_rows(900, 64, 30, noise=0.2), [500, 400])
    random, spread = (
        [run(group, 30, seed=seed, seeding=seeding).objective for seed in range(4)]
        for seeding in ("random", "spread")
    )
    assert min(spread) > np.mean(random)
    assert np.mean(spread) > np.mean(random) + 0.02


def test_rows_of_one_number(loaded):
    rows = np.array([[1], [-1], [0.5], [-2], [1], [1]])
    result = run(loaded(rows, [4, 2]), 2, seed=1)
    np.testing.assert_array_equal(np.abs(result.centroids), 1)
    sides = np.concatenate(result.assignment)
    assert (sides == sides[0]).tolist() == [True, False, True, False, True, True]


def test_rows_of_any_length_go_to_the_centroid_of_their_direction(loaded):
    rows = clustered_rows(300, 8, 6)
    lengths = np.random.default_rng(0).uniform(0.25, 4, (300, 1))
    scaled = (rows * lengths).astype(np.float16)
    result = run(loaded(scaled, PARTS), 6)
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-6)
    similarity = scaled.astype(np.float64) @ result.centroids.T.astype(np.float64)
    np.testing.assert_array_equal(np.concatenate(result.assignment), similarity.argmax(axis=1))
    assert result.objective == pytest.approx(similarity.max(axis=1).mean(), abs=1e-5)


def test_figures_of_a_pass_say_how_even_the_clusters_are(loaded):
    result = run(loaded(unit_rows(N_ROWS, 8), PARTS), 5)
    counts = np.bincount(np.concatenate(result.assignment), minlength=5)
    expected = 5 * ((counts / counts.sum()) ** 2).sum()
    assert result.iterations[-1]["imbalance"] == pytest.approx(expected, rel=0.02)
    assert all(line["seconds"] > 0 for line in result.iterations)
