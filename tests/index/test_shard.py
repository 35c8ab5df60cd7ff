"""One shard against plain NumPy."""

import math

import numpy as np
import pytest
import torch

from tac_ray.algorithm.kmeans import normalize_rows
from tac_ray.index import shard as shard_module
from tac_ray.index.found import merge_top
from tac_ray.index.group import part_sources
from tac_ray.index.shard import Shard

PARTS = [70, 70, 33]


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    return normalize_rows(np.random.default_rng(seed).standard_normal((n, d))).astype(np.float16)


def tied_rows(n: int, seed: int = 0) -> np.ndarray:
    """Rows whose inner products are exact in float32, with many ties and duplicates."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(-1, 2, (n, 4)) / 2
    rows[(rows == 0).all(axis=1)] = 0.5
    return rows.astype(np.float16)


def nearest_rows(rows: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Brute force: larger inner product first, ties by row number."""
    wide = rows.astype(np.float64)
    similarity = wide @ wide.T
    numbers = np.broadcast_to(np.arange(len(rows)), similarity.shape)
    order = np.lexsort((numbers, -similarity), axis=1)[:, :n]
    return np.take_along_axis(similarity, order, 1), order


@pytest.fixture
def loaded(make_artifact):
    """Makes a shard that holds all parts of these rows."""

    def make(rows: np.ndarray, part_rows: list[int] = PARTS, threads: int = 2):
        sources = part_sources([make_artifact(rows, part_rows)])
        shard = Shard(threads, torch.cuda.is_available())
        shard.load(sources)
        return shard, sources

    return make


def test_assign_equals_plain_numpy(loaded):
    rows = unit_rows(173, 12)
    centroids = normalize_rows(np.random.default_rng(1).standard_normal((7, 12)))
    shard, _ = loaded(rows)
    sums, moved, *_ = shard.assign(centroids, None)
    similarity = rows.astype(np.float64) @ centroids.astype(np.float64).T
    nearest = similarity.argmax(axis=1)
    assert moved == 173
    np.testing.assert_array_equal(np.concatenate(shard.assignment()), nearest)
    assert [len(part) for part in shard.assignment()] == PARTS
    np.testing.assert_array_equal(sums.counts, np.bincount(nearest, minlength=7))
    assert sums.objective(centroids) == pytest.approx(similarity.max(axis=1).mean(), abs=1e-6)
    for k in range(7):
        exact = [math.fsum(column) for column in rows[nearest == k].astype(np.float64).T]
        assert sums.sums[k].tolist() == exact


def test_moved_counts_the_rows_that_changed_centroid(loaded):
    rows = unit_rows(173, 12)
    centroids = normalize_rows(np.random.default_rng(1).standard_normal((7, 12)))
    shard, _ = loaded(rows)
    shard.assign(centroids, None)
    before = np.concatenate(shard.assignment())
    assert shard.assign(centroids, None).moved == 0
    other = np.ascontiguousarray(centroids[[0, 1, 2, 4, 3, 5, 6]])
    assert shard.assign(other, None).moved == np.isin(before, [3, 4]).sum() > 0


def test_sums_are_exact_whatever_the_blocks_and_threads(loaded, monkeypatch):
    rows = unit_rows(173, 12)
    # Magnitudes far apart: any rounding on the way would show.
    rows[::3] *= np.float16(1 / 256)
    centroids = normalize_rows(np.random.default_rng(1).standard_normal((3, 12)))
    nearest = (rows.astype(np.float64) @ centroids.astype(np.float64).T).argmax(axis=1)
    found = []
    for block_rows, threads in [(4096, 1), (1, 3), (7, 2), (64, 4)]:
        monkeypatch.setattr(shard_module, "BLOCK_ROWS", block_rows)
        shard, _ = loaded(rows, threads=threads)
        sums, counts = shard.assign(centroids, None).sums
        found.append((sums.tobytes(), counts.tolist()))
        np.testing.assert_array_equal(np.concatenate(shard.assignment()), nearest)
    assert all(other == found[0] for other in found)


def test_sums_kept_up_to_date_have_the_bits_of_sums_made_anew(loaded):
    rows = unit_rows(173, 12)
    shard, _ = loaded(rows)
    for seed in range(4):
        centroids = normalize_rows(np.random.default_rng(seed).standard_normal((7, 12)))
        kept = shard.assign(centroids, None).sums
        anew = loaded(rows)[0].assign(centroids, None).sums
        assert kept.sums.tobytes() == anew.sums.tobytes()
        assert kept.counts.tolist() == anew.counts.tolist()


def test_a_pruned_pass_finds_nearly_what_an_exact_one_finds(make_artifact):
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((40, 64))
    rows = normalize_rows(np.repeat(centers, 20, axis=0) + rng.standard_normal((800, 64)))
    parts = [300, 300, 200]
    shard = Shard(2, on_gpu=False)  # what prunes is for CPUs
    shard.load(part_sources([make_artifact(rows.astype(np.float16), parts)]))
    shard.assign(normalize_rows(rows[::20]), None)
    centroids = normalize_rows(centers + 0.2 * rng.standard_normal((40, 64)))
    done = shard.assign(centroids, 16)
    nearest = (rows.astype(np.float16).astype(np.float64) @ centroids.T).argmax(axis=1)
    found = np.concatenate(shard.assignment())
    assert (found == nearest).mean() > 0.99
    assert done.n_pairs == 800 * 40
    assert 0.3 < done.n_pruned / done.n_pairs < 1
    for k in range(40):
        exact = rows.astype(np.float16)[found == k].astype(np.float64).sum(axis=0)
        np.testing.assert_allclose(done.sums.sums[k], exact, atol=1e-12)


def test_assign_sees_only_the_rows_in_use(loaded):
    rows = unit_rows(173, 12)
    centroids = normalize_rows(np.random.default_rng(1).standard_normal((7, 12)))
    shard, _ = loaded(rows)
    everything = shard.assign(centroids, None).sums
    used = np.array([3, 69, 70, 100, 172])
    shard.use_rows(used)
    sums, moved, *_ = shard.assign(centroids, None)
    nearest = (rows[used].astype(np.float64) @ centroids.T.astype(np.float64)).argmax(axis=1)
    assert moved == sums.counts.sum() == 5
    np.testing.assert_array_equal(np.concatenate(shard.assignment()), nearest)
    shard.use_rows(None)
    again, moved, *_ = shard.assign(centroids, None)
    assert moved == 173
    np.testing.assert_array_equal(again.sums, everything.sums)


def test_rows_gives_the_rows_asked_for(loaded):
    rows = unit_rows(173, 12)
    shard, _ = loaded(rows)
    asked = np.array([0, 69, 70, 139, 140, 172])
    values = shard.rows(asked)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, rows[asked].astype(np.float32))


def test_search_equals_brute_force(loaded):
    rows = unit_rows(173, 12)
    shard, sources = loaded(rows)
    similarity, order = nearest_rows(rows, 6)
    for source, start in zip(sources, [0, 70, 140], strict=True):
        got_similarity, got_rows = shard.search(source, 6)
        stop = start + source.n_rows
        np.testing.assert_array_equal(got_rows, order[start:stop])
        np.testing.assert_allclose(got_similarity, similarity[start:stop], atol=1e-6)


def test_search_gives_all_rows_when_fewer_than_asked_for(loaded):
    rows = unit_rows(10, 12)
    shard, sources = loaded(rows, [7, 3])
    similarity, order = shard.search(sources[0], 50)
    assert similarity.shape == (7, 10)
    np.testing.assert_array_equal(order, nearest_rows(rows, 50)[1][:7])


@pytest.mark.parametrize("part_rows", [[173], PARTS, [3, 1, 169]])
def test_search_breaks_ties_by_row_number(loaded, part_rows):
    rows = tied_rows(173)
    shard, sources = loaded(rows, part_rows)
    similarity, order = nearest_rows(rows, 9)
    # Both many duplicates of a row, and ties that straddle the last place.
    tenth = nearest_rows(rows, 10)[0][:, 9]
    assert (tenth == similarity[:, 8]).mean() > 0.5
    found = [shard.search(source, 9) for source in sources]
    np.testing.assert_array_equal(np.concatenate([s for s, _ in found]), similarity)
    np.testing.assert_array_equal(np.concatenate([r for _, r in found]), order)


def test_search_does_not_depend_on_blocks_and_threads(loaded, monkeypatch):
    rows = tied_rows(173)
    found = []
    for block_rows, threads in [(4096, 1), (7, 3), (50, 2)]:
        monkeypatch.setattr(shard_module, "BLOCK_ROWS", block_rows)
        shard, sources = loaded(rows, threads=threads)
        found.append(np.concatenate([shard.search(source, 9)[1] for source in sources]))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_merge_takes_the_larger_similarity_first_and_the_smaller_row_of_a_tie():
    first = (np.array([[0.5, 0.25, -1.0]], np.float32), np.array([[7, 2, 9]]))
    second = (np.array([[0.75, 0.5, 0.25]], np.float32), np.array([[4, 3, 1]]))
    for lists in ([first, second], [second, first]):
        similarity, rows = merge_top(lists, 5)
        assert similarity.tolist() == [[0.75, 0.5, 0.5, 0.25, 0.25]]
        assert rows.tolist() == [[4, 3, 7, 1, 2]]
    assert merge_top([first], 9)[1].tolist() == [[7, 2, 9]]


@pytest.mark.parametrize("value", [np.nan, np.inf, 0])
def test_rows_without_direction_are_refused_by_number(make_artifact, value):
    rows = unit_rows(173, 12)
    rows[75] = value
    rows[80] = value
    if value:
        rows[75, 1:] = 0.5
    with pytest.raises(ValueError, match=r"row 75 .*2 such rows in part 1.*embed again"):
        Shard(1, torch.cuda.is_available()).load(part_sources([make_artifact(rows, PARTS)]))


def test_loading_replaces_what_was_held(loaded, make_artifact):
    shard, _ = loaded(unit_rows(173, 12))
    other = unit_rows(20, 5, seed=4)
    shard.load(part_sources([make_artifact(other, [20])]))
    values = shard.rows(np.arange(20))
    np.testing.assert_array_equal(values, other.astype(np.float32))
