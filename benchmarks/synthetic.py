"""Embeddings that were never images."""

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from session import Silent

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix_column
from tac_ray.artifacts.store import ArtifactWriter, Store

PART_ROWS = 32_768
BLOCK_ROWS = 8192


def synthetic_rows(n: int, width: int, kind: str, *, first: int = 0) -> NDArray[np.float16]:
    """Rows `first` to `first + n` of an endless collection, unit norm, (n, width).

    Args:
        n: how many.
        width: d.
        kind: "separated": 2,000 directions with some noise, where the neighbors of a row lie in
            its own cluster. "overlapping": a mixture in 16 dimensions whose parts run into each
            other, where many do not.
        first: number of the first row.
    """
    shape = np.random.default_rng(0)
    n_centers, inner = (2000, width) if kind == "separated" else (200, 16)
    centers = shape.standard_normal((n_centers, inner), dtype=np.float32)
    embed = shape.standard_normal((inner, width), dtype=np.float32) / np.sqrt(inner)
    rows = []
    for block in range(first // BLOCK_ROWS, -(-(first + n) // BLOCK_ROWS)):
        rng = np.random.default_rng([1, block])
        center = centers[rng.integers(n_centers, size=BLOCK_ROWS)]
        noise = rng.standard_normal((BLOCK_ROWS, inner), dtype=np.float32)
        if kind == "separated":
            row = center + 0.7 * noise
        else:
            row = (center + 0.4 * noise) @ embed
            row += 0.1 * rng.standard_normal(row.shape, dtype=np.float32)
        rows.append(row / np.linalg.norm(row, axis=1, keepdims=True))
    skip = first % BLOCK_ROWS
    return np.concatenate(rows)[skip : skip + n].astype(np.float16)


def synthetic_directions(n: int, kind: str) -> NDArray[np.int64]:
    """What direction or part each of the first `n` rows belongs to, (n,)."""
    n_centers = 2000 if kind == "separated" else 200
    drawn = [
        np.random.default_rng([1, block]).integers(n_centers, size=BLOCK_ROWS)
        for block in range(-(-n // BLOCK_ROWS))
    ]
    return np.concatenate(drawn)[:n]


FIRST_NOUN = 1 << 40
"""Row that nouns begin at, so that none is an image."""


def synthetic_artifact(
    store: str, n: int, width: int, kind: str, *, nouns: bool = False
) -> Artifact:
    """Such rows as embed_images would have written them, or embed_nouns."""

    def write(writer: ArtifactWriter) -> None:
        cuts = np.linspace(0, n, -(-n // PART_ROWS) + 1).astype(int)
        for first, last in pairwise(cuts.tolist()):
            ids = np.arange(first, last)
            skip = FIRST_NOUN if nouns else 0
            rows = synthetic_rows(last - first, width, kind, first=first + skip)
            columns = {"noun_id": ids, "noun": [f"noun {i}" for i in ids]}
            table = pa.table(columns if nouns else {"image_id": ids})
            table = table.append_column("embedding", matrix_column(rows))
            writer.add_part(table, plain=True)

    options: dict[str, Any] = {"n": n, "width": width, "kind": kind}
    return Store(store, Silent()).run_stage(
        "embed_nouns" if nouns else "embed_images",
        version=0,
        options=options,
        inputs=[],
        write=write,
    )
