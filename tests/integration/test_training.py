"""Training that loses a worker or its driver ends with the heads of one that did not."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tac_ray.artifacts.manifest import Artifact
from tac_ray.config import TrainHeadsConfig

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
Trained = tuple[bytes, list[dict[str, float]]]


def start(store: Path, n_workers: int = 2) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("train_job.py")), str(store), str(n_workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
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


def test_fewer_workers_may_begin():
    assert TrainHeadsConfig(n_workers=4, min_workers=2).min_workers == 2
    with pytest.raises(ValueError, match="min_workers=0 should be >= 1"):
        TrainHeadsConfig(min_workers=0)
