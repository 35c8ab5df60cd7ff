"""Nearest neighbors of every row in its own collection."""

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.config import FindNeighborsConfig
from tac_ray.index.group import ShardGroup


def find_neighbors(
    store: Store,
    config: FindNeighborsConfig,
    index: ShardGroup,
    embeddings: Artifact,
    *,
    title: str,
) -> Artifact:
    """Exact neighbors by inner product over all shards.

    Args:
        store: where artifacts lie.
        config: how many, and how a row is kept from being its own neighbor.
        index: the shards that will hold the rows.
        embeddings: artifact with an `embedding` column, of images or of text counterparts.
        title: what the neighbors are of.

    Returns:
        Aligned with `embeddings`: `neighbor_row` and `similarity`, fixed-size lists, best first,
        ties by row number. With fewer than n + 1 rows there are N - 1 neighbors.

    Cost: 2 N^2 d operations. Peak memory a shard: 2 d bytes a row, and a part widened to float32
    for each thread.
    """
    n = min(config.n_neighbors, embeddings.n_rows - 1)

    def write(writer: ArtifactWriter) -> None:
        writer.start(embeddings.n_rows, "rows")
        index.load([embeddings])
        for part in index.write_neighbors(writer.folder, n, exclude=config.self_neighbor):
            writer.parts.append(part)
            writer.progress.advance(part.rows)
        writer.facts |= {"n_neighbors": n, "search": "exact"}
        writer.note_memory(index.peak_memory_gb)

    return store.run_stage(
        "find_neighbors",
        version=1,
        options=config,
        inputs=[embeddings],
        write=write,
        title=f"find_neighbors {title}",
    )
