"""Train the demo's encoder, tac_ray/demo/encoder: a small CLIP that knows emoji and WordNet.

    apt-get install fonts-noto-color-emoji
    python scripts/train_demo_encoder.py

Pictures come from scripts/render_demo.py: every character of Noto Color Emoji whose Unicode name
leads to a noun of WordNet (`--list` prints them), except the demo's unseen glyphs and what looks
the same to the pixel. The demo's own pictures are not among them. Its classes are not told,
though some of their names are hypernyms of what is drawn.

A picture's text is its noun, a synonym or a hypernym, bare or in one of TAC's prompt templates:
lemmas and links of tac_ray's noun table, nothing else. Both towers start from random weights and
learn with CLIP's contrastive loss on

- pictures and texts, where further nouns of WordNet are among each picture's wrong texts, and
- nouns and their synonyms or hypernyms, over all WordNet, so that a noun that was never pictured
  lies near its kind. The names of unseen glyphs are among these nouns: words, not pictures.

A wrong pair whose synsets are equal or one above the other is no pair at all: it is left out.

Writes open_clip_config.json and open_clip_model.safetensors (fp16, 10 MB). Takes 13 minutes on two
cores and 3 GB of memory. Everything random comes from one seed.
"""

import argparse
import json
import math
import time
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from demo_nouns import BLOCKS, Nouns, noun_of, synset_of
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from render_demo import DEMO, FONT, TRAINING_STREAM, demo_glyphs, glyph_image, picture
from safetensors.torch import save_file
from torch import Tensor

from tac_ray.encoders.clip import packed_text_forward
from tac_ray.encoders.prompts import PROMPT_TEMPLATES

IMAGE_SIZE = 64
CONTEXT_LENGTH = 32  # WordNet's longest noun in the longest template has 28 tokens.
MODEL = {
    "embed_dim": 64,
    "vision_cfg": {
        "layers": [2, 2, 2, 2],
        "width": 16,
        "head_width": 64,
        "image_size": IMAGE_SIZE,
    },
    "text_cfg": {
        "context_length": CONTEXT_LENGTH,
        "vocab_size": 49408,
        "width": 64,
        "heads": 4,
        "layers": 2,
    },
}
PREPROCESS = {
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}

MAX_GLYPHS_PER_NOUN = 10  # So that 150 smileys do not outweigh the animals.
TEXT_SHARES = {"noun": 0.4, "bare": 0.25, "short": 0.7}
TEXT_LOSS_WEIGHT = 0.5
N_STEPS = 1900
N_WARM_UP_STEPS = 100
BATCH_SIZE = 256
LEARNING_RATE = 2e-3
PICTURES_PER_GLYPH = 48
N_THREADS = 2
SEED = 0


def training_glyphs(nouns: Nouns, font: Path) -> dict[str, str]:
    """The characters to train on and their nouns: none that an unseen one looks like."""
    unseen = {glyph.character for glyph in demo_glyphs() if not glyph.seen}
    unseen_pixels = {glyph_image(character, font).tobytes() for character in unseen}
    tofu = glyph_image("\U0010fffd", font).tobytes()
    found = {}
    for code_point in BLOCKS:
        character = chr(code_point)
        noun = noun_of(character, nouns)
        if noun is None:
            continue
        pixels = glyph_image(character, font).tobytes()
        is_new = pixels and pixels != tofu and pixels not in unseen_pixels
        if is_new and list(found.values()).count(noun) < MAX_GLYPHS_PER_NOUN:
            found[character] = noun
    return found


def render(character: str, n_pictures: int, font: Path) -> NDArray[np.uint8]:
    """Training pictures of a character, as the encoder takes them, (n_pictures, 64, 64, 3)."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = (picture(character, TRAINING_STREAM, n, font) for n in range(n_pictures))
    return np.stack([np.asarray(i.resize(size, Image.Resampling.BICUBIC)) for i in images])


class Prompter:
    """Tokens of prompts. Nouns and templates are encoded once and joined, which is quick."""

    def __init__(self) -> None:
        self._tokenizer = open_clip.SimpleTokenizer()
        self._frames = [("", ""), *(t.split("{}") for t in PROMPT_TEMPLATES)]
        self._encode = cache(self._tokenizer.encode)

    def __call__(self, texts: Sequence[str], rng: Generator) -> Tensor:
        """The texts in random templates or bare, (n, longest)."""
        rows = []
        for text in texts:
            is_bare = rng.random() < TEXT_SHARES["bare"]
            before, after = self._frames[0 if is_bare else rng.integers(1, len(self._frames))]
            body = [*self._encode(before), *self._encode(text), *self._encode(after)]
            body = body[: CONTEXT_LENGTH - 2]
            rows.append([self._tokenizer.sot_token_id, *body, self._tokenizer.eot_token_id])
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def encode_texts(model: open_clip.CLIP, tokens: Tensor) -> Tensor:
    """Unit-norm embeddings of rows that may be shorter than the context, (n, d)."""
    return F.normalize(packed_text_forward(model, tokens, n_shared=1).float(), dim=-1)


def encode_images(model: open_clip.CLIP, pixels: Tensor) -> Tensor:
    """The image tower on uint8 pixels, (n, height, width, 3)."""
    x = pixels.permute(0, 3, 1, 2).float() / 255
    x = (x - PREPROCESS["mean"][0]) / PREPROCESS["std"][0]
    with torch.autocast("cpu", torch.bfloat16):
        x = model.encode_image(x)
    return F.normalize(x.float(), dim=-1)


def contrast(a: Tensor, b: Tensor, related: Tensor, scale: Tensor) -> Tensor:
    """InfoNCE of a[i] and b[i] against all of b but those related to a[i]."""
    target = torch.arange(len(a))
    related = related.clone()
    related[target, target] = False
    return F.cross_entropy((scale * a @ b.T).masked_fill(related, -math.inf), target)


def shuffled(n: int, size: int, rng: Generator) -> Iterator[NDArray[np.int64]]:
    """Batches of row numbers, epoch after epoch, without end."""
    while True:
        order = rng.permutation(n)
        yield from (order[at : at + size] for at in range(0, n - size + 1, size))


def jittered(pixels: NDArray[np.uint8], rng: Generator) -> Tensor:
    """The pictures flipped and shifted a little, brighter or darker, each its own way."""
    pad = 3
    padded = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="edge")
    out = np.empty_like(pixels)
    for n, (y, x) in enumerate(rng.integers(0, 2 * pad + 1, (len(pixels), 2))):
        crop = padded[n, y : y + IMAGE_SIZE, x : x + IMAGE_SIZE]
        out[n] = crop[:, ::-1] if rng.random() < 0.5 else crop
    gain = rng.uniform(0.75, 1.25, (len(pixels), 1, 1, 3)) * rng.uniform(0.8, 1.2)
    return torch.from_numpy(np.clip(out * gain, 0, 255).astype(np.uint8))


def train(bank: NDArray[np.uint8], synsets: Sequence[list[int]], nouns: Nouns) -> open_clip.CLIP:
    """The model after N_STEPS steps; bank has the pictures of synsets[i] in row i."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng([TRAINING_STREAM, SEED])
    model = open_clip.CLIP(**MODEL)
    model.visual.to(memory_format=torch.channels_last)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "embedding" not in n]
    plain = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, n_steps=N_STEPS))
    prompter = Prompter()
    every_noun = list(nouns.meaning)
    n_glyphs, n_pictures = bank.shape[:2]
    batches = shuffled(n_glyphs * n_pictures, BATCH_SIZE, rng)
    start, losses = time.monotonic(), []
    for step in range(N_STEPS):
        glyph, number = np.divmod(next(batches), n_pictures)
        shown = [synsets[i] for i in glyph]
        named = [
            nouns.sample_text(s[rng.integers(len(s))], rng, TEXT_SHARES["noun"]) for s in shown
        ]
        others = [
            pool[rng.integers(len(pool))]
            for is_short in rng.random(BATCH_SIZE // 2) < TEXT_SHARES["short"]
            for pool in [nouns.short if is_short else every_noun]
        ]
        other_synsets = [nouns.meaning[noun.lower()] for noun in others]
        uppers = [nouns.sample_text(s, rng, 0.3) for s in other_synsets]
        words = [*(noun for noun, _ in named), *others, *(noun for noun, _ in uppers)]
        meant = [*(s for _, s in named), *other_synsets]
        embedding = encode_texts(model, prompter(words, rng))
        text, other, upper = embedding.split([len(named), len(others), len(uppers)])
        image = encode_images(model, jittered(bank[glyph, number], rng))
        scale = model.logit_scale.exp()
        # A glyph has one noun or two.
        to_text = nouns.related([s[0] for s in shown], meant)
        to_text |= nouns.related([s[-1] for s in shown], meant)
        to_upper = nouns.related(other_synsets, [s for _, s in uppers])
        loss_image = contrast(image, torch.cat([text, other]), to_text, scale) + contrast(
            text, image, to_text[:, : len(text)].T, scale
        )
        loss_text = contrast(other, upper, to_upper, scale) + contrast(
            upper, other, to_upper.T, scale
        )
        optimizer.zero_grad()
        (loss_image / 2 + TEXT_LOSS_WEIGHT * loss_text / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append((loss_image.item() / 2, loss_text.item() / 2))
        if (step + 1) % 100 == 0:
            images_loss, texts_loss = np.mean(losses[-100:], axis=0)
            print(
                f"step {step + 1:,} of {N_STEPS:,}: loss {images_loss:.3f} on pictures, "
                f"{texts_loss:.3f} on nouns; {time.monotonic() - start:.0f} s",
                flush=True,
            )
    return model.eval()


def _rate(step: int, n_steps: int) -> float:
    """Share of the learning rate: up in a line, down in half a cosine."""
    warm = min(1.0, (step + 1) / N_WARM_UP_STEPS)
    return warm * 0.5 * (1 + math.cos(math.pi * step / n_steps))


def save(model: open_clip.CLIP, out: Path) -> None:
    """Write configuration and fp16 weights as open_clip's local-dir: reads them."""
    out.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    state = {
        name: tensor.half().contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    save_file(state, out / "open_clip_model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Render the training pictures, train, write the encoder and say what was written."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--font", type=Path, default=FONT, help="NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=DEMO / "encoder", help="folder to write")
    parser.add_argument("--list", action="store_true", help="print the glyphs' nouns and stop")
    args = parser.parse_args()
    torch.set_num_threads(N_THREADS)
    nouns = Nouns.load()
    glyphs = training_glyphs(nouns, args.font)
    synsets = [[synset_of(noun, nouns) for noun in found.split("/")] for found in glyphs.values()]
    if args.list:
        for character, shown in zip(glyphs, synsets, strict=True):
            print(f"{ord(character):X} {character} {unicodedata.name(character).lower()}")
            for s in shown:
                print("    ", " < ".join(nouns.lemmas[a][0] for a in (s, *nouns.texts_above(s))))
        return
    start = time.monotonic()
    with ProcessPoolExecutor(N_THREADS) as pool:
        rendered = pool.map(
            partial(render, n_pictures=PICTURES_PER_GLYPH, font=args.font), glyphs, chunksize=16
        )
        bank = np.stack(list(rendered))
    print(f"{len(bank):,} glyphs, {PICTURES_PER_GLYPH} pictures of each: {bank.nbytes:,} bytes")
    print(f"rendered in {time.monotonic() - start:.0f} s", flush=True)
    save(train(bank, synsets, nouns), args.out)
    for path in sorted(args.out.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")
    print(f"{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
