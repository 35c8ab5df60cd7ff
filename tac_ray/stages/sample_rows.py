"""Some of the rows of aligned artifacts, where all are too many."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tac_ray.artifacts.manifest import Artifact, Part, write_part
from tac_ray.artifacts.storage import Folder
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.stages.parts import map_parts


def graph_rows(
    store: Store, images: Artifact, counterparts: Artifact, *, most: int, seed: int
) -> tuple[Artifact, Artifact]:
    """The images whose graph is cut, and their text counterparts: all, or a sample.

    Args:
        store: where artifacts lie.
        images: artifact of embed_images.
        counterparts: artifact of build_counterparts over `images`.
        most: rows up to which all are taken, and rows of the sample beyond.
        seed: of the sample.
    """
    if images.n_rows <= most:
        return images, counterparts
    image, text = (
        sample_rows(store, embeddings, n_rows=most, seed=seed, title=kind)
        for kind, embeddings in (("image", images), ("text", counterparts))
    )
    return image, text


def sample_rows(
    store: Store, embeddings: Artifact, *, n_rows: int, seed: int, title: str
) -> Artifact:
    """Random rows, equally many of every part, the same of all artifacts that are aligned.

    Args:
        store: where artifacts lie.
        embeddings: artifact of embed_images or of build_counterparts.
        n_rows: how many, at most as many as there are.
        seed: of the draw.
        title: what the rows are of.

    Returns:
        The columns of `embeddings` for the rows drawn, in their order, in as many parts.

    Raises:
        ValueError: fewer rows than parts.

    Cost: one pass over the rows; a part of memory a worker.
    """
    n_parts = len(embeddings.manifest.parts)
    if n_rows < n_parts:
        raise ValueError(
            f"n_rows={n_rows} should be >= n_parts={n_parts}, or a part would have none; raise "
            "--max-graph-rows or --part-rows"
        )

    def write(writer: ArtifactWriter) -> None:
        writer.start(n_rows, "rows")
        share = np.cumsum([0, *embeddings.part_rows]) / embeddings.n_rows
        cuts = np.round(share * n_rows).astype(int)
        # A row at least of each part, also of a last one that is short.
        rank = np.arange(n_parts + 1)
        cuts = np.minimum(np.maximum.accumulate(cuts - rank) + rank, n_rows - rank[::-1])
        arguments = (
            (writer.folder, i, embeddings.folder, part, _drawn(part.rows, last - first, seed, i))
            for i, (part, (first, last)) in enumerate(
                zip(embeddings.manifest.parts, pairwise(cuts.tolist()), strict=True)
            )
        )
        for part in map_parts(_take, arguments):
            writer.parts.append(part)
            writer.progress.advance(part.rows)

    return store.run_stage(
        "sample_rows",
        version=1,
        options={"n_rows": n_rows, "seed": seed},
        inputs=[embeddings],
        write=write,
        title=f"sample_rows {title}",
    )


def _drawn(n_rows: int, n: int, seed: int, part: int) -> NDArray[np.int64]:
    rng = np.random.default_rng([seed, part, 3])
    return np.sort(rng.choice(n_rows, size=n, replace=False, shuffle=False))


def _take(folder: Folder, index: int, source: Folder, part: Part, rows: NDArray[np.int64]) -> Part:
    return write_part(folder, index, source.read_table(part.name).take(rows), plain=True)
