"""The jobs under `ray job submit`, on a cluster of one machine with token authentication."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tac_ray.artifacts.run import Run
from tests.integration.conftest import free_port

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Environment of a client of a cluster started with `ray start --head`."""
    port, dashboard = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray")  # short: sockets lie in it
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": folder,
    }
    command = [RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    log = Path(folder) / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [
                *command,
                f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={free_port()}",
                "--disable-usage-stats",
            ],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    client = {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    deadline = time.monotonic() + 90
    # A cluster lists jobs before it takes any: its agent comes up last.
    probe = [RAY, "job", "submit", "--", "true"]
    while subprocess.run(probe, env=client, capture_output=True).returncode:
        assert time.monotonic() < deadline, "the cluster did not come up"
        assert head.poll() is None, log.read_text()
        time.sleep(1)
    yield client
    head.terminate()
    head.wait(90)
    shutil.rmtree(folder, ignore_errors=True)


def test_job_over_a_folder_gives_the_table(
    cluster: dict[str, str], options: list[str], tmp_path: Path
):
    done = _submit(cluster, "jobs/tac_s3.py", *options, "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout
    assert "TAC without training" in done.stdout
    assert pq.read_table(tmp_path / "run" / "clusters").num_rows == 60


def test_job_refuses_a_folder_that_would_vanish_with_it(
    cluster: dict[str, str], options: list[str]
):
    done = _submit(cluster, "jobs/tac_s3.py", *options, "--out", "runs/a")
    assert done.returncode != 0
    assert "out=runs/a is relative to the job's temporary folder" in done.stdout


def test_a_stopped_job_goes_on_when_it_is_submitted_again(
    cluster: dict[str, str], options: list[str], tmp_path: Path
):
    out = tmp_path / "run"
    command = ["jobs/tac_s3.py", *options, "--out", str(out)]
    begun = _submit(cluster, *command, how=["--submission-id", "stopped", "--no-wait"])
    assert begun.returncode == 0, begun.stdout
    deadline = time.monotonic() + 120
    while not (out / "run.json").exists() or "embed_images" not in Run.load(str(out)).artifacts:
        assert time.monotonic() < deadline, "no images were embedded"
        time.sleep(0.1)
    stopped = subprocess.run([RAY, "job", "stop", "stopped"], env=cluster, capture_output=True)
    assert b"was stopped" in stopped.stdout + stopped.stderr
    assert not Run.load(str(out)).finished

    done = _submit(cluster, *command)
    assert done.returncode == 0, done.stdout
    assert "embed_images: 60 rows, done before" in done.stdout
    assert pq.read_table(out / "clusters").num_rows == 60


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs tinyimagenet-val and mnv2-tiny beside it")
def test_imagenet_job_scores_train_and_val(cluster: dict[str, str], tmp_path: Path):
    classes = sorted((SHARED / "data" / "tinyimagenet-val").iterdir())[:20]
    for folder in classes:
        for i, path in enumerate(sorted(folder.iterdir())[:20]):
            half = tmp_path / ("train", "val")[i % 2] / folder.name
            half.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, half)
    nouns = tmp_path / "nouns.txt"
    nouns.write_text("goldfish\nsalamander\nbullfrog\nalligator\nboa\nspider\ncentipede\nkoala\n")
    done = _submit(
        cluster,
        "jobs/tac_imagenet.py",
        *("--images", str(tmp_path / "train"), "--val-images", str(tmp_path / "val")),
        *("--n-clusters", "20", "--model", f"local-dir:{SHARED / 'encoders' / 'mnv2-tiny'}"),
        *("--nouns", str(nouns), "--epochs", "5", "--out", str(tmp_path / "run")),
    )
    assert done.returncode == 0, done.stdout
    scores = Run.load(str(tmp_path / "run")).scores
    assert set(scores) == {"train", "val"}
    # By chance, 10 images of each of 20 classes reach about 0.17 after the best matching.
    assert scores["val"]["kmeans"]["acc"] > 0.25
    assert {"kmeans@val", "train-free@val"} <= set(scores["val"])


def _submit(
    cluster: dict[str, str], job: str, *arguments: str, how: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", "submit", *how, "--working-dir", ".", "--", "python", job, *arguments]
    return subprocess.run(
        command,
        env=cluster,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
