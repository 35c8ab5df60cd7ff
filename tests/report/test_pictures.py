import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tac_ray.artifacts.run import Run
from tac_ray.artifacts.schemas import CLUSTERS
from tac_ray.report.pictures import KINDS, PER_KIND, SIDE, choose_pictures, sheet_name
from tests.report.conftest import RunFactory, write_pictures

MOST, LEAST, NEXT = range(len(KINDS))


def assigned(cluster: list[int], probability: list[float], following: list[float]) -> pa.Table:
    n = len(cluster)
    columns = [range(n), map(str, range(n)), [None] * n, cluster, probability, [0] * n, following]
    columns.append(["name"] * n)
    arrays = [pa.array(list(c), f.type) for c, f in zip(columns, CLUSTERS, strict=True)]
    return pa.table(arrays, schema=CLUSTERS)


def chosen(table: pa.Table, cluster: int, kind: int) -> list[int]:
    rows = choose_pictures(table).to_pylist()
    return [r["image_id"] for r in rows if (r["cluster_id"], r["kind"]) == (cluster, kind)]


def test_each_kind_has_its_first_and_no_image_comes_twice():
    probability = [0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.56, 0.57, 0.58, 0.59]
    following = [0.0] * 10 + [0.4, 0.42, 0.41, 0.3]
    table = assigned([0] * 14, probability, following)
    assert chosen(table, 0, MOST) == [0, 1, 2, 3]
    assert chosen(table, 0, LEAST) == [9, 8, 7, 6]
    assert chosen(table, 0, NEXT) == [11, 10, 12, 13]  # margins 0.15, 0.16, 0.17, 0.29


def test_clusters_are_apart_and_small_ones_show_what_they_have():
    table = assigned([1, 0, 1, 1, 1, 1], [0.5, 0.9, 0.6, 0.7, 0.8, 0.9], [0.0] * 6)
    assert chosen(table, 0, MOST) == [1]
    assert chosen(table, 0, LEAST) == chosen(table, 0, NEXT) == []
    assert chosen(table, 1, MOST) == [5, 4, 3, 2]
    assert chosen(table, 1, LEAST) == [0]


def test_equal_images_stand_in_order_of_their_id_whatever_the_order_of_rows():
    table = assigned([0] * 30, [1.0] * 30, [0.0] * 30)
    shuffled = table.take(np.random.default_rng(0).permutation(30))
    assert choose_pictures(shuffled).equals(choose_pictures(table))
    assert chosen(table, 0, MOST) == [0, 1, 2, 3]


@pytest.mark.integration
def test_sheets_show_the_chosen_images_in_their_places(make_run: RunFactory, tmp_path: Path):
    uris = write_pictures(tmp_path / "images", [f"{i}.jpg" for i in range(40)])
    Path(uris[0]).unlink()  # gone since it was embedded
    run = make_run(uris, ["one", "two"])
    pictures = run.artifact("report").folder.read_table("pictures.parquet").to_pylist()
    assert len(pictures) == 2 * len(KINDS) * PER_KIND
    shown = {row["uri"] for row in pictures}
    assert run.artifact("report").facts["n_unread"] == int(uris[0] in shown)
    for row, column in places(pictures):
        at = (column * SIDE + SIDE // 2, row["kind"] * SIDE + SIDE // 2)
        pixel = np.array(sheet(run, row["cluster_id"]).getpixel(at), dtype=int)
        gone = row["uri"] == uris[0]
        wanted = [128] * 3 if gone else np.array(Image.open(row["uri"]).getpixel((20, 20)))
        assert np.abs(pixel - wanted).max() < 12


@pytest.mark.integration
def test_pictures_do_not_depend_on_how_parts_are_cut(make_run: RunFactory, tmp_path: Path):
    uris = write_pictures(tmp_path / "images", [f"{i}.jpg" for i in range(8)]) * 8_000
    run = make_run(uris, ["one", "two", "three"])
    assignment = run.artifact("assign_clusters:tac")
    assert len(assignment.manifest.parts) == 3
    whole = choose_pictures(pa.concat_tables(assignment.tables()))
    assert run.artifact("report").folder.read_table("pictures.parquet").equals(whole)


def places(pictures: list[dict]) -> list[tuple[dict, int]]:
    """Each picture with its column on the sheet."""
    seen: dict[tuple[int, int], int] = {}
    found = []
    for row in pictures:
        key = row["cluster_id"], row["kind"]
        found.append((row, seen.get(key, 0)))
        seen[key] = seen.get(key, 0) + 1
    return found


def sheet(run: Run, cluster: int) -> Image.Image:
    return Image.open(io.BytesIO(run.artifact("report").folder.read(sheet_name(cluster))))
