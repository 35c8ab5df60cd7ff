"""Trains heads on made-up embeddings, and tells of each epoch: STORE N_WORKERS."""

import sys

import numpy as np
import pyarrow as pa
import ray

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix_column
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.config import TrainHeadsConfig
from tac_ray.stages.train_heads import train_heads

N, WIDTH, K, PARTS = 10_000, 128, 10, 3


class Told:
    """A progress that prints what it is told."""

    def start(self, title: str, total: int | None, unit: str) -> None:
        print("start", title, flush=True)

    def advance(self, n: int = 1, note: str = "") -> None:
        print("epoch", note, flush=True)

    def finish(self, title: str, artifact: Artifact) -> None:
        print("artifact", artifact.folder.path, flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)


class Untold(Told):
    """The same, silent."""

    def start(self, title: str, total: int | None, unit: str) -> None: ...
    def advance(self, n: int = 1, note: str = "") -> None: ...
    def finish(self, title: str, artifact: Artifact) -> None: ...


def inputs(store: str) -> list[Artifact]:
    """Embeddings in K groups, counterparts, and neighbors of the group."""
    rng = np.random.default_rng(0)
    group = np.arange(N) % K
    columns = []
    for _ in range(2):
        rows = rng.standard_normal((K, WIDTH))[group] + rng.standard_normal((N, WIDTH))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        columns.append(("embedding", rows.astype(np.float16)))
    for _ in range(2):
        steps = rng.integers(1, N // K, size=(N, 20)) * K
        columns.append(("neighbor_row", (np.arange(N)[:, None] + steps) % N))

    def artifact(i: int, name: str, rows: np.ndarray) -> Artifact:
        def write(writer: ArtifactWriter) -> None:
            for part in np.array_split(rows, PARTS):
                writer.add_part(pa.table({name: matrix_column(part)}), plain=True)

        return Store(store, Untold()).run_stage(
            "inputs", version=1, options={"i": i}, inputs=[], write=write
        )

    return [artifact(i, name, rows) for i, (name, rows) in enumerate(columns)]


if __name__ == "__main__":
    store, n_workers = sys.argv[1], int(sys.argv[2])
    config = TrainHeadsConfig(
        epochs=6,
        batch_size=256,
        n_workers=n_workers,
        checkpoint_every=1,
        products="fp32",
        tensorboard=f"{store}/board",
    )
    images, counterparts, image_neighbors, text_neighbors = inputs(store)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    train_heads(
        Store(store, Told()),
        config,
        images,
        counterparts,
        image_neighbors,
        text_neighbors,
        n_clusters=K,
        seed=0,
    )
