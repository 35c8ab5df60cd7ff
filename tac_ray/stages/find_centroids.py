"""Semantic centroids, or clusters without training: spherical k-means over the shards."""

import json

import numpy as np
import pyarrow as pa

from tac_ray.algorithm.kmeans import normalize_rows
from tac_ray.algorithm.small import SmallMethod, cluster_small
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
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

    Cost: 2 N k d operations an iteration that compares everything, a half to a third of it one that
    is pruned. Peak memory a shard: 2 d bytes a row, as much again where passes are pruned, 8 k d
    bytes and what its threads work on (`Shard`); the driver holds 8 k d bytes a shard and 4 N.
    """
    options = {
        "n_centroids": n_centroids,
        "restarts": restarts,
        "seed": seed,
        "max_iterations": config.max_iterations,
        "tolerance": config.tolerance,
        "max_points_per_centroid": config.max_points_per_centroid,
        "seeding": config.seeding,
        "prune": config.prune,
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
            seeding=config.seeding,
            prune=config.prune,
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
            "corrected": result.corrected,
        }
        writer.note_memory(index.peak_memory_gb)

    return store.run_stage(
        "find_centroids",
        version=3,
        options=options,
        inputs=embeddings,
        write=write,
        title=f"find_centroids {title}",
    )


def find_small_centroids(
    store: Store, method: SmallMethod, embeddings: Artifact, *, n_centroids: int, seed: int
) -> Artifact:
    """Semantic centroids of a small collection by another clustering (Table IV).

    Args:
        store: where artifacts lie.
        method: see `cluster_small`.
        embeddings: artifact of embed_images.
        n_centroids: k; DBSCAN comes as near as it can.
        seed: of spectral clustering.

    Returns:
        As `find_centroids`, without iterations; centroids are unit-norm means, and `centroid_id`
        is -1 for rows that DBSCAN leaves out.

    Raises:
        ValueError: too many rows, or fewer than centroids.

    Cost: O(N^2 d) operations and O(N^2) memory, in the driver.
    """

    def write(writer: ArtifactWriter) -> None:
        writer.start(embeddings.n_rows, "rows")
        rows = normalize_rows(matrix(embeddings.column("embedding")))
        centroid_id = cluster_small(rows, n_centroids, method, seed=seed)
        sums = np.zeros((centroid_id.max() + 1, rows.shape[1]))
        np.add.at(sums, centroid_id[centroid_id >= 0], rows[centroid_id >= 0])
        centroids = normalize_rows(sums)
        for ids in np.split(centroid_id, np.cumsum(embeddings.part_rows)[:-1]):
            writer.add_part(pa.table({"centroid_id": ids.astype(np.int32)}))
        writer.add_file("centroids.npy", array_bytes(centroids))
        writer.facts |= {
            "n_centroids": len(centroids),
            "method": method,
            "n_left_out": int((centroid_id < 0).sum()),
        }

    return store.run_stage(
        "find_centroids",
        version=2,
        options={"method": method, "n_centroids": n_centroids, "seed": seed},
        inputs=[embeddings],
        write=write,
        title=f"find_centroids {method}",
    )
