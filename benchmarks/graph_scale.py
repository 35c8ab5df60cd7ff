"""The default method at the size of ImageNet-1K, from embeddings to the table of clusters.

    python benchmarks/graph_scale.py
    python benchmarks/graph_scale.py --rows 100000 --clusters 100 --nouns 5000

A JSON object a stage: seconds, the most memory of a process, rows. Then one of the whole, with the
share of rows whose cluster is the commonest of their direction: images and nouns are synthetic rows
about the same 2,000 directions. There is no peer: what clusters a graph elsewhere wants all of it
in one machine's memory. benchmarks/graph.py compares the cut itself.
"""

import json
import os
import platform
import tempfile
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import tyro
from session import Silent, ray_session
from synthetic import synthetic_artifact, synthetic_directions

import tac_ray
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import IMAGES
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.index.group import ShardGroup
from tac_ray.plan import n_semantic
from tac_ray.stages.assign_clusters import Model, assign_clusters
from tac_ray.stages.build_counterparts import build_counterparts
from tac_ray.stages.cut_graph import cut_graph
from tac_ray.stages.find_centroids import find_centroids
from tac_ray.stages.find_neighbors import find_neighbors
from tac_ray.stages.fit_head import fit_head
from tac_ray.stages.sample_rows import sample_rows
from tac_ray.stages.select_nouns import select_nouns


def listing(store: Store, n: int) -> Artifact:
    """Uris of images that are not there."""

    def write(writer: ArtifactWriter) -> None:
        ids = np.arange(n)
        columns = {"image_id": ids, "uri": [f"s3://synthetic/{i:08d}.jpg" for i in ids]}
        rest = {name: pa.nulls(n) for name in IMAGES.names if name not in columns}
        writer.add_part(pa.table({**columns, **rest}).select(IMAGES.names).cast(IMAGES))

    return store.run_stage("list_images", version=0, options={"n": n}, inputs=[], write=write)


def main(
    rows: int = 1_281_167,
    clusters: int = 1000,
    nouns: int = 119_034,
    width: int = 512,
    restarts: int = 3,
) -> None:
    """Measure and print.

    Args:
        rows: N.
        clusters: K.
        nouns: nouns to select from.
        width: d.
        restarts: of k-means for the semantic centroids.
    """
    config = tac_ray.best(images="", out="", n_clusters=clusters, methods=("graph",))
    made: dict[str, Artifact] = {}
    with tempfile.TemporaryDirectory() as folder, ray_session():
        store = Store(folder, Silent())

        def note(stage: str, artifact: Artifact) -> Artifact:
            made[stage] = artifact
            figures = {
                "benchmark": "graph_scale",
                "case": stage,
                "seconds": artifact.manifest.seconds,
                "peak_rss_gb": artifact.manifest.peak_memory_gb,
                "n_rows": artifact.n_rows,
                **{k: v for k, v in artifact.facts.items() if isinstance(v, int | float)},
            }
            print(json.dumps(figures), flush=True)
            return artifact

        images = synthetic_artifact(folder, rows, width, "separated")
        words = synthetic_artifact(folder, nouns, width, "separated", nouns=True)
        with ShardGroup() as index:
            semantic = find_centroids(
                store,
                config.kmeans,
                index,
                [images],
                n_centroids=n_semantic(config, rows),
                restarts=restarts,
                seed=0,
                title="semantic",
            )
            note("find_centroids", semantic)
            selected = note(
                "select_nouns", select_nouns(store, config.select_nouns, semantic, words)
            )
            texts = build_counterparts(store, config.build_counterparts, images, selected)
            note("build_counterparts", texts)
            n_sample = min(rows, config.cut_graph.max_graph_rows)
            sampled, neighbors = [], []
            for kind, embeddings in (("image", images), ("text", texts)):
                sample = sample_rows(store, embeddings, n_rows=n_sample, seed=0, title=kind)
                sampled.append(note(f"sample_rows {kind}", sample))
                found = find_neighbors(
                    store, config.find_neighbors, index, sample, seed=0, title=kind
                )
                neighbors.append(note(f"find_neighbors {kind}", found))
        cut = cut_graph(
            store,
            config.cut_graph,
            *sampled,
            *neighbors,
            selected,
            n_clusters=clusters,
        )
        note("cut_graph", cut)
        head = fit_head(store, config.fit_head, sampled[0], cut, n_clusters=clusters, seed=0)
        note("fit_head", head)
        table = assign_clusters(
            store,
            Model(method="graph", artifact=head),
            listing(store, rows),
            images,
            texts,
            selected,
        )
        note("assign_clusters", table)
        cluster_id = table.column("cluster_id").to_numpy()
    direction = synthetic_directions(rows, "separated")
    pairs, counts = np.unique(np.stack([direction, cluster_id]), axis=1, return_counts=True)
    most = np.zeros(direction.max() + 1, dtype=int)
    np.maximum.at(most, pairs[0], counts)
    whole: dict[str, Any] = {
        "benchmark": "graph_scale",
        "case": "all stages",
        "seconds": round(sum(artifact.manifest.seconds for artifact in made.values()), 1),
        "peak_rss_gb": max(artifact.manifest.peak_memory_gb for artifact in made.values()),
        "n_rows": rows,
        "n_clusters": clusters,
        "centroid_restarts": restarts,
        "in_commonest_cluster": round(float(most.sum() / rows), 4),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }
    if torch.cuda.is_available():
        whole["machine"] += f", {torch.cuda.get_device_name()}"
    print(json.dumps(whole), flush=True)


if __name__ == "__main__":
    tyro.cli(main)
