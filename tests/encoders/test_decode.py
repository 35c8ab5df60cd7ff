"""Pixels of odd images as a viewer shows them, and a reason for every file that has none."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image, ImageFile

from tac_ray.encoders import decode
from tac_ray.encoders.decode import decode_image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return decode_image(data, lambda image: image)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def corners() -> Image.Image:
    """16 x 32 pixels in four colors, clockwise from the top left: red, green, blue, white."""
    image = Image.new("RGB", (32, 16), RED)
    image.paste(GREEN, (16, 0, 32, 8))
    image.paste(BLUE, (16, 8, 32, 16))
    image.paste(WHITE, (0, 8, 16, 16))
    return image


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit gray of this size, whatever its other chunks say."""
    return png_of(struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), *chunks)


def png_of(header: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), *chunks, (b"IEND", b""))
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})],
)
def test_lossless_images_keep_their_pixels(kind, options):
    array = noise(9, 7)
    got = pixels(encoded(Image.fromarray(array), kind, **options))
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, array)


def test_the_crop_is_applied_to_rgb_pixels():
    seen = []

    def crop(image: Image.Image) -> Image.Image:
        seen.append((image.mode, image.size))
        return image.crop((1, 0, 3, 1))

    got = decode_image(encoded(Image.fromarray(noise(4, 6)).convert("L"), "PNG"), crop)
    assert seen == [("RGB", (6, 4))]
    assert got.shape == (1, 2, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(orientation):
    upright = corners()
    # What a camera stores for each value, from the meaning of the tag.
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    got = pixels(encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0))
    assert got.shape == (16, 32, 3)
    for (row, column), color in {
        (3, 7): RED,
        (3, 23): GREEN,
        (12, 23): BLUE,
        (12, 7): WHITE,
    }.items():
        np.testing.assert_allclose(got[row, column].astype(int), color, atol=12)


@pytest.mark.parametrize("byte", [1, 3], ids=["tag", "type"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_photograph_with_broken_exif_is_shown_or_refused(byte):
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "hello"
    exif[ExifTags.Base.Orientation] = 6
    data = bytearray(encoded(corners(), "JPEG", exif=exif))
    first_entry = data.index(b"Exif\0\0") + 16
    escaped = {}
    for value in range(256):
        data[first_entry + byte] = value
        try:
            assert pixels(bytes(data)).shape[2] == 3
        except ValueError:
            continue
        except Exception as error:
            escaped[value] = repr(error)
    assert not escaped


def test_cmyk_jpeg_becomes_rgb():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    got = pixels(encoded(cmyk, "JPEG", quality=95))
    assert got.shape == (16, 16, 3)
    np.testing.assert_allclose(got.reshape(-1, 3).mean(0), RED, atol=12)


def test_inverted_adobe_cmyk_jpeg_becomes_rgb():
    # Adobe's programs store the complement and say so by their marker.
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).info["adobe_transform"] == 0
    got = pixels(data)
    np.testing.assert_allclose(got.reshape(-1, 3).mean(0), RED, atol=12)


def test_ycck_jpeg_becomes_rgb():
    # Pillow writes CMYK alone; here with the marker's transform set to 2, so that the first three
    # channels are read as Y, Cb and Cr. Adobe's complement of red's inks is (255, 0, 0, 255), and
    # YCCK holds the complement of the first three, cyan: Y, Cb, Cr = 179, 171, 0 (JFIF).
    stored = Image.new("CMYK", (16, 16), tuple(255 - value for value in (179, 171, 0, 255)))
    data = bytearray(encoded(stored, "JPEG", quality=95))
    data[data.index(b"Adobe") + 11] = 2
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    got = pixels(bytes(data))
    np.testing.assert_allclose(got.reshape(-1, 3).mean(0), RED, atol=12)


def test_palette_with_transparency_lies_over_white():
    image = Image.new("P", (4, 2))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2, 0, 1, 1, 0, 2])
    got = pixels(encoded(image, "PNG", transparency=1))
    colors = [RED, WHITE, BLUE, RED, WHITE, WHITE, RED, BLUE]
    np.testing.assert_array_equal(got.reshape(-1, 3), colors)


def test_transparent_color_of_a_gray_png_lies_over_white():
    image = Image.fromarray(np.array([[7, 50]], dtype=np.uint8))
    got = pixels(encoded(image, "PNG", transparency=7))
    np.testing.assert_array_equal(got, [[WHITE, (50, 50, 50)]])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_gray_is_scaled_and_not_clipped(kind):
    values = np.array([[0, 128, 257, 32_896], [40_000, 65_000, 65_407, 65_535]], dtype=np.uint16)
    got = pixels(encoded(Image.fromarray(values), kind))
    expected = np.array([[0, 0, 1, 128], [156, 253, 255, 255]])
    np.testing.assert_array_equal(got, np.repeat(expected[..., None], 3, axis=2))


def test_16_bit_rgb_keeps_its_brightness():
    # Pillow writes no such PNG. Color type 2, no filter.
    values = np.array([[[0, 257, 65_535], [32_896, 40_000, 65_000]]], dtype=">u2")
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    got = pixels(png_of(header, (b"IDAT", zlib.compress(b"\0" + values.tobytes()))))
    np.testing.assert_allclose(got.astype(int), [[[0, 1, 255], [128, 156, 253]]], atol=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        ([0.5, 0.5, 0.5, 0.5], [128] * 4),
        ([-2, 0, 1, 2], [0, 128, 191, 255]),
        ([1000, 2000, 3000, 3000], [0, 128, 255, 255]),
        ([7, 7, 7, 7], [0] * 4),
        ([0, float("nan"), 1, 1], [0, 0, 255, 255]),
        ([-float("inf"), 0, 0, float("inf")], [0, 128, 128, 255]),
    ],
    ids=["0 to 1", "gray", "below 0", "above 1", "one value", "not a number", "infinite"],
)
def test_gray_in_floating_point_is_scaled(values, expected):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert image.mode == "F"
    got = pixels(encoded(image, "TIFF"))
    np.testing.assert_array_equal(got, np.repeat(np.array([expected])[..., None], 3, axis=2))


def test_one_bit_image_is_black_and_white():
    image = Image.fromarray(np.array([[True, False], [False, True]]))
    assert image.mode == "1"
    got = pixels(encoded(image, "PNG"))
    np.testing.assert_array_equal(got[..., 0], [[255, 0], [0, 255]])


def test_rgba_and_gray_with_alpha_lie_over_white():
    rgba = Image.new("RGBA", (3, 1))
    rgba.putdata([(*RED, 255), (*RED, 0), (0, 0, 0, 128)])
    got = pixels(encoded(rgba, "PNG"))
    np.testing.assert_allclose(got[0].astype(int), [RED, WHITE, (127, 127, 127)], atol=1)
    gray = Image.new("LA", (3, 1))
    gray.putdata([(40, 255), (40, 0), (40, 128)])
    got = pixels(encoded(gray, "PNG"))
    np.testing.assert_allclose(got[0, :, 0].astype(int), [40, 255, 147], atol=1)


def test_palette_with_alpha_lies_over_white():
    image = Image.new("PA", (3, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([(0, 255), (1, 0), (1, 255)])
    rgb = decode._to_rgb(image)  # no file holds this mode, but Pillow may come to give it
    assert rgb.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(rgb), [[RED, WHITE, GREEN]])


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 6), color) for color in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    got = pixels(data)
    assert got.shape == (6, 8, 3)
    assert (got == RED).all()


def test_first_page_of_a_tiff_with_pages_of_several_sizes():
    first = noise(5, 6)
    data = encoded(
        Image.fromarray(first), "TIFF", save_all=True, append_images=[Image.new("RGB", (9, 9))]
    )
    assert Image.open(io.BytesIO(data)).n_frames == 2
    np.testing.assert_array_equal(pixels(data), first)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_one_pixel(kind):
    got = pixels(encoded(Image.new("RGB", (1, 1), WHITE), kind))
    np.testing.assert_array_equal(got, [[WHITE]])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("kept", [0.9, 0.5, 0.01])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_truncated_files_are_refused_with_a_reason(kind, kept):
    data = encoded(Image.fromarray(noise(40, 40)), kind)
    with pytest.raises(ValueError, match=r"\w+: .+|not an image"):
        pixels(data[: int(len(data) * kept)])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"\0" * 100, "not an image"),
        (b"<html>404 Not Found</html>", "not an image"),
        (b"these are the words of photograph.jpg\n" * 20, "not an image"),
        (b"\xff\xd8\xff\xe0 not a photograph", "OSError"),
        (png(4, 4), "OSError"),
        (png(4, 4, (b"IDAT", b"no stream")), "OSError"),
    ],
    ids=["no bytes", "zero bytes", "page", "text", "JPEG mark only", "no pixels", "broken stream"],
)
def test_what_is_no_image_is_refused_with_a_reason(data, reason):
    with pytest.raises(ValueError, match=reason):
        pixels(data)


@pytest.fixture
def never_decompressed(monkeypatch):
    """Stands in for decompression, which must not be reached with too many pixels."""

    def load(self):
        raise OSError("reached the pixels")

    for kind in (ImageFile.ImageFile, *map(type, [Image.open(io.BytesIO(png(1, 1)))])):
        monkeypatch.setattr(kind, "load", load)


@pytest.mark.parametrize(
    ("width", "height"), [(20_001, 10_000), (20_000, 20_000), (60_000, 60_000), (1 << 30, 2)]
)
def test_too_many_pixels_are_refused_before_decompression(never_decompressed, width, height):
    with pytest.raises(ValueError, match=r"ixels") as error:
        pixels(png(width, height))
    assert "reached the pixels" not in str(error.value)


def test_exactly_as_many_pixels_as_allowed_are_decompressed(never_decompressed):
    with pytest.raises(ValueError, match="reached the pixels"):
        pixels(png(decode.MAX_PIXELS // 10_000, 10_000))


def test_refusal_of_size_names_the_image_and_the_limit(monkeypatch):
    data = encoded(Image.new("RGB", (40, 30)), "PNG")
    monkeypatch.setattr(decode, "MAX_PIXELS", 1_200)
    assert pixels(data).shape == (30, 40, 3)
    monkeypatch.setattr(decode, "MAX_PIXELS", 1_199)
    with pytest.raises(ValueError, match=r"40 x 30 pixels should be <= 1,199"):
        pixels(data)


def test_no_file_starts_another_program(monkeypatch):
    started = []

    def ghostscript(*args, **kwargs):
        started.append(args)
        return Image.new("RGB", (4, 4)).im

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    data = encoded(Image.new("RGB", (4, 4)), "EPS")
    with contextlib.suppress(ValueError):
        pixels(data)
    assert not started
    with pytest.raises(ValueError, match=r"\w+"):
        pixels(data)


def test_images_that_resizing_would_blow_up_are_refused_before_decompression(never_decompressed):
    with pytest.raises(ValueError, match=r"1 x 20001 pixels should be at most 500 times"):
        pixels(png(1, 20_001))
