"""A run killed in every stage goes on from the last finished one and ends with the same table."""

import signal
from pathlib import Path

import pytest

from tests.integration.conftest import files, tac_ray

pytestmark = pytest.mark.integration

STAGES = (
    "embed_images",
    "embed_nouns",
    "find_centroids semantic",
    "select_nouns",
    "build_counterparts",
    "find_neighbors image",
    "train_heads",
    "cut_graph",
    "fit_head",
    "assign_clusters kmeans",
    "evaluate",
)


def test_killed_in_each_stage_in_turn_ends_with_the_same_table(options: list[str], tmp_path: Path):
    options = [*options, "--methods", "kmeans", "train-free", "tac", "graph"]
    undisturbed = tac_ray("run", *options, "--out", str(tmp_path / "undisturbed" / "run"))
    output, _ = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, output

    command = ("run", *options, "--out", str(tmp_path / "killed" / "run"))
    for i, stage in enumerate(STAGES):
        lines = _kill_when(command, stage)
        for finished in STAGES[: max(0, i - 1)]:  # the one before was killed
            told = [line for line in lines if line.startswith(finished)]
            assert told, lines
            assert not any("starting" in line for line in told), lines
    last = tac_ray(*command)
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    for folder in ("clusters", "clusters-kmeans", "clusters-train-free", "clusters-tac"):
        before = files(tmp_path / "undisturbed" / "run" / folder)
        assert files(tmp_path / "killed" / "run" / folder) == before

    status = tac_ray("status", str(tmp_path / "killed" / "run"))
    output, _ = status.communicate(timeout=60)
    assert status.returncode == 0
    for stage in STAGES:
        assert stage.split()[0] in output


def _kill_when(command: tuple[str, ...], stage: str) -> list[str]:
    """Start the run, kill it when the stage starts, and give what it printed."""
    process = tac_ray(*command)
    assert process.stdout is not None
    seen = []
    for printed in process.stdout:
        seen.append(printed)
        if printed.startswith(stage) and "starting" in printed:
            break
    else:
        pytest.fail(f"never saw {stage} start in {seen}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return seen
