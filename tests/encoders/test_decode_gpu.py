"""Which images the GPU decodes, where its pixels lie, and how near they are to Pillow's."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, ImageFilter
from torchvision import transforms

from tac_ray.encoders import decode, decode_gpu
from tac_ray.encoders.clip import Encoder, EncoderSpec
from tac_ray.encoders.decode import decode_image
from tac_ray.encoders.decode_gpu import GpuDecoder, device_crop, resize_and_crop

SIZES = {
    "portrait": (61, 150),
    "landscape": (333, 100),
    "small": (20, 17),
    "exact": (32, 32),
    "long": (400, 33),
    "narrow": (1, 90),
}


def load(folder, device="cpu", **options) -> Encoder:
    spec = {"model": f"local-dir:{folder}", "pretrained": None, "precision": "fp32", **options}
    return EncoderSpec(**spec).load(device)


@pytest.fixture(scope="module")
def encoder(tiny_encoder_dir) -> Encoder:
    return load(tiny_encoder_dir)


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blurred noise, stretched to all levels."""
    rng = np.random.default_rng(seed)
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    soft = np.asarray(noise.filter(ImageFilter.GaussianBlur(2)), dtype=float)
    spread = (soft - soft.min()) / max(float(np.ptp(soft)), 1) * 255
    return Image.fromarray(spread.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(photograph(60, 40), exif=exif)


class FakeGpu:
    """Decodes with Pillow, except the files it is told to fail on; remembers what it was given."""

    def __init__(self, *failing: bytes) -> None:
        self.failing = failing
        self.groups: list[list[bytes]] = []

    def __call__(self, files: list[bytes]) -> list[torch.Tensor | None]:
        self.groups.append(files)
        return [None if data in self.failing else self.pixels(data) for data in files]

    @staticmethod
    def pixels(data: bytes) -> torch.Tensor:
        array = np.array(Image.open(io.BytesIO(data)))
        return torch.from_numpy(array.reshape(*array.shape[:2], -1))


@pytest.mark.parametrize("resize", [None, 48])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_resize_and_crop_of_a_tensor_is_near_pillows(tiny_encoder_dir, size, resize):
    encoder = load(tiny_encoder_dir, resize=resize)
    image = photograph(*size)
    expected = np.asarray(encoder.crop(image))
    got = resize_and_crop(torch.from_numpy(np.array(image)), device_crop(encoder.crop))
    assert got.dtype == torch.uint8
    assert got.shape == expected.shape == (32, 32, 3)
    difference = np.abs(got.numpy().astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.5
    both = np.stack([got.numpy(), expected])
    one, other = encoder.encode_images(both, batch_size=2)
    assert one @ other >= 0.999


def test_a_crop_of_another_kind_is_refused(make_encoder_dir, encoder):
    crops = [
        transforms.Compose([transforms.CenterCrop(32)]),
        transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)]),
        transforms.Compose([transforms.Resize(32, transforms.InterpolationMode.BICUBIC)]),
        transforms.Compose([]),
    ]
    for crop in crops:
        with pytest.raises(ValueError, match=r"begins with .* on the GPU needs .* decode on the"):
            device_crop(crop)
    assert len(device_crop(encoder.crop).transforms) == 2


PLAIN = {
    "YCbCr": encoded(photograph(60, 40)),
    "gray": encoded(photograph(60, 40).convert("L")),
    "progressive": encoded(photograph(60, 40), progressive=True),
    "upright": turned(1),
    "color profile": encoded(
        photograph(60, 40),
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    ),
}
OTHERS = {
    "PNG": encoded(photograph(60, 40), "PNG"),
    "CMYK": encoded(photograph(60, 40).convert("CMYK")),
    "RGB": encoded(photograph(60, 40), keep_rgb=True),
    "turned": turned(6),
    "bytes after the end": encoded(photograph(60, 40)) + b"\0\0",
    "one pixel wide": encoded(photograph(1, 90)),
}
BAD = {
    "nothing": b"",
    "text": b"no image",
    "text with an end": b"no image\xff\xd9",
    "truncated": encoded(photograph(60, 40))[:-300],
    "narrow": encoded(Image.new("L", (1, 501))),
}


def test_plain_jpegs_alone_go_to_the_gpu_and_each_image_lies_in_its_place(encoder):
    # Interleaved, so that a slip of one place shows.
    files = [*OTHERS.values(), *PLAIN.values(), *BAD.values()][::-1]
    files = files[::2] + files[1::2]
    gpu = FakeGpu()
    pixels, errors = GpuDecoder(encoder, gpu)(files)
    assert pixels.shape == (len(files), 32, 32, 3)
    assert pixels.dtype == torch.uint8
    (given,) = gpu.groups
    assert sorted(given) == sorted(PLAIN.values())
    for data, got, error in zip(files, pixels.numpy(), errors, strict=True):
        if data in BAD.values():
            assert error
            assert not got.any()
            continue
        assert error == ""
        expected = decode_image(data, encoder.crop)
        limit = 2 if data in PLAIN.values() else 0
        assert np.abs(got.astype(int) - expected).max() <= limit


def test_what_the_gpu_fails_on_is_decoded_on_the_cpu(encoder):
    files = [encoded(photograph(60, 40, seed)) for seed in range(5)]
    broken = files[2][:200] + b"\xff\xd9"
    files[2] = broken
    pixels, errors = GpuDecoder(encoder, FakeGpu(files[0], broken, files[4]))(files)
    assert [bool(error) for error in errors] == [False, False, True, False, False]
    assert "Error" in errors[2]
    for place in (0, 4):
        np.testing.assert_array_equal(pixels[place], decode_image(files[place], encoder.crop))
    assert not pixels[2].any()


def test_errors_are_those_of_the_cpu(encoder):
    _, errors = GpuDecoder(encoder, FakeGpu())(list(BAD.values()))
    for data, error in zip(BAD.values(), errors, strict=True):
        with pytest.raises(ValueError) as reason:  # noqa: PT011
            decode_image(data, encoder.crop)
        assert error == str(reason.value)


def test_no_more_pixels_lie_on_the_gpu_at_a_time_than_one_image_may_have(encoder, monkeypatch):
    for module in (decode, decode_gpu):
        monkeypatch.setattr(module, "MAX_PIXELS", 2_000)
    sizes = [(40, 20), (40, 30), (10, 10), (50, 40), (41, 50), (10, 10)]
    files = [encoded(photograph(*size)) for size in sizes]
    gpu = FakeGpu()
    _, errors = GpuDecoder(encoder, gpu)(files)
    assert gpu.groups == [files[:2], files[2:3], files[3:4], files[5:]]
    assert [bool(error) for error in errors] == [False] * 4 + [True, False]
    assert "should be <= 2,000" in errors[4]


def test_no_files_give_no_pixels(encoder):
    gpu = FakeGpu()
    pixels, errors = GpuDecoder(encoder, gpu)([])
    assert pixels.shape == (0, 32, 32, 3)
    assert errors == gpu.groups == []


@pytest.mark.parametrize(("cuda", "package"), [("12.8", "cu12"), ("13.2", "cu13")])
def test_without_nvimagecodec_the_command_to_install_it_is_named(
    encoder, monkeypatch, cuda, package
):
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    monkeypatch.delattr(sys.modules.get("nvidia"), "nvimgcodec", raising=False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ImportError, match=rf"pip install 'nvidia-nvimgcodec-{package}\[nvjpeg\]'"):
        GpuDecoder(encoder)


def test_what_nvimagecodec_cannot_read_stays_in_its_place(encoder, monkeypatch):
    """The calls to nvImageCodec, by a stand-in that refuses one header and fails on one image."""
    files = [encoded(photograph(60, 40, seed)) for seed in range(4)]
    asked = {}

    def code_stream(data):
        if data == files[1]:
            raise RuntimeError("Failed to get image info")
        return data

    class Decoder:
        def __init__(self, **options):
            asked.update(options)

        def decode(self, streams, *, params, cuda_stream):
            asked.update(params=params, stream=cuda_stream)
            return [None if data == files[2] else FakeGpu.pixels(data) for data in streams]

    codec = SimpleNamespace(
        BackendKind=SimpleNamespace(HW_GPU_ONLY="hw", GPU_ONLY="gpu", HYBRID_CPU_GPU="both"),
        Backend=lambda kind: kind,
        Decoder=Decoder,
        DecodeParams=lambda **options: options,
        CodeStream=code_stream,
    )
    monkeypatch.setitem(sys.modules, "nvidia", SimpleNamespace(nvimgcodec=codec))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    pixels, errors = GpuDecoder(encoder)(files)
    assert asked == {
        "device_id": 3,
        "backends": ["hw", "gpu", "both"],
        "options": ":fancy_upsampling=1",
        "params": {"apply_exif_orientation": False},
        "stream": 7,
    }
    assert errors == [""] * 4
    for data, got, limit in zip(files, pixels.numpy(), (2, 0, 0, 2), strict=True):
        expected = decode_image(data, encoder.crop)
        assert np.abs(got.astype(int) - expected).max() <= limit


@pytest.mark.gpu
def test_nvimagecodec_gives_nearly_the_pixels_and_embeddings_of_pillow(tiny_encoder_dir):
    pytest.importorskip("nvidia.nvimgcodec")
    encoder = load(tiny_encoder_dir, "cuda")
    sizes = [encoded(photograph(*size), quality=90) for size in SIZES.values()]
    files = [*sizes, *PLAIN.values(), *OTHERS.values(), *BAD.values()]
    decoder = GpuDecoder(encoder)
    decoded = decoder._decode_jpegs([*PLAIN.values()])
    assert all(image is not None and image.is_cuda for image in decoded)
    pixels, errors = decoder(files)
    assert pixels.is_cuda
    n_good = len(files) - len(BAD)
    assert errors[:n_good] == [""] * n_good
    assert all(errors[n_good:])
    expected = np.stack([decode_image(data, encoder.crop) for data in files[:n_good]])
    difference = np.abs(pixels[:n_good].cpu().numpy().astype(int) - expected)
    assert difference.mean(axis=(1, 2, 3)).max() < 2
    got = encoder.encode_images(pixels[:n_good], batch_size=8)
    assert (got * encoder.encode_images(expected, batch_size=8)).sum(axis=1).min() >= 0.999
