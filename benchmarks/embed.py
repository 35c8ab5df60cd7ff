"""Embedding against its peers: images, texts, and the listing of a bucket.

    python benchmarks/embed.py
    python benchmarks/embed.py --cases embed-bf16 --images 500

| case | what | peer, on the same data, encoder and threads |
|---|---|---|
| embed-fp32, -bf16, -fp16 | the stage, first batch to last | read, decode, encode in a loop |
| embed-fp16-nvjpeg | it, decoding on the GPU | the same loop, decoding on cores |
| texts | sorted, cut at the longest, heads shared | open_clip's encode_text, 77 tokens a text |
| list | the stage on a flat prefix, over HTTP | one call after the other |

One JSON object a line. All run on a GPU where there is one, for which the cases of fp16 are. The
loop decodes the images of a batch on as many threads as torch has; it does half of the images
before the stage and half after, since machines drift. The bucket is a server on this machine that
waits `--latency-ms` before each answer.
"""

import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import psutil
import torch
import tyro
from botocore.session import get_session
from numpy.typing import NDArray
from PIL import Image
from session import Silent, ray_session
from torch import Tensor

from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.store import Store
from tac_ray.config import EmbedImagesConfig
from tac_ray.encoders.clip import EncoderSpec
from tac_ray.encoders.decode import decode_image
from tac_ray.encoders.nouns import load_nouns
from tac_ray.encoders.prompts import prompts
from tac_ray.stages.embed_images import embed_images
from tac_ray.stages.list_images import list_images

ARCHITECTURE = "ViT-B-32-quickgelu"
LISTING_SERVER = Path(__file__).parents[1] / "tests" / "listing_server.py"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCH_SIZE = 256 if DEVICE == "cuda" else 16
Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    cases: tuple[str, ...] = ("embed-fp32", "embed-bf16", "texts", "list")
    """Which of those above."""
    model: str | None = None
    """An encoder as `--model` of tac-ray; default is ViT-B/32's architecture, random weights."""
    images: int = 2000
    """JPEGs of 500 x 375 pixels."""
    nouns: int = 146
    """Nouns, each in seven templates."""
    keys: int = 1_000_000
    """Keys under one prefix."""
    latency_ms: float = 50
    """Of each call that lists."""
    quick: bool = False
    """Little of everything."""


def main(options: Options) -> None:
    """Measure and print."""
    n_images, n_nouns, n_keys = options.images, options.nouns, options.keys
    if options.quick:
        n_images, n_nouns, n_keys = 64, 20, 20_000
    with tempfile.TemporaryDirectory() as folder:
        name, pretrained = options.model, None
        if name is None:
            name, pretrained = ARCHITECTURE, str(Path(folder) / "weights.pt")
            model = open_clip.create_model(ARCHITECTURE, load_weights=False)
            torch.save(model.state_dict(), pretrained)
        specs = {
            precision: EncoderSpec(model=name, pretrained=pretrained, precision=precision)
            for precision in ("fp32", "bf16", "fp16")
        }
        specs["fp16-nvjpeg"] = dataclasses.replace(specs["fp16"], decode_on_gpu=True)
        fp32_rate = 0.0
        for case in options.cases:
            if case == "texts":
                line = texts(specs["fp32"], n_nouns)
            elif case == "list":
                line = listing(folder, n_keys, options.latency_ms)
            else:
                photos = Path(folder) / "photos"
                if not photos.exists():
                    write_photos(photos, n_images)
                line = embed(folder, photos, specs[case.removeprefix("embed-")])
                if case == "embed-fp32":
                    fp32_rate = n_images / line["peer_seconds"]
                elif fp32_rate:
                    line["speedup_over_fp32"] = round(line["images_per_s"] / fp32_rate, 2)
            machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
            if DEVICE == "cuda":
                machine += f", {torch.cuda.get_device_name()}"
            figures = {
                "benchmark": "embed",
                "case": case,
                "encoder": options.model or f"{ARCHITECTURE}, random weights",
                **line,
                "speedup": round(line["peer_seconds"] / line["seconds"], 3),
                "machine": machine,
            }
            print(json.dumps(figures), flush=True)


def write_photos(folder: Path, n: int) -> None:
    """JPEGs of 500 x 375 pixels with smooth colors and some grain, about 70 kB each."""
    folder.mkdir()

    def write(i: int) -> None:
        rng = np.random.default_rng(i)
        colors = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        grain = rng.normal(0, 8, (375, 500, 1))
        pixels = np.asarray(colors.resize((500, 375), Image.Resampling.BICUBIC)) + grain
        photo = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        photo.save(folder / f"{i:06d}.jpg", quality=90)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(write, range(n)))


def embed(folder: str, photos: Path, spec: EncoderSpec) -> Line:
    """The stage against a loop on the same images."""
    n_threads = torch.get_num_threads()
    paths = sorted(photos.iterdir())
    half = len(paths) // 2
    before, before_s = loop(paths[:half], spec, n_threads)
    with tempfile.TemporaryDirectory(dir=folder) as store_path, ray_session():
        store = Store(store_path, Silent())
        listed = list_images(store, str(photos), labels="none")
        encoder = spec.load(DEVICE)
        config = EmbedImagesConfig(image_batch_size=BATCH_SIZE)
        artifact = embed_images(store, config, spec, encoder, listed)
        ours = matrix(artifact.column("embedding")).astype(np.float32)
    facts = artifact.facts
    torch.set_num_threads(n_threads)
    after, after_s = loop(paths[half:], spec, n_threads)
    theirs, peer_seconds = np.concatenate([before, after]), before_s + after_s
    fp32 = theirs
    if spec.precision != "fp32":
        exact = EncoderSpec(model=spec.model, pretrained=spec.pretrained, precision="fp32")
        fp32, _ = loop(paths[:256], exact, n_threads)
    return {
        "seconds": round(listed.n_rows / facts["images_per_s"], 3),
        "peer": "a loop without Ray",
        "peer_seconds": round(peer_seconds, 3),
        "images_per_s": facts["images_per_s"],
        "startup_s": facts["startup_s"],
        "decode_per_s": facts["decode_per_s"],
        "encode_per_s": facts["encode_per_s"],
        "bottleneck": facts["bottleneck"],
        "lowest_cosine_to_peer": round(float((ours * theirs).sum(1).min()), 5),
        "lowest_cosine_to_fp32": round(float((ours[: len(fp32)] * fp32).sum(1).min()), 5),
        "peak_rss_gb": artifact.manifest.peak_memory_gb,
    }


def loop(paths: list[Path], spec: EncoderSpec, n_threads: int) -> tuple[NDArray[np.float32], float]:
    """Embeddings of images, and the seconds without those for loading the encoder."""
    encoder = spec.load(DEVICE)

    def load(path: Path) -> NDArray[np.uint8]:
        return decode_image(path.read_bytes(), encoder.crop)

    def batch(start: int) -> NDArray[np.float32]:
        pixels = np.stack(list(threads.map(load, paths[start : start + BATCH_SIZE])))
        return encoder.encode_images(pixels, batch_size=BATCH_SIZE)

    with ThreadPoolExecutor(n_threads) as threads:
        batch(0)
        start = time.perf_counter()
        found = [batch(first) for first in range(0, len(paths), BATCH_SIZE)]
        return np.concatenate(found), time.perf_counter() - start


def texts(spec: EncoderSpec, n_nouns: int, batch_size: int = 64) -> Line:
    """The text tower on short texts against batches of its whole context."""
    nouns = load_nouns("wordnet", "clean")
    chosen = nouns[:: len(nouns) // n_nouns][:n_nouns]
    prompted = [prompt for noun in chosen for prompt in prompts(noun)]
    n = len(prompted)
    encoder = spec.load(DEVICE)
    model = open_clip.create_model(spec.model, pretrained=spec.pretrained, device=DEVICE).eval()
    tokenize = open_clip.get_tokenizer(spec.model)

    @torch.inference_mode()
    def theirs() -> Tensor:
        batches = tokenize(prompted).split(batch_size)
        return torch.cat([model.encode_text(batch.to(DEVICE)).cpu() for batch in batches])

    ours, seconds = timed(lambda: encoder.encode_prompts(chosen, batch_size=batch_size))
    expected, peer_seconds = timed(theirs)
    return {
        "seconds": round(seconds, 3),
        "peer": "open_clip encode_text, 77-token batches",
        "peer_seconds": round(peer_seconds, 3),
        "texts_per_s": round(n / seconds, 1),
        "largest_difference": (ours.reshape(n, -1) - expected).abs().max().item(),
        "peak_rss_gb": resident_gb(),
    }


def timed(work: Callable[[], Tensor], repeats: int = 3) -> tuple[Tensor, float]:
    """What the work gives, and its median seconds."""
    taken, found = [], torch.empty(0)
    for _ in range(repeats):
        start = time.perf_counter()
        found = work()
        taken.append(time.perf_counter() - start)
    return found, statistics.median(taken)


def listing(folder: str, n_keys: int, latency_ms: float) -> Line:
    """The stage against one caller, on a bucket with all keys under one prefix."""
    server = subprocess.Popen(
        [
            *(sys.executable, str(LISTING_SERVER)),
            *("--keys", str(n_keys), "--latency-ms", str(latency_ms)),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        os.environ |= {
            "AWS_ENDPOINT_URL": server.stdout.readline().strip(),
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        with tempfile.TemporaryDirectory(dir=folder) as store, ray_session():
            start = time.perf_counter()
            listed = list_images(Store(store, Silent()), "s3://bucket/flat", labels="none")
            seconds = time.perf_counter() - start
        assert listed.n_rows == n_keys, f"{listed.n_rows} of {n_keys} keys"
        start = time.perf_counter()
        pages = get_session().create_client("s3").get_paginator("list_objects_v2")
        answers = pages.paginate(Bucket="bucket", Prefix="flat/")
        n_listed = sum(len(answer["Contents"]) for answer in answers)
        peer_seconds = time.perf_counter() - start
        assert n_listed == n_keys, f"{n_listed} of {n_keys} keys"
    finally:
        server.kill()
        server.wait()
    return {
        "seconds": round(seconds, 3),
        "peer": "botocore's paginator",
        "peer_seconds": round(peer_seconds, 3),
        "n_keys": n_keys,
        "latency_ms": latency_ms,
        "peak_rss_gb": listed.manifest.peak_memory_gb,
    }


def resident_gb() -> float:
    """Resident memory of this process, GB."""
    return round(psutil.Process().memory_info().rss / 1e9, 2)


if __name__ == "__main__":
    main(tyro.cli(Options))
