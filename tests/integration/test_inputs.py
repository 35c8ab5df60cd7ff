"""One collection in every form it may have, and files that are no images, through both stages."""

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.store import Store
from tac_ray.config import EmbedImagesConfig
from tac_ray.encoders.clip import Encoder, EncoderSpec
from tac_ray.stages.embed_images import embed_images
from tac_ray.stages.import_embeddings import import_embeddings
from tac_ray.stages.list_images import list_images

pytestmark = pytest.mark.integration

N = 12
NAMES = [f"{i % 3}/{i:02d}.png" for i in range(N)]


def picture(seed: int) -> bytes:
    colors = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colors).resize((40, 32)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(seed) for seed in range(N)]


@pytest.fixture(scope="module")
def encoder(tiny_encoder_dir: Path) -> Encoder:
    spec = EncoderSpec(model=f"local-dir:{tiny_encoder_dir}", pretrained=None, precision="fp32")
    return spec.load()


@pytest.fixture
def store(ray_cluster: None, tmp_path: Path, silent_progress: Any) -> Store:
    return Store(str(tmp_path / "artifacts"), silent_progress)


def embedded(
    store: Store, encoder: Encoder, place: Path, **options: Any
) -> tuple[Artifact, Artifact]:
    listed = list_images(store, str(place), labels="auto")
    config = EmbedImagesConfig(**options)
    return listed, embed_images(store, config, encoder.spec, encoder, listed)


def in_folder(root: Path) -> Path:
    for name, data in zip(NAMES, PICTURES, strict=True):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def in_tars(root: Path) -> Path:
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"{shard}.tar", "w") as tar:
            for i in range(shard, N, 2):
                files = {"png": PICTURES[i], "cls": b"%d" % (i % 3), "json": b"{}"}
                for suffix, data in files.items():
                    member = tarfile.TarInfo(f"./{i:02d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return root


def in_table_of_bytes(root: Path) -> Path:
    table = pa.table({"image": PICTURES, "label": [i % 3 for i in range(N)]})
    pq.write_table(table, root.with_suffix(".parquet"), row_group_size=5)
    return root.with_suffix(".parquet")


def in_table_of_uris(root: Path) -> Path:
    folder = in_folder(root)
    paths = [str(folder / name) for name in NAMES]
    pq.write_table(
        pa.table({"url": paths, "label": [name[0] for name in NAMES]}), f"{root}.parquet"
    )
    return Path(f"{root}.parquet")


def in_text(root: Path) -> Path:
    in_folder(root)
    lines = [f"{root.name}/{name}" for name in NAMES]  # relative to the list itself
    root.with_suffix(".txt").write_text("\n".join(lines) + "\n\n")
    return root.with_suffix(".txt")


ORDERS = {
    in_folder: sorted(range(N), key=lambda i: NAMES[i]),
    in_tars: [*range(0, N, 2), *range(1, N, 2)],
    in_table_of_bytes: list(range(N)),
    in_table_of_uris: list(range(N)),
    in_text: list(range(N)),
}


@pytest.mark.parametrize("write", ORDERS, ids=lambda write: write.__name__)
def test_every_form_gives_the_same_embeddings(
    write: Callable[[Path], Path], store: Store, encoder: Encoder, tmp_path: Path
):
    listed, found = embedded(store, encoder, write(tmp_path / "photos"), part_rows=5)
    order = ORDERS[write]
    pixels = np.stack(
        [np.asarray(encoder.crop(Image.open(io.BytesIO(PICTURES[i])))) for i in order]
    )
    expected = encoder.encode_images(pixels, batch_size=16)
    got = matrix(found.column("embedding")).astype(np.float32)
    np.testing.assert_allclose(got, expected, atol=1e-3)
    assert np.abs(expected[1:] - expected[:-1]).max(axis=1).min() > 2e-3
    assert found.column("image_id").to_pylist() == list(range(N))
    assert [part.rows for part in found.manifest.parts] == [4, 4, 4]
    labels = [None] * N if write is in_text else [str(i % 3) for i in order]
    assert listed.column("label").to_pylist() == labels
    assert found.facts["n_new"] == N
    _, again = embedded(store, encoder, Path(listed_place(tmp_path)), part_rows=4)
    assert (again.facts["n_new"], again.facts["n_reused"]) == (0, N)


def listed_place(tmp_path: Path) -> str:
    """What `write` made: a file beside the folder, else the folder."""
    (place,) = [p for p in tmp_path.glob("photos*") if p.is_file()] or [tmp_path / "photos"]
    return str(place)


def png(width: int, height: int) -> bytes:
    """A PNG of one bit a pixel, all black, which is a bomb if it is large."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    row = b"\0" * (1 + (width + 7) // 8)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row * height)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


GOOD = {
    "with spaces  in it.png": PICTURES[0],
    "quotes '\".png": PICTURES[1],
    "two\nlines.png": PICTURES[2],
    "né 猫 \U0001f408.png": PICTURES[3],
    "a..b/..c/..d.png": PICTURES[4],
    "percent %41%2F+?#&.png": PICTURES[5],
    "photograph.JPEG": PICTURES[6],  # a PNG by its content
    "one pixel.png": png(1, 1),
    os.fsdecode(b"not utf-8 \xff.png"): PICTURES[7],
}
BAD = {
    "bomb.png": (png(20_000, 20_000), "400000000 pixels"),
    "empty.jpg": (b"", "the file is empty"),
    "page.jpg": (b"<html>404 Not Found</html>", "not an image"),
    "text.jpg": (b"the words of a photograph\n" * 99, "not an image"),
    "truncated.png": (PICTURES[8][:-60], "truncated"),
    "zeros.png": (b"\0" * 4000, "not an image"),
}


def test_bad_files_are_rows_with_a_reason_and_odd_names_are_none(
    store: Store, encoder: Encoder, tmp_path: Path
):
    content = GOOD | {name: data for name, (data, _) in BAD.items()}
    for name, data in content.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "photos" / "gone.png").symlink_to("nowhere")
    (tmp_path / "photos" / "notes.md").write_text("no image")
    listed, found = embedded(store, encoder, tmp_path / "photos", max_failures=7)
    assert listed.n_rows == len(content) + 1
    assert listed.facts["n_other_files"] == 1
    failures = found.folder.read_table("failures.parquet").to_pylist()
    reasons = {row["uri"].rpartition("/")[2]: (row["step"], row["error"]) for row in failures}
    assert reasons.keys() == BAD.keys() | {"gone.png"}
    for name, (_, reason) in BAD.items():
        assert reasons[name][0] == "decode"
        assert reason in reasons[name][1]
    assert reasons["gone.png"] == ("download", "FileNotFoundError: No such file or directory")
    everything = set(range(listed.n_rows))
    failed = {row["image_id"] for row in failures}
    assert set(found.column("image_id").to_pylist()) == everything - failed
    assert len(everything - failed) == len(GOOD)
    facts = {name: found.facts[f"n_{name}"] for name in ("new", "reused", "failed")}
    assert facts == {"new": len(GOOD), "reused": 0, "failed": 7}

    # What was put right is embedded, what is still bad is tried again, and the rest is there.
    (tmp_path / "photos" / "empty.jpg").write_bytes(PICTURES[9])
    _, found = embedded(store, encoder, tmp_path / "photos", max_failures=7)
    facts = {name: found.facts[f"n_{name}"] for name in ("new", "reused", "failed")}
    assert facts == {"new": 1, "reused": len(GOOD), "failed": 6}

    with pytest.raises(ValueError, match=r"6 of 6 images .* --max-failures 5 allows 5 of 16"):
        embedded(store, encoder, tmp_path / "photos", max_failures=5, part_rows=7)


def as_npy(root: Path, rows: np.ndarray) -> Path:
    """Parts of embeddings with tables beside them, as clip-retrieval writes them."""
    for folder in ("img_emb", "metadata"):
        (root / folder).mkdir(parents=True)
    for part, start in enumerate(range(0, len(rows), 5)):
        some = rows[start : start + 5]
        np.save(root / "img_emb" / f"img_emb_{part}.npy", some)
        names = [f"/photos/{start + i}.jpg" for i in range(len(some))]
        pq.write_table(
            pa.table({"image_path": names}), root / "metadata" / f"metadata_{part}.parquet"
        )
    return root


def as_table(root: Path, rows: np.ndarray) -> Path:
    names = [f"/photos/{i}.jpg" for i in range(len(rows))]
    table = pa.table({"uri": names, "vector": pa.array(rows.tolist(), pa.list_(pa.float32()))})
    root.mkdir()
    pq.write_table(table, root / "embeddings.parquet", row_group_size=4)
    return root


def imported(store: Store, encoder: Encoder, place: Path) -> tuple[Artifact, Artifact]:
    listed = list_images(store, str(place), labels="auto")
    return listed, import_embeddings(store, EmbedImagesConfig(part_rows=6), encoder, listed)


@pytest.mark.parametrize("write", [as_npy, as_table], ids=lambda write: write.__name__)
def test_embeddings_that_are_there_are_taken_and_normalized(
    write: Callable[[Path, np.ndarray], Path], store: Store, encoder: Encoder, tmp_path: Path
):
    rows = np.random.default_rng(0).normal(size=(13, 16)).astype(np.float32)
    rows[3], rows[7, 2] = 0, np.nan
    listed, found = imported(store, encoder, write(tmp_path / "vectors", rows))
    assert listed.column("uri").to_pylist() == [f"/photos/{i}.jpg" for i in range(13)]
    good = [i for i in range(13) if i not in (3, 7)]
    assert found.column("image_id").to_pylist() == good
    norms = np.linalg.norm(rows[good], axis=1, keepdims=True)
    got = matrix(found.column("embedding")).astype(np.float32)
    np.testing.assert_allclose(got, rows[good] / norms, atol=1e-3)
    np.testing.assert_allclose(found.facts["norms"], [norms.min(), norms.max()], rtol=1e-5)
    failures = found.folder.read_table("failures.parquet").to_pylist()
    assert [(row["image_id"], row["uri"]) for row in failures] == [
        (3, "/photos/3.jpg"),
        (7, "/photos/7.jpg"),
    ]


def test_embeddings_of_another_width_than_the_encoders_are_refused(
    store: Store, encoder: Encoder, tmp_path: Path
):
    place = as_table(tmp_path / "vectors", np.ones((4, 12), dtype=np.float32))
    with pytest.raises(ValueError, match=r"of width 12 and --model .* makes 16; name the encoder"):
        imported(store, encoder, place)
