"""A job on a cluster that starts without workers, grows, loses nodes, and shrinks again.

Ray's own autoscaler starts and stops the nodes, which are processes of this machine. Their GPU is
a number without a device behind it: the encoder and the heads compute on the CPU.
"""

import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import psutil
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from tests.integration.conftest import NOUNS, free_port, write_images

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "cluster_configs" / "local-autoscaling.yaml"
RAY = str(Path(sys.executable).with_name("ray"))
COLUMNS = ["image_id", "uri", "cluster_id", "probability", "cluster_name"]


@dataclass
class Cluster:
    """A head that an autoscaler gives workers to, and an S3 server."""

    client: dict[str, str]
    """Environment of who submits jobs."""
    gcs_port: int

    def nodes(self) -> list[psutil.Process]:
        """Raylets of the workers."""
        return [
            process
            for process in psutil.process_iter(["name", "cmdline"])
            if process.info["name"] == "raylet"
            and any(f":{self.gcs_port}" in word for word in process.info["cmdline"] or [])
            and not any("--head" in word for word in process.info["cmdline"] or [])
        ]

    def kill_node_of(self, title: str) -> None:
        """SIGKILL the raylet of a worker node that runs a process with this in its title."""
        for raylet in self.nodes():
            if any(title in name for name in titles(raylet)):
                raylet.send_signal(signal.SIGKILL)
                return
        raise AssertionError(f"no worker node runs {title}")

    def runs(self, title: str) -> bool:
        """Whether a worker node runs a process with this in its title."""
        return any(title in name for raylet in self.nodes() for name in titles(raylet))


def titles(raylet: psutil.Process) -> list[str]:
    found = []
    try:
        for child in raylet.children(recursive=True):
            found.append(" ".join(child.cmdline()))
    except psutil.NoSuchProcess:
        pass
    return found


@pytest.fixture(scope="module")
def s3_of_module() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def cluster(s3_of_module: str) -> Iterator[Cluster]:
    port, dashboard = free_port(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="ray"))  # short: sockets lie in it
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": str(folder),
        "AWS_ENDPOINT_URL": s3_of_module,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    config = yaml.safe_load(CONFIG.read_text())
    head_id = config["provider"]["head_node_id"]
    config["provider"]["gcs_address"] = f"{ray.util.get_node_ip_address()}:{port}"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    log = folder / "head.log"
    with log.open("w") as output:
        head = subprocess.Popen(
            [
                *(RAY, "start", "--head", "--block", "--num-cpus=1", f"--port={port}"),
                f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={free_port()}",
                f"--autoscaling-config={folder / 'config.yaml'}",
                "--disable-usage-stats",
            ],
            env={
                **environment,
                "RAY_enable_autoscaler_v2": "1",
                "RAY_FAKE_CLUSTER": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_CLOUD_INSTANCE_ID": head_id,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": head_id,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    client = {**environment, "RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    deadline = time.monotonic() + 120
    probe = [RAY, "job", "submit", "--", "true"]
    while subprocess.run(probe, env=client, capture_output=True, timeout=60).returncode:
        assert time.monotonic() < deadline, "the cluster did not come up"
        assert head.poll() is None, log.read_text()
        time.sleep(1)
    started = Cluster(client, port)
    yield started
    for node in started.nodes():
        node.kill()
    head.terminate()
    head.wait(90)
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Job:
    """A submitted job whose log is a file."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait_for(self, what: Callable[[], bool], timeout_s: float = 180) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def told(self, text: str) -> bool:
        return text in self.log.read_text()


@pytest.fixture(scope="module")
def bucket(s3_of_module: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A bucket of 1,500 images below in/."""
    client = boto3.client(
        "s3",
        endpoint_url=s3_of_module,
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="photos")
    root = write_images(tmp_path_factory.mktemp("images") / "colors", 500)
    for path in sorted(root.rglob("*.png")):
        key = f"in/{path.relative_to(root).as_posix()}"
        client.put_object(Bucket="photos", Key=key, Body=path.read_bytes())
    return client


def submit(cluster: Cluster, encoder: Path, folder: Path, run: str) -> Job:
    nouns, log = folder / "nouns.txt", folder / f"{run}.log"
    nouns.write_text("\n".join(NOUNS))
    # Without --working-dir: every node unpacks it anew, and these share the place, unlike others.
    command = [RAY, "job", "submit", "--", sys.executable, str(ROOT / "jobs" / "tac_s3.py")]
    options = [
        *("--images", "s3://photos/in", "--n-clusters", "3", "--n-gpus", "2"),
        *("--model", f"local-dir:{encoder}", "--precision", "fp32", "--nouns", str(nouns)),
        *("--part-rows", "300", "--cluster-restarts", "2", "--methods", "kmeans", "tac"),
        *("--epochs", "100", "--batch-size", "64", "--checkpoint-every", "10"),
        *("--out", f"s3://photos/{run}/run"),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options], env=cluster.client, cwd=ROOT, stdout=output, stderr=output
        )
    return Job(process, log)


def table(bucket: Any, run: str, folder: Path) -> dict[str, list[Any]]:
    listed = bucket.list_objects_v2(Bucket="photos", Prefix=f"{run}/run/clusters/")["Contents"]
    parts = []
    for i, entry in enumerate(listed):
        parts.append(folder / f"{run}{i}.parquet")
        bucket.download_file("photos", entry["Key"], str(parts[-1]))
    return pq.read_table(parts, columns=COLUMNS).to_pydict()


def stored(bucket: Any, prefix: str) -> list[str]:
    listed = bucket.list_objects_v2(Bucket="photos", Prefix=prefix)
    return [entry["Key"] for entry in listed.get("Contents", [])]


def test_the_cluster_grows_loses_nodes_and_shrinks(
    cluster: Cluster, bucket: Any, tiny_encoder_dir: Path, tmp_path: Path
):
    assert cluster.nodes() == []
    job = submit(cluster, tiny_encoder_dir, tmp_path, "undisturbed")
    job.wait_for(lambda: len(cluster.nodes()) == 2)
    assert job.process.wait(500) == 0, job.log.read_text()
    expected = table(bucket, "undisturbed", tmp_path)
    assert len(expected["uri"]) == 1500
    assert not job.told("was lost")

    job = submit(cluster, tiny_encoder_dir, tmp_path, "disturbed")
    job.wait_for(lambda: len(stored(bucket, "disturbed/artifacts/embeddings/")) > 1)
    cluster.kill_node_of("EncodePixels")
    # A checkpoint of the heads is there: it is gone on from, not begun anew.
    heads = "disturbed/artifacts/train_heads-"
    job.wait_for(lambda: any("/checkpoint_" in key for key in stored(bucket, heads)), 400)
    cluster.kill_node_of("RayTrainWorker")
    assert job.process.wait(500) == 0, job.log.read_text()
    assert table(bucket, "disturbed", tmp_path) == expected
    assert job.log.read_text().count("was lost") == 2

    deadline = time.monotonic() + 120
    while cluster.nodes():
        assert time.monotonic() < deadline, "idle workers stay"
        time.sleep(1)


def test_a_request_without_the_token_is_refused(cluster: Cluster):
    stranger = {name: cluster.client[name] for name in cluster.client if "RAY_AUTH" not in name}
    stranger["HOME"] = tempfile.gettempdir()  # where no token lies
    asked = subprocess.run(
        [RAY, "job", "submit", "--", "true"], env=stranger, capture_output=True, text=True
    )
    assert asked.returncode != 0
    assert "uthentication" in asked.stdout + asked.stderr
