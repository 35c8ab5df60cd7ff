"""A small collection of images, and the command line of a run over it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}
NOUNS = """
apple banana car dog house tree river stone cloud lamp chair table shoe hat bread cheese boat plane
train bird fish horse cow sheep flower leaf mountain beach road bridge
""".split()


def write_images(root: Path, n_each: int = 20, *, seed: int = 0) -> Path:
    """A tree in ImageFolder layout: three colors with noise, `n_each` images of each."""
    rng = np.random.default_rng(seed)
    for name, color in COLORS.items():
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(n_each):
            noise = rng.normal(0, 40, (40, 48, 3))
            pixels = (np.array(color) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "colors")


@pytest.fixture(scope="session")
def nouns_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nouns") / "nouns.txt"
    path.write_text("\n".join(NOUNS))
    return path


@pytest.fixture(scope="session")
def options(images: Path, nouns_file: Path, tiny_encoder_dir: Path) -> list[str]:
    """`tac-ray run` over the small collection, all but --out."""
    return [
        *("--images", str(images)),
        *("--n-clusters", "3"),
        *("--model", f"local-dir:{tiny_encoder_dir}"),
        *("--nouns", str(nouns_file)),
        *("--epochs", "3"),
        *("--part-rows", "25"),
        *("--cluster-restarts", "2"),
    ]


def tac_ray(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start the command line in a process of its own; errors come with the output."""
    return subprocess.Popen(
        [sys.executable, "-m", "tac_ray.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]  # type: ignore[no-any-return]


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
