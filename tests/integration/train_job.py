"""Trains heads on made-up embeddings, and tells of each epoch: STORE N_WORKERS [OPTION].

With `lose-node` there are two nodes, and the second one dies after epoch 2. With `two-seeds` heads
are trained from seeds 1 and 0 together.
"""

import sys
import threading

import numpy as np
import pyarrow as pa
import ray
from ray.cluster_utils import Cluster

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix_column
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.config import TrainHeadsConfig
from tac_ray.stages.train_heads import HeadTraining, train_heads_together

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


class Losing(Told):
    """The same; the cluster loses its second node after two epochs."""

    def __init__(self) -> None:
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        self.second = self.cluster.add_node(num_cpus=1)
        self.n_epochs = 0
        ray.init(address=self.cluster.address, log_to_driver=False)

    def advance(self, n: int = 1, note: str = "") -> None:
        super().advance(n, note)
        self.n_epochs += 1
        if self.n_epochs == 2:
            lose = {"allow_graceful": False}
            threading.Thread(
                target=self.cluster.remove_node, args=[self.second], kwargs=lose
            ).start()


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


def training(config: TrainHeadsConfig, artifacts: list[Artifact], *, seed: int) -> HeadTraining:
    """Heads to train on what `inputs` gives."""
    names = ("images", "counterparts", "image_neighbors", "text_neighbors")
    inputs = dict(zip(names, artifacts, strict=True))
    return HeadTraining(config=config, n_clusters=K, seed=seed, **inputs)


if __name__ == "__main__":
    store, n_workers, lose_node = sys.argv[1], int(sys.argv[2]), "lose-node" in sys.argv[3:]
    config = TrainHeadsConfig(
        epochs=6,
        batch_size=256,
        n_workers=n_workers,
        min_workers=1 if lose_node else None,
        checkpoint_every=1,
        tensorboard=f"{store}/board",
    )
    artifacts = inputs(store)
    if lose_node:
        told: Told = Losing()
    else:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        told = Told()
    seeds = (1, 0) if "two-seeds" in sys.argv[3:] else (0,)
    trainings = [training(config, artifacts, seed=seed) for seed in seeds]
    train_heads_together(Store(store, told), trainings)
