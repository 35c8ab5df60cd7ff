"""The join of lists against all pairs."""

import dataclasses

import numpy as np
import psutil
import pytest
import ray

from tac_ray.algorithm.kmeans import normalize_rows
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.storage import Folder
from tac_ray.index import join
from tac_ray.index.group import ShardGroup
from tac_ray.index.join import Sample, plan_join
from tests.memory import PeakMemory

pytestmark = pytest.mark.integration

PARTS = [1000, 800, 700]
N = 10


def overlapping_rows() -> np.ndarray:
    """Rows in 8 dimensions of 24, without gaps between their clusters."""
    rng = np.random.default_rng(0)
    inner = rng.standard_normal((60, 8))[rng.integers(60, size=sum(PARTS))]
    rows = (inner + rng.standard_normal(inner.shape)) @ rng.standard_normal((8, 24))
    return normalize_rows(rows).astype(np.float16)


def all_pairs(rows: np.ndarray) -> np.ndarray:
    similarity = rows.astype(np.float64) @ rows.T.astype(np.float64)
    np.fill_diagonal(similarity, -2)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :N]


def share(found: np.ndarray, true: np.ndarray) -> float:
    return sum(len(np.intersect1d(a, b)) for a, b in zip(found, true, strict=True)) / true.size


@pytest.fixture
def several_groups(monkeypatch):
    monkeypatch.setattr(join, "GROUP_ROWS", 600)


@pytest.fixture
def joined(ray_cluster, make_artifact, tmp_path):
    """Joins rows; the neighbors, the files, the plan and the recall that was told."""

    def run(rows: np.ndarray, *, n_shards: int = 2, n_probe: int | None = None, kill: bool = False):
        told = []

        def on_rows(n_rows: int) -> None:
            if kill and not told:
                ray.kill(index._shards[0])
            told.append(n_rows)

        folder = Folder(str(tmp_path / f"join{n_shards}{kill}"))
        with ShardGroup(n_shards) as index:
            index.load([make_artifact(rows, PARTS)])
            plan, sample = plan_join(index, N, recall=0.9, seed=0)
            if n_probe is not None:
                plan = dataclasses.replace(plan, n_probe=min(n_probe, len(plan.group)))
            parts = index.join_neighbors(folder, plan, N, exclude="row", on_rows=on_rows)
        assert sum(told) == sum(PARTS)
        tables = [folder.read_table(part.name) for part in parts]
        found = np.concatenate([matrix(table.column("neighbor_row")) for table in tables])
        return found, parts, plan, sample.recall(found[sample.rows])

    return run


def test_a_join_finds_what_it_was_asked_to_and_says_so(joined, several_groups):
    rows = overlapping_rows()
    found, parts, plan, told = joined(rows)
    assert [part.rows for part in parts] == PARTS
    true = all_pairs(rows)
    recall = share(found, true)
    assert 0.9 <= recall < 1
    assert told == pytest.approx(recall, abs=0.02)
    assert plan.n_groups == 4
    # Fewer pairs than there are, but more lists than one: here one would not do.
    assert 1 < plan.n_probe < len(plan.group) / 2
    alone = plan.of_row[:, None] == plan.of_row[true]
    assert alone.mean() < 0.8
    assert not (found == np.arange(len(rows))[:, None]).any()
    pairs = np.einsum("id,ijd->ij", rows.astype(np.float64), rows[found].astype(np.float64))
    assert (np.diff(pairs, axis=1) < 1e-6).all()


def test_a_join_of_all_lists_finds_all(joined, several_groups):
    rows = overlapping_rows()
    found, *_ = joined(rows, n_probe=10**6)
    assert share(found, all_pairs(rows)) > 0.9999  # the order of sums may exchange near ties


def test_a_join_gives_the_same_files_whatever_the_shards(joined, several_groups):
    rows = overlapping_rows()
    one = joined(rows, n_shards=1)[1]
    assert all(joined(rows, n_shards=n)[1] == one for n in (2, 3, 5))


@pytest.mark.timeout(120)
def test_a_shard_killed_in_a_join_leaves_no_trace(joined, several_groups):
    rows = overlapping_rows()
    assert joined(rows, kill=True)[1] == joined(rows)[1]


def test_a_thousand_copies_of_one_row_have_each_other(joined):
    rows = overlapping_rows()
    rows[200:1200] = rows[200]
    found, *_ = joined(rows)
    copies = np.arange(200, 1200)
    expected = np.array([[row for row in range(200, 212) if row != i][:N] for i in copies])
    np.testing.assert_array_equal(found[copies], expected)


def test_nearly_all_rows_in_one_list(joined, monkeypatch):
    monkeypatch.setattr(join, "GROUP_ROWS", 200)
    rows = overlapping_rows()
    rows[:2450] = rows[0]
    found, *_ = joined(rows)
    expected = np.array([[row for row in range(N + 1) if row != i][:N] for i in range(2450)])
    np.testing.assert_array_equal(found[:2450], expected)
    assert share(found[2450:], all_pairs(rows)[2450:]) > 0.8


def test_a_few_rows_far_from_all_others_have_their_neighbors_all_the_same(joined):
    rows = overlapping_rows()
    far = np.linalg.svd(rows.astype(np.float64))[2][-1]
    lonely = [5, 1500, 2400]
    rows[lonely] = far + np.random.default_rng(0).normal(0, 0.01, (3, len(far)))
    # In one list each, which for these has too few rows.
    found, *_ = joined(rows, n_probe=1)
    assert all(len(set(row)) == N for row in found.tolist())
    for row in lonely:
        assert set(found[row, :2].tolist()) == set(lonely) - {row}


def test_memory_of_a_join_grows_as_its_formula_says(ray_cluster, make_artifact, tmp_path):
    width, sizes = 256, (50_000, 200_000)
    rng = np.random.default_rng(1)
    centers = rng.standard_normal((500, width))
    peaks = []
    for n in sizes:
        rows = normalize_rows(centers[rng.integers(500, size=n)] + rng.standard_normal((n, width)))
        with ShardGroup(1) as index:
            index.load([make_artifact(rows.astype(np.float16), [25_000] * (n // 25_000))])
            plan, _ = plan_join(index, N, recall=0.5, seed=0)
            folder = Folder(str(tmp_path / str(n)))
            with PeakMemory(psutil.Process(), "ray::Shard") as memory:
                index.join_neighbors(folder, plan, N, exclude="row", on_rows=lambda _: None)
        peaks.append(memory.largest_mb)
    # The rows, and as much again; a float32 copy of all rows would double it.
    expected = 4 * width * (sizes[1] - sizes[0]) / 1e6
    assert peaks[1] - peaks[0] < 1.4 * expected


def test_groups_have_about_equally_many_rows_and_near_lists(monkeypatch):
    monkeypatch.setattr(join, "GROUP_ROWS", 100)
    angle = np.linspace(0, np.pi, 64)
    centroids = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    sizes = np.random.default_rng(0).integers(5, 20, 64)
    group = join._groups(centroids, sizes)
    rows = np.bincount(group, sizes)
    assert len(rows) == sizes.sum() // 100
    assert rows.min() > 60
    assert rows.max() < 150
    assert (np.diff(group) != 0).sum() == len(rows) - 1


def test_recall_of_a_sample_counts_the_neighbors_that_were_found():
    sample = Sample(np.array([3, 8]), np.array([[1, 2], [5, 6]]))
    assert sample.recall(np.array([[2, 9], [6, 5]])) == 0.75
