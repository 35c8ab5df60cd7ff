"""The same run with images, store and results on S3, spoken over HTTP to a local server."""

import time
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from tests.integration.conftest import free_port, tac_ray

pytestmark = pytest.mark.integration


S3 = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@pytest.fixture
def s3(s3_server: str) -> dict[str, str]:
    """Environment of a client of an S3 server with one empty bucket, "photos"."""
    environment = {**S3, "AWS_ENDPOINT_URL": s3_server}
    _client(environment).create_bucket(Bucket="photos")
    return environment


def test_bucket_to_bucket_gives_the_table_of_a_folder(
    s3: dict[str, str], options: list[str], images: Path, tmp_path: Path
):
    client = _client(s3)
    for path in sorted(images.rglob("*.png")):
        key = f"in/{path.relative_to(images).as_posix()}"
        client.put_object(Bucket="photos", Key=key, Body=path.read_bytes())
    at = options.index("--images")
    elsewhere = [*options[:at], "--images", "s3://photos/in", *options[at + 2 :]]
    _finished("run", *elsewhere, "--out", "s3://photos/runs/a", **s3)
    _finished("run", *options, "--out", str(tmp_path / "run"))
    listed = client.list_objects_v2(Bucket="photos", Prefix="runs/a/clusters/")["Contents"]
    parts = [tmp_path / f"{i}.parquet" for i in range(len(listed))]
    for path, entry in zip(parts, listed, strict=True):
        client.download_file("photos", entry["Key"], str(path))
    columns = ["image_id", "cluster_id", "probability", "cluster_name"]
    found = pq.read_table(parts, columns=columns).to_pydict()
    expected = pq.read_table(tmp_path / "run" / "clusters", columns=columns).to_pydict()
    for column in columns:
        assert found[column] == expected[column], column
    assert pq.read_table(parts)["uri"][0].as_py().startswith("s3://photos/in/")

    assert "embed_images" in _finished("status", "s3://photos/runs/a", **s3)


def test_a_bucket_that_is_away_for_a_minute_is_waited_for(
    options: list[str], images: Path, tmp_path: Path
):
    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    s3 = {**S3, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    client = _client(s3)
    client.create_bucket(Bucket="outage")
    for path in sorted(images.rglob("*.png")):
        key = f"in/{path.relative_to(images).as_posix()}"
        client.put_object(Bucket="outage", Key=key, Body=path.read_bytes())
    at = options.index("--images")
    elsewhere = [*options[:at], "--images", "s3://outage/in", *options[at + 2 :]]
    process = tac_ray("run", *elsewhere, "--out", "s3://outage/runs/a", **s3)
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith("embed_images: starting"):
            server.stop()
            assert server._server is not None
            server._server.server_close()
            time.sleep(60)
            server = ThreadedMotoServer(host, port, verbose=False)
            server.start()
    assert process.wait(300) == 0, seen
    server.stop()
    assert "60 rows, 60 new" in "".join(seen)


def _finished(*arguments: str, **environment: str) -> str:
    """What the command line printed."""
    process = tac_ray(*arguments, **environment)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


def _client(environment: dict[str, str]):  # boto3's clients have no static type
    return boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
