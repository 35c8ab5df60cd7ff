"""The benchmark over a few dozen images: every row, every seed, one start of Ray Train."""

import json
from pathlib import Path
from typing import Any

import pytest

from tac_ray.artifacts.store import Store
from tac_ray.benchmark.command import benchmark_command
from tac_ray.benchmark.datasets import class_folders
from tests.integration.conftest import write_images

pytestmark = pytest.mark.integration

N_TRAINED = 2 * 4  # SCAN, SIC, TAC, TAC with class names; from two seeds


@pytest.fixture(scope="module")
def common(
    nouns_file: Path, tiny_encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    """Options of all commands, with a store that they share."""
    return [
        *("--model", f"local-dir:{tiny_encoder_dir}"),
        *("--store", str(tmp_path_factory.mktemp("store"))),
        *("--seeds", "0,1"),
        *("--nouns", str(nouns_file)),
        *("--epochs", "2"),
        *("--batch-size", "30"),
        *("--part-rows", "25"),
        *("--centroid-restarts", "1"),
        *("--cluster-restarts", "2"),
    ]


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())  # type: ignore[no-any-return]


def test_the_main_table_of_a_folder(
    ray_cluster: None, common: list[str], images: Path, tmp_path: Path, capsys: Any
):
    command = ["--images", str(images), "--out", str(tmp_path / "out"), *common]
    benchmark_command(command)
    shown = capsys.readouterr().out
    assert f"train_heads {N_TRAINED} of {N_TRAINED}" in shown
    found = results(tmp_path / "out")["lines"]
    assert [line["row"] for line in found] == [
        "k-means on embeddings",
        "zero-shot (class names)",
        "SCAN",
        "SIC",
        "TAC without training",
        "TAC",
        "TAC with class names as nouns",
        "best",
    ]
    assert all(line["split"] == "all" for line in found)
    by_row = {line["row"]: line for line in found}
    assert by_row["k-means on embeddings"]["acc"] == {"mean": 100.0, "deviation": 0.0}
    assert by_row["zero-shot (class names)"]["acc"]["deviation"] is None
    assert by_row["TAC"]["seeds"] == [0, 1]
    text = (tmp_path / "out" / "results.md").read_text()
    assert text.strip() in shown
    assert "| k-means on embeddings | all | 100.0 ± 0.0 | 100.0 ± 0.0 | 100.0 ± 0.0 |" in text

    benchmark_command(command)
    assert "starting" not in capsys.readouterr().out
    assert results(tmp_path / "out")["lines"] == found


def test_a_folder_of_another_data_set_is_tested_by_both_protocols(
    ray_cluster: None, common: list[str], images: Path, tmp_path: Path
):
    root = tmp_path / "imagenet"
    write_images(root / "train", 20)
    write_images(root / "val", 10, seed=1)
    out = tmp_path / "out"
    where = ["--dataset", "imagenet", "--data", str(root), "--out", str(out)]
    small = ["--n-centroids", "9", "--resize", "32"]
    benchmark_command([*where, "--table", "6", *small, *common])
    found = results(out)["lines"]
    assert [(line["row"], line["split"], line["protocol"]) for line in found] == [
        ("k-means on embeddings", "train", "fitted on train"),
        ("k-means on embeddings", "test", "fitted on train"),
        ("k-means on embeddings", "test", "fitted on test"),
        ("TAC without training", "train", "fitted on train"),
        ("TAC without training", "test", "fitted on train"),
        ("TAC without training", "test", "fitted on test"),
        ("zero-shot (class names)", "train", "fitted on train"),
        ("zero-shot (class names)", "test", "fitted on train"),
        ("TAC", "train", "fitted on train"),
        ("TAC", "test", "fitted on train"),
    ]
    assert all(line["acc"]["mean"] == 100 for line in found[:3])


def test_a_folder_without_images_is_no_class(
    ray_cluster: None, silent_progress: Any, images: Path, tmp_path: Path
):
    store = Store(str(tmp_path / "store"), silent_progress)
    for root, classes in (("three", ["red", "green", "blue"]), ("one", ["red"])):
        (tmp_path / root / "notes").mkdir(parents=True)
        for name in classes:
            (tmp_path / root / name).symlink_to(images / name)
    found = class_folders(store, str(tmp_path / "three"))
    assert (found.train, found.test, found.n_clusters) == (str(tmp_path / "three"), None, 3)
    assert found.class_names == {name: name for name in ("blue", "green", "red")}
    with pytest.raises(ValueError, match="has 1 folders of images and should have at least 2"):
        class_folders(store, str(tmp_path / "one"))


def test_several_numbers_of_clusters_are_compared_without_labels(
    ray_cluster: None, common: list[str], images: Path, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")  # as in a job
    out = tmp_path / "out"
    where = ["--images", str(images), "--labels", "none", "--out", str(out)]
    benchmark_command([*where, "--n-clusters", "2,3", *common])
    assert results(out)["lines"] == []
    (judgments,) = results(out)["judgments"].values()
    assert [judgment["n_clusters"] for judgment in judgments] == [2, 3]
    assert all(-1 <= judgment["silhouette"] <= 1 for judgment in judgments)
    assert "take --n-clusters" in (out / "results.md").read_text()
    store = Path(common[common.index("--store") + 1])
    # Of each seed: images, and their words for each K.
    assert len(list(store.glob("sample_rows-*"))) == 2 * (1 + 2)


def test_what_is_not_there_or_does_not_fit_is_said_in_a_line(
    ray_cluster: None, common: list[str], images: Path, tmp_path: Path, capsys: Any
):
    with pytest.raises(SystemExit):
        benchmark_command(["--images", str(tmp_path / "none"), "--out", str(tmp_path), *common])
    assert "error: no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark_command(["--dataset", "dtd", "--out", str(tmp_path), *common])
    assert "1 of --dataset and 0 of --data should be as many" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark_command(
            ["--images", str(images), str(images), "--out", str(tmp_path), *common],
        )
    assert "2 cases are called 'colors, " in capsys.readouterr().err
    larger = ["512" if option == "30" else option for option in common]
    with pytest.raises(SystemExit):
        benchmark_command(["--images", str(images), "--out", str(tmp_path), *larger])
    said = capsys.readouterr()
    assert "batch_size=512 should be <= n_images=60" in said.err
    assert "find_centroids" not in said.out
