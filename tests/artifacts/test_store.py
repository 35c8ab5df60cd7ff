"""When a stage runs, where its artifact lies, and when it exists."""

import dataclasses
import hashlib
import json
import os
import uuid
from dataclasses import dataclass, field

import pyarrow as pa
import pytest

from tac_ray.artifacts.manifest import MANIFEST, Artifact, Manifest
from tac_ray.artifacts.storage import Folder
from tac_ray.artifacts.store import Store, hash_of, result_options


@dataclass(frozen=True)
class Inner:
    depth: int = 1
    workers: int = field(default=2, metadata={"changes_result": False})


@dataclass(frozen=True)
class Options:
    width: int = 8
    name: str | None = None
    batch_size: int = field(default=32, metadata={"changes_result": False})
    inner: Inner = Inner()


class Write:
    """A stage's work that counts how often it is done."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, writer) -> None:
        self.calls += 1
        writer.progress.start("count", 2, "parts")
        for rows in (3, 2):
            writer.add_part(pa.table({"n": list(range(rows))}))
            writer.progress.advance()
        writer.add_file("notes.txt", b"two parts", rows=7)
        writer.facts["answer"] = 42


@pytest.fixture
def store(tmp_path, silent_progress) -> Store:
    return Store(str(tmp_path / "store"), silent_progress)


@pytest.fixture(scope="module")
def s3_server():
    """Address of an object store of its own, reached over HTTP."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_path(s3_server, monkeypatch):
    """A folder in a new bucket, found through the standard variables."""
    import s3fs

    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # Filesystems are kept by their options, and a kept one would ask an older server.
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}/some/store"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.integration)])
def any_store(request, silent_progress) -> Store:
    """A store on a local path, and one on an object store."""
    if request.param == "s3":
        return Store(request.getfixturevalue("s3_path"), silent_progress)
    return Store(str(request.getfixturevalue("tmp_path") / "store"), silent_progress)


def run(store: Store, write=None, **changes) -> Artifact:
    arguments = {"version": 1, "options": Options(), "inputs": ["image-list"], **changes}
    return store.run_stage("count", **arguments, write=write or Write())


def test_a_stage_leaves_its_parts_files_and_facts(any_store):
    artifact = run(any_store)
    assert not artifact.reused
    assert artifact.folder.path == f"{any_store.path}/count-{artifact.fingerprint[:8]}"
    manifest = artifact.manifest
    assert [part.name for part in manifest.parts] == ["part-00000.parquet", "part-00001.parquet"]
    assert artifact.part_rows == [3, 2]
    assert artifact.n_rows == manifest.n_rows == 5
    assert [(file.name, file.rows) for file in manifest.files] == [("notes.txt", 7)]
    for part in [*manifest.parts, *manifest.files]:
        data = artifact.folder.read(part.name)
        assert part.bytes == len(data)
        assert part.sha256 == hashlib.sha256(data).hexdigest()
    assert manifest.n_bytes == sum(p.bytes for p in [*manifest.parts, *manifest.files])
    assert artifact.facts == {"answer": 42}
    assert manifest.stage == "count"
    assert manifest.version == 1
    assert manifest.inputs == ["image-list"]
    assert manifest.options == {"width": 8, "name": None, "inner": {"depth": 1}}
    assert manifest.seconds >= 0
    assert 0.01 < manifest.peak_memory_gb < 100
    assert {"python", "torch", "ray"} <= set(manifest.versions)
    loaded = Artifact.load(artifact.folder.path)
    assert loaded == artifact
    assert loaded.column("n").to_pylist() == [0, 1, 2, 0, 1]
    assert [table.num_rows for table in loaded.tables(["n"])] == [3, 2]


def test_a_finished_stage_is_not_done_again(any_store, silent_progress):
    write = Write()
    first = run(any_store, write)
    second = run(any_store, write)
    assert write.calls == 1
    assert second.reused
    assert second == first
    assert silent_progress.finished == [("count", False), ("count", True)]
    assert silent_progress.started == ["count"]


def test_a_stage_that_fails_leaves_no_artifact_and_runs_again(any_store, silent_progress):
    found = []

    def fail(writer):
        writer.add_part(pa.table({"n": [1]}))
        found.append(writer.folder)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(any_store, fail)
    [folder] = found
    assert folder.exists("part-00000.parquet")
    assert not folder.exists(MANIFEST)
    with pytest.raises(FileNotFoundError, match=r"no artifact at .*manifest\.json.*run the stage"):
        Artifact.load(folder.path)
    assert silent_progress.finished == []
    write = Write()
    artifact = run(any_store, write)
    assert write.calls == 1
    assert not artifact.reused
    assert artifact.folder == folder
    assert artifact.column("n").to_pylist() == [0, 1, 2, 0, 1]


def test_the_manifest_is_the_last_file(store, monkeypatch):
    written = []
    write_file = Folder.write

    def note(self, name, data):
        written.append(name)
        write_file(self, name, data)

    monkeypatch.setattr(Folder, "write", note)
    run(store)
    assert written == ["part-00000.parquet", "part-00001.parquet", "notes.txt", MANIFEST]


def test_absent_artifact_is_refused_with_the_path_and_the_remedy(any_store):
    path = f"{any_store.path}/count-00000000"
    with pytest.raises(FileNotFoundError, match=r"no artifact at .*run the stage") as error:
        Artifact.load(path)
    assert path in str(error.value)


def test_a_stray_file_is_not_read(any_store):
    artifact = run(any_store)
    stray = artifact.folder.read("part-00000.parquet")
    for name in ("part-00002.parquet", "part-00000-copy.parquet", ".part-00000.parquet.1234"):
        artifact.folder.write(name, stray)
    again = run(any_store)
    assert again.reused
    assert again.n_rows == 5
    assert again.column("n").to_pylist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {"options": Options(width=9)},
        {"options": Options(name="x")},
        {"options": Options(inner=Inner(depth=2))},
        {"version": 2},
        {"inputs": ["another list"]},
        {"inputs": ["image-list", "nouns"]},
        {"inputs": []},
    ],
    ids=["option", "none", "inner option", "version", "input", "more inputs", "no inputs"],
)
def test_what_changes_the_result_gives_another_artifact(store, changes):
    first = run(store)
    write = Write()
    other = run(store, write, **changes)
    assert write.calls == 1
    assert other.fingerprint != first.fingerprint
    assert other.folder != first.folder
    assert run(store).reused
    assert run(store, **changes).reused


def test_another_stage_gives_another_artifact(store):
    first = run(store)
    other = store.run_stage(
        "tally", version=1, options=Options(), inputs=["image-list"], write=Write()
    )
    assert other.fingerprint != first.fingerprint
    assert other.folder.path == f"{store.path}/tally-{other.fingerprint[:8]}"


@pytest.mark.parametrize(
    "options",
    [Options(batch_size=64), Options(inner=Inner(workers=9))],
    ids=["outer", "inner"],
)
def test_what_does_not_change_the_result_gives_the_same_artifact(store, options):
    first = run(store)
    again = run(store, options=options)
    assert again.reused
    assert again.fingerprint == first.fingerprint


def test_the_order_of_inputs_counts_and_the_order_of_options_does_not(store):
    first = run(store, inputs=["a", "b"])
    assert run(store, inputs=["b", "a"]).fingerprint != first.fingerprint
    one = run(store, options={"x": 1, "y": 2})
    assert run(store, options={"y": 2, "x": 1}).reused
    assert run(store, options={"x": 2, "y": 1}).fingerprint != one.fingerprint


def test_an_artifact_stands_for_its_fingerprint_as_an_input(store):
    first = run(store)
    by_artifact = run(store, inputs=[first])
    assert by_artifact.manifest.inputs == [first.fingerprint]
    assert run(store, inputs=[first.fingerprint]).reused
    upstream = run(store, version=2)
    assert run(store, inputs=[upstream]).fingerprint != by_artifact.fingerprint


def test_an_artifact_does_not_depend_on_where_the_store_lies(tmp_path, silent_progress):
    one, other = (run(Store(str(tmp_path / name), silent_progress)) for name in "ab")
    assert one.fingerprint == other.fingerprint
    assert one.manifest.parts == other.manifest.parts
    assert not other.reused


def test_another_artifact_in_the_same_folder_makes_room(store):
    artifact = run(store)
    stranger = dataclasses.replace(
        artifact.manifest, fingerprint=artifact.fingerprint[:8] + "0" * 56
    )
    artifact.folder.write(MANIFEST, stranger.to_json())
    artifact.folder.write("left.over", b"from the other")
    write = Write()
    again = run(store, write)
    assert write.calls == 1
    assert again.fingerprint == artifact.fingerprint
    assert not again.folder.exists("left.over")


def test_unfinished_files_are_there_for_the_next_try(store):
    def fail(writer):
        writer.folder.write("staging/block", b"done")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        run(store, fail)
    run(store, lambda writer: writer.facts.update(found=writer.folder.exists("staging/block")))
    assert run(store).facts == {"found": True}


def test_workers_memory_enters_the_manifest(store):
    def write(writer):
        writer.note_memory(123.0)
        writer.note_memory(1.0)

    assert run(store, write).manifest.peak_memory_gb == 123.0


def test_manifests_round_trip_as_json(store):
    manifest = run(store).manifest
    raw = json.loads(manifest.to_json())
    assert raw["parts"][0]["rows"] == 3
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_options_that_change_the_result_are_kept_at_every_depth():
    kept = result_options(Options(width=3, inner=Inner(depth=4, workers=5)))
    assert kept == {"width": 3, "name": None, "inner": {"depth": 4}}
    assert hash_of({"a": 1, "b": 2}) == hash_of({"b": 2, "a": 1})
    assert hash_of({"a": 1}) != hash_of({"a": "1"})


def test_an_option_added_later_counts_only_away_from_its_default():
    added = field(default="old", metadata={"hash_default": False})
    later = dataclasses.make_dataclass("Later", [("width", int, 8), ("way", str, added)])
    assert result_options(later()) == {"width": 8}
    assert result_options(later(way="new")) == {"width": 8, "way": "new"}


@pytest.mark.integration
def test_an_object_store_is_written_by_whole_files(s3_path):
    folder = Folder(s3_path)
    with pytest.raises(FileNotFoundError):
        folder.read("absent")
    folder.write("deep/file", b"one")
    assert folder.read("deep/file") == b"one"
    folder.write("deep/file", b"two")
    # A reader that looked before sees the new file, and not a listing it kept.
    assert folder.read("deep/file") == b"two"
    assert not folder.exists("later")
    folder.write("later", b"3")
    assert folder.exists("later")
    folder.remove("later")
    folder.remove("later")
    assert not folder.exists("later")
    folder.remove()
    assert not folder.exists("deep/file")
