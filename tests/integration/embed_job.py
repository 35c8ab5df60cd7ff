"""A job that lists a place and embeds it, tells how far it is, and counts what its encoder saw.

python -m tests.integration.embed_job PLACE STORE [ENCODER COUNTS]

Its cluster has as many GPUs, by name only, as the environment's JOB_GPUS says; at the end it tells
how many of them are free.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import ray

from tac_ray.artifacts.store import Store
from tac_ray.config import EmbedImagesConfig
from tac_ray.encoders.clip import Encoder, EncoderSpec
from tac_ray.stages.embed_images import embed_images
from tac_ray.stages.list_images import list_images


class Telling:
    """A progress of one line an event, with the images done so far."""

    def __init__(self) -> None:
        self.done = 0

    def start(self, title: str, total: int | None, unit: str) -> None:
        print(f"start {title} {total}", flush=True)

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        print(f"done {self.done}", flush=True)

    def finish(self, title: str, artifact: Any) -> None:
        print(f"artifact {title} {artifact.folder.path}", flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)


def main(place: str, store_path: str, model: str = "", counts: str = "") -> None:
    def count_images() -> None:
        """In every worker: each call of the encoder adds a line with its images."""
        encode = Encoder.encode_images

        def counted(self: Encoder, pixels: Any, *, batch_size: int) -> Any:
            with Path(counts).open("a") as file:
                file.write(f"{len(pixels)}\n")
            return encode(self, pixels, batch_size=batch_size)

        Encoder.encode_images = counted

    ray.init(
        "local",
        num_cpus=2,
        num_gpus=int(os.environ.get("JOB_GPUS", "0")),
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"worker_process_setup_hook": count_images},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    store = Store(store_path, Telling())
    listed = list_images(store, place, labels="none")
    if not model:
        return
    spec = EncoderSpec(model=model, pretrained=None, precision="fp32")
    config = EmbedImagesConfig(part_rows=1000, max_failures=0.2)
    embed_images(store, config, spec, spec.load(), listed)
    time.sleep(1)  # Ray learns of its resources once a second or so
    print(f"gpus free {ray.available_resources().get('GPU', 0):g}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
