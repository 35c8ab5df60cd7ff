"""Cluster heads on Ray Train (Eq. 9-17): one global batch, any number of workers."""

import dataclasses
import json
import math
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.train
import ray.train.torch
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.metrics import Gauge
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from tensorboardX import SummaryWriter
from torch import Tensor

from tac_ray.algorithm.head import TacHeads
from tac_ray.algorithm.losses import TacLoss
from tac_ray.algorithm.training import ClusterSizes, TrainingRows, train_epoch, troubles
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.storage import Folder, filesystem, is_local
from tac_ray.artifacts.store import ArtifactWriter, Store, own_memory_gb, result_options
from tac_ray.config import TrainHeadsConfig

STATE_FILE = "state.pt"
_PRODUCTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    n_gpus: int | None = None,
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
        n_gpus: GPUs that the cluster may grow to; default those it has.

    Returns:
        `heads.safetensors`; `heads.json` (width, K, the last metrics, warnings); `metrics.jsonl`,
        of every epoch: each loss, entropy of the cluster sizes, empty clusters, share of rows that
        changed cluster, seconds, samples a second. Warnings are also said and kept as a fact.

    Raises:
        ValueError: the loss is no longer finite.

    Cost: 24 N d (d + K) + 28 N K^2 operations an epoch. Peak memory a worker: N (4 d + 8
    n_neighbors + 8) bytes on its device, or on the disk of its node where they do not fit, and
    100 n (d + K) for its n rows of a batch.
    """
    resources = ray.cluster_resources()
    n_cpus = int(resources.get("CPU", 1))
    n_gpus = n_gpus or int(resources.get("GPU", 0))
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
        # On the driver's machine, which ends with it: others may be lost.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        log = ray.remote(_EpochLog).options(num_cpus=0, scheduling_strategy=here).remote()
        fewest = min(config.min_workers or n_workers, n_workers)
        on_gpu = n_gpus > 0 and ray.get(_has_cuda.remote())
        if n_gpus and not on_gpu:
            writer.progress.say("warning: torch finds no CUDA device; heads train on cores")
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={"job": job, "log": log},
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=(fewest, n_workers) if fewest < n_workers else n_workers,
                use_gpu=n_gpus > 0,
                # Half the cores a worker uses are reserved: Ray Train needs some itself.
                resources_per_worker={"GPU": 1, "CPU": 0.5}
                if n_gpus
                else {"CPU": max(0.5, n_cpus / n_workers / 2)},
            ),
            # A run of this name that was killed goes on from its last checkpoint.
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
        state = _fit(trainer, log, writer, config.tensorboard)
        weights = {name: tensor.contiguous() for name, tensor in state["heads"].items()}
        writer.add_file("heads.safetensors", save_tensors(weights))
        metrics, warnings = state["metrics"], troubles(state["metrics"], n_clusters)
        about = {
            "width": weights["image.0.weight"].shape[1],
            "n_clusters": n_clusters,
            "final": metrics[-1],
            "warnings": warnings,
        }
        writer.add_file("heads.json", json.dumps(about, indent=1).encode())
        lines = "".join(json.dumps(line) + "\n" for line in metrics)
        writer.add_file("metrics.jsonl", lines.encode())
        for warning in warnings:
            writer.progress.say(f"warning: {warning}")
        writer.facts |= {
            "n_workers": state["n_workers"],
            "batch_size": batch_size,
            "n_epochs": len(metrics),
            "warnings": warnings,
        }
        writer.note_memory(state["memory_gb"])

    heads = store.run_stage(
        "train_heads",
        version=2,
        options={**options, "batch_size": batch_size, "n_clusters": n_clusters, "seed": seed},
        inputs=[images, counterparts, image_neighbors, text_neighbors],
        write=write,
    )
    # Not before the artifact exists: a run killed here has nothing to repeat.
    Folder(heads.folder.join("checkpoints")).remove()
    return heads


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


def _fit(
    trainer: TorchTrainer, log: Any, writer: ArtifactWriter, tensorboard: str | None
) -> dict[str, Any]:
    """Train, telling of epochs as they end, and give the last checkpoint's state."""
    board = SummaryWriter(tensorboard) if tensorboard else None
    gauge = Gauge("tac_ray_heads_loss", "Loss of the last epoch of the cluster heads.")
    loss: float | None = None
    with ThreadPoolExecutor(1) as background:
        training = background.submit(trainer.fit)
        running = True
        while running:
            running = not training.done()
            for line in ray.get(log.take.remote()):
                if not math.isfinite(line["loss"]):
                    raise ValueError(
                        f"loss is not finite in epoch {line['epoch']}: {line}; lower "
                        "--learning-rate"
                    )
                loss = line["loss"]
                note = f"loss {line['loss']:.3f}, {line['changed']:.1%} changed cluster"
                writer.progress.advance(1, f"{note}, {line['n_empty']} empty")
                if board:
                    for name, value in line.items():
                        board.add_scalar(f"heads/{name}", value, line["epoch"])
            if loss is not None:
                # Also between epochs: Ray forgets a gauge that has not been set for 20 s.
                gauge.set(loss)
            if running:
                time.sleep(0.2)
        checkpoint = training.result().checkpoint
    if board:
        board.close()
    ray.kill(log)
    assert checkpoint is not None
    return _read_state(checkpoint)


@ray.remote(num_gpus=1, num_cpus=0)
def _has_cuda() -> bool:
    """Whether torch can use a GPU that Ray counts."""
    return torch.cuda.is_available()


def _read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def _train_worker(told: dict[str, Any]) -> None:
    job: TrainingJob = told["job"]
    config = job.config
    assert config.epochs is not None
    assert config.batch_size is not None
    assert config.distillation_temperature is not None
    context = ray.train.get_context()
    rank, n_workers = context.get_world_rank(), context.get_world_size()
    # Ray Train names a GPU wherever it counts one.
    device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
    assert isinstance(device, torch.device)
    if device.type == "cpu":
        torch.set_num_threads(job.n_threads)
    rows = load_rows(job, device, room_bytes(device, context.get_local_world_size()))

    heads = TacHeads(rows.images.shape[1], job.n_clusters, seed=job.seed).to(device)
    model: torch.nn.Module = heads
    if n_workers > 1:
        model = torch.nn.parallel.DistributedDataParallel(heads, broadcast_buffers=False)
    optimizer = torch.optim.Adam(
        heads.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
    )
    compute_loss = TacLoss(
        temperature=config.distillation_temperature,
        balance_weight=config.balance_weight,
        distillation_form=config.distillation_form,
        confidence_form=config.confidence_form,
    )
    sizes = ClusterSizes(len(rows.images), job.n_clusters, device)
    metrics: list[dict[str, float]] = []
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        state = _read_state(checkpoint)
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        sizes.cluster.copy_(state["cluster"])
        metrics = state["metrics"]

    model.train()
    while not _is_done(metrics, config):
        start = time.perf_counter()
        batches = rows.batches(
            batch_size=config.batch_size,
            seed=job.seed,
            epoch=len(metrics),
            rank=rank,
            n_workers=n_workers,
            device=device,
        )
        found = train_epoch(
            model, optimizer, compute_loss, batches, sizes, products=_PRODUCTS[config.products]
        )
        seconds = time.perf_counter() - start
        n_samples = len(rows.images) // config.batch_size * config.batch_size
        line = {"epoch": len(metrics) + 1, **found, "seconds": round(seconds, 3)}
        metrics.append({**line, "samples_per_s": round(n_samples / seconds, 1)})
        if rank == 0:
            ray.get(told["log"].add.remote(metrics[-1]))
        if not math.isfinite(found["loss"]):
            return  # the driver says so: to try again would not help
        if _is_done(metrics, config) or len(metrics) % config.checkpoint_every == 0:
            _report(rank, heads, optimizer, sizes, metrics)


def _is_done(metrics: list[dict[str, float]], config: TrainHeadsConfig) -> bool:
    if config.stable_below is not None and metrics:
        return len(metrics) == config.epochs or metrics[-1]["changed"] < config.stable_below
    return len(metrics) == config.epochs


def _report(
    rank: int,
    heads: TacHeads,
    optimizer: torch.optim.Optimizer,
    sizes: ClusterSizes,
    metrics: list[dict[str, float]],
) -> None:
    """Hand the state to Ray Train; all workers hold the same, the first one writes it."""
    if rank != 0:
        ray.train.report(metrics[-1])
        return
    state = {
        "heads": {name: tensor.cpu() for name, tensor in heads.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "cluster": sizes.cluster.cpu(),
        "metrics": metrics,
        "memory_gb": own_memory_gb(),
        "n_workers": ray.train.get_context().get_world_size(),
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / STATE_FILE)
        ray.train.report(metrics[-1], checkpoint=Checkpoint.from_directory(folder))


def room_bytes(device: torch.device, n_sharing: int) -> int:
    """Memory that a worker may fill with rows, of what its device has free.

    Args:
        device: of the worker.
        n_sharing: workers on its machine, which share its memory; a GPU is a worker's own.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    return psutil.virtual_memory().available // (2 * n_sharing)


def load_rows(job: TrainingJob, device: torch.device, room: int) -> TrainingRows:
    """The rows of a training, on the device if they fit, else in files of this worker's own.

    Args:
        job: names the artifacts.
        device: of the worker.
        room: bytes that the rows may take on it.
    """
    columns = {
        "images": (job.images, "embedding", torch.float16),
        "texts": (job.counterparts, "embedding", torch.float16),
        "image_neighbors": (job.image_neighbors, "neighbor_row", torch.int32),
        "text_neighbors": (job.text_neighbors, "neighbor_row", torch.int32),
    }
    widths = {name: _width(artifact, column) for name, (artifact, column, _) in columns.items()}
    n_rows = job.images.n_rows
    n_bytes = sum(n_rows * widths[name] * kind.itemsize for name, (*_, kind) in columns.items())
    fits = n_bytes <= room
    found = {}
    for name, (artifact, column, kind) in columns.items():
        shape = (n_rows, widths[name])
        whole = torch.empty(shape, dtype=kind, device=device) if fits else _mapped(shape, kind)
        start = 0
        for table in artifact.tables([column]):
            part = torch.tensor(matrix(table[column]))
            whole[start : start + len(part)] = part
            start += len(part)
        found[name] = whole
    return TrainingRows(**found)


def _width(artifact: Artifact, column: str) -> int:
    first = next(artifact.tables([column]))
    return matrix(first[column]).shape[1]


def _mapped(shape: tuple[int, int], kind: torch.dtype) -> Tensor:
    """Room in a file without a name, which goes with the process that maps it.

    Raises:
        OSError: the disk is full.
    """
    with tempfile.NamedTemporaryFile() as file:
        n = shape[0] * shape[1]
        os.posix_fallocate(file.fileno(), 0, n * kind.itemsize)
        return torch.from_file(file.name, shared=True, size=n, dtype=kind).view(shape)
