"""From the bytes of an untrusted file to the pixels an encoder takes."""

import io
import warnings
from collections.abc import Callable

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
    transparency over white.

    Args:
        data: content of a JPEG, PNG, WebP, BMP, GIF or TIFF file.
        crop: the encoder's resize and crop.

    Raises:
        ValueError: not an image, truncated, larger than MAX_PIXELS or longer than MAX_ASPECT
            times its width.
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
                image.load()
                rgb = _upright(image, _to_rgb(image))
    except ValueError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image in any of the formats {', '.join(_FORMATS)}") from error
    except Exception as error:  # Pillow's readers raise nearly anything on a broken file
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return np.asarray(crop(rgb), dtype=np.uint8)


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """`rgb` turned as the EXIF data of `image` say."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # EXIF data that cannot be read turn nothing
        return rgb
    return rgb.transpose(_TURN[orientation]) if orientation in _TURN else rgb


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit gray to 255 instead of scaling it.
        wide = np.asarray(image, dtype=np.float64)
        return Image.fromarray((wide / 257).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
