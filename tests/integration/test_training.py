"""Training that loses a worker or its driver ends with the heads of one that did not."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.store import Store
from tac_ray.config import TrainHeadsConfig
from tac_ray.stages.train_heads import train_heads, train_heads_together
from tests.integration.train_job import K, inputs, training

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
Trained = tuple[bytes, list[dict[str, float]]]


def start(store: Path, n_workers: int = 2, *options: str) -> subprocess.Popen[str]:
    job = Path(__file__).with_name("train_job.py")
    return subprocess.Popen(
        [sys.executable, str(job), str(store), str(n_workers), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            # Ray Train may ask for workers on a node that is gone, and tries again after this.
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
            # It looks for checkpoints every 2 s, in which several of these short epochs end: one
            # that is killed in between has lost them. A lost node needs longer than the epochs.
            **({} if "lose-node" in options else {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1"}),
        },
    )


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    yield from process.stdout


def finish(process: subprocess.Popen[str], at: Callable[[int], None] = lambda _: None) -> list[str]:
    """All lines; `at` is called with the number of each epoch that this process told of."""
    seen, n_epochs = [], 0
    for line in lines(process):
        seen.append(line)
        if line.startswith("epoch"):
            n_epochs += 1
            at(n_epochs)
    process.wait(timeout=60)
    return seen


def trained(seen: list[str]) -> Trained:
    """The bytes of the heads, and the metrics but for their seconds."""
    told = [line.split()[1] for line in seen if line.startswith("artifact")]
    assert told, seen
    artifact = Artifact.load(told[-1])
    metrics = [json.loads(line) for line in artifact.folder.read("metrics.jsonl").splitlines()]
    for line in metrics:
        assert line.pop("seconds") > 0
        assert line.pop("samples_per_s") > 0
    return artifact.folder.read("heads.safetensors"), metrics


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    store = tmp_path_factory.mktemp("undisturbed")
    found = trained(finish(start(store)))
    assert list((store / "board").glob("events.out.tfevents.*"))
    return found


def test_metrics_tell_of_each_epoch(undisturbed: Trained):
    _, metrics = undisturbed
    assert [line["epoch"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "distillation", "confidence", "balance", "entropy", "n_empty", "changed"} < set(
        metrics[0]
    )
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[0]["changed"] == 1 > metrics[-1]["changed"]


def test_a_worker_killed_at_epoch_3_leaves_no_trace(undisturbed: Trained, tmp_path: Path):
    process = start(tmp_path)
    killed: list[int] = []

    def at(epoch: int) -> None:
        if epoch == 3:
            job = psutil.Process(process.pid)
            workers = [p for p in job.children(recursive=True) if "TrainWorker" in p.name()]
            assert len(workers) == 2
            workers[1].send_signal(signal.SIGKILL)
            killed.append(epoch)

    seen = finish(process, at)
    assert killed
    assert trained(seen) == undisturbed
    # Some epochs were told of twice, but it did not begin anew.
    assert 6 <= sum(line.startswith("epoch") for line in seen) < 9


def test_a_driver_killed_at_epoch_4_leaves_no_trace(undisturbed: Trained, tmp_path: Path):
    process = start(tmp_path)

    def at(epoch: int) -> None:
        if epoch == 4:
            process.send_signal(signal.SIGKILL)

    assert not any(line.startswith("artifact") for line in finish(process, at))
    seen = finish(start(tmp_path))
    assert trained(seen) == undisturbed
    assert sum(line.startswith("epoch") for line in seen) <= 3


def test_a_lost_node_leaves_the_training_to_the_others(undisturbed: Trained, tmp_path: Path):
    # Each node has room for two workers; three begin, and two go on.
    seen = finish(start(tmp_path, 3, "lose-node"))
    _, metrics = trained(seen)
    artifact = next(line.split()[1] for line in seen if line.startswith("artifact"))
    assert Artifact.load(artifact).facts["n_workers"] == 2
    assert 6 <= sum(line.startswith("epoch") for line in seen) <= 8
    _, expected = undisturbed
    assert [line["epoch"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    for line, other in zip(metrics, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_heads_trained_together_are_those_trained_alone(
    ray_cluster: None, silent_progress: Any, tmp_path: Path
):
    config = TrainHeadsConfig(epochs=2, batch_size=256)
    artifacts = inputs(str(tmp_path))
    wanted = [
        training(config, artifacts, seed=0),
        dataclasses.replace(training(config, artifacts, seed=1), n_clusters=K + 3),
    ]
    together = train_heads_together(Store(str(tmp_path / "a"), silent_progress), [*wanted, *wanted])
    assert [name for name, _ in silent_progress.finished] == [
        "train_heads 1 of 2",
        "train_heads 2 of 2",
    ]
    assert together[:2] == together[2:]
    for both, one in zip(together, wanted, strict=False):
        (alone,) = train_heads_together(Store(str(tmp_path / "b"), silent_progress), [one])
        assert both.fingerprint == alone.fingerprint
        assert both.manifest.files[0] == alone.manifest.files[0]  # the weights
        assert both.facts == alone.facts
    assert not list((tmp_path / "a").glob("*checkpoints"))
    again = train_heads_together(Store(str(tmp_path / "a"), silent_progress), wanted)
    assert all(artifact.reused for artifact in again)


def test_heads_that_ended_before_the_driver_was_killed_are_not_trained_again(
    undisturbed: Trained, tmp_path: Path
):
    process = start(tmp_path, 2, "two-seeds")

    def at(epoch: int) -> None:
        if epoch == 10:  # the fourth of the second heads
            process.send_signal(signal.SIGKILL)

    first = finish(process, at)
    assert sum(line.startswith("artifact") for line in first) == 1
    seen = finish(start(tmp_path, 2, "two-seeds"))
    assert trained(seen) == undisturbed
    assert sum(line.startswith("epoch") for line in seen) <= 3


def test_a_worker_killed_in_the_second_heads_leaves_the_first(undisturbed: Trained, tmp_path: Path):
    process = start(tmp_path, 2, "two-seeds")

    def at(epoch: int) -> None:
        if epoch == 9:
            job = psutil.Process(process.pid)
            workers = [p for p in job.children(recursive=True) if "TrainWorker" in p.name()]
            workers[1].send_signal(signal.SIGKILL)

    seen = finish(process, at)
    assert trained(seen) == undisturbed
    assert 12 <= sum(line.startswith("epoch") for line in seen) < 15


def test_heads_that_collapse_are_warned_of(ray_cluster: None, silent_progress: Any, tmp_path: Path):
    config = TrainHeadsConfig(epochs=2, batch_size=256, balance_weight=0.0, learning_rate=1.0)
    store = Store(str(tmp_path), silent_progress)
    heads = train_heads(store, config, *inputs(str(tmp_path)), n_clusters=K, seed=0)
    kept = json.loads(heads.folder.read("heads.json"))["warnings"]
    assert "clusters have collapsed" in kept[0]
    assert "8 of 10 clusters are empty; lower --n-clusters" in kept[1]
    assert heads.facts["warnings"] == kept
    assert [said for said in silent_progress.said if "warning" in said] == [
        f"warning: {text}" for text in kept
    ]


def test_a_loss_that_is_not_finite_ends_the_training(
    ray_cluster: None, silent_progress: Any, tmp_path: Path
):
    config = TrainHeadsConfig(epochs=50, batch_size=256, learning_rate=1e30)
    store = Store(str(tmp_path), silent_progress)
    with pytest.raises(ValueError, match=r"not finite in epoch 1: .*lower --learning-rate"):
        train_heads(store, config, *inputs(str(tmp_path)), n_clusters=K, seed=0)
    assert silent_progress.advanced == 0
    assert [name for name, _ in silent_progress.finished] == []
