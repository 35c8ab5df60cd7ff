"""A whole run over a small collection: what it writes, keeps, refuses and assigns."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tac_ray
from tac_ray.artifacts.run import Run
from tac_ray.artifacts.schemas import CLUSTERS
from tac_ray.cli import run_command
from tac_ray.config import (
    CutGraphConfig,
    EmbedImagesConfig,
    EmbedNounsConfig,
    EncoderConfig,
    KMeansConfig,
    TacConfig,
    TrainHeadsConfig,
)
from tests.integration.conftest import files, write_images

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def config(
    images: Path, nouns_file: Path, tiny_encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> TacConfig:
    return tac_ray.best(
        images=str(images),
        n_clusters=3,
        out=str(tmp_path_factory.mktemp("runs") / "a"),
        encoder=EncoderConfig(model=f"local-dir:{tiny_encoder_dir}"),
        embed_nouns=EmbedNounsConfig(nouns=str(nouns_file)),
        embed_images=EmbedImagesConfig(part_rows=25),
        kmeans=KMeansConfig(cluster_restarts=2),
        train_heads=TrainHeadsConfig(epochs=3),
        methods=("kmeans", "train-free", "turtle", "graph", "tac"),
    )


@pytest.fixture(scope="module")
def finished(config: TacConfig, ray_cluster: None) -> Run:
    return tac_ray.run(config)


def test_table_has_every_image_once_with_a_named_cluster(finished: Run, images: Path):
    table = finished.clusters.to_table()
    assert table.schema.equals(CLUSTERS)
    assert table["image_id"].to_pylist() == list(range(60))
    assert table["uri"].to_pylist() == sorted(str(path) for path in images.rglob("*.png"))
    names = {row["cluster_id"]: row["name"] for row in finished.names.to_pylist()}
    assert len(set(names.values())) == 3
    assert table["cluster_name"].to_pylist() == [names[c] for c in table["cluster_id"].to_pylist()]
    assert all(1 / 3 <= p <= 1 for p in table["probability"].to_pylist())
    sizes = np.bincount(table["cluster_id"].to_numpy(), minlength=3)
    assert finished.names["size"].to_pylist() == sizes.tolist()


def test_labeled_tree_is_scored_for_every_method(finished: Run):
    assert set(finished.scores["all"]) == {"kmeans", "train-free", "turtle", "graph", "tac"}
    # Three plain colors fall apart under any encoder, also an untrained one.
    assert finished.scores["all"]["kmeans"]["acc"] == 1.0
    assert finished.scores["all"]["graph"]["acc"] == 1.0
    assert finished.scores["all"]["turtle"]["acc"] > 0.6
    document = json.loads(finished.artifact("evaluate").folder.read("metrics.json"))
    assert np.sum(document["splits"]["all"]["tac"]["confusion"]) == 60


def test_methods_beside_the_answer_are_written_too(finished: Run):
    for suffix in ("", "-kmeans", "-train-free", "-graph"):
        assert pq.read_table(Path(finished.out) / f"clusters{suffix}").num_rows == 60
        assert pq.read_table(Path(finished.out) / f"names{suffix}.parquet").num_rows == 3


def test_same_call_again_finds_every_stage_done(config: TacConfig, finished: Run):
    before = files(Path(finished.out) / "clusters")
    again = tac_ray.run(config)
    assert set(again.seconds.values()) == {0.0}
    assert files(Path(again.out) / "clusters") == before


def test_same_seed_in_an_empty_store_gives_the_same_bytes(
    config: TacConfig, finished: Run, tmp_path: Path
):
    again = tac_ray.run(dataclasses.replace(config, out=str(tmp_path / "b")))
    assert min(again.seconds.values()) > 0
    assert files(tmp_path / "b" / "clusters") == files(Path(finished.out) / "clusters")


def test_two_training_workers_and_three_shards_give_the_same_clusters(
    config: TacConfig, finished: Run, tmp_path: Path
):
    heads = dataclasses.replace(config.train_heads, n_workers=2)
    other = dataclasses.replace(config, out=str(tmp_path / "c"), n_shards=3, train_heads=heads)
    again = tac_ray.run(other)
    one, two = finished.clusters.to_table(), again.clusters.to_table()
    assert one["cluster_id"].to_pylist() == two["cluster_id"].to_pylist()
    np.testing.assert_allclose(one["probability"], two["probability"], atol=5e-3)
    neighbors = "find_neighbors:text"
    assert again.artifact(neighbors).manifest.parts == finished.artifact(neighbors).manifest.parts


def test_other_options_in_the_same_out_are_refused_without_replace(
    config: TacConfig, finished: Run
):
    with pytest.raises(FileExistsError, match=r"seed was 0, now 1.*--replace"):
        tac_ray.run(dataclasses.replace(config, seed=1))


def test_assign_puts_new_images_into_the_runs_clusters(finished: Run, tmp_path: Path):
    new = write_images(tmp_path / "new", 5, seed=1)
    assigned = tac_ray.assign(finished.out, images=str(new), out=str(tmp_path / "assigned"))
    table = assigned.clusters.to_table()
    assert table.num_rows == 15
    assert set(table["cluster_name"].to_pylist()) <= set(finished.names["name"].to_pylist())
    assert assigned.scores["new"]["tac"].keys() == {"acc", "nmi", "ari"}


def test_the_graph_of_a_sample_tells_clusters_of_all_and_of_new_images(
    config: TacConfig, tmp_path: Path
):
    sampled = dataclasses.replace(
        config,
        methods=("turtle", "graph"),
        out=str(tmp_path / "run"),
        cut_graph=CutGraphConfig(max_graph_rows=30, n_edges=8),
    )
    found = tac_ray.run(sampled)
    assert found.artifact("sample_rows:image").n_rows == 30
    assert found.artifact("find_neighbors:text of sample").n_rows == 30
    assert found.clusters.to_table().num_rows == 60
    assert found.scores["all"]["graph"]["acc"] > 0.9
    new = write_images(tmp_path / "new", 5, seed=1)
    assigned = tac_ray.assign(found.out, images=str(new), out=str(tmp_path / "assigned"))
    assert assigned.scores["new"]["graph"]["acc"] > 0.9
    again = dataclasses.replace(sampled, seed=5, match_run=found.out, out=str(tmp_path / "again"))
    names = [row["name"] for row in tac_ray.run(again).names.to_pylist()]
    assert names == [row["name"] for row in found.names.to_pylist()]


def test_a_run_over_a_grown_folder_keeps_the_ids_and_names_of_clusters(
    config: TacConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = write_images(tmp_path / "colors", 12)
    first = dataclasses.replace(
        config, images=str(folder), out=str(tmp_path / "first"), methods=("kmeans",)
    )
    before = tac_ray.run(first)
    for i in range(8):
        (folder / "red" / f"more{i}.png").write_bytes((folder / "red" / f"00{i}.png").read_bytes())
    again = dataclasses.replace(first, out=str(tmp_path / "again"), seed=9)
    unmatched = tac_ray.run(again)
    matched = tac_ray.run(
        dataclasses.replace(again, match_run=before.out, out=str(tmp_path / "matched"))
    )
    assert "3 clusters keep their id and name, new: none, gone: none" in capsys.readouterr().out

    def clusters(run: Run) -> dict[str, tuple[int, str]]:
        rows = run.clusters.to_table().to_pylist()
        return {row["uri"]: (row["cluster_id"], row["cluster_name"]) for row in rows}

    assert clusters(unmatched).items() != clusters(matched).items()  # or nothing is shown here
    assert clusters(before).items() < clusters(matched).items()
    assert len(clusters(matched)) == 44
    new = tac_ray.assign(matched.out, images=str(folder / "red"), out=str(tmp_path / "new"))
    assert clusters(new).items() < clusters(matched).items()
    with pytest.raises(ValueError, match="n_clusters=2 should be >= n_clusters=3"):
        tac_ray.run(
            dataclasses.replace(
                again, n_clusters=2, match_run=before.out, out=str(tmp_path / "fewer")
            )
        )


@pytest.mark.parametrize("method", ["agglomerative", "none"])
def test_nouns_may_be_chosen_by_another_clustering_or_not_at_all(
    config: TacConfig, finished: Run, tmp_path: Path, method: Literal["agglomerative", "none"]
):
    selection = dataclasses.replace(config.select_nouns, centroid_method=method)
    other = dataclasses.replace(
        config, out=str(tmp_path / "run"), methods=("train-free",), select_nouns=selection
    )
    found = tac_ray.run(
        dataclasses.replace(other, store=str(Path(finished.out).parent / "artifacts"))
    )
    n_selected = found.artifact("select_nouns").n_rows
    n_nouns = found.artifact("embed_nouns").n_rows
    assert n_selected == n_nouns if method == "none" else 0 < n_selected < n_nouns
    assert found.scores["all"]["train-free"]["acc"] == 1.0


def test_bad_images_are_kept_apart_and_the_run_goes_on(config: TacConfig, tmp_path: Path):
    mixed = write_images(tmp_path / "mixed", 6)
    bad = {"cut.jpg": (mixed / "red" / "000.png").read_bytes()[:200], "empty.png": b""}
    for name, data in bad.items():
        (mixed / "red" / name).write_bytes(data)
    methods = dataclasses.replace(
        config, images=str(mixed), out=str(tmp_path / "run"), methods=("kmeans",)
    )
    found = tac_ray.run(methods)
    assert found.clusters.to_table().num_rows == 18
    embedded = found.artifact("embed_images")
    failures = embedded.folder.read_table("failures.parquet").to_pylist()
    assert [Path(f["uri"]).name for f in failures] == ["cut.jpg", "empty.png"]
    assert {f["step"] for f in failures} == {"decode"}
    assert embedded.facts["n_failed"] == 2


def test_validation_images_are_scored_under_both_protocols(config: TacConfig, tmp_path: Path):
    val = write_images(tmp_path / "val", 4, seed=2)
    found = tac_ray.run(dataclasses.replace(config, val_images=str(val), out=str(tmp_path / "run")))
    assert set(found.scores) == {"train", "val"}
    expected = {"kmeans", "train-free", "turtle", "graph", "tac", "kmeans@val", "train-free@val"}
    assert set(found.scores["val"]) == expected
    assert found.scores["val"]["kmeans"]["acc"] == 1.0
    assert pq.read_table(tmp_path / "run" / "clusters-val").num_rows == 12


def test_unlabeled_folder_is_not_scored(config: TacConfig, tmp_path: Path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(Path(config.images).rglob("*.png"))):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
    found = tac_ray.run(
        dataclasses.replace(
            config, images=str(flat), out=str(tmp_path / "run"), methods=("train-free",)
        )
    )
    assert found.scores == {}
    assert found.clusters.to_table().num_rows == 60


def _without(options: list[str], *flags: str) -> list[str]:
    kept = list(options)
    for flag in flags:
        del kept[kept.index(flag) : kept.index(flag) + 2]
    return kept


BAD_INPUT = {
    "missing path": ({"--images": "nowhere"}, "no folder"),
    "fewer images than clusters": (
        {"--n-clusters": "61"},
        "n_images=60 should be >= n_clusters=61",
    ),
    "unknown model": ({"--model": "ViT-Z"}, "unknown --model ViT-Z"),
    "gelu with openai": ({"--model": "ViT-B-32"}, "ViT-B-32-quickgelu"),
    "missing weights": (
        {"--model": "ViT-B-32", "--pretrained": "lost.safetensors"},
        "no weights 'lost.safetensors'",
    ),
    "missing encoder folder": ({"--model": "local-dir:lost"}, "no open_clip_config.json"),
    "missing nouns": ({"--nouns": "lost.txt"}, "lost.txt"),
    "batch that leaves no step": (
        {"--methods": "tac", "--batch-size": "64", "--batch-over-n": "refuse"},
        "batch_size=64 should be <= n_images=60",
    ),
    "batch smaller than the workers": (
        {"--methods": "tac", "--batch-size": "3", "--n-workers": "2"},
        "batch_size=3 should be >= 2 x n_workers=2",
    ),
    "no more images than clusters": (
        {"--n-clusters": "60"},
        "n_images=60 should be > n_clusters=60",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_clear_line(
    case: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    changes, message = BAD_INPUT[case]
    kept = _without(options, *(flag for flag in changes if flag in options))
    changed = [word for pair in changes.items() for word in pair]
    _refused([*kept, *changed, "--out", str(tmp_path / "run")], message, capsys)
    assert not (tmp_path / "run").exists(), "a refused run is in the way of the corrected one"


def test_an_option_out_of_range_is_named(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    kept = _without(options, "--cluster-restarts")
    with pytest.raises(SystemExit) as ended:
        run_command([*kept, "--cluster-restarts", "0", "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert "cluster_restarts=0 should be >= 1" in capsys.readouterr().err


def test_folders_without_a_readable_image_are_refused(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rest = [*_without(options, "--images"), "--out", str(tmp_path / "run")]
    empty, text, broken = (tmp_path / name for name in ("empty", "text", "broken"))
    for folder in (empty, text, broken):
        folder.mkdir()
    _refused([*rest, "--images", str(empty)], "holds no files", capsys)
    (text / "a.txt").write_text("words")
    _refused([*rest, "--images", str(text)], "1 files (.txt) and no image", capsys)
    for i in range(5):
        (broken / f"{i}.jpg").write_text("words")
    _refused([*rest, "--images", str(broken)], "5 of 5 images could not be read", capsys)


def test_weights_of_another_architecture_are_refused(
    options: list[str],
    tiny_encoder_dir: Path,
    wider_encoder_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name, folder in (
        ("open_clip_config.json", tiny_encoder_dir),
        ("open_clip_model.safetensors", wider_encoder_dir),
    ):
        (mixed / name).write_bytes((folder / name).read_bytes())
    rest = [*_without(options, "--model"), "--out", str(tmp_path / "run")]
    _refused([*rest, "--model", f"local-dir:{mixed}"], "not of architecture", capsys)


def test_a_run_that_cannot_fit_is_refused(
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    import ray

    # A cluster of 0.5 GB: less than the libraries of one worker take.
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0, "memory": 5e8})
    _refused([*options, "--out", str(tmp_path / "run")], "not enough memory", capsys)


def _refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_command(arguments)
    assert ended.value.code not in (0, None)
    errors = capsys.readouterr().err.strip()
    assert message in errors
    assert len(errors.splitlines()) == 1, errors


def test_image_of_every_kind_a_viewer_shows(tmp_path: Path):
    # Guards the listing: each suffix it accepts is one that Pillow can open.
    from tac_ray.sources.listing import IMAGE_EXTENSIONS

    Image.init()
    assert set(Image.registered_extensions()) >= IMAGE_EXTENSIONS
