"""Render the demo's pictures, tac_ray/demo/images, and the list of its glyphs.

    apt-get install fonts-noto-color-emoji
    python scripts/render_demo.py

Every picture shows one character of Noto Color Emoji, at a random size, place and angle, on a
random background. A class has 10 to 24 characters that look different but share a meaning, and
each character has a few pictures, so a cluster that is right joins many shapes.

    tac_ray/demo/images/<class>/<code point>-<n>.jpg
    tac_ray/demo/glyphs.csv     code_point, name, class, seen: a row a character

`name` is the character's name in Unicode. A fifth of each class, rounded up and drawn with a fixed
seed, has `seen` false: scripts/train_demo_encoder.py, which imports this file for its own pictures,
never shows those to the encoder. Training pictures come from other random streams than the demo's.

Takes 5 seconds and 5 MB. The same font file, Pillow and NumPy give the same bytes.
"""

import argparse
import csv
import math
import shutil
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

DEMO = Path(__file__).parents[1] / "tac_ray" / "demo"
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # The only size of this bitmap font.

CLASSES = {
    "bird": "🐓🐔🐣🐤🐥🐦🐧🕊🦃🦅🦆🦉🦚🦜🦢🦤🦩",
    "building": "🏠🏡🏢🏣🏥🏦🏨🏪🏫🏬🏭🏯🏰🏛⛪🕌🕍🛕🏚🛖",
    "clothing": "👔👕👖👗👘👙👚🥻🥼🦺🧥🧤🧣🧦🩱🩲🩳🎽🥋",
    "dessert": "🍦🍧🍨🍩🍪🎂🍰🧁🥧🍫🍬🍭🍮🥞🥠🧇",
    "drink": "☕🍵🍶🍷🍸🍹🍺🍻🥂🥃🥛🧃🧉🧋🥤🍾",
    "flower": "🌷🌸🌹🌺🌻🌼🪷💐🥀🏵💮",
    "fruit": "🍇🍈🍉🍊🍋🍌🍍🍎🍏🍐🍑🍒🍓🥝🥭🫐🥥",
    "insect": "🐜🐝🐞🦋🦗🦟🪰🪲🪳🐛",
    "mammal": "🐎🐄🐖🐑🐐🐕🐈🐇🐘🐅🐒🐪🦌🦏🦔🦘🦥🦨🐻🐼🐨🦊🦁🐹",
    "musical_instrument": "🎷🎸🎹🎺🎻🪕🥁🪘🪗📯",
    "tool": "🔨🔧🪛🪚⛏🪓⚒🛠✂🔪🪠🪒",
    "vegetable": "🍅🍆🌽🥒🥔🥕🥦🥬🧄🧅🫑🌶🍠🫘🍄",
    "vehicle": "🚗🚕🚙🚌🚎🏎🚓🚑🚒🚐🛻🚚🚛🚜🛵🏍🚲🚂🚃🚋🛺🛴",
}
PICTURES_PER_CLASS = 115  # About so many; a glyph has 4 to 8.
UNSEEN_SHARE = 0.2
SEED = 0

# First word of a random stream, so that no picture of one purpose is one of another.
SPLIT_STREAM, DEMO_STREAM, TRAINING_STREAM = range(3)

SIZE = 96
JPEG_QUALITY = 88

Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Glyph:
    """One character of the demo."""

    character: str
    label: str
    seen: bool

    @property
    def code_point(self) -> str:
        """In hexadecimal, as Unicode writes it."""
        return f"{ord(self.character):X}"


def demo_glyphs() -> list[Glyph]:
    """The demo's characters by class, some of them kept from the encoder's training."""
    rng = np.random.default_rng([SPLIT_STREAM, SEED])
    glyphs = []
    for label, characters in CLASSES.items():
        n_unseen = math.ceil(UNSEEN_SHARE * len(characters))
        unseen = set(rng.choice(len(characters), n_unseen, replace=False).tolist())
        glyphs += [Glyph(c, label, at not in unseen) for at, c in enumerate(characters)]
    return glyphs


@cache
def glyph_image(character: str, font: Path = FONT) -> Image.Image:
    """The character as the font draws it, cropped, or an empty image if the font lacks it."""
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    typeface = ImageFont.truetype(font, FONT_SIZE)
    ImageDraw.Draw(canvas).text((20, 20), character, font=typeface, embedded_color=True)
    return canvas.crop(canvas.getbbox() or (0, 0, 0, 0))


def picture(character: str, stream: int, n: int, font: Path = FONT) -> Image.Image:
    """Picture n of a character, SIZE pixels square: the same for the same arguments."""
    rng = np.random.default_rng([stream, SEED, ord(character), n])
    canvas = Image.fromarray(_background(rng)).convert("RGBA")
    layer = _placed(glyph_image(character, font), rng)
    if rng.random() < 0.35:
        canvas.alpha_composite(_halo(layer, rng))
    canvas.alpha_composite(layer)
    return canvas.convert("RGB")


def _placed(glyph: Image.Image, rng: Generator) -> Image.Image:
    """A transparent picture with the glyph flipped, sized, turned and put somewhere, uncut."""
    if rng.random() < 0.5:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    glyph = glyph.rotate(rng.normal(0, 10), Image.Resampling.BICUBIC, expand=True)
    glyph = glyph.crop(glyph.getbbox())
    scale = rng.uniform(0.6, 0.96) * SIZE / max(glyph.size)
    width, height = (max(1, round(scale * side)) for side in glyph.size)
    glyph = glyph.resize((width, height), Image.Resampling.LANCZOS)
    layer = Image.new("RGBA", (SIZE, SIZE))
    x, y = rng.integers(SIZE - width + 1), rng.integers(SIZE - height + 1)
    layer.paste(glyph, (int(x), int(y)))
    return layer


def _halo(layer: Image.Image, rng: Generator) -> Image.Image:
    """A soft glow or shadow around what is on the layer."""
    alpha = layer.getchannel("A").filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 4)))
    alpha = alpha.point(lambda value: min(255, int(1.6 * value)))
    shade = 255 if rng.random() < 0.5 else 20
    halo = Image.new("RGBA", layer.size, (shade, shade, shade, 0))
    halo.putalpha(alpha)
    return halo


def _background(rng: Generator) -> NDArray[np.uint8]:
    painter = _PAINTERS[rng.integers(len(_PAINTERS))]
    grain = rng.normal(0, rng.choice([0.0, 3.0, 9.0]), (SIZE, SIZE, 1))
    return np.clip(painter(rng) + grain, 0, 255).astype(np.uint8)


def _color(rng: Generator) -> Pixels:
    color = rng.uniform(10, 250, 3).astype(np.float32)
    return color.mean() + rng.uniform(0.2, 0.9) * (color - color.mean())


def _axis(rng: Generator) -> Pixels:
    """Positions along a random direction, about -0.7 to 0.7, (SIZE, SIZE)."""
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    return (math.cos(angle) * x + math.sin(angle) * y).astype(np.float32)


def _blend(weight: Pixels, rng: Generator) -> Pixels:
    """Two random colors mixed: the first where the weight is 0, the second where it is 1."""
    share = weight[..., None]
    return (1 - share) * _color(rng) + share * _color(rng)


def _flat(rng: Generator) -> Pixels:
    return np.tile(_color(rng), (SIZE, SIZE, 1))


def _gradient(rng: Generator) -> Pixels:
    return _blend(np.clip(_axis(rng) + 0.5, 0, 1), rng)


def _glow(rng: Generator) -> Pixels:
    y, x = np.mgrid[:SIZE, :SIZE] / (SIZE - 1) - rng.uniform(0, 1, (2, 1, 1))
    return _blend(np.clip(np.hypot(x, y) / rng.uniform(0.5, 1.2), 0, 1).astype(np.float32), rng)


def _stripes(rng: Generator) -> Pixels:
    wave = np.sin(2 * math.pi * rng.uniform(2, 8) * _axis(rng) + rng.uniform(0, 6))
    return _blend(np.clip(rng.choice([0.5, 8.0]) * wave + 0.5, 0, 1), rng)


def _checks(rng: Generator) -> Pixels:
    n_waves = rng.uniform(2, 5)
    waves = [np.sin(2 * math.pi * n_waves * _axis(rng)) for _ in range(2)]
    return _blend(np.clip(6 * waves[0] * waves[1] + 0.5, 0, 1), rng)


def _noise(rng: Generator) -> Pixels:
    side = int(rng.choice([3, 6, 12, 24]))
    small = rng.uniform(0, 255, (side, side, 3)).astype(np.uint8)
    cloud = Image.fromarray(small).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    contrast = rng.uniform(0.3, 0.9)
    return contrast * np.asarray(cloud, np.float32) + (1 - contrast) * _color(rng)


def _blobs(rng: Generator) -> Pixels:
    image = Image.fromarray(_flat(rng).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(4, 14))):
        x, y = rng.uniform(0, SIZE, 2)
        radius = rng.uniform(6, 26)
        fill = tuple(_color(rng).astype(int).tolist())
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    blurred = image.filter(ImageFilter.GaussianBlur(rng.uniform(1, 7)))
    return np.asarray(blurred, np.float32)


_PAINTERS: tuple[Callable[[Generator], Pixels], ...] = (
    _flat,
    _gradient,
    _glow,
    _stripes,
    _checks,
    _noise,
    _blobs,
)


def main() -> None:
    """Render all pictures, write the list of glyphs and say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=DEMO, help="folder of images/ and glyphs.csv")
    args = parser.parse_args()
    if not args.font.is_file():
        raise FileNotFoundError(
            f"no font '{args.font}'; run apt-get install fonts-noto-color-emoji, or pass --font"
        )
    images = args.out / "images"
    shutil.rmtree(images, ignore_errors=True)
    glyphs = demo_glyphs()
    for glyph in glyphs:
        folder = images / glyph.label
        folder.mkdir(parents=True, exist_ok=True)
        n_pictures = round(PICTURES_PER_CLASS / len(CLASSES[glyph.label]))
        for n in range(min(max(n_pictures, 4), 8)):
            image = picture(glyph.character, DEMO_STREAM, n, args.font)
            image.save(folder / f"{glyph.code_point.lower()}-{n}.jpg", quality=JPEG_QUALITY)
    with (args.out / "glyphs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["code_point", "name", "class", "seen"])
        for glyph in glyphs:
            name = unicodedata.name(glyph.character).lower()
            writer.writerow([glyph.code_point, name, glyph.label, str(glyph.seen).lower()])
    sizes = [path.stat().st_size for path in images.rglob("*.jpg")]
    n_unseen = sum(not glyph.seen for glyph in glyphs)
    print(f"{images}: {len(sizes):,} pictures, {sum(sizes):,} bytes")
    print(f"{len(CLASSES)} classes, {len(glyphs)} glyphs, {n_unseen} of them unseen")


if __name__ == "__main__":
    main()
