"""What a batch goes through on its way into the store, and when a run is stopped."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tac_ray.artifacts.embeddings import EmbeddingStore, Index, image_keys
from tac_ray.artifacts.schemas import FAILURES, IMAGES
from tac_ray.encoders import decode_gpu
from tac_ray.encoders.clip import EncoderSpec
from tac_ray.stages.embed_images import EncodePixels, LoadImages, _check_failures

BAD = (2, 5)
"""A text, and a file that is not there."""


@pytest.fixture
def listing(tmp_path: Path) -> pa.Table:
    rows = []
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / f"{i}.jpg"
        colors = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
        data = io.BytesIO()
        colors.resize((70, 50), Image.Resampling.BICUBIC).save(data, "JPEG", quality=95)
        path.write_bytes(b"a text" if i == BAD[0] else data.getvalue())
        if i == BAD[1]:
            path.unlink()
        rows.append({"image_id": i, "uri": str(path), "etag": f"state {i}"})
    return pa.Table.from_pylist(rows, IMAGES)


def embed(listing: pa.Table, spec: EncoderSpec, store: EmbeddingStore) -> dict:
    """The report of the batch, after both steps."""
    encoder = spec.load()
    load = LoadImages(None if spec.decode_on_gpu else encoder.crop, encoder.image_size)
    loaded = {name: np.asarray(column) for name, column in load(listing).items()}
    report = EncodePixels(spec, 4, torch.get_num_threads(), store)(loaded)
    return {name: value for name, (value,) in report.items()}


def stored(listing: pa.Table, report: dict, store: EmbeddingStore) -> np.ndarray:
    index = Index.empty().extended(store, [report["name"]])
    positions = index.find(image_keys(listing))
    assert np.flatnonzero(positions < 0).tolist() == list(BAD)
    return store.read(index.places(positions[positions >= 0])).astype(np.float32)


def pillow_for_gpu(files: list[bytes]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(Image.open(io.BytesIO(data)))) for data in files]


def test_both_ways_of_decoding_store_the_same_images_and_report_the_same_failures(
    listing: pa.Table, tiny_encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decode_gpu, "_nvimgcodec", lambda device: pillow_for_gpu)
    reports, embeddings = [], []
    for on_gpu in (False, True):
        spec = EncoderSpec(
            model=f"local-dir:{tiny_encoder_dir}",
            pretrained=None,
            precision="fp32",
            decode_on_gpu=on_gpu,
        )
        store = EmbeddingStore.of(str(tmp_path / "store"), spec.load().image_fingerprint)
        reports.append(embed(listing, spec, store))
        embeddings.append(stored(listing, reports[-1], store))
        assert len(store.names()) == 1  # the two do not share a store
    cpu, gpu = reports
    assert cpu["failed"] == gpu["failed"]
    failed = pa.Table.from_pylist(gpu["failed"], FAILURES).to_pylist()
    assert [(row["image_id"], row["step"]) for row in failed] == [(2, "decode"), (5, "download")]
    assert "not an image" in failed[0]["error"]
    assert "No such file" in failed[1]["error"]
    assert cpu["rows"] == gpu["rows"] == 8
    assert gpu["decode_s"] > 0
    assert (embeddings[0] * embeddings[1]).sum(axis=1).min() >= 0.999
    # Those of two images are further apart.
    assert (embeddings[0][1:] * embeddings[0][:-1]).sum(axis=1).max() < 0.999


def failures(n: int) -> list[dict]:
    return [{"image_id": i, "uri": f"{i}.jpg", "error": "the file is empty"} for i in range(n)]


@pytest.mark.parametrize(
    ("n_failed", "n_seen", "allowed"),
    [(0, 100, 0), (5, 1000, 0.005), (5, 6, 5), (999, 999, 0.999)],
)
def test_few_failures_are_borne(n_failed, n_seen, allowed):
    _check_failures(failures(n_failed), n_seen, 1000, allowed)


@pytest.mark.parametrize(
    ("n_failed", "n_seen", "n_images", "allowed", "most"),
    [
        (1, 10, 1000, 0, 0),
        (6, 10, 1000, 0.005, 5),
        (6, 10, 1000, 5, 5),
        (1000, 1000, 10_000, 0.5, 5000),  # nothing but failures among the first
        (8, 8, 8, 100, 100),
    ],
)
def test_too_many_failures_stop_the_run(n_failed, n_seen, n_images, allowed, most):
    reason = (
        rf"{n_failed} of {n_seen} images could not be read and --max-failures {allowed:g} allows "
        rf"{most} of {n_images}; the first: 0.jpg: the file is empty"
    )
    with pytest.raises(ValueError, match=reason):
        _check_failures(failures(n_failed), n_seen, n_images, allowed)
