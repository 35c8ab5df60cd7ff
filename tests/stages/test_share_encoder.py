"""An encoder brought to workers through the store."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tac_ray.artifacts.store import Store
from tac_ray.encoders.clip import Encoder, EncoderSpec
from tac_ray.stages.share_encoder import SharedEncoder, share_encoder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_shared_encoder_has_the_bits_of_the_first(
    tiny_encoder_dir: Path, tmp_path: Path, silent_progress: Any, precision: str
):
    spec = EncoderSpec(model=f"local-dir:{tiny_encoder_dir}", pretrained=None, precision=precision)
    encoder = spec.load()
    shared = share_encoder(Store(str(tmp_path), silent_progress), spec, encoder)
    assert isinstance(shared, SharedEncoder)
    again = shared.load()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    found, expected = (e.encode_images(pixels, batch_size=2) for e in (again, encoder))
    assert np.array_equal(found, expected)
    texts = ["a dog", "a photograph of a lamp"]
    found, expected = (e.encode_texts(texts, batch_size=2) for e in (again, encoder))
    assert torch.equal(found, expected)


def test_an_encoder_with_files_of_a_tokenizer_stays_where_it_is(
    tiny_encoder_dir: Path,
    tmp_path: Path,
    silent_progress: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    spec = EncoderSpec(model=f"local-dir:{tiny_encoder_dir}", pretrained=None, precision="fp32")
    encoder = spec.load()
    assert encoder.has_plain_tokenizer
    monkeypatch.setattr(Encoder, "has_plain_tokenizer", False)
    assert share_encoder(Store(str(tmp_path), silent_progress), spec, encoder) is spec
