"""Two nodes with file systems of their own: home, temporary folder, shared memory and runs.

Each node is a process in a mount namespace, in which a fresh file system covers the same folder.
"""

import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.integration.conftest import free_port, tac_ray

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def can_unshare() -> bool:
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    )
    return tried.returncode == 0


pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not shutil.which("unshare") or not can_unshare(), reason="needs the right to mount"
    ),
]


@dataclass
class Cluster:
    """A head and a worker."""

    client: dict[str, str]
    """Environment of who submits jobs."""
    folder: Path
    """Where each node has a file system of its own."""


@pytest.fixture
def cluster(s3_server: str, tiny_encoder_dir: Path) -> Iterator[Cluster]:
    port, dashboard = free_port(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="n"))  # short: sockets lie in it
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    prepare = [
        # The encoder is brought to the head's disk alone.
        f"mount -t tmpfs tmpfs {folder} && mount -t tmpfs tmpfs /dev/shm",
        f"mkdir {folder}/home {folder}/tmp {folder}/ray",
        f"export HOME={folder}/home TMPDIR={folder}/tmp RAY_TMPDIR={folder}/ray",
    ]

    def node(name: str, *options: str, also: str = "true") -> subprocess.Popen[bytes]:
        command = [RAY, "start", "--block", "--num-cpus=1", "--disable-usage-stats", *options]
        command.append(f"--dashboard-agent-listen-port={free_port()}")
        script = " && ".join([*prepare, also, f"exec {shlex.join(command)}"])
        with (logs / f"{name}.log").open("w") as output:
            return subprocess.Popen(
                ["unshare", "--mount", "bash", "-c", script],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    logs = Path(tempfile.mkdtemp())
    nodes = [
        node(
            "head",
            "--head",
            f"--port={port}",
            f"--dashboard-port={dashboard}",
            also=f"cp -r {tiny_encoder_dir} {folder}/encoder",
        )
    ]

    def wait_for(code: str) -> None:
        deadline = time.monotonic() + 120
        probe = [RAY, "job", "submit", "--", sys.executable, "-c", code]
        while subprocess.run(probe, env=client, capture_output=True, timeout=90).returncode:
            assert time.monotonic() < deadline, [path.read_text() for path in logs.iterdir()]
            time.sleep(1)

    wait_for("pass")
    nodes.append(node("worker", f"--address=127.0.0.1:{port}"))
    wait_for("import ray; ray.init(); exit(len(ray.nodes()) != 2)")
    yield Cluster(client, folder)
    for process in reversed(nodes):
        process.terminate()
        process.wait(90)
    shutil.rmtree(folder)
    shutil.rmtree(logs)


def submit(cluster: Cluster, options: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    command = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "jobs/tac_s3.py"]
    return subprocess.run(
        [*command, *options, *more],
        env=cluster.client,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )


def test_nothing_depends_on_a_disk_that_nodes_share(
    cluster: Cluster, options: list[str], images: Path, tmp_path: Path
):
    client = boto3.client(
        "s3",
        endpoint_url=cluster.client["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="photos")
    for path in sorted(images.rglob("*.png")):
        key = f"in/{path.relative_to(images).as_posix()}"
        client.put_object(Bucket="photos", Key=key, Body=path.read_bytes())

    def changed(name: str, value: str) -> list[str]:
        at = elsewhere.index(name)
        return [*elsewhere[: at + 1], value, *elsewhere[at + 2 :]]

    elsewhere = options
    elsewhere = changed("--model", f"local-dir:{cluster.folder}/encoder")
    elsewhere = changed("--images", "s3://photos/in")

    refused = submit(cluster, elsewhere, "--out", str(cluster.folder / "run"))
    assert refused.returncode != 0
    assert f"out={cluster.folder}/run should be seen by all nodes" in refused.stdout

    done = submit(cluster, elsewhere, "--out", "s3://photos/runs/a")
    assert done.returncode == 0, done.stdout
    local = tac_ray("run", *options, "--out", str(tmp_path / "run"))
    output, _ = local.communicate(timeout=300)
    assert local.returncode == 0, output
    listed = client.list_objects_v2(Bucket="photos", Prefix="runs/a/clusters/")["Contents"]
    parts = [tmp_path / f"{i}.parquet" for i in range(len(listed))]
    for path, entry in zip(parts, listed, strict=True):
        client.download_file("photos", entry["Key"], str(path))
    columns = ["image_id", "cluster_id", "probability", "cluster_name"]
    expected = pq.read_table(tmp_path / "run" / "clusters", columns=columns).to_pydict()
    found = pq.read_table(parts, columns=columns).to_pydict()
    # The nodes have one core and this machine has more, which enters the last bits of a head.
    np.testing.assert_allclose(found.pop("probability"), expected.pop("probability"), atol=5e-3)
    assert found == expected
