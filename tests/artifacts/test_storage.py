"""Files written whole, and embedding columns there and back."""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError, ReadTimeoutError

from tac_ray.artifacts import storage
from tac_ray.artifacts.run import Run
from tac_ray.artifacts.schemas import matrix, matrix_column
from tac_ray.artifacts.storage import (
    Folder,
    absolute,
    array_bytes,
    array_from,
    is_local,
    table_bytes,
    table_from,
)


def test_a_file_is_read_as_it_was_written(tmp_path):
    folder = Folder(str(tmp_path / "a" / "b"))
    assert not folder.exists("deep/file.bin")
    folder.write("deep/file.bin", b"one")
    folder.write("deep/file.bin", b"two")
    assert folder.exists("deep/file.bin")
    assert folder.read("deep/file.bin") == b"two"
    assert [p.name for p in (tmp_path / "a" / "b" / "deep").iterdir()] == ["file.bin"]


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    folder = Folder(str(tmp_path))
    folder.write("file.bin", b"old")
    write_bytes = Path.write_bytes

    def fail(self, *args):
        if step == "write_bytes":
            write_bytes(self, args[0][:2])  # a part of it has reached the disk
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, step, fail)
        with pytest.raises(OSError, match="no space left"):
            folder.write("file.bin", b"newer")
        with pytest.raises(OSError, match="no space left"):
            folder.write("another.bin", b"newer")
    assert folder.read("file.bin") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]
    folder.write("file.bin", b"newer")
    assert folder.read("file.bin") == b"newer"


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    folder.write("file.bin", b"old")
    seen = []
    replace = Path.replace

    def look(self, target):
        seen.append((folder.read("file.bin"), self.read_bytes(), self.parent))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", look)
    folder.write("file.bin", b"new")
    # Renaming is atomic within one folder only.
    assert seen == [(b"old", b"new", tmp_path)]
    assert folder.read("file.bin") == b"new"


def test_remove_takes_a_file_or_all_and_nothing_when_absent(tmp_path):
    folder = Folder(str(tmp_path / "artifact"))
    folder.remove()
    folder.remove("absent")
    folder.write("one", b"1")
    folder.write("deep/two", b"2")
    folder.remove("one")
    assert not folder.exists("one")
    assert folder.exists("deep/two")
    folder.remove()
    assert not (tmp_path / "artifact").exists()
    assert tmp_path.exists()


def test_reading_what_is_absent(tmp_path):
    with pytest.raises(FileNotFoundError):
        Folder(str(tmp_path)).read("absent")


@pytest.mark.parametrize(
    ("path", "local"),
    [("runs/a", True), ("/runs/a", True), ("file:///runs/a", True), ("s3://bucket/a", False)],
)
def test_local_paths_and_urls_are_told_apart(path, local):
    assert is_local(path) is local


def test_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert absolute("runs/../store") == str(tmp_path / "store")
    assert absolute(f"file://{tmp_path}/store") == str(tmp_path / "store")
    assert absolute("~/store") == str(tmp_path / "home" / "store")
    assert absolute("s3://bucket/store/") == "s3://bucket/store"


def test_arrays_round_trip_and_pickles_are_refused():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    back = array_from(array_bytes(array))
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, array)
    with pytest.raises(ValueError, match=r"[Oo]bject arrays"):
        array_bytes(np.array([{}], dtype=object))
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"[Oo]bject arrays"):
        array_from(buffer.getvalue())


# Embedding columns


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.int64, np.int32])
def test_matrix_round_trip_keeps_type_and_values(kind):
    rows = np.arange(12).reshape(4, 3).astype(kind)
    column = matrix_column(rows)
    assert column.type.list_size == 3
    back = matrix(column)
    assert back.dtype == kind
    np.testing.assert_array_equal(back, rows)


def test_matrix_of_an_array_that_is_not_contiguous():
    rows = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::-2]
    np.testing.assert_array_equal(matrix(matrix_column(rows)), rows)
    np.testing.assert_array_equal(matrix(matrix_column(rows.T)), rows.T)


@pytest.mark.parametrize(("start", "length"), [(0, 10), (3, 4), (9, 1), (5, 0)])
def test_matrix_of_a_sliced_column(start, length):
    rows = np.arange(20, dtype=np.float16).reshape(10, 2)
    column = matrix_column(rows).slice(start, length)
    np.testing.assert_array_equal(matrix(column), rows[start : start + length])
    assert matrix(column).shape == (length, 2)


def test_matrix_of_chunked_and_sliced_columns():
    rows = np.arange(40, dtype=np.float32).reshape(20, 2)
    chunks = [matrix_column(rows[:7]), matrix_column(rows[7:8]), matrix_column(rows[8:])]
    column = pa.chunked_array(chunks)
    np.testing.assert_array_equal(matrix(column), rows)
    np.testing.assert_array_equal(matrix(column.slice(3, 10)), rows[3:13])
    sliced = pa.chunked_array([chunk.slice(1) for chunk in chunks])
    np.testing.assert_array_equal(matrix(sliced), np.concatenate([rows[1:7], rows[9:]]))
    only = pa.chunked_array([matrix_column(rows).slice(4, 5)])
    np.testing.assert_array_equal(matrix(only), rows[4:9])


def test_matrix_without_rows():
    kind = pa.list_(pa.float32(), 3)
    for column in (
        pa.chunked_array([], type=kind),
        pa.chunked_array([pa.array([], type=kind)]),
        matrix_column(np.empty((0, 3), dtype=np.float32)),
    ):
        assert matrix(column).shape == (0, 3)


def test_matrix_of_a_contiguous_column_is_no_copy():
    rows = np.arange(20, dtype=np.float16).reshape(10, 2)
    assert np.shares_memory(matrix(matrix_column(rows)), rows)


@pytest.mark.parametrize("plain", [True, False])
def test_embeddings_survive_parquet(tmp_path, plain):
    rows = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float16)
    rows[0] = [np.nan, np.inf, -0.0, 6e-8]
    folder = Folder(str(tmp_path))
    folder.write("part", table_bytes(pa.table({"embedding": matrix_column(rows)}), plain=plain))
    back = matrix(folder.read_table("part", ["embedding"]).column("embedding"))
    assert back.dtype == np.float16
    assert back.tobytes() == rows.tobytes()


def test_nothing_holds_a_file_once_its_table_is_read():
    # A thread that lets go of it while Python exits aborts the process.
    data = table_bytes(pa.table({"row": range(20), "noun": ["tench"] * 20}))
    before = sys.getrefcount(data)
    for _ in range(300):
        assert table_from(pa.BufferReader(data)).num_rows == 20
        assert sys.getrefcount(data) == before


def test_plain_tables_are_neither_compressed_nor_put_in_a_dictionary():
    table = pa.table({"embedding": matrix_column(np.ones((100, 4), dtype=np.float16))})
    for plain in (True, False):
        data = pa.BufferReader(table_bytes(table, plain=plain))
        column = pq.ParquetFile(data).metadata.row_group(0).column(0)
        assert (column.compression == "UNCOMPRESSED") is plain
        assert any("DICTIONARY" in encoding for encoding in column.encodings) is not plain


# Runs


def test_a_run_round_trips_and_takes_the_folder_it_was_read_from(tmp_path):
    out = tmp_path / "run"
    run = Run(
        out=str(out),
        config={"images": "photos"},
        question={"n_clusters": 3},
        artifacts={"embed_images": "store/embed_images-0"},
        seconds={"embed_images": 1.5},
        scores={"all": {"tac": {"acc": 0.5}}},
        finished=True,
    )
    run.write()
    assert Run.load(str(out)) == run
    moved = out.rename(tmp_path / "moved")
    assert Run.load(str(moved)).out == str(moved)


def test_a_folder_without_a_run_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=r"no run at .*run\.json.*tac-ray run") as error:
            Run.load(str(path))
        assert str(path) in str(error.value)


def test_a_store_that_is_away_for_a_while_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(storage.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(storage.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))

    def back_after(outage_s: float) -> str:
        if clock[0] < outage_s:
            raise EndpointConnectionError(endpoint_url="http://127.0.0.1:1")
        return "here"

    assert storage.patiently(lambda: back_after(60)) == "here"
    assert 60 <= clock[0] < 75
    clock[0] = 0.0
    with pytest.raises(EndpointConnectionError):
        storage.patiently(lambda: back_after(10_000))
    assert 300 < clock[0] < 315


@pytest.mark.parametrize("error", [ConnectTimeoutError, EndpointConnectionError, ReadTimeoutError])
def test_no_answer_is_an_outage_whatever_its_form(error: type[Exception]):
    assert issubclass(error, storage.UNREACHABLE)


def test_an_answer_of_the_store_is_final():
    asked = []

    def missing() -> None:
        asked.append(1)
        raise FileNotFoundError("no such key")

    with pytest.raises(FileNotFoundError):
        storage.patiently(missing)
    assert len(asked) == 1
