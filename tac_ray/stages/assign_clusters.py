"""Every image's cluster, with its probability and the cluster's name."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import Tensor

from tac_ray.algorithm.names import name_clusters, noun_salience
from tac_ray.artifacts.manifest import Artifact, Part, write_part
from tac_ray.artifacts.schemas import CLUSTER_NAMES, CLUSTERS, matrix
from tac_ray.artifacts.storage import Folder, array_from, table_bytes
from tac_ray.artifacts.store import ArtifactWriter, Store, own_memory_gb
from tac_ray.config import Method
from tac_ray.stages.fit_head import load_head
from tac_ray.stages.match_clusters import read_matching
from tac_ray.stages.parts import map_parts
from tac_ray.stages.train_heads import load_heads

BATCH_ROWS = 8192
CENTROID_TEMPERATURE = 0.01
"""Without heads, probability is softmax(similarity / 0.01) over the centroids: CLIP's own scale
of 100. It ranks images within a cluster and is not calibrated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """What gives a cluster to an image: centroids on embeddings or on [t~, v], or heads."""

    method: Method
    artifact: Artifact
    """Of find_centroids, of train_heads for "tac" or of fit_head for "graph"."""
    matching: Artifact | None = None
    """Of match_clusters, whose ids and names hold."""


def assign_clusters(
    store: Store,
    model: Model,
    listing: Artifact,
    images: Artifact,
    counterparts: Artifact,
    selected: Artifact,
    *,
    named_by: Artifact | None = None,
) -> Artifact:
    """Assign the rows of `images`, a task a part, and name the clusters.

    Args:
        store: where artifacts lie.
        model: centroids or heads.
        listing: artifact of list_images, for the uris.
        images: artifact of embed_images.
        counterparts: artifact of build_counterparts, aligned with `images`.
        selected: artifact of select_nouns.
        named_by: an earlier assignment whose names hold; default is to name by these images.

    Returns:
        `image_id`, `uri`, `member`, `cluster_id`, `probability`, `next_cluster_id`,
        `next_probability` (the runner-up), `cluster_name`, aligned with `images`;
        `names.parquet`, a row a cluster.

    Cost: 2 N d (d + K) operations with heads. Peak memory a worker: one part; the driver holds
    the K x M sums of noun weights, sparse.
    """

    def write(writer: ArtifactWriter) -> None:
        writer.start(images.n_rows, "images")
        nouns = next(selected.tables(["noun_id", "noun"]))
        staging = Folder(writer.folder.join("staging"))
        staging.remove()
        n_parts = range(len(images.manifest.parts))
        arguments = ((staging, i, model, listing, images, counterparts, nouns) for i in n_parts)
        sums = _ClusterSums()
        staged = []
        for part, partial, memory_gb in map_parts(_assign_part, arguments):
            staged.append(part)
            sums = sums.plus(partial)
            writer.note_memory(memory_gb)
            writer.progress.advance(part.rows)
        if named_by is None:
            kept = read_matching(model.matching)["names"] if model.matching else {}
            names, runners_up = _names(sums, nouns, {int(id): kept[id] for id in kept})
        else:
            earlier = named_by.folder.read_table("names.parquet")
            names = earlier["name"].to_pylist()
            runners_up = earlier["runners_up"].to_pylist()
        naming = ((writer.folder, i, staging, part, names) for i, part in enumerate(staged))
        writer.parts += map_parts(_name_part, naming)
        sizes = sums.sizes
        columns = [
            np.arange(len(sizes)),
            names,
            runners_up,
            sizes,
            sums.probability / np.maximum(sizes, 1),
        ]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, CLUSTER_NAMES, strict=True)]
        table = pa.table(arrays, schema=CLUSTER_NAMES)
        writer.add_file("names.parquet", table_bytes(table), table.num_rows)
        writer.facts |= {"method": model.method, "n_empty": int((sizes == 0).sum())}
        staging.remove()

    inputs = [model.artifact, listing, images, counterparts, selected]
    inputs += [further for further in (named_by, model.matching) if further]
    return store.run_stage(
        "assign_clusters",
        version=2,
        options={"method": model.method},
        inputs=inputs,
        write=write,
        title=f"assign_clusters {model.method}",
    )


class _ClusterSums(NamedTuple):
    """What naming and sizes need of the rows; adds up over parts."""

    noun_weights: scipy.sparse.csr_array | None = None
    """Summed retrieval weight of each noun row in each cluster, (K, largest noun row + 1)."""
    sizes: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    probability: NDArray[np.float64] = np.zeros(0)

    def plus(self, other: "_ClusterSums") -> "_ClusterSums":
        if self.noun_weights is None or other.noun_weights is None:
            return other if self.noun_weights is None else self
        return _ClusterSums(
            self.noun_weights + other.noun_weights,
            self.sizes + other.sizes,
            self.probability + other.probability,
        )


def _assign_part(
    staging: Folder,
    index: int,
    model: Model,
    listing: Artifact,
    images: Artifact,
    counterparts: Artifact,
    selected: pa.Table,
) -> tuple[Part, _ClusterSums, float]:
    table = images.folder.read_table(images.manifest.parts[index].name)
    text = counterparts.folder.read_table(counterparts.manifest.parts[index].name)
    vectors = torch.tensor(matrix(table["embedding"]))
    if model.method == "train-free":
        vectors = torch.cat([torch.tensor(matrix(text["embedding"])), vectors], dim=1)
    nearest, n_clusters = _nearest(model, vectors)
    cluster_id, probability = nearest.cluster_id, nearest.probability
    image_id = table["image_id"].to_numpy()
    listed = _listed(listing, image_id)
    staged = pa.table(
        {
            "image_id": image_id,
            "uri": listed["uri"],
            "member": listed["member"],
            "cluster_id": cluster_id.astype(np.int32),
            "probability": probability,
            "next_cluster_id": nearest.next_cluster_id.astype(np.int32),
            "next_probability": nearest.next_probability,
        }
    )
    noun_row = np.searchsorted(selected["noun_id"].to_numpy(), matrix(text["noun_id"]))
    weight = matrix(text["weight"]).astype(np.float64)
    entries = (np.repeat(cluster_id, noun_row.shape[1]), noun_row.reshape(-1))
    shape = (n_clusters, selected.num_rows)
    return (
        write_part(staging, index, staged),
        _ClusterSums(
            scipy.sparse.csr_array((weight.reshape(-1), entries), shape),
            np.bincount(cluster_id, minlength=n_clusters),
            np.bincount(cluster_id, probability, n_clusters).astype(np.float64),
        ),
        own_memory_gb(),
    )


class _Nearest(NamedTuple):
    """Two clusters of each row with their probabilities, (n,) each."""

    cluster_id: NDArray[np.int64]
    probability: NDArray[np.float32]
    next_cluster_id: NDArray[np.int64]
    next_probability: NDArray[np.float32]


def _nearest(model: Model, vectors: Tensor) -> tuple[_Nearest, int]:
    """The most probable cluster of each row and the runner-up, and K."""
    probs_of = cluster_probs(model)
    found, n_clusters = [], 0
    with torch.inference_mode():
        for rows in vectors.split(BATCH_ROWS):
            probs = probs_of(rows.float())
            n_clusters = probs.shape[1]
            # max, not topk: of equal probabilities it promises the first.
            first = probs.max(dim=1)
            second = probs.scatter(1, first.indices[:, None], -1.0).max(dim=1)
            found.append((first.indices, first.values, second.indices, second.values))
    return _Nearest(*(torch.cat(c).numpy() for c in zip(*found, strict=True))), n_clusters


def cluster_probs(model: Model) -> Callable[[Tensor], Tensor]:
    """What gives the probability of each cluster, by its id, to rows."""
    probs_of: Callable[[Tensor], Tensor]
    if model.method == "tac":
        probs_of = load_heads(model.artifact).image
    elif model.method == "graph":
        probs_of = load_head(model.artifact)
    else:
        probs_of = _centroid_probs(model.artifact)
    if model.matching is None:
        return probs_of
    of_id = torch.tensor(read_matching(model.matching)["new_id"]).argsort()
    return lambda rows: probs_of(rows)[:, of_id]


def _centroid_probs(artifact: Artifact) -> Callable[[Tensor], Tensor]:
    centroids = torch.from_numpy(array_from(artifact.folder.read("centroids.npy")))
    return lambda rows: torch.softmax(rows @ centroids.T / CENTROID_TEMPERATURE, dim=1)


def _listed(listing: Artifact, image_id: NDArray[np.int64]) -> pa.Table:
    """Rows of the listing for sorted image ids, reading only the parts that hold them."""
    starts = np.cumsum([0, *listing.part_rows])
    tables = []
    for start, part in zip(starts, listing.manifest.parts, strict=False):
        inside = image_id[(image_id >= start) & (image_id < start + part.rows)]
        if len(inside):
            table = listing.folder.read_table(part.name, ["uri", "member"])
            tables.append(table.take(inside - start))
    return pa.concat_tables(tables)


def _names(
    sums: _ClusterSums, selected: pa.Table, kept: dict[int, dict[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Names and runners-up; rows of the same noun (its synsets) speak together.

    Clusters that keep a name have it to themselves.
    """
    assert sums.noun_weights is not None
    text = [noun.replace("_", " ") for noun in selected["noun"].to_pylist()]
    nouns = list(dict.fromkeys(text))
    column = {noun: j for j, noun in enumerate(nouns)}
    by_row = sums.noun_weights.toarray()
    weights = np.zeros((len(by_row), len(nouns)))
    np.add.at(weights.T, [column[noun] for noun in text], by_row.T)
    salience = noun_salience(weights, sums.sizes)
    taken = {before["name"] for before in kept.values()}
    salience[:, [column[name] for name in taken if name in column]] = 0
    salience[list(kept)] = 0
    names, runners_up = name_clusters(salience, nouns)
    for id, before in kept.items():
        names[id], runners_up[id] = before["name"], before["runners_up"]
    return names, runners_up


def _name_part(folder: Folder, index: int, staging: Folder, part: Part, names: list[str]) -> Part:
    table = staging.read_table(part.name)
    name = pa.array(names, pa.string()).take(table["cluster_id"].combine_chunks())
    return write_part(folder, index, table.append_column("cluster_name", name).cast(CLUSTERS))
