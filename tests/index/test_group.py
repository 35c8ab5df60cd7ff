"""Any number of shards together give what one flat index gives."""

import numpy as np
import pytest
import ray

from tac_ray.algorithm.kmeans import normalize_rows
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.storage import Folder
from tac_ray.index import kmeans
from tac_ray.index.group import ShardGroup, part_sources
from tac_ray.index.kmeans import fit

PARTS = [40, 40, 40, 25]
N_ROWS = sum(PARTS)


def unit_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    return normalize_rows(np.random.default_rng(seed).standard_normal((n, d))).astype(np.float16)


def rows_with_duplicates() -> np.ndarray:
    """Exact inner products; most rows have more duplicates than neighbors are asked for."""
    rng = np.random.default_rng(3)
    distinct = np.array([[0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0], [0, 0.5, -0.5, 0.5], [0, 0, 0, -1]])
    return distinct[rng.choice(4, N_ROWS, p=[0.6, 0.3, 0.08, 0.02])].astype(np.float16)


def neighbors(group: ShardGroup, folder: Folder, n: int, exclude: str):
    """Rows, similarities and the manifest's lines."""
    parts = list(group.write_neighbors(folder, n, exclude=exclude))
    tables = [folder.read_table(part.name) for part in parts]
    assert [table.num_rows for table in tables] == [part.rows for part in parts]
    found, similarity = (
        np.concatenate([matrix(table.column(name)) for table in tables])
        for name in ("neighbor_row", "similarity")
    )
    return found, similarity, parts


def brute_force(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All rows for each row, larger inner product first, ties by row number."""
    wide = rows.astype(np.float64)
    similarity = wide @ wide.T
    numbers = np.broadcast_to(np.arange(len(rows)), similarity.shape)
    order = np.lexsort((numbers, -similarity), axis=1)
    return order, np.take_along_axis(similarity, order, 1)


def without_itself(order: np.ndarray, n: int) -> np.ndarray:
    return np.array([row[row != i][:n] for i, row in enumerate(order)])


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(str(tmp_path / "neighbors"))


# Without a cluster


@pytest.mark.parametrize("n_shards", [1, 2, 3, 4])
def test_assign_adds_up_over_shards(in_process, make_artifact, n_shards):
    rows = unit_rows(N_ROWS, 6)
    centroids = normalize_rows(np.random.default_rng(1).standard_normal((5, 6)))
    similarity = rows.astype(np.float64) @ centroids.astype(np.float64).T
    nearest = similarity.argmax(axis=1)
    with in_process(n_shards) as group:
        group.load([make_artifact(rows, PARTS)])
        assert group.n_rows == N_ROWS
        assert group.peak_memory_gb > 0
        sums, moved, *_ = group.assign(centroids)
        assert moved == N_ROWS
        np.testing.assert_array_equal(np.concatenate(group.assignment()), nearest)
        assert [len(part) for part in group.assignment()] == PARTS
        expected = [rows[nearest == k].astype(np.float64).sum(axis=0) for k in range(5)]
        np.testing.assert_array_equal(sums.sums, expected)
        assert sums.counts.tolist() == np.bincount(nearest, minlength=5).tolist()
        best = similarity.max(axis=1)
        assert sums.objective(centroids) == pytest.approx(best.mean(), abs=1e-6)
        asked = np.array([0, 39, 40, 80, 144])
        np.testing.assert_array_equal(group.rows(asked), rows[asked].astype(np.float32))


def test_aligned_artifacts_lie_side_by_side(in_process, make_artifact):
    left, right = unit_rows(N_ROWS, 6), unit_rows(N_ROWS, 3, seed=5)
    with in_process(2) as group:
        group.load([make_artifact(left, PARTS), make_artifact(right, PARTS)])
        both = np.concatenate([left, right], axis=1).astype(np.float32)
        np.testing.assert_array_equal(group.rows(np.arange(N_ROWS)), both)


def test_artifacts_with_other_parts_are_refused(make_artifact):
    one = make_artifact(unit_rows(30, 4), [20, 10])
    other = make_artifact(unit_rows(30, 4), [15, 15])
    with pytest.raises(ValueError, match=r"\[\[20, 10\], \[15, 15\]\].*aligned"):
        part_sources([one, other])


@pytest.mark.parametrize("n_shards", [1, 2, 3, 4])
@pytest.mark.parametrize("exclude", ["row", "first_column"])
def test_neighbors_equal_brute_force(in_process, make_artifact, folder, n_shards, exclude):
    rows = unit_rows(N_ROWS, 6)
    order, similarity = brute_force(rows)
    with in_process(n_shards) as group:
        group.load([make_artifact(rows, PARTS)])
        found, values, parts = neighbors(group, folder, 7, exclude)
    assert [part.rows for part in parts] == PARTS
    # float16 unit rows: a row need not be its own best hit, which is why "row" is there.
    not_first = order[:, 0] != np.arange(N_ROWS)
    expected = without_itself(order, 7) if exclude == "row" else order[:, 1:8]
    assert exclude == "row" or not not_first.all()
    np.testing.assert_array_equal(found, expected)
    pairs = np.einsum("id,ijd->ij", rows.astype(np.float64), rows[found].astype(np.float64))
    np.testing.assert_allclose(values, pairs, atol=1e-6)
    assert (np.diff(values, axis=1) <= 0).all()
    assert similarity[:, 1].max() > similarity[:, 7].min()


def test_a_row_that_is_not_its_own_best_hit(in_process, make_artifact, folder):
    # Row 0 is short, so row 1 is nearer to it than itself.
    rows = np.array([[0.5, 0], [1, 0], [0.25, 0], [0, 1]])
    with in_process(1) as group:
        group.load([make_artifact(rows, [2, 2])])
        by_row, _, _ = neighbors(group, folder, 2, "row")
        by_column, _, _ = neighbors(group, folder, 2, "first_column")
    assert by_row[0].tolist() == [1, 2]
    assert by_column[0].tolist() == [0, 2]
    assert by_row[1].tolist() == by_column[1].tolist() == [0, 2]


@pytest.mark.parametrize("n_shards", [1, 3])
def test_no_row_is_its_own_neighbor_among_duplicates(in_process, make_artifact, folder, n_shards):
    rows = rows_with_duplicates()
    with in_process(n_shards) as group:
        group.load([make_artifact(rows, PARTS)])
        found, values, _ = neighbors(group, folder, 5, "row")
    assert found.shape == (N_ROWS, 5)
    assert not (found == np.arange(N_ROWS)[:, None]).any()
    assert all(len(set(row)) == 5 for row in found.tolist())
    expected = without_itself(brute_force(rows)[0], 5)
    pairs = np.einsum("id,ijd->ij", rows.astype(np.float64), rows[expected].astype(np.float64))
    np.testing.assert_array_equal(values, pairs)


@pytest.mark.parametrize("exclude", ["row", "first_column"])
def test_ties_among_neighbors_go_to_the_smaller_row(in_process, make_artifact, folder, exclude):
    rows = rows_with_duplicates()
    order, _ = brute_force(rows)
    with in_process(2) as group:
        group.load([make_artifact(rows, PARTS)])
        found, _, _ = neighbors(group, folder, 5, exclude)
    expected = without_itself(order, 5) if exclude == "row" else order[:, 1:6]
    np.testing.assert_array_equal(found, expected)


def test_more_shards_than_parts(in_process, make_artifact, folder):
    rows = unit_rows(30, 6)
    centroids = unit_rows(3, 6, seed=8).astype(np.float32)
    with in_process(4) as group:
        group.load([make_artifact(rows, [20, 10])])
        assert group.assign(centroids).sums.counts.sum() == 30
        np.testing.assert_array_equal(group.rows(np.arange(30)), rows.astype(np.float32))
        found, _, _ = neighbors(group, folder, 4, "row")
    np.testing.assert_array_equal(found, without_itself(brute_force(rows)[0], 4))


def test_loading_the_same_rows_again_uses_all_of_them(in_process, make_artifact):
    artifact = make_artifact(unit_rows(N_ROWS, 6), PARTS)
    centroids = unit_rows(3, 6, seed=8).astype(np.float32)
    with in_process(2) as group:
        group.load([artifact])
        group.use_rows(np.arange(10))
        assert group.assign(centroids).sums.counts.sum() == 10
        group.load([artifact])
        assert group.assign(centroids).sums.counts.sum() == N_ROWS


def test_other_rows_take_the_place_of_those_held(in_process, make_artifact):
    one, other = unit_rows(N_ROWS, 6), unit_rows(50, 4, seed=9)
    with in_process(2) as group:
        group.load([make_artifact(one, PARTS)])
        group.load([make_artifact(other, [25, 25])])
        assert group.n_rows == 50
        np.testing.assert_array_equal(group.rows(np.arange(50)), other.astype(np.float32))


def test_rows_that_were_refused_are_not_taken_for_those_held_before(in_process, make_artifact):
    good = unit_rows(N_ROWS, 6)
    bad = unit_rows(N_ROWS, 6, seed=7)
    bad[3] = 0
    artifact, refused = make_artifact(good, PARTS), make_artifact(bad, PARTS)
    with in_process(2) as group:
        group.load([artifact])
        with pytest.raises(ValueError, match="row 3"):
            group.load([refused])
        group.load([artifact])
        np.testing.assert_array_equal(group.rows(np.arange(N_ROWS)), good.astype(np.float32))


# On a cluster

WIDE, WIDE_PARTS = 64, [300, 300, 200, 150, 50]


def wide_rows() -> np.ndarray:
    """Rows long enough for pruned passes, in forty loose clusters."""
    rng = np.random.default_rng(5)
    centers = rng.standard_normal((40, WIDE))
    rows = centers[rng.integers(40, size=sum(WIDE_PARTS))]
    return normalize_rows(rows + rng.standard_normal(rows.shape)).astype(np.float16)


def cluster(group: ShardGroup) -> tuple[bytes, bytes, float]:
    """A fit whose passes are pruned."""
    result = fit(
        group,
        30,
        seed=3,
        restarts=2,
        max_iterations=6,
        tolerance=0,
        max_points_per_centroid=None,
        on_iteration=lambda _: None,
    )
    assert any(line["depth"] for line in result.iterations)
    assignment = np.concatenate(result.assignment)
    assert len(assignment) == group.n_rows
    return result.centroids.tobytes(), assignment.tobytes(), result.objective


@pytest.fixture
def pruned(monkeypatch):
    monkeypatch.setattr(kmeans, "PRUNE_CENTROIDS", 2)


@pytest.fixture(scope="module", params=[1, 2, 3, 5])
def on_ray(request, ray_cluster):
    """Shards that are actors; kept for the tests of one number of shards."""
    with ShardGroup(request.param) as group:
        yield group


@pytest.mark.integration
def test_kmeans_on_any_number_of_actors_gives_the_bits_of_one_process(
    on_ray, make_artifact, request, pruned
):
    artifact = make_artifact(wide_rows(), WIDE_PARTS)
    on_ray.load([artifact])
    found = cluster(on_ray)
    in_process = request.getfixturevalue("in_process")
    with in_process(1) as one:
        one.load([artifact])
        assert cluster(one) == found


@pytest.mark.integration
@pytest.mark.timeout(120)
def test_neighbors_on_any_number_of_actors_give_the_files_of_one_process(
    on_ray, make_artifact, tmp_path, request
):
    artifact = make_artifact(wide_rows(), WIDE_PARTS)
    on_ray.load([artifact])
    parts = list(on_ray.write_neighbors(Folder(str(tmp_path / "ray")), 5, exclude="row"))
    in_process = request.getfixturevalue("in_process")
    with in_process(1) as one:
        one.load([artifact])
        expected = list(one.write_neighbors(Folder(str(tmp_path / "one")), 5, exclude="row"))
    assert parts == expected
    assert len({part.sha256 for part in parts}) == len(WIDE_PARTS)


@pytest.mark.integration
@pytest.mark.parametrize("on_ray", [2], indirect=True)
@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_shard_killed_in_a_pass_leaves_no_trace(
    on_ray, make_artifact, request, pruned, monkeypatch, at
):
    artifact = make_artifact(wide_rows(), WIDE_PARTS)
    on_ray.load([artifact])
    begin, passes, killed = on_ray._begin, [], []

    def begin_and_kill(shard, method, arguments):
        answer = begin(shard, method, arguments)
        passes.append(method == "assign" and shard == 1)
        if sum(passes) == at and not killed:
            killed.append(on_ray._shards[1])
            ray.kill(on_ray._shards[1])
        return answer

    monkeypatch.setattr(on_ray, "_begin", begin_and_kill)
    found = cluster(on_ray)
    assert killed
    assert killed[0] != on_ray._shards[1]
    in_process = request.getfixturevalue("in_process")
    with in_process(1) as one:
        one.load([artifact])
        assert cluster(one) == found


@pytest.mark.integration
def test_memory_of_a_shard_grows_as_its_formula_says(ray_cluster, make_artifact):
    width, sizes = 256, (40_000, 160_000)
    centroids = unit_rows(300, width, seed=8).astype(np.float32)
    found = []
    for n in sizes:
        rows = np.tile(unit_rows(10_000, width), (n // 10_000, 1))
        artifact = make_artifact(rows, [20_000] * (n // 20_000))
        with ShardGroup(1) as group:
            group.load([artifact])
            group.assign(centroids)
            group.assign(centroids, 32)
            found.append(group.peak_memory_gb)
    # The rows and the rotated rows; what else there is does not grow.
    expected = 2 * 2 * width * (sizes[1] - sizes[0]) / 1e9
    assert found[1] - found[0] == pytest.approx(expected, rel=0.35)


@pytest.mark.integration
@pytest.mark.timeout(120)
@pytest.mark.parametrize("on_ray", [2], indirect=True)
def test_a_shard_killed_in_a_search_leaves_no_trace(on_ray, make_artifact, tmp_path):
    on_ray.load([make_artifact(wide_rows(), WIDE_PARTS)])
    expected = list(on_ray.write_neighbors(Folder(str(tmp_path / "one")), 5, exclude="row"))
    found = []
    for part in on_ray.write_neighbors(Folder(str(tmp_path / "other")), 5, exclude="row"):
        if not found:
            ray.kill(on_ray._shards[0])
        found.append(part)
    assert found == expected


@pytest.mark.integration
@pytest.mark.parametrize("on_ray", [2], indirect=True)
def test_a_shards_complaint_arrives_as_it_was_raised(on_ray, make_artifact):
    rows = unit_rows(N_ROWS, 6)
    rows[100] = np.nan
    artifact = make_artifact(rows, PARTS)
    assert isinstance(artifact, Artifact)
    with pytest.raises(ValueError, match=r"^embedding of row 100 ") as error:
        on_ray.load([artifact])
    assert type(error.value) is ValueError
