"""Nouns in prompt templates to embeddings; shared by all runs with the same text tower."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from ray.util import ActorPool

from tac_ray.algorithm.nouns import mean_over_templates
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix_column
from tac_ray.artifacts.store import ArtifactWriter, Store, hash_of, own_memory_gb
from tac_ray.cluster import Workers
from tac_ray.config import EmbedNounsConfig
from tac_ray.encoders.clip import EncoderSpec
from tac_ray.encoders.prompts import PROMPT_TEMPLATES

BLOCK_NOUNS = 1024
"""Distinct nouns an actor takes at a time; the prompts of a template are sorted together."""
PART_NOUNS = 32_768
RESTARTS = 5
"""Times that an encoder whose node is lost is started again."""


def embed_nouns(
    store: Store,
    config: EmbedNounsConfig,
    spec: EncoderSpec,
    text_fingerprint: str,
    nouns: list[str],
    *,
    n_gpus: int | None = None,
) -> Artifact:
    """Embed nouns: the mean of a noun's prompts, then unit norm.

    Equal strings are embedded once, whatever rows they take.

    Args:
        store: where artifacts lie.
        config: batch size; noun list and form are in `nouns` already.
        spec: what the actors load.
        text_fingerprint: of the encoder's text tower.
        nouns: one string a row.
        n_gpus: GPUs that the cluster may grow to; default those it has.

    Returns:
        `noun_id` int64 (the row), `noun` string, `embedding` float16.

    Cost: one text forward a distinct noun and template. Peak memory: 2 d bytes a noun on the
    driver; a worker holds the text tower and 4 d bytes for each of 7 BLOCK_NOUNS prompts.
    """

    def write(writer: ArtifactWriter) -> None:
        distinct = list(dict.fromkeys(nouns))
        row = {noun: i for i, noun in enumerate(distinct)}
        embedding = np.concatenate(list(_embed(writer, config, spec, distinct, n_gpus)))
        for start in range(0, len(nouns), PART_NOUNS):
            block = nouns[start : start + PART_NOUNS]
            table = pa.table(
                {
                    "noun_id": np.arange(start, start + len(block)),
                    "noun": pa.array(block, pa.string()),
                    "embedding": matrix_column(embedding[[row[noun] for noun in block]]),
                }
            )
            writer.add_part(table, plain=True)
        writer.facts["precision"] = spec.precision

    return store.run_stage(
        "embed_nouns",
        version=2,
        options={"templates": list(PROMPT_TEMPLATES)},
        inputs=[text_fingerprint, hash_of(nouns)],
        write=write,
    )


class TextEncoder:
    """One text tower on one device."""

    def __init__(self, spec: EncoderSpec, batch_size: int | None, n_threads: int) -> None:
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            torch.set_num_threads(n_threads)
        self._encoder = spec.load("cuda" if on_gpu else "cpu")
        self._batch_size = batch_size or (256 if on_gpu else 64)

    def encode(self, nouns: list[str]) -> tuple[NDArray[np.float16], float, float]:
        """Embeddings (n, d), seconds taken, and memory in GB."""
        start = time.perf_counter()
        embedding = self._encoder.encode_prompts(nouns, batch_size=self._batch_size)
        half = mean_over_templates(embedding).half().numpy()
        return half, time.perf_counter() - start, own_memory_gb()


def _embed(
    writer: ArtifactWriter,
    config: EmbedNounsConfig,
    spec: EncoderSpec,
    distinct: list[str],
    n_gpus: int | None,
) -> Iterator[NDArray[np.float16]]:
    """Embeddings of distinct nouns, a block at a time, in order."""
    workers = Workers.over_cluster(n_gpus=n_gpus)
    actor: Any = ray.remote(TextEncoder).options(
        num_cpus=workers.num_cpus,
        num_gpus=workers.num_gpus,
        max_restarts=RESTARTS,
        max_task_retries=-1,  # as of the encoders of images
    )
    actors = [
        actor.remote(spec, config.text_batch_size, workers.n_threads) for _ in range(workers.n)
    ]
    writer.start(len(distinct), "nouns")
    _announce(writer, actors[0], distinct, workers.n)
    blocks = [distinct[i : i + BLOCK_NOUNS] for i in range(0, len(distinct), BLOCK_NOUNS)]
    for half, _, memory_gb in ActorPool(actors).map(lambda a, b: a.encode.remote(b), blocks):
        writer.note_memory(memory_gb)
        writer.progress.advance(len(half))
        yield half
    for used in actors:
        ray.kill(used)


def _announce(writer: ArtifactWriter, actor: Any, distinct: list[str], n_encoders: int) -> None:
    """Say how long the nouns will take, measured on a sample of them."""
    sample = distinct[:: max(1, len(distinct) // 128)][:128]
    ray.get(actor.encode.remote(sample[:8]))  # first call: memory is allocated
    _, seconds, _ = ray.get(actor.encode.remote(sample))
    minutes = seconds / len(sample) * len(distinct) / n_encoders / 60
    shorter = "; --nouns short is faster" if minutes > 3 and len(distinct) > 20_000 else ""
    writer.progress.say(
        f"{len(distinct):,} nouns x {len(PROMPT_TEMPLATES)} templates = "
        f"{len(distinct) * len(PROMPT_TEMPLATES):,} prompts: about {minutes:.1f} min{shorter}; "
        "they are kept for later runs"
    )
