"""Spherical k-means over the shards: semantic centroids, or clusters without training."""

import json

import numpy as np
import pyarrow as pa

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.storage import array_bytes
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.config import KMeansConfig
from tac_ray.index.group import ShardGroup
from tac_ray.index.kmeans import fit


def find_centroids(
    store: Store,
    config: KMeansConfig,
    index: ShardGroup,
    embeddings: list[Artifact],
    *,
    n_centroids: int,
    restarts: int,
    seed: int,
    title: str,
) -> Artifact:
    """Cluster the rows of one artifact, or of aligned ones side by side.

    Args:
        store: where artifacts lie.
        config: when to stop and how many rows to fit on.
        index: the shards that will hold the rows.
        embeddings: aligned artifacts with an `embedding` column; [t~, v] clusters their
            concatenation without writing it.
        n_centroids: k.
        restarts: independent starts, the best objective wins.
        seed: of the starts.
        title: what these centroids are for.

    Returns:
        `centroids.npy` float32 (k, d), parts of `centroid_id` int32 aligned with the inputs, and
        `iterations.jsonl`.

    Raises:
        ValueError: fewer rows than centroids.

    Cost: 2 N k d operations an iteration. Peak memory a shard: 2 d bytes a row and 8 k d bytes;
    the driver holds 8 k d bytes and 4 N bytes.
    """
    options = {
        "n_centroids": n_centroids,
        "restarts": restarts,
        "seed": seed,
        "max_iterations": config.max_iterations,
        "tolerance": config.tolerance,
        "max_points_per_centroid": config.max_points_per_centroid,
    }

    def write(writer: ArtifactWriter) -> None:
        writer.start(None, "iterations")
        index.load(embeddings)
        result = fit(
            index,
            n_centroids,
            seed=seed,
            restarts=restarts,
            max_iterations=config.max_iterations,
            tolerance=config.tolerance,
            max_points_per_centroid=config.max_points_per_centroid,
            on_iteration=lambda note: writer.progress.advance(1, note),
        )
        for ids in result.assignment:
            writer.add_part(pa.table({"centroid_id": ids}))
        writer.add_file("centroids.npy", array_bytes(result.centroids))
        lines = "".join(json.dumps(line) + "\n" for line in result.iterations)
        writer.add_file("iterations.jsonl", lines.encode())
        used = np.unique(np.concatenate(result.assignment))
        writer.facts |= {
            "n_centroids": n_centroids,
            "objective": result.objective,
            "n_iterations": len(result.iterations),
            "n_empty": n_centroids - len(used),
        }
        writer.note_memory(index.peak_memory_gb)

    return store.run_stage(
        "find_centroids",
        version=1,
        options=options,
        inputs=embeddings,
        write=write,
        title=f"find_centroids {title}",
    )
