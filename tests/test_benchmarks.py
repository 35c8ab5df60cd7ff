"""The benchmark runs, and prints one JSON object a line and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

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


def test_embed_prints_json_lines(tiny_encoder_dir: Path):
    # A process of its own, since it chooses the bucket of its Ray workers by the environment.
    ran = subprocess.run(
        [
            *(sys.executable, str(BENCHMARKS / "embed.py")),
            *("--quick", "--model", f"local-dir:{tiny_encoder_dir}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [line["case"] for line in lines] == list(NEARNESS)
    for line in lines:
        assert line.keys() >= REQUIRED
        assert line["speedup"] == pytest.approx(line["peer_seconds"] / line["seconds"], rel=0.1)
        assert NEARNESS[line["case"]](line), line
    assert lines[1]["speedup_over_fp32"] > 0
