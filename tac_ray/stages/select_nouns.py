"""Which nouns speak for the collection (Eq. 4-6)."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from tac_ray.algorithm.nouns import classify_nouns, gradient_scores, top_nouns_per_centroid
from tac_ray.algorithm.transport import SCORE_TEMPERATURE, transport_prices, transport_scores
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
        config: gamma, what makes a noun good, and the precision of Eq. 4.
        centroids: artifact of find_centroids; None keeps all nouns, as of one centroid.
        nouns: artifact of embed_nouns.

    Returns:
        One part: `noun_id`, `noun`, `centroid_id`, `confidence` (whatever the score is),
        `embedding`, in noun order.

    Cost: 2 T k d operations for T nouns, twice that by gradient. Peak memory: 4 BATCH_NOUNS k
    + 4 k d bytes, and 12 bytes a noun; by transport 2 T d bytes more, and the cost of
    `transport_prices`.
    """
    options = {
        "nouns_per_centroid": config.nouns_per_centroid,
        "selection_precision": config.selection_precision,
        **({} if config.noun_score == "confidence" else {"noun_score": config.noun_score}),
    }

    def write(writer: ArtifactWriter) -> None:
        writer.start(nouns.n_rows, "nouns")
        if centroids is None:
            selected = np.arange(nouns.n_rows)
            keep(writer, selected, np.zeros(len(selected), dtype=np.int64), np.ones(len(selected)))
            return
        score_nouns = _noun_scorer(config, centroids, nouns)
        ids, confidences = [], []
        for table in nouns.tables(["embedding"]):
            rows = torch.tensor(matrix(table["embedding"]))
            for batch in rows.split(BATCH_NOUNS):
                centroid_id, confidence = score_nouns(batch)
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
        version=2,
        options=options,
        inputs=[nouns] if centroids is None else [centroids, nouns],
        write=write,
    )


def _noun_scorer(
    config: SelectNounsConfig, centroids: Artifact, nouns: Artifact
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What gives nouns (T, d) their centroid_id (T,) and score (T,)."""
    directions = torch.from_numpy(array_from(centroids.folder.read("centroids.npy")))
    if config.noun_score == "gradient":
        return partial(gradient_scores, centroids=directions)
    if config.noun_score == "transport":
        prices = transport_prices(
            torch.tensor(matrix(nouns.column("embedding"))),
            directions,
            _sizes(centroids, len(directions)),
            temperature=SCORE_TEMPERATURE,
        )
        return partial(transport_scores, centroids=directions, prices=prices)
    return partial(classify_nouns, centroids=directions, precision=config.selection_precision)


def _sizes(centroids: Artifact, n_centroids: int) -> Tensor:
    """Images of each centroid, (k,); 1 for one without any, since mass is above 0."""
    sizes = np.zeros(n_centroids, dtype=np.int64)
    for table in centroids.tables(["centroid_id"]):
        ids = table["centroid_id"].to_numpy()
        sizes += np.bincount(ids[ids >= 0], minlength=n_centroids)
    return torch.from_numpy(np.maximum(sizes, 1))


def _starts(artifact: Artifact) -> list[int]:
    return np.cumsum([0, *artifact.part_rows[:-1]]).tolist()  # type: ignore[no-any-return]
