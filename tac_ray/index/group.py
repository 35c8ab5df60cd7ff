"""All shards together: actors that own the rows of one or two aligned artifacts."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.exceptions import RayTaskError

from tac_ray.algorithm.kmeans import Sums
from tac_ray.artifacts.manifest import Artifact, Part, write_part
from tac_ray.artifacts.schemas import matrix_column
from tac_ray.artifacts.storage import Folder
from tac_ray.index.shard import PartSource, Shard, merge_top


def part_sources(artifacts: list[Artifact]) -> list[PartSource]:
    """The parts of aligned artifacts, side by side.

    Raises:
        ValueError: the artifacts are not aligned.
    """
    rows = [artifact.part_rows for artifact in artifacts]
    if any(other != rows[0] for other in rows):
        raise ValueError(f"artifacts have parts of {rows} rows and should be aligned")
    starts = np.cumsum([0, *rows[0]])
    return [
        PartSource(
            index=i,
            first_row=int(starts[i]),
            columns=tuple((a.folder.path, a.manifest.parts[i]) for a in artifacts),
        )
        for i in range(len(rows[0]))
    ]


class ShardGroup:
    """Shard actors, started at the first `load` and kept until `close`.

    Rows go from storage to the shards and never through the driver. Shards hold runs of
    neighboring parts; results do not depend on how many there are.
    """

    def __init__(self, n_shards: int | None = None) -> None:
        self._n_shards = n_shards
        self._shards: list[Any] = []
        self._loaded: list[str] | None = None
        self._sources: list[PartSource] = []
        self.peak_memory_gb = 0.0

    def __enter__(self) -> "ShardGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def n_rows(self) -> int:
        """Rows of all shards."""
        return sum(source.n_rows for source in self._sources)

    def load(self, artifacts: list[Artifact]) -> None:
        """Hold the rows of aligned artifacts, side by side."""
        fingerprints = [artifact.fingerprint for artifact in artifacts]
        if fingerprints == self._loaded:
            self.use_rows(None)
            return
        self._start()
        self._loaded = None
        self._sources = part_sources(artifacts)
        held = np.array_split(np.arange(len(self._sources)), len(self._shards))
        loading = [
            shard.load.remote([self._sources[i] for i in indices])
            for shard, indices in zip(self._shards, held, strict=True)
        ]
        self.peak_memory_gb = max(self.peak_memory_gb, *self._get(loading))
        self._loaded = fingerprints

    def use_rows(self, rows: NDArray[np.int64] | None) -> None:
        """Let `assign` see only these rows; None for all."""
        self._get([shard.use_rows.remote(rows) for shard in self._shards])

    def assign(self, centroids: NDArray[np.float32]) -> tuple[Sums, int]:
        """Sums of every centroid's rows over all shards, and how many rows moved.

        Cost: 2 N k d operations over all shards; 8 k d bytes from each to the driver.
        """
        sums = np.zeros(centroids.shape)
        counts = np.zeros(len(centroids), dtype=np.int64)
        objective: list[float] = []
        moved = 0
        reference = ray.put(centroids)
        for part, n in self._get([s.assign.remote(reference) for s in self._shards]):
            sums += part.sums
            counts += part.counts
            objective += part.objective
            moved += n
        return Sums(sums, counts, objective), moved

    def assignment(self) -> list[NDArray[np.int32]]:
        """Centroid of every row at the last `assign`, a part at a time."""
        parts = self._get([shard.assignment.remote() for shard in self._shards])
        return [part for shard in parts for part in shard]

    def rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Embeddings of sorted global rows, (n, d) float32."""
        found = self._get([shard.rows.remote(rows) for shard in self._shards])
        return np.concatenate([values for _, values in found if len(values)])

    def write_neighbors(self, folder: Folder, n: int, *, exclude: str) -> Iterator[Part]:
        """Write the `n` nearest rows of every row, part by part, aligned with the sources.

        Args:
            folder: where the parts go.
            n: neighbors of a row.
            exclude: "row" leaves out the row itself; "first_column" drops the best hit.

        Yields:
            The parts, in order, as they are written.
        """
        for source in self._sources:
            found = [shard.search.remote(source, n + 1) for shard in self._shards]
            yield ray.get(_write_neighbors.remote(folder, source, n, exclude, *found))

    def close(self) -> None:
        """End the actors and give back what they hold."""
        for shard in self._shards:
            ray.kill(shard)
        self._shards, self._loaded, self._sources = [], None, []

    def _start(self) -> None:
        if self._shards:
            return
        cpus = int(ray.cluster_resources().get("CPU", 1))
        nodes = sum(node["Alive"] for node in ray.nodes())
        n_shards = self._n_shards or nodes
        threads = max(1, cpus // n_shards)
        # Half the cores are reserved, so that tasks over parts find room beside the shards.
        actor = ray.remote(Shard).options(
            num_cpus=cpus / n_shards / 2, scheduling_strategy="SPREAD"
        )
        self._shards = [actor.remote(threads) for _ in range(n_shards)]

    @staticmethod
    def _get(references: list[Any]) -> list[Any]:
        try:
            return ray.get(references)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise error.cause from error
            raise


@ray.remote(num_cpus=0.5)
def _write_neighbors(
    folder: Folder,
    source: PartSource,
    n: int,
    exclude: str,
    *found: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> Part:
    similarity, rows = merge_top(found, n + 1)
    if exclude == "row":
        itself = rows == (source.first_row + np.arange(len(rows)))[:, None]
        # A row that is not among its own best hits (duplicates before it) drops the last one.
        itself[~itself.any(axis=1), -1] = True
    else:
        itself = np.zeros(rows.shape, dtype=bool)
        itself[:, 0] = True
    table = pa.table(
        {
            "neighbor_row": matrix_column(rows[~itself].reshape(len(rows), n)),
            "similarity": matrix_column(similarity[~itself].reshape(len(rows), n)),
        }
    )
    return write_part(folder, source.index, table)


def objective(sums: Sums) -> float:
    """Mean similarity of a row and its centroid, added up exactly in part order."""
    return math.fsum(sums.objective) / int(sums.counts.sum())
