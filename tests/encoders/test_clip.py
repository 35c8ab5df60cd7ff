"""Both towers against open_clip's own, refusals before work starts, and fingerprints."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch._dynamo.utils import counters

from tac_ray.encoders.clip import Encoder, EncoderSpec, resolve_precision
from tac_ray.encoders.prompts import prompts

TEXTS = [
    "a photo of a very old and rather small wooden church on a hill.",
    "dog",
    "cat " * 100,
    "a photo of a dog.",
    "",
    "tree " * 75,
    "itap of a French horn.",
    "lamp " * 40,
    "dog",
    "tree " * 74,
]


def load(folder: Path, **options) -> Encoder:
    spec = {"model": f"local-dir:{folder}", "pretrained": None, "precision": "fp32", **options}
    return EncoderSpec(**spec).load()


@pytest.fixture(scope="module")
def encoder(tiny_encoder_dir) -> Encoder:
    return load(tiny_encoder_dir)


@pytest.fixture(scope="module")
def half(tiny_encoder_dir) -> Encoder:
    return load(tiny_encoder_dir, precision="bf16")


@pytest.fixture(scope="module")
def peer(tiny_encoder_dir):
    """open_clip's own model and preprocessing for the same folder."""
    return open_clip_model(tiny_encoder_dir)


def open_clip_model(folder: Path):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    return model.eval(), preprocess


@torch.inference_mode()
def peer_texts(peer, texts) -> torch.Tensor:
    model, _ = peer
    return model.encode_text(open_clip.tokenize(texts, model.context_length))


def photographs(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    sizes = [(32, 32), (50, 41), (33, 97), (64, 48), (20, 25)]
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for h, w in (sizes[i % len(sizes)] for i in range(n))
    ]


def noise(n: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)


# Texts


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_texts_equal_open_clip_in_any_order_and_length(encoder, peer, batch_size):
    expected = peer_texts(peer, TEXTS)
    lengths = (open_clip.tokenize(TEXTS).argmax(dim=1) + 1).tolist()
    assert min(lengths) == 2
    assert lengths.count(77) == 2
    assert len(set(lengths)) > 5
    got = encoder.encode_texts(TEXTS, batch_size=batch_size)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    order = np.argsort(lengths)[::-1]
    reverse = encoder.encode_texts([TEXTS[i] for i in order], batch_size=batch_size)
    torch.testing.assert_close(reverse, expected[order.tolist()], rtol=0, atol=1e-5)
    # Neither is it the same vector for every text, nor of unit norm.
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    assert (got.norm(dim=1) - 1).abs().max() > 1e-3


def positions_run(encoder: Encoder, texts: list[str], batch_size: int) -> list[tuple[int, int]]:
    """Rows and token positions of every pass through the text transformer."""
    seen = []
    tower = getattr(encoder._model, "text", encoder._model)
    hook = tower.transformer.register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape[:2]))
    )
    try:
        encoder.encode_texts(texts, batch_size=batch_size)
    finally:
        hook.remove()
    return seen


def test_batches_of_texts_are_cut_at_their_longest_and_share_their_head(encoder):
    # "dog" has a start, one word and an end; the start and the first word are in all.
    texts = ["dog " * 100, "dog", "dog dog", "dog", "dog " * 9, "dog"]
    heads_and_tails = [(1, 2 + 2 * 1), (1, 2 + 2 * 2), (2, 2 + 75)]
    assert positions_run(encoder, texts, batch_size=2) == heads_and_tails
    texts = ["dog", "cat dog", "dog " * 4]
    assert positions_run(encoder, texts, batch_size=2) == [(1, 1 + 2 * 3), (1, 1 + 5)]
    # As many in a row as the context of 77 holds, and as few rows.
    assert positions_run(encoder, ["dog"] * 100, batch_size=100) == [(2, 2 + 50)]


def test_prompts_equal_open_clip_whatever_shares_a_row(encoder, peer):
    nouns = ["dog", "tench", "sulphur-crested cockatoo", "bridge", "x"] * 5
    got = encoder.encode_prompts(nouns, batch_size=7)
    expected = peer_texts(peer, [prompt for noun in nouns for prompt in prompts(noun)])
    assert got.shape == (25, 7, 16)
    torch.testing.assert_close(got.reshape(175, -1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"text": {"no_causal_mask": True}},
        {"text": {"no_causal_mask": True}, "custom_text": True},
        {"text": {"pool_type": "last"}},
    ],
    ids=["no mask", "no mask, own module", "pools last"],
)
def test_towers_that_look_past_the_end_of_text_run_at_full_length(make_encoder_dir, config):
    folder = make_encoder_dir(**config)
    encoder = load(folder)
    assert positions_run(encoder, TEXTS, batch_size=4) == [(4, 77), (4, 77), (2, 77)]
    expected = peer_texts(open_clip_model(folder), TEXTS)
    got = encoder.encode_texts(TEXTS, batch_size=4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_causal_tower_in_a_module_of_its_own_is_cut_and_equals_open_clip(make_encoder_dir):
    folder = make_encoder_dir(custom_text=True, text={"proj_bias": True, "context_length": 16})
    encoder = load(folder)
    assert positions_run(encoder, ["dog", "dog dog"], batch_size=1) == [(1, 3), (1, 4)]
    expected = peer_texts(open_clip_model(folder), TEXTS)
    got = encoder.encode_texts(TEXTS, batch_size=4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


# Images


def test_images_equal_open_clip_and_have_unit_norm(encoder, peer):
    model, preprocess = peer
    images = photographs(7)
    pixels = np.stack([np.asarray(encoder.crop(image)) for image in images])
    assert pixels.shape == (7, *encoder.image_size, 3)
    assert pixels.dtype == np.uint8
    with torch.inference_mode():
        batch = torch.stack([preprocess(image) for image in images])
        expected = F.normalize(model.encode_image(batch), dim=-1).numpy()
    got = encoder.encode_images(pixels, batch_size=3)
    assert got.dtype == np.float32
    assert got.shape == (7, encoder.width) == (7, 16)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert np.abs(got[0] - got[1]).max() > 1e-3


@pytest.mark.parametrize("name", ["encoder", "half"])
def test_bits_of_an_image_depend_neither_on_its_batch_mates_nor_on_its_place(request, name):
    encoder = request.getfixturevalue(name)
    pixels = noise(11)
    together = encoder.encode_images(pixels, batch_size=8)
    for rows in ([5], [10], [9, 5], [3, 2, 1, 0, 5], list(range(11))[::-1]):
        alone = encoder.encode_images(pixels[rows], batch_size=8)
        np.testing.assert_array_equal(alone, together[rows])


def test_every_forward_pass_has_the_full_batch(encoder):
    seen = []
    hook = encoder._model.visual.register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape))
    )
    try:
        encoder.encode_images(noise(9), batch_size=4)
    finally:
        hook.remove()
    assert seen == [(4, 3, 32, 32)] * 3


def test_images_do_not_change_the_callers_pixels_and_may_be_read_only(encoder):
    pixels = noise(2)
    before = pixels.copy()
    pixels.setflags(write=False)
    encoder.encode_images(pixels, batch_size=2)
    np.testing.assert_array_equal(pixels, before)


def test_lower_precision_stays_near_and_is_used(encoder, half):
    pixels = noise(4)
    full = encoder.encode_images(pixels, batch_size=4)
    assert 0 < np.abs(full - half.encode_images(pixels, batch_size=4)).max() < 0.05


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.half)])
def test_large_layers_are_held_in_the_precision_and_norms_in_full(
    tiny_encoder_dir, precision, dtype
):
    lower = load(tiny_encoder_dir, precision=precision)
    held = {name: tensor.dtype for name, tensor in lower._model.state_dict().items()}
    for tower in ("visual.transformer", "transformer"):
        assert held[f"{tower}.resblocks.0.mlp.c_fc.weight"] == dtype
        assert held[f"{tower}.resblocks.0.ln_1.weight"] == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_gives_nearly_the_same_unit_vectors(tiny_encoder_dir, encoder, precision):
    lower = load(tiny_encoder_dir, precision=precision)
    full, got = (e.encode_images(noise(9), batch_size=4) for e in (encoder, lower))
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert (got * full).sum(axis=1).min() > 0.999
    full, got = (e.encode_texts(TEXTS, batch_size=4) for e in (encoder, lower))
    assert got.dtype == torch.float32
    assert F.cosine_similarity(got, full).min() > 0.999


@pytest.mark.parametrize("name", ["encoder", "half"])
def test_pixels_may_be_a_tensor(request, name):
    encoder = request.getfixturevalue(name)
    pixels = noise(9)
    got = encoder.encode_images(torch.from_numpy(pixels), batch_size=4)
    np.testing.assert_array_equal(got, encoder.encode_images(pixels, batch_size=4))


def test_embeddings_come_from_the_device_in_one_copy(encoder, monkeypatch):
    copied = []
    to_cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: copied.append(len(t)) or to_cpu(t))
    assert len(encoder.encode_images(noise(9), batch_size=4)) == 9
    assert copied == [9]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_gpu_gives_nearly_the_embeddings_of_the_cpu(tiny_encoder_dir, encoder, precision):
    spec = {"model": f"local-dir:{tiny_encoder_dir}", "pretrained": None, "precision": precision}
    on_gpu = EncoderSpec(**spec).load("cuda")
    pixels = noise(200)
    got = on_gpu.encode_images(pixels, batch_size=8)
    assert (got * encoder.encode_images(pixels, batch_size=8)).sum(axis=1).min() > 0.999
    there = torch.from_numpy(pixels).cuda()
    np.testing.assert_array_equal(on_gpu.encode_images(there, batch_size=8), got)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_compiled_image_tower_agrees_with_the_eager_one(tiny_encoder_dir, precision):
    eager = load(tiny_encoder_dir, precision=precision)
    compiled = load(tiny_encoder_dir, precision=precision, compile=True)
    counters.clear()
    pixels = noise(9)
    got = compiled.encode_images(pixels, batch_size=4)
    assert counters["stats"]["unique_graphs"] == 1
    assert (got * eager.encode_images(pixels, batch_size=4)).sum(axis=1).min() > 0.9999
    texts = compiled.encode_texts(TEXTS, batch_size=4)
    torch.testing.assert_close(texts, eager.encode_texts(TEXTS, batch_size=4), rtol=0, atol=0)


def test_compiling_enters_the_image_fingerprint_alone(tiny_encoder_dir, encoder):
    compiled = load(tiny_encoder_dir, compile=True)
    assert compiled.image_fingerprint != encoder.image_fingerprint
    assert compiled.text_fingerprint == encoder.text_fingerprint


def test_resize_takes_the_center_of_a_larger_image(tiny_encoder_dir, encoder):
    plain, encoder = encoder, load(tiny_encoder_dir, resize=48)
    image = Image.new("RGB", (96, 192), "red")
    image.paste("blue", (16, 64, 80, 128))  # after resizing to 48 x 96, the middle 32 x 32
    inner = np.asarray(encoder.crop(image))
    assert inner.shape == (32, 32, 3)
    assert (inner[4:-4, 4:-4] == [0, 0, 255]).all()
    assert encoder.image_fingerprint != plain.image_fingerprint
    assert encoder.text_fingerprint == plain.text_fingerprint
    whole = np.asarray(plain.crop(image))
    assert (whole[0, 0] == [255, 0, 0]).all()


def test_resize_below_the_image_size_is_refused(tiny_encoder_dir):
    with pytest.raises(ValueError, match=r"resize=31 .*>= .*32.*raise --resize"):
        load(tiny_encoder_dir, resize=31)


@pytest.mark.parametrize(
    ("asked", "on_gpu", "used"),
    [("auto", True, "fp16"), ("bf16", True, "bf16"), ("fp32", False, "fp32")],
)
def test_precision_is_made_definite(asked, on_gpu, used):
    assert resolve_precision(asked, on_gpu=on_gpu) == used


@pytest.mark.parametrize(
    ("able", "used"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, "fp32"),
        ({"architecture": "aarch64"}, "fp32"),
    ],
)
def test_processors_that_compute_in_bf16_do(monkeypatch, able, used):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert resolve_precision("auto", on_gpu=False) == used


# Refusals


@pytest.fixture
def no_download(monkeypatch):
    """Fails a test that builds a model or asks for weights over the network."""

    def never(*args, **kwargs):
        raise AssertionError("went to the network or built the model")

    for name in ("download_pretrained", "download_pretrained_from_hf", "CLIP", "CustomTextCLIP"):
        monkeypatch.setattr(open_clip.factory, name, never)


@pytest.fixture
def registered(monkeypatch, tiny_encoder_dir) -> str:
    """A name under which open_clip knows the tiny architecture."""
    config = json.loads((tiny_encoder_dir / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny-32", config)
    return "ViT-tiny-32"


@pytest.mark.parametrize("tag", ["openai", "OpenAI"])
def test_openai_weights_without_quickgelu_are_refused_before_any_download(no_download, tag):
    spec = EncoderSpec(model="ViT-B-32", pretrained=tag, precision="fp32")
    with pytest.raises(ValueError, match=r"openai.*QuickGELU.*ViT-B-32.*use .*ViT-B-32-quickgelu"):
        spec.load()


def test_unknown_model_is_refused(no_download):
    spec = EncoderSpec(model="ViT-Z-99", pretrained="openai", precision="fp32")
    with pytest.raises(ValueError, match=r"unknown --model ViT-Z-99.*local-dir:"):
        spec.load()


def test_a_named_model_without_weights_is_refused(no_download):
    spec = EncoderSpec(model="ViT-B-32", pretrained=None, precision="fp32")
    with pytest.raises(ValueError, match=r"ViT-B-32 needs --pretrained"):
        spec.load()


@pytest.mark.parametrize("pretrained", ["no_such_tag", "/nowhere/weights.safetensors"])
def test_unknown_tag_and_missing_path_are_refused_with_the_tags_there_are(no_download, pretrained):
    spec = EncoderSpec(model="ViT-B-32-quickgelu", pretrained=pretrained, precision="fp32")
    with pytest.raises(FileNotFoundError, match=r"ViT-B-32-quickgelu.*openai") as error:
        spec.load()
    assert pretrained in str(error.value)


def test_a_folder_is_no_weights_file(registered, tmp_path):
    spec = EncoderSpec(model=registered, pretrained=str(tmp_path), precision="fp32")
    with pytest.raises(FileNotFoundError, match=registered) as error:
        spec.load()
    assert str(tmp_path) in str(error.value)


def test_local_folder_without_config_or_weights_is_refused(tiny_encoder_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json.*needs a folder"):
        load(tmp_path / "absent")
    shutil.copy(tiny_encoder_dir / "open_clip_config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no weights") as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_weights_given_by_path_load_under_a_registered_name(registered, tiny_encoder_dir, peer):
    weights = tiny_encoder_dir / "open_clip_model.safetensors"
    encoder = EncoderSpec(model=registered, pretrained=str(weights), precision="fp32").load()
    got = encoder.encode_texts(TEXTS, batch_size=4)
    torch.testing.assert_close(got, peer_texts(peer, TEXTS), rtol=0, atol=1e-5)


OTHERS = {
    "both towers wider": {"vision": {"width": 48}, "text": {"width": 48}},
    "image tower wider": {"vision": {"width": 48}},
    "text tower wider": {"text": {"width": 48}},
    "deeper": {"text": {"layers": 3}},
    "embedding wider": {"embed_dim": 24},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_weights_of_another_architecture_are_refused(registered, make_encoder_dir, other):
    weights = str(make_encoder_dir(**other) / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=r"--model.*--pretrained.*same model") as error:
        EncoderSpec(model=registered, pretrained=weights, precision="fp32").load()
    assert weights in str(error.value)
    assert registered in str(error.value)


def test_local_folder_with_weights_of_another_architecture_is_refused(
    make_encoder_dir, wider_encoder_dir
):
    folder = make_encoder_dir(weights_from=wider_encoder_dir)
    with pytest.raises(ValueError, match="not of architecture") as error:
        load(folder)
    assert str(folder) in str(error.value)


# Fingerprints


def with_other(folder: Path, to: Path, prefix: str) -> Path:
    """A copy of an encoder whose weights below `prefix` are others."""
    shutil.copytree(folder, to)
    path = to / "open_clip_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.startswith(prefix):
            tensors[name] = tensors[name] + 0.25
    save_file(tensors, path)
    return to


def test_fingerprints_are_the_same_for_the_same_weights_in_another_folder(
    encoder, tiny_encoder_dir, tmp_path
):
    copy = load(Path(shutil.copytree(tiny_encoder_dir, tmp_path / "copy")))
    assert copy.text_fingerprint == encoder.text_fingerprint
    assert copy.image_fingerprint == encoder.image_fingerprint
    assert encoder.text_fingerprint != encoder.image_fingerprint


@pytest.mark.parametrize(
    ("prefix", "image_differs", "text_differs"),
    [
        ("visual.", True, False),
        ("transformer.", False, True),
        ("positional_embedding", False, True),
        ("logit_scale", False, False),
    ],
)
def test_fingerprints_follow_the_weights_of_their_own_tower(
    encoder, tiny_encoder_dir, tmp_path, prefix, image_differs, text_differs
):
    other = load(with_other(tiny_encoder_dir, tmp_path / "other", prefix))
    assert (other.image_fingerprint != encoder.image_fingerprint) is image_differs
    assert (other.text_fingerprint != encoder.text_fingerprint) is text_differs


def test_image_tower_of_another_shape_keeps_the_text_fingerprint(make_encoder_dir, tmp_path):
    # Same text tower, image tower with one more layer.
    small, large = make_encoder_dir(), make_encoder_dir(vision={"layers": 2})
    tensors = load_file(large / "open_clip_model.safetensors")
    text = load_file(small / "open_clip_model.safetensors")
    tensors |= {n: t for n, t in text.items() if not n.startswith("visual.")}
    save_file(tensors, large / "open_clip_model.safetensors")
    one, other = load(small), load(large)
    assert one.text_fingerprint == other.text_fingerprint
    assert one.image_fingerprint != other.image_fingerprint


def test_activation_changes_both_fingerprints(encoder, tiny_encoder_dir, make_encoder_dir):
    quick = load(make_encoder_dir(weights_from=tiny_encoder_dir, quick_gelu=True))
    assert quick.image_fingerprint != encoder.image_fingerprint
    assert quick.text_fingerprint != encoder.text_fingerprint


@pytest.mark.parametrize(
    "text",
    [{"heads": 4}, {"no_causal_mask": True}, {"pool_type": "last"}],
    ids=["heads", "mask", "pooling"],
)
def test_text_configuration_that_no_weight_shows_changes_the_text_fingerprint(
    encoder, tiny_encoder_dir, make_encoder_dir, text
):
    other = load(make_encoder_dir(weights_from=tiny_encoder_dir, text=text))
    difference = other.encode_texts(TEXTS, batch_size=4) - encoder.encode_texts(TEXTS, batch_size=4)
    assert difference.abs().max() > 1e-3
    assert other.text_fingerprint != encoder.text_fingerprint


@pytest.mark.parametrize("vision", [{"head_width": 8}, {"pool_type": "avg"}], ids=["heads", "pool"])
def test_image_configuration_that_no_weight_shows_changes_the_image_fingerprint(
    encoder, tiny_encoder_dir, make_encoder_dir, vision
):
    other = load(make_encoder_dir(weights_from=tiny_encoder_dir, vision=vision))
    pixels = noise(2)
    difference = other.encode_images(pixels, batch_size=2) - encoder.encode_images(
        pixels, batch_size=2
    )
    assert np.abs(difference).max() > 1e-3
    assert other.image_fingerprint != encoder.image_fingerprint


def test_preprocessing_and_precision_enter_the_fingerprints(
    encoder, half, tiny_encoder_dir, tmp_path
):
    assert half.image_fingerprint != encoder.image_fingerprint
    assert half.text_fingerprint != encoder.text_fingerprint
    shutil.copytree(tiny_encoder_dir, tmp_path / "other")
    path = tmp_path / "other" / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    path.write_text(json.dumps(config))
    assert load(tmp_path / "other").image_fingerprint != encoder.image_fingerprint
