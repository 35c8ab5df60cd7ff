"""Clusters of the rows and how well they agree with labels, without tables and names for people."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from tac_ray.algorithm.metrics import Table, classification_accuracy, contingency, scores
from tac_ray.artifacts.manifest import Artifact, Part, write_part
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.storage import Folder
from tac_ray.artifacts.store import ArtifactWriter, Store, own_memory_gb
from tac_ray.stages.assign_clusters import BATCH_ROWS, Model, cluster_probs
from tac_ray.stages.parts import map_parts


def score_clusters(
    store: Store,
    model: Model,
    listing: Artifact,
    images: Artifact,
    counterparts: Artifact | None,
    *,
    n_clusters: int,
) -> Artifact:
    """Assign the rows of `images`, a task a part, and score them.

    Args:
        store: where artifacts lie.
        model: centroids or heads.
        listing: artifact of list_images, for the labels.
        images: artifact of embed_images.
        counterparts: artifact of build_counterparts, for a model of [t~, v].
        n_clusters: K.

    Returns:
        Parts of `cluster_id` int32 aligned with `images`. Facts: `sizes` of the clusters and, where
        the listing has labels, `acc`, `nmi`, `ari`.

    Cost: 2 N d (d + K) operations with heads. Peak memory a worker: one part and 4 bytes a row of
    the collection, for its labels; the driver holds the labels of all rows and 8 K bytes a label.
    """
    beside = counterparts if model.sees_text else None
    return _score(
        store,
        _cluster_part,
        (model, beside),
        [model.artifact, *([beside] if beside else [])],
        listing,
        images,
        options={"method": model.method, "n_clusters": n_clusters},
        accuracy=None,
    )


def score_zero_shot(
    store: Store, class_nouns: Artifact, listing: Artifact, images: Artifact
) -> Artifact:
    """Give each image the class whose name is nearest, and score that.

    Args:
        store: where artifacts lie.
        class_nouns: artifact of embed_nouns over the names of the listing's labels, in their order.
        listing: artifact of list_images, labeled.
        images: artifact of embed_images.

    Returns:
        As `score_clusters`; `acc` is accuracy of classification, without any matching.

    Cost: 2 N K d operations; memory as `score_clusters`.
    """
    assert class_nouns.n_rows == len(listing.facts["labels"])
    return _score(
        store,
        _classify_part,
        (class_nouns,),
        [class_nouns],
        listing,
        images,
        options={"method": "zero-shot", "n_clusters": class_nouns.n_rows},
        accuracy=classification_accuracy,
    )


def _score(
    store: Store,
    assign: Callable[..., tuple[Part, Table, float]],
    arguments: tuple[Any, ...],
    models: list[Artifact],
    listing: Artifact,
    images: Artifact,
    *,
    options: dict[str, Any],
    accuracy: Callable[[Table], float] | None,
) -> Artifact:
    def write(writer: ArtifactWriter) -> None:
        writer.start(images.n_rows, "images")
        labels = listing.facts["labels"]
        label_id = np.zeros(listing.n_rows, dtype=np.int32)
        if labels:
            label_id = np.searchsorted(labels, listing.column("label").to_numpy()).astype(np.int32)
        shared = ray.put(label_id)
        shape = (options["n_clusters"], max(1, len(labels)))
        calls = (
            (writer.folder, i, images, shared, shape, *arguments)
            for i in range(len(images.manifest.parts))
        )
        table = np.zeros(shape, dtype=np.int64)
        for part, counts, memory_gb in map_parts(assign, calls):
            writer.parts.append(part)
            table += counts
            writer.note_memory(memory_gb)
            writer.progress.advance(part.rows)
        writer.facts["sizes"] = table.sum(axis=1).tolist()
        if labels:
            writer.facts |= scores(table)
            if accuracy:
                writer.facts["acc"] = accuracy(table)

    return store.run_stage(
        "score_clusters",
        version=1,
        options=options,
        inputs=[*models, listing, images],
        write=write,
        title=f"score_clusters {options['method']}",
    )


def _cluster_part(
    folder: Folder,
    index: int,
    images: Artifact,
    label_id: NDArray[np.int32],
    shape: tuple[int, int],
    model: Model,
    counterparts: Artifact | None,
) -> tuple[Part, Table, float]:
    def with_text(vectors: Tensor) -> Tensor:
        if counterparts is None:
            return vectors
        part = counterparts.manifest.parts[index].name
        text = counterparts.folder.read_table(part, ["embedding"])["embedding"]
        return torch.cat([torch.tensor(matrix(text)), vectors], dim=1)

    return _write_ids(folder, index, images, label_id, shape, cluster_probs(model), with_text)


def _classify_part(
    folder: Folder,
    index: int,
    images: Artifact,
    label_id: NDArray[np.int32],
    shape: tuple[int, int],
    class_nouns: Artifact,
) -> tuple[Part, Table, float]:
    nouns = torch.tensor(matrix(class_nouns.column("embedding"))).float()
    return _write_ids(folder, index, images, label_id, shape, lambda rows: rows @ nouns.T)


def _write_ids(
    folder: Folder,
    index: int,
    images: Artifact,
    label_id: NDArray[np.int32],
    shape: tuple[int, int],
    likelihood: Callable[[Tensor], Tensor],
    with_text: Callable[[Tensor], Tensor] = lambda vectors: vectors,
) -> tuple[Part, Table, float]:
    rows = images.folder.read_table(images.manifest.parts[index].name, ["image_id", "embedding"])
    vectors = with_text(torch.tensor(matrix(rows["embedding"])))
    with torch.no_grad():
        found = [likelihood(batch.float()).argmax(dim=1) for batch in vectors.split(BATCH_ROWS)]
    cluster_id = torch.cat(found).numpy()
    table = contingency(cluster_id, label_id[rows["image_id"].to_numpy()], *shape)
    column = pa.table({"cluster_id": cluster_id.astype(np.int32)})
    return write_part(folder, index, column), table, own_memory_gb()
