"""Cluster heads on Ray Train (Eq. 9-17): one global batch, any number of workers."""

import dataclasses
import json
import math
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from tac_ray.algorithm.head import TacHeads
from tac_ray.algorithm.losses import TacLoss
from tac_ray.algorithm.sampling import epoch_neighbors, epoch_rows
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.storage import Folder, filesystem, is_local
from tac_ray.artifacts.store import ArtifactWriter, Store, own_memory_gb, result_options
from tac_ray.config import TrainHeadsConfig

STATE_FILE = "state.pt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What every training worker is told."""

    config: TrainHeadsConfig
    n_clusters: int
    seed: int
    n_threads: int
    images: Artifact
    counterparts: Artifact
    image_neighbors: Artifact
    text_neighbors: Artifact


def train_heads(
    store: Store,
    config: TrainHeadsConfig,
    images: Artifact,
    counterparts: Artifact,
    image_neighbors: Artifact,
    text_neighbors: Artifact,
    *,
    n_clusters: int,
    seed: int,
) -> Artifact:
    """Train an image head and a text head against each other.

    Args:
        store: where artifacts lie.
        config: options; those left open follow `n_clusters`.
        images: artifact of embed_images.
        counterparts: artifact of build_counterparts.
        image_neighbors: artifact of find_neighbors over `images`.
        text_neighbors: artifact of find_neighbors over `counterparts`.
        n_clusters: K.
        seed: of the weights, the order of rows and the draw of neighbors.

    Returns:
        `heads.safetensors`, `heads.json` (width, K), `metrics.jsonl` (losses of every epoch).

    Cost: 12 N (d^2 + d K) + 8 N K^2 operations a pass of the head forward, three times that a
    step. Peak memory a worker: (4 d + 16 n_neighbors) N bytes, and 100 n (d + K) for its n rows
    of a batch.
    """
    resources = ray.cluster_resources()
    n_cpus, n_gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    n_workers = config.n_workers or max(1, n_gpus)
    config = dataclasses.replace(config.resolve(n_clusters), n_workers=n_workers)
    batch_size = check_batch(config, images.n_rows)
    options = {
        name: value
        for name, value in result_options(config).items()
        if name not in ("batch_size", "batch_over_n")
    }

    def write(writer: ArtifactWriter) -> None:
        assert config.epochs is not None
        writer.start(config.epochs, "epochs")
        job = TrainingJob(
            config=dataclasses.replace(config, batch_size=batch_size),
            n_clusters=n_clusters,
            seed=seed,
            n_threads=max(1, n_cpus // n_workers),
            images=images,
            counterparts=counterparts,
            image_neighbors=image_neighbors,
            text_neighbors=text_neighbors,
        )
        checkpoints = writer.folder.join("checkpoints")
        fs, path = filesystem(checkpoints)
        log = ray.remote(_EpochLog).options(num_cpus=0).remote()
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={"job": job, "log": log},
            scaling_config=ScalingConfig(
                num_workers=n_workers,
                use_gpu=n_gpus > 0,
                # Half the cores a worker uses are reserved: Ray Train needs some itself.
                resources_per_worker=None if n_gpus else {"CPU": max(0.5, n_cpus / n_workers / 2)},
            ),
            run_config=RunConfig(
                name="heads",
                storage_path=path,
                storage_filesystem=None
                if is_local(checkpoints)
                else PyFileSystem(FSSpecHandler(fs)),
                failure_config=FailureConfig(max_failures=3),
                checkpoint_config=CheckpointConfig(num_to_keep=1),
            ),
        )
        state = _fit(trainer, log, writer)
        heads = {name: tensor.contiguous() for name, tensor in state["heads"].items()}
        writer.add_file("heads.safetensors", save_tensors(heads))
        width = heads["image.0.weight"].shape[1]
        about = {"width": width, "n_clusters": n_clusters, "final": state["metrics"][-1]}
        writer.add_file("heads.json", json.dumps(about, indent=1).encode())
        lines = "".join(json.dumps(line) + "\n" for line in state["metrics"])
        writer.add_file("metrics.jsonl", lines.encode())
        writer.facts |= {"n_workers": n_workers, "batch_size": batch_size}
        writer.note_memory(state["memory_gb"])
        Folder(checkpoints).remove()

    return store.run_stage(
        "train_heads",
        version=1,
        options={**options, "batch_size": batch_size, "n_clusters": n_clusters, "seed": seed},
        inputs=[images, counterparts, image_neighbors, text_neighbors],
        write=write,
    )


def check_batch(config: TrainHeadsConfig, n_images: int) -> int:
    """The global batch size for so many images.

    Raises:
        ValueError: no step would be made, since the batch is larger than the collection and may
            not shrink, or a worker would be left without two rows.
    """
    assert config.batch_size is not None
    batch_size = config.batch_size
    if config.batch_over_n == "shrink":
        batch_size = min(batch_size, n_images)
    if batch_size > n_images:
        raise ValueError(
            f"batch_size={batch_size} should be <= n_images={n_images}, or no training step is "
            "made; lower --batch-size or use --batch-over-n shrink"
        )
    n_workers = config.n_workers or 1
    if batch_size < 2 * n_workers:
        raise ValueError(
            f"batch_size={batch_size} should be >= 2 x n_workers={n_workers}; raise --batch-size "
            "or lower --n-workers"
        )
    return batch_size


def load_heads(artifact: Artifact) -> TacHeads:
    """The trained heads in evaluation mode, on the CPU."""
    about = json.loads(artifact.folder.read("heads.json"))
    heads = TacHeads(about["width"], about["n_clusters"])
    heads.load_state_dict(load_tensors(artifact.folder.read("heads.safetensors")))
    return heads.eval()


class _EpochLog:
    """Where the first training worker tells the driver of its epochs."""

    def __init__(self) -> None:
        self._lines: list[dict[str, float]] = []

    def add(self, line: dict[str, float]) -> None:
        self._lines.append(line)

    def take(self) -> list[dict[str, float]]:
        taken, self._lines = self._lines, []
        return taken


def _fit(trainer: TorchTrainer, log: Any, writer: ArtifactWriter) -> dict[str, Any]:
    """Train, telling of epochs as they end, and give the last checkpoint's state."""
    with ThreadPoolExecutor(1) as background:
        training = background.submit(trainer.fit)
        running = True
        while running:
            running = not training.done()
            for line in ray.get(log.take.remote()):
                note = f"loss {line['loss']:.3f}"
                writer.progress.advance(1, note)
            if running:
                time.sleep(0.2)
        checkpoint = training.result().checkpoint
    ray.kill(log)
    assert checkpoint is not None
    return _read_state(checkpoint)


def _read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / STATE_FILE, weights_only=True)  # type: ignore[no-any-return]


def _column(artifact: Artifact, name: str, device: torch.device) -> Tensor:
    """A fixed-size list column of all parts on the device, filled part by part."""
    whole, start = torch.empty(0), 0
    for table in artifact.tables([name]):
        part = torch.tensor(matrix(table[name]))
        if start == 0:
            whole = torch.empty(artifact.n_rows, part.shape[1], dtype=part.dtype, device=device)
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def _train_worker(told: dict[str, Any]) -> None:
    job: TrainingJob = told["job"]
    config = job.config
    context = ray.train.get_context()
    rank, n_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    assert isinstance(device, torch.device)
    if device.type == "cpu":
        torch.set_num_threads(job.n_threads)
    images = _column(job.images, "embedding", device)
    texts = _column(job.counterparts, "embedding", device)
    image_neighbors = _column(job.image_neighbors, "neighbor_row", device)
    text_neighbors = _column(job.text_neighbors, "neighbor_row", device)
    n_rows, n_neighbors = image_neighbors.shape
    assert config.epochs is not None
    assert config.batch_size is not None
    assert config.distillation_temperature is not None

    heads = TacHeads(images.shape[1], job.n_clusters, seed=job.seed).to(device)
    model: torch.nn.Module = heads
    if n_workers > 1:
        model = torch.nn.parallel.DistributedDataParallel(heads, broadcast_buffers=False)
    optimizer = torch.optim.Adam(
        heads.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2)
    )
    compute_loss = TacLoss(
        temperature=config.distillation_temperature,
        balance_weight=config.balance_weight,
        distillation_form=config.distillation_form,
        confidence_form=config.confidence_form,
    )
    metrics: list[dict[str, float]] = []
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        state = _read_state(checkpoint)
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        metrics = state["metrics"]

    model.train()
    for epoch in range(len(metrics), config.epochs):
        start = time.perf_counter()
        steps = epoch_rows(n_rows, batch_size=config.batch_size, seed=job.seed, epoch=epoch)
        draws = epoch_neighbors(n_rows, n_neighbors, seed=job.seed, epoch=epoch).to(device)
        total: dict[str, Tensor] = {}
        for step in steps:
            rows = step.tensor_split(n_workers)[rank].to(device)
            image_rows = image_neighbors[rows, draws[0, rows]].long()
            text_rows = text_neighbors[rows, draws[1, rows]].long()
            batch = (images[rows], texts[rows], images[image_rows], texts[text_rows])
            losses = compute_loss(*model(*(rows.float() for rows in batch)))
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            for name, value in losses.items():
                total[name] = total.get(name, 0) + value.detach()
        means = {name: value.item() / len(steps) for name, value in total.items()}
        if not all(math.isfinite(value) for value in means.values()):
            raise ValueError(
                f"loss is not finite in epoch {epoch + 1}: {means}; lower --learning-rate"
            )
        seconds = time.perf_counter() - start
        metrics.append({"epoch": epoch + 1, **means, "seconds": round(seconds, 3)})
        if rank == 0:
            ray.get(told["log"].add.remote(metrics[-1]))
        last = epoch + 1 == config.epochs
        if last or (epoch + 1) % config.checkpoint_every == 0:
            _report(rank, heads, optimizer, metrics)


def _report(
    rank: int, heads: TacHeads, optimizer: torch.optim.Optimizer, metrics: list[dict[str, float]]
) -> None:
    """Hand the state to Ray Train; all workers hold the same, the first one writes it."""
    if rank != 0:
        ray.train.report(metrics[-1])
        return
    state = {
        "heads": {name: tensor.cpu() for name, tensor in heads.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "metrics": metrics,
        "memory_gb": own_memory_gb(),
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / STATE_FILE)
        ray.train.report(metrics[-1], checkpoint=Checkpoint.from_directory(folder))
