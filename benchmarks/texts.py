"""Texts through the text tower, sorted and cut at the longest, against full-length batches.

    python benchmarks/texts.py --model local-dir:PATH

The peer is open_clip's own `encode_text` on batches of the tower's whole context in the order of
the list, on the same texts, threads and batch size. One JSON object a line.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import psutil
import torch
import tyro
from torch import Tensor

from tac_ray.encoders.clip import Encoder, EncoderSpec
from tac_ray.encoders.nouns import load_nouns
from tac_ray.encoders.prompts import prompts


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: str | None = None
    """An encoder as `--model` of tac-ray; default is ViT-B/32's architecture, random weights."""
    n_nouns: int = 146
    """Nouns, each in seven templates."""
    batch_size: int = 256
    """Prompts a forward pass."""
    repeats: int = 3
    """Medians are over so many."""
    quick: bool = False
    """One repeat of a few nouns."""


def main(options: Options) -> None:
    """Measure and print."""
    n_nouns, repeats = (20, 1) if options.quick else (options.n_nouns, options.repeats)
    nouns = load_nouns("wordnet", "clean")
    chosen = nouns[:: len(nouns) // n_nouns][:n_nouns]
    texts = [prompt for noun in chosen for prompt in prompts(noun)]
    encoder, model, tokenize = _load(options.model)

    def ours() -> Tensor:
        return encoder.encode_texts(texts, batch_size=options.batch_size)

    @torch.inference_mode()
    def peer() -> Tensor:
        batches = tokenize(texts).split(options.batch_size)
        return torch.cat([model.encode_text(batch) for batch in batches])

    difference = (ours() - peer()).abs().max().item()
    seconds, peer_seconds = _median(ours, repeats), _median(peer, repeats)
    line = {
        "benchmark": "texts",
        "case": options.model or "ViT-B-32-quickgelu, random weights",
        "seconds": round(seconds, 3),
        "peer": "open_clip encode_text, 77-token batches",
        "peer_seconds": round(peer_seconds, 3),
        "speedup": round(peer_seconds / seconds, 2),
        "texts_per_s": round(len(texts) / seconds, 1),
        "largest_difference": difference,
        "peak_rss_gb": round(psutil.Process().memory_info().rss / 1e9, 2),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    print(json.dumps(line))


def _load(name: str | None) -> tuple[Encoder, open_clip.CLIP, Callable[[list[str]], Tensor]]:
    if name is not None:
        encoder = EncoderSpec(model=name, pretrained=None, precision="fp32").load()
        return encoder, open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    architecture = "ViT-B-32-quickgelu"
    model = open_clip.create_model(architecture, load_weights=False).eval()
    folder = tempfile.TemporaryDirectory()
    weights = Path(folder.name) / "weights.pt"
    torch.save(model.state_dict(), weights)
    try:
        spec = EncoderSpec(model=architecture, pretrained=str(weights), precision="fp32")
        return spec.load(), model, open_clip.get_tokenizer(architecture)
    finally:
        folder.cleanup()


def _median(work: Callable[[], Tensor], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    main(tyro.cli(Options))
