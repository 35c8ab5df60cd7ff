"""Training of the cluster heads against a plain loop in torch.

    python benchmarks/head.py
    python benchmarks/head.py --cases K=10-fp32 --epochs 5

| case | rows, K, batch |
|---|---|
| K=10-fp32, K=10-bf16 | 50,000, 10, 512 |
| K=1000-fp32, K=1000-bf16 | 100,000, 1000, 8192 |

One JSON object a line: seconds of an epoch of the stage on Ray Train with one worker, as its
metrics have them, and of the peer: a Dataset that gives one item a call, a DataLoader, the same
heads from torch's layers and the losses as one would write them down, in float32, on the same
threads and, where there is one, the same GPU. Both see the same rows in the same order, from the
same weights; `loss_difference` is the largest of any epoch, as a share. With --workers, the seconds
of an epoch with more of them, on the same cores.
"""

import dataclasses
import json
import platform
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import tyro
from session import Silent, WorkersMemory, ray_session
from synthetic import PART_ROWS, synthetic_artifact
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from tac_ray.algorithm.head import TacHeads
from tac_ray.algorithm.sampling import epoch_neighbors, epoch_rows
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix, matrix_column
from tac_ray.artifacts.store import ArtifactWriter, Store
from tac_ray.config import TrainHeadsConfig
from tac_ray.stages.train_heads import train_heads

SIZES = {10: (50_000, 512), 1000: (100_000, 8192)}
CASES = ("K=10-fp32", "K=10-bf16", "K=1000-fp32", "K=1000-bf16")
N_NEIGHBORS = 50


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    cases: tuple[str, ...] = CASES
    """Which of the four."""
    width: int = 512
    """d."""
    epochs: int = 3
    """Of both; the median counts."""
    workers: tuple[int, ...] = ()
    """Other numbers of training workers."""
    rows: int | None = None
    """N, in place of the case's."""
    peer: bool = True
    """Run the plain loop too."""
    quick: bool = False
    """Little of everything."""


def main(options: Options) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder, ray_session():
        plain: dict[int, dict[str, Any]] = {}
        for case in options.cases:
            k, products = int(case[2:].split("-")[0]), case.split("-")[1]
            n, batch_size = SIZES[k]
            n = options.rows or n
            if options.quick:
                n, batch_size = n // 10, batch_size // 8
            config = TrainHeadsConfig(
                epochs=options.epochs,
                batch_size=batch_size,
                products=products,  # type: ignore[arg-type]
                checkpoint_every=options.epochs,
            ).resolve(k)
            inputs = training_inputs(folder, n, options.width)
            ours = staged(folder, config, inputs, k, 1)
            figures: dict[str, Any] = {
                "benchmark": "head",
                "case": case,
                "seconds": ours["seconds"],
                "samples_per_s": ours["samples_per_s"],
                "peak_rss_gb": ours["peak_gb"],
                "loss": ours["losses"][-1],
            }
            if options.peer:
                if k not in plain:
                    plain[k] = plain_loop(config, inputs, k)
                peer = plain[k]
                pairs = zip(ours["losses"], peer["losses"], strict=True)
                figures |= {
                    "peer": "plain loop in fp32",
                    "peer_seconds": peer["seconds"],
                    "speedup": round(peer["seconds"] / ours["seconds"], 3),
                    "loss_difference": max(abs(a / b - 1) for a, b in pairs),
                }
            others = {
                n_workers: staged(folder, config, inputs, k, n_workers)["seconds"]
                for n_workers in options.workers
            }
            figures |= {
                "unit": "seconds an epoch",
                "seconds_by_workers": {1: ours["seconds"], **others},
                "n_rows": n,
                "width": options.width,
                "n_clusters": k,
                "batch_size": batch_size,
                "epochs": options.epochs,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            }
            print(json.dumps(figures), flush=True)


def training_inputs(folder: str, n: int, width: int) -> list[Artifact]:
    """Embeddings, counterparts and the neighbors of both, as the stages before would leave them."""
    embedded = [synthetic_artifact(folder, n, width, k) for k in ("overlapping", "separated")]
    return [*embedded, *(_neighbors(folder, n, seed) for seed in (0, 1))]


def _neighbors(folder: str, n: int, seed: int) -> Artifact:
    def write(writer: ArtifactWriter) -> None:
        rng = np.random.default_rng(seed)
        for first in range(0, n, PART_ROWS):
            rows = rng.integers(n, size=(min(PART_ROWS, n - first), N_NEIGHBORS))
            writer.add_part(pa.table({"neighbor_row": matrix_column(rows)}))

    return Store(folder, Silent()).run_stage(
        "find_neighbors", version=0, options={"n": n, "seed": seed}, inputs=[], write=write
    )


def staged(
    folder: str, config: TrainHeadsConfig, inputs: list[Artifact], k: int, n_workers: int
) -> dict[str, Any]:
    """The stage, on Ray Train."""
    with tempfile.TemporaryDirectory(dir=folder) as store, WorkersMemory() as memory:
        images, counterparts, image_neighbors, text_neighbors = inputs
        heads = train_heads(
            Store(store, Silent()),
            dataclasses.replace(config, n_workers=n_workers),
            images,
            counterparts,
            image_neighbors,
            text_neighbors,
            n_clusters=k,
            seed=0,
        )
        lines = [json.loads(line) for line in heads.folder.read("metrics.jsonl").splitlines()]
    return {
        "seconds": median(line["seconds"] for line in lines),
        "samples_per_s": median(line["samples_per_s"] for line in lines),
        "losses": [line["loss"] for line in lines],
        "peak_gb": round(memory.peak_gb, 2),
    }


class Items(Dataset[tuple[Tensor, ...]]):
    """One row a call."""

    def __init__(self, columns: list[Tensor], draws: Tensor) -> None:
        self.images, self.texts, self.image_neighbors, self.text_neighbors = columns
        self.draws = draws

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        image_row = self.image_neighbors[i, self.draws[0, i]]
        text_row = self.text_neighbors[i, self.draws[1, i]]
        rows = (self.images[i], self.texts[i], self.images[image_row], self.texts[text_row])
        return tuple(row.float() for row in rows)


class PlainHead(nn.Sequential):
    """The same head, from torch's own layers."""

    def __init__(self, width: int, k: int) -> None:
        super().__init__(
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, k),
            nn.Softmax(dim=1),
        )


def plain_loop(config: TrainHeadsConfig, inputs: list[Artifact], k: int) -> dict[str, Any]:
    """The same training as one would write it down."""
    assert config.epochs is not None
    assert config.batch_size is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = ("embedding", "embedding", "neighbor_row", "neighbor_row")
    columns = [torch.tensor(matrix(a.column(name))) for a, name in zip(inputs, names, strict=True)]
    n, width = columns[0].shape
    start = TacHeads(width, k, seed=0)
    image_head, text_head = PlainHead(width, k), PlainHead(width, k)
    image_head.load_state_dict(start.image.state_dict())
    text_head.load_state_dict(start.text.state_dict())
    heads = nn.ModuleList([image_head, text_head]).to(device)
    optimizer = torch.optim.Adam(
        heads.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2)
    )
    seconds, losses = [], []
    for epoch in range(config.epochs):
        order = epoch_rows(n, batch_size=config.batch_size, seed=0, epoch=epoch)
        draws = epoch_neighbors(n, N_NEIGHBORS, seed=0, epoch=epoch)
        began = time.perf_counter()
        total = 0.0
        for batch in loader(columns, draws, order, config.batch_size):
            image, text, neighbor_image, neighbor_text = (rows.to(device) for rows in batch)
            p, q = image_head(image), text_head(text)
            p_neighbor, q_neighbor = image_head(neighbor_image), text_head(neighbor_text)
            loss = (
                contrast(p, q_neighbor, config.distillation_temperature or 1.0)
                + contrast(q, p_neighbor, config.distillation_temperature or 1.0)
                - (p * q).sum(dim=1).log().mean()
                - config.balance_weight * (entropy(p) + entropy(q))
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds.append(time.perf_counter() - began)
        losses.append(total / len(order))
    return {"seconds": round(median(seconds), 3), "losses": losses}


def loader(
    columns: list[Tensor], draws: Tensor, order: Tensor, batch_size: int
) -> Iterator[list[Tensor]]:
    """Batches in the order of the steps."""
    rows = order.reshape(-1).tolist()
    return iter(DataLoader(Items(columns, draws), batch_size=batch_size, sampler=rows))


def contrast(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """NT-Xent over the columns of both."""
    columns = functional.normalize(torch.cat([a, b], dim=1), dim=0).T
    k = a.shape[1]
    logits = columns @ columns.T / temperature
    logits.fill_diagonal_(-torch.inf)
    other = (torch.arange(2 * k, device=a.device) + k) % (2 * k)
    return functional.cross_entropy(logits, other)


def entropy(probs: Tensor) -> Tensor:
    """Of the mean."""
    mean = probs.mean(dim=0)
    return -(mean * mean.log()).sum()


if __name__ == "__main__":
    main(tyro.cli(Options))
