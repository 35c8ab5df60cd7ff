"""Each benchmark runs, and prints one JSON object a line and nothing else."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
REQUIRED = {
    "benchmark",
    "case",
    "seconds",
    "peer",
    "peer_seconds",
    "speedup",
    "peak_rss_gb",
    "machine",
}


NEARNESS = {
    "embed-fp32": lambda line: line["lowest_cosine_to_peer"] > 0.999,
    "embed-bf16": lambda line: line["lowest_cosine_to_fp32"] > 0.999,
    "texts": lambda line: line["largest_difference"] < 1e-5,
    "list": lambda line: line["n_keys"] == 20_000,
}


def quick(name: str, *options: str) -> list[dict[str, Any]]:
    """What a benchmark prints: in a process of its own, as it chooses its cluster's environment."""
    ran = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), "--quick", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.mark.integration
def test_kmeans_prints_json_lines_and_comes_near_its_peers_objective():
    lines = quick("kmeans.py")
    assert [line["case"] for line in lines] == ["kmeans-k667", "kmeans-k4271"]
    for line in lines:
        assert line.keys() >= REQUIRED
        assert line["objective_ratio"] > 0.98
        assert line["corrected"] < 0.01


@pytest.mark.integration
def test_neighbors_print_json_lines_and_are_those_of_their_peer():
    exact, *joins = quick("neighbors.py", "--cases", "exact-50k", "join-200k")
    assert exact.keys() >= REQUIRED
    assert exact["recall"] > 0.999
    for line in joins:
        assert line.keys() >= REQUIRED | {"speedup_over_ivf"}
        assert line["recall"] > 0.93
        assert line["recall_told"] == pytest.approx(line["recall"], abs=0.03)


@pytest.mark.integration
def test_head_prints_json_lines_and_trains_as_its_peer():
    (line,) = quick("head.py", "--cases", "K=10-fp32", "--epochs", "1")
    assert line.keys() >= REQUIRED
    assert line["loss_difference"] < 1e-4
    assert line["samples_per_s"] > 0


def test_graph_prints_json_lines_and_finds_no_less_than_its_peer():
    lines = quick("graph.py")
    assert [line["case"] for line in lines] == ["K=10", "K=200"]
    for line in lines:
        assert line.keys() >= REQUIRED
        assert line["acc"] > line["peer_acc"] - 0.02


def test_embed_prints_json_lines(tiny_encoder_dir: Path):
    lines = quick("embed.py", "--model", f"local-dir:{tiny_encoder_dir}")
    assert [line["case"] for line in lines] == list(NEARNESS)
    for line in lines:
        assert line.keys() >= REQUIRED
        assert line["speedup"] == pytest.approx(line["peer_seconds"] / line["seconds"], rel=0.1)
        assert NEARNESS[line["case"]](line), line
    assert lines[1]["speedup_over_fp32"] > 0
