"""Clusters without training, from the graph of neighbors in images and in words."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from tac_ray.algorithm.affinity import semantic_overlap
from tac_ray.algorithm.graph import cut, edge_weights, join_edges, share_in_words
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.store import ArtifactWriter, Store, own_memory_gb
from tac_ray.config import CutGraphConfig
from tac_ray.stages.alone import run_alone

OVERLAP_TEMPERATURE = 0.02
"""Of the softmax over nouns for `edge_weight="overlap"`."""


def cut_graph(
    store: Store,
    config: CutGraphConfig,
    images: Artifact,
    counterparts: Artifact,
    image_neighbors: Artifact,
    text_neighbors: Artifact,
    selected: Artifact,
    *,
    n_clusters: int,
) -> Artifact:
    """Join neighbors of both kinds and cut the graph into clusters.

    Edges weigh what their ends look alike, and what words they share if asked for; those from text
    counterparts are multiplied by the share of images that words say something about, so that
    words count where they fit.

    Args:
        store: where artifacts lie.
        config: how many edges, their weights, which of text, how much equal sizes are worth.
        images: artifact of embed_images, or a sample of its rows.
        counterparts: artifact of build_counterparts, or the same sample of it.
        image_neighbors: artifact of find_neighbors over `images`.
        text_neighbors: artifact of find_neighbors over `counterparts`.
        selected: artifact of select_nouns, whose nouns counterparts are made of.
        n_clusters: K.

    Returns:
        Aligned with `images`: `cluster_id` int32. Facts: `share_in_words`, the weight of text
        edges, the K-th eigenvalue and how exact the eigenvectors are.

    Cost: see `cut`, on one worker, which also holds 4 n d + 40 n n_edges bytes.
    """

    def write(writer: ArtifactWriter) -> None:
        writer.start(images.n_rows, "rows")
        found = run_alone(
            _cut,
            config,
            images,
            counterparts,
            image_neighbors,
            text_neighbors,
            selected,
            n_clusters,
        )
        ends = np.cumsum(images.part_rows)[:-1]
        for ids in np.split(found.cluster_id, ends):
            writer.add_part(pa.table({"cluster_id": ids.astype(np.int32)}))
        writer.progress.advance(images.n_rows)
        writer.facts |= found.facts
        writer.note_memory(found.memory_gb)

    return store.run_stage(
        "cut_graph",
        version=2,
        options={
            "n_edges": config.n_edges,
            "edge_weight": config.edge_weight,
            "text_edges": config.text_edges,
            "significance": config.significance,
            "cluster_balance": config.cluster_balance,
            "n_clusters": n_clusters,
        },
        inputs=[images, counterparts, image_neighbors, text_neighbors, selected],
        write=write,
    )


def check_graph(config: CutGraphConfig, n_images: int, n_clusters: int) -> None:
    """Refuse a graph that has no K eigenvectors beside the first.

    Raises:
        ValueError: not more rows than clusters.
    """
    n_rows = min(n_images, config.max_graph_rows)
    if n_rows <= n_clusters:
        raise ValueError(
            f"n_images={n_rows} should be > n_clusters={n_clusters} to cut their graph; lower "
            "--n-clusters, raise --max-graph-rows or choose other --methods"
        )


class _Found(NamedTuple):
    cluster_id: NDArray[np.int64]
    facts: dict[str, Any]
    memory_gb: float


def _cut(
    config: CutGraphConfig,
    images: Artifact,
    counterparts: Artifact,
    image_neighbors: Artifact,
    text_neighbors: Artifact,
    selected: Artifact,
    n_clusters: int,
) -> _Found:
    embedding = torch.tensor(matrix(images.column("embedding")))
    nouns = torch.tensor(matrix(selected.column("embedding")))

    def edges(neighbors: Artifact, share: float) -> tuple[NDArray[Any], NDArray[Any]]:
        rows = torch.tensor(matrix(neighbors.column("neighbor_row")), dtype=torch.int64)
        ends = rows[:, : config.n_edges]
        if config.edge_weight == "overlap":
            weights = semantic_overlap(embedding, nouns, ends, temperature=OVERLAP_TEMPERATURE)
        else:
            weights = edge_weights(embedding, ends)
        return ends.numpy(), share * weights.numpy()

    standing = counterparts.column("standing").to_numpy()
    heard = share_in_words(standing, len(nouns), config.significance)
    text_weight = {"gated": heard, "all": 1.0, "none": 0.0}[config.text_edges]
    graph = join_edges(edges(image_neighbors, 1.0), edges(text_neighbors, text_weight))
    found = cut(graph, n_clusters, balance=config.cluster_balance)
    facts = {
        "share_in_words": round(heard, 4),
        "text_weight": round(text_weight, 4),
        "eigenvalue": round(float(found.eigenvalues[-1]), 6),
        "eigenvector_residual": float(f"{found.residual:.2g}"),
        "n_empty": n_clusters - len(np.unique(found.cluster_id)),
    }
    return _Found(found.cluster_id, facts, own_memory_gb())
