"""From the bytes of an untrusted file to the pixels an encoder takes."""

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970
"""Larger images are refused before they are decompressed. Pillow's own limit."""

MAX_ASPECT = 500
"""Narrower images are refused: resized to an encoder's short side, they would fill the memory."""

# Pillow would open more, some of them (EPS) by running another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_ORIENTATION_TAG = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Crop = Callable[[Image.Image], Image.Image]


def decode_image(data: bytes, crop: Crop) -> NDArray[np.uint8]:
    """Pixels of an image as a viewer shows it, resized and cropped, (height, width, 3) uint8.

    The first frame; turned as EXIF says; palette, gray, 16-bit and CMYK converted to RGB;
    transparency over white. Gray in floating point is shown from 0 (black) to 1 (white) where all
    values lie there, else from its least value to its greatest.

    Args:
        data: content of a JPEG, PNG, WebP, BMP, GIF or TIFF file.
        crop: the encoder's resize and crop.

    Raises:
        ValueError: not an image, truncated, larger than MAX_PIXELS or longer than MAX_ASPECT
            times its width.
    """
    with open_image(data) as image:
        image.load()
        turn, rgb = exif_turn(image), _to_rgb(image)
        upright = rgb if turn is None else rgb.transpose(turn)
    return np.asarray(crop(upright), dtype=np.uint8)


@contextlib.contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """The image of a file, of which only the header has been read.

    Raises:
        ValueError: as `decode_image`; also for whatever Pillow raises inside the `with` block.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ValueError(
                        f"{width} x {height} pixels should be <= {MAX_PIXELS:,} in all"
                    )
                if max(width, height) > MAX_ASPECT * min(width, height):
                    raise ValueError(
                        f"{width} x {height} pixels should be at most {MAX_ASPECT} times as long "
                        "as wide"
                    )
                yield image
    except ValueError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image in any of the formats {', '.join(_FORMATS)}") from error
    except Exception as error:  # Pillow's readers raise nearly anything on a broken file
        raise ValueError(f"{type(error).__name__}: {error}") from error


def exif_turn(image: Image.Image) -> Image.Transpose | None:
    """How the EXIF data say to turn an image, None where it is upright."""
    try:
        return _TURN.get(image.getexif().get(_ORIENTATION_TAG))  # type: ignore[arg-type]
    except Exception:  # EXIF data that cannot be read turn nothing
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit gray to 255 instead of scaling it.
        wide = np.asarray(image, dtype=np.float64)
        return Image.fromarray((wide / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        # Pillow clips floating point to 0 and 255, though white is mostly 1.
        values = np.nan_to_num(np.asarray(image)).astype(np.float64)
        low, high = values.min(), values.max()
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
        scaled = (values - low) / ((high - low) or 1.0)
        return Image.fromarray((scaled * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
