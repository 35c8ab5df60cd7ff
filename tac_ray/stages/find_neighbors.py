"""Nearest neighbors of every row in its own collection."""

import time

import numpy as np

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.config import FindNeighborsConfig
from tac_ray.index.group import ShardGroup
from tac_ray.index.join import Sample, plan_join


def find_neighbors(
    store: Store,
    config: FindNeighborsConfig,
    index: ShardGroup,
    embeddings: Artifact,
    *,
    seed: int,
    title: str,
) -> Artifact:
    """Neighbors by inner product: of all rows, or of those in nearby lists.

    Args:
        store: where artifacts lie.
        config: how many, how a row is kept from being its own neighbor, and how to search.
        index: the shards that will hold the rows.
        embeddings: artifact with an `embedding` column, of images or of text counterparts.
        seed: of the lists and samples of a join.
        title: what the neighbors are of.

    Returns:
        Aligned with `embeddings`: `neighbor_row` and `similarity`, fixed-size lists, best first,
        ties by row number. With fewer than n + 1 rows there are N - 1 neighbors. Facts: which
        search it was, and for a join its lists, how many each met, and its recall on a sample.

    Cost: exact: 2 N^2 d operations; peak memory a shard 2 d bytes a row, and a part widened to
    float32 for each thread. Join: see `plan_join` and
    `ShardGroup.join_neighbors`.
    """
    n = min(config.n_neighbors, embeddings.n_rows - 1)
    join = config.joins(embeddings.n_rows)

    def write(writer: ArtifactWriter) -> None:
        writer.start(embeddings.n_rows, "rows")
        index.load([embeddings])
        if join:
            _join(writer)
        else:
            for part in index.write_neighbors(writer.folder, n, exclude=config.self_neighbor):
                writer.parts.append(part)
                writer.progress.advance(part.rows)
        writer.note_memory(index.peak_memory_gb)
        writer.facts |= {"n_neighbors": n, "search": "join" if join else "exact"}

    def _join(writer: ArtifactWriter) -> None:
        begun = time.perf_counter()
        plan, sample = plan_join(index, n, recall=config.recall, seed=seed)
        lists_s = round(time.perf_counter() - begun, 3)
        writer.parts = index.join_neighbors(
            writer.folder,
            plan,
            n,
            exclude=config.self_neighbor,
            on_rows=writer.progress.advance,
        )
        writer.facts |= {
            "n_lists": len(plan.group),
            "n_probe": plan.n_probe,
            "lists_s": lists_s,
            "recall": round(sample.recall(_found(writer, sample)), 4),
        }

    options = {
        "n_neighbors": config.n_neighbors,
        "self_neighbor": config.self_neighbor,
        **({"recall": config.recall, "seed": seed} if join else {}),
    }
    return store.run_stage(
        "find_neighbors",
        version=3,
        options=options,
        inputs=[embeddings],
        write=write,
        title=f"find_neighbors {title}",
    )


def _found(writer: ArtifactWriter, sample: Sample) -> np.ndarray:
    """The neighbors that were written of sampled rows, (m, n)."""
    starts = np.cumsum([0, *(part.rows for part in writer.parts)])
    found = []
    for start, part in zip(starts, writer.parts, strict=False):
        mine = sample.rows[(sample.rows >= start) & (sample.rows < start + part.rows)] - start
        if len(mine):
            table = writer.folder.read_table(part.name, ["neighbor_row"])
            found.append(matrix(table.column("neighbor_row"))[mine])
    return np.concatenate(found)
