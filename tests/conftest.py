"""Fixtures that several folders of tests share: tiny encoders, silence, Ray, a browser."""

import itertools
import json
import logging
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

EncoderFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def make_encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> EncoderFactory:
    """Makes open_clip `local-dir:` folders with a tiny dual encoder.

    Arguments of the factory: `seed` of the weights; `weights_from`, another folder whose weights
    are copied instead; `vision` and `text`, changes to the two towers' configurations; all others
    are changes to the model's configuration.
    """
    root = tmp_path_factory.mktemp("encoders")
    numbers = itertools.count()

    def make(
        *,
        seed: int = 0,
        weights_from: Path | None = None,
        vision: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        **model: Any,
    ) -> Path:
        import open_clip
        import torch
        from safetensors.torch import save_file

        folder = root / f"encoder{next(numbers)}"
        folder.mkdir()
        vision_cfg = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1}
        text_cfg = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
        config = {
            "model_cfg": {
                "embed_dim": 16,
                "vision_cfg": {**vision_cfg, "head_width": 16, **(vision or {})},
                "text_cfg": {**text_cfg, **(text or {})},
                **model,
            },
            "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
        }
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        weights = folder / "open_clip_model.safetensors"
        if weights_from is not None:
            shutil.copy(weights_from / weights.name, weights)
            return folder
        logging.disable(logging.WARNING)
        try:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                built = open_clip.create_model(f"local-dir:{folder}")
        finally:
            logging.disable(logging.NOTSET)
        save_file({n: t.contiguous() for n, t in built.state_dict().items()}, weights)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_encoder_dir(make_encoder_dir: EncoderFactory) -> Path:
    """An open_clip folder: 32 x 32 pixels, 77 tokens, embeddings of width 16, random weights.

    Use it as `--model local-dir:PATH`.
    """
    return make_encoder_dir()


@pytest.fixture(scope="session")
def wider_encoder_dir(make_encoder_dir: EncoderFactory) -> Path:
    """Like `tiny_encoder_dir`, of another architecture: both towers are wider."""
    return make_encoder_dir(vision={"width": 48}, text={"width": 48})


class SilentProgress:
    """A progress that shows nothing and remembers what it was told."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.advanced = 0
        self.finished: list[tuple[str, bool]] = []
        self.said: list[str] = []

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self.started.append(stage)

    def advance(self, n: int = 1, note: str = "") -> None:
        self.advanced += n

    def finish(self, stage: str, artifact: Any) -> None:
        self.finished.append((stage, artifact.reused))

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def silent_progress() -> SilentProgress:
    """For `Store(path, progress)`."""
    return SilentProgress()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of 2 CPUs of its own, shared by all tests that ask for it."""
    import ray

    # "local", so that a cluster that happens to run on this machine is not joined.
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def s3_server() -> Iterator[str]:
    """URL of an S3 server without buckets."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    # Servers of one process share what they hold.
    urllib.request.urlopen(f"{url}/moto-api/reset", data=b"").close()
    yield url
    server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, for tests that carry `needs_chromium`."""
    from playwright.sync_api import sync_playwright

    from tests.browser import CHROMIUM

    with sync_playwright() as playwright:
        # Without a sandbox, since containers often forbid it; the page is our own.
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()
