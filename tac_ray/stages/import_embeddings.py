"""Embeddings that someone already has, to the sealed parts that embed_images would have written."""

from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tac_ray.artifacts.manifest import Artifact, Part, write_part
from tac_ray.artifacts.schemas import FAILURES, matrix_column
from tac_ray.artifacts.storage import Folder, table_bytes
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.config import EmbedImagesConfig
from tac_ray.encoders.clip import Encoder
from tac_ray.sources.tables import Vectors
from tac_ray.stages.parts import map_parts

UNIT_WITHIN = 0.01
"""Norms this near to 1 are those of unit vectors in half precision."""


def import_embeddings(
    store: Store, config: EmbedImagesConfig, encoder: Encoder, images: Artifact
) -> Artifact:
    """Take the embeddings that a listing names in its fact `vectors`.

    Args:
        store: where artifacts lie.
        config: part size.
        encoder: the one that embeds the nouns and is said to have made the embeddings.
        images: artifact of list_images.

    Returns:
        As embed_images: embeddings of another norm are normalized (fact `norms` has the smallest
        and the largest), those without a direction are in `failures.parquet`.

    Raises:
        ValueError: their width is not the encoder's, or none has a direction.

    Cost: reads the embeddings twice. Peak memory a worker: one file of them, and one part.
    """
    sources = [Vectors(**source) for source in images.facts["vectors"]]
    for source in sources:
        if source.d != encoder.width:
            raise ValueError(
                f"{source.uri} has embeddings of width {source.d} and --model "
                f"{encoder.spec.model} makes {encoder.width}; name the encoder that made them, "
                "since the nouns are embedded with it"
            )

    def write(writer: ArtifactWriter) -> None:
        writer.start(images.n_rows, "images")
        starts = [0, *accumulate(source.n for source in sources)]
        looked = list(map_parts(_look, zip(sources, starts[:-1], strict=True)))
        ids = np.concatenate([good for good, _, _ in looked])
        if not len(ids):
            raise ValueError(f"none of {images.n_rows} embeddings is finite and other than 0")
        bad = np.setdiff1d(np.arange(images.n_rows), ids)
        tasks = (
            (writer.folder, number, sources, starts, ids[start : start + config.part_rows])
            for number, start in enumerate(range(0, len(ids), config.part_rows))
        )
        for part in map_parts(_write_part, tasks):
            writer.parts.append(part)
            writer.progress.advance(part.rows)
        failures = _failures(images, bad)
        writer.add_file("failures.parquet", table_bytes(failures), len(bad))
        norms = [min(low for _, low, _ in looked), max(high for _, _, high in looked)]
        writer.facts |= {"n_failed": len(bad), "n_reused": len(ids), "norms": norms}
        if norms[0] < 1 - UNIT_WITHIN or norms[1] > 1 + UNIT_WITHIN:
            writer.progress.say(
                f"embeddings of norm {norms[0]:.3g} to {norms[1]:.3g} were normalized"
            )

    return store.run_stage(
        "import_embeddings",
        version=1,
        options=config,
        inputs=[images, encoder.image_fingerprint],
        write=write,
        title="embed_images",
    )


def _look(source: Vectors, start: int) -> tuple[NDArray[np.int64], float, float]:
    """Image ids of embeddings that have a direction, and the range of their norms."""
    norms = np.linalg.norm(source.read(0, source.n).astype(np.float32), axis=1)
    good = np.isfinite(norms) & (norms > 0)
    low, high = (norms[good].min(), norms[good].max()) if good.any() else (1.0, 1.0)
    return start + np.flatnonzero(good), float(low), float(high)


def _write_part(
    folder: Folder,
    number: int,
    sources: list[Vectors],
    starts: list[int],
    ids: NDArray[np.int64],
) -> Part:
    rows = []
    for source, start in zip(sources, starts[:-1], strict=True):
        mine = ids[(ids >= start) & (ids < start + source.n)] - start
        if len(mine):
            found = source.read(int(mine[0]), int(mine[-1]) + 1)[mine - mine[0]]
            rows.append(found.astype(np.float32))
    embedding = np.concatenate(rows)
    embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
    table = pa.table({"image_id": ids, "embedding": matrix_column(embedding.astype(np.float16))})
    return write_part(folder, number, table, plain=True)


def _failures(images: Artifact, bad: NDArray[np.int64]) -> pa.Table:
    """Rows of failures.parquet for these image ids."""
    rows: list[dict[str, Any]] = []
    for table in images.tables(["image_id", "uri"]):
        first = table["image_id"][0].as_py() if table.num_rows else 0
        mine = bad[(bad >= first) & (bad < first + table.num_rows)]
        uris = table["uri"].take(pa.array(mine - first)).to_pylist()
        rows += [
            {
                "image_id": i,
                "uri": uri,
                "step": "encode",
                "error": "the embedding is 0 or not finite",
            }
            for i, uri in zip(mine.tolist(), uris, strict=True)
        ]
    return pa.Table.from_pylist(rows, FAILURES)
