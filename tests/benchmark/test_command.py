"""What the benchmark refuses before any work."""

from pathlib import Path

import pytest

from tac_ray.benchmark.command import Benchmark, run_benchmark


@pytest.mark.parametrize(
    ("option", "value"),
    [("seed", "3"), ("methods", "tac"), ("val-images", "/val"), ("labels", "none")],
)
def test_options_that_the_benchmark_decides_are_refused(tmp_path: Path, option: str, value: str):
    wanted = Benchmark(out=str(tmp_path / "out"), images=("/images",))
    with pytest.raises(ValueError, match=f"leave out --{option}"):
        run_benchmark(wanted, [f"--{option}", value])


@pytest.mark.parametrize("option", ["out", "store", "images", "data"])
def test_a_job_refuses_paths_that_vanish_with_it(monkeypatch: pytest.MonkeyPatch, option: str):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    paths = {"out": "/out", option: "a" if option in ("out", "store") else ("a",)}
    with pytest.raises(ValueError, match=f"{option}=a is relative to the job's temporary folder"):
        run_benchmark(Benchmark(**paths))  # type: ignore[arg-type]
