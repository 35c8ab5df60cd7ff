"""Which nouns speak for the collection (Eq. 4-6)."""

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from tac_ray.algorithm.nouns import classify_nouns, top_nouns_per_centroid
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import SELECTED_NOUNS, matrix, matrix_column
from tac_ray.artifacts.storage import array_from
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.config import SelectNounsConfig

BATCH_NOUNS = 8192


def select_nouns(
    store: Store, config: SelectNounsConfig, centroids: Artifact | None, nouns: Artifact
) -> Artifact:
    """Give each noun to its most probable centroid and keep each centroid's best.

    Args:
        store: where artifacts lie.
        config: gamma and the precision of Eq. 4.
        centroids: artifact of find_centroids; None keeps all nouns, as of one centroid.
        nouns: artifact of embed_nouns.

    Returns:
        One part: `noun_id`, `noun`, `centroid_id`, `confidence`, `embedding`, in noun order.

    Cost: 2 T k d operations for T nouns. Peak memory: 4 BATCH_NOUNS k + 4 k d bytes, and 12 bytes
    a noun.
    """
    options = {
        "nouns_per_centroid": config.nouns_per_centroid,
        "selection_precision": config.selection_precision,
    }

    def write(writer: ArtifactWriter) -> None:
        writer.start(nouns.n_rows, "nouns")
        if centroids is None:
            selected = np.arange(nouns.n_rows)
            keep(writer, selected, np.zeros(len(selected), dtype=np.int64), np.ones(len(selected)))
            return
        directions = torch.from_numpy(array_from(centroids.folder.read("centroids.npy")))
        ids, confidences = [], []
        for table in nouns.tables(["embedding"]):
            rows = torch.tensor(matrix(table["embedding"]))
            for batch in rows.split(BATCH_NOUNS):
                centroid_id, confidence = classify_nouns(
                    batch, directions, precision=config.selection_precision
                )
                ids.append(centroid_id)
                confidences.append(confidence)
                writer.progress.advance(len(batch))
        centroid_id, confidence = torch.cat(ids), torch.cat(confidences)
        selected = top_nouns_per_centroid(
            centroid_id, confidence, nouns_per_centroid=config.nouns_per_centroid
        ).numpy()
        keep(writer, selected, centroid_id.numpy()[selected], confidence.numpy()[selected])

    def keep(
        writer: ArtifactWriter,
        selected: NDArray[np.int64],
        centroid_id: NDArray[np.integer],
        confidence: NDArray[np.floating],
    ) -> None:
        kept = []
        for first, table in zip(_starts(nouns), nouns.tables(["noun", "embedding"]), strict=True):
            inside = selected[(selected >= first) & (selected < first + table.num_rows)]
            kept.append(table.take(inside - first))
        chosen = pa.concat_tables(kept)
        table = pa.table(
            [
                pa.array(selected, pa.int64()),
                chosen["noun"],
                pa.array(centroid_id.astype(np.int32)),
                pa.array(confidence.astype(np.float32)),
            ],
            schema=SELECTED_NOUNS,
        )
        embedding = matrix_column(matrix(chosen["embedding"]))
        writer.add_part(table.append_column("embedding", embedding))

    return store.run_stage(
        "select_nouns",
        version=1,
        options=options,
        inputs=[nouns] if centroids is None else [centroids, nouns],
        write=write,
    )


def _starts(artifact: Artifact) -> list[int]:
    return np.cumsum([0, *artifact.part_rows[:-1]]).tolist()  # type: ignore[no-any-return]
