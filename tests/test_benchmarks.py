"""Each benchmark runs, and prints one JSON object a line and nothing else."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))
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


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark_prints_json_lines(
    path: Path,
    tiny_encoder_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(
        sys, "argv", [path.name, "--quick", "--model", f"local-dir:{tiny_encoder_dir}"]
    )
    runpy.run_path(str(path), run_name="__main__")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines
    for line in lines:
        assert line.keys() >= REQUIRED
        assert line["speedup"] == pytest.approx(line["peer_seconds"] / line["seconds"], rel=0.1)
        assert line["largest_difference"] < 1e-5
