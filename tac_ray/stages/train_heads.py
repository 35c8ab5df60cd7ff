"""Cluster heads on Ray Train (Eq. 9-17): one global batch, any number of workers."""

import dataclasses
import json
import math
import os
import posixpath
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

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

from tac_ray.algorithm.baselines import ScanLoss, SicHead, SicLoss, semantic_space
from tac_ray.algorithm.head import ImageHead, TacHeads
from tac_ray.algorithm.losses import TacLoss
from tac_ray.algorithm.training import ClusterSizes, TrainingRows, train_epoch, troubles
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.storage import Folder, array_from, filesystem, is_local
from tac_ray.artifacts.store import ArtifactWriter, Store, hash_of, own_memory_gb, result_options
from tac_ray.config import TrainHeadsConfig

STATE_FILE = "state.pt"
Objective = Literal["tac", "scan", "sic"]
"""What heads are trained for: TAC's mutual distillation, or a method that it is compared with."""
_TAC_OPTIONS = (
    "distillation_temperature",
    "distillation_form",
    "confidence_form",
    "distillation_weight",
    "confidence_weight",
)
_PRODUCTS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadTraining:
    """Heads to train, and on what."""

    config: TrainHeadsConfig
    n_clusters: int
    seed: int
    images: Artifact
    image_neighbors: Artifact
    counterparts: Artifact | None = None
    """Of build_counterparts, for "tac"."""
    text_neighbors: Artifact | None = None
    """Of find_neighbors over them, for "tac"."""
    nouns: Artifact | None = None
    """Of embed_nouns, for "sic"."""
    centroids: Artifact | None = None
    """Of find_centroids with K over the images, for "sic"."""
    objective: Objective = "tac"

    @property
    def inputs(self) -> list[Artifact]:
        """The artifacts that the heads depend on."""
        needed = {
            "tac": [self.images, self.counterparts, self.image_neighbors, self.text_neighbors],
            "scan": [self.images, self.image_neighbors],
            "sic": [self.images, self.image_neighbors, self.nouns, self.centroids],
        }[self.objective]
        there = [artifact for artifact in needed if artifact is not None]
        assert len(there) == len(needed), f"an input of {self.objective} is missing"
        return there

    @property
    def options(self) -> dict[str, Any]:
        """What the heads depend on beside them, once the options are resolved."""
        kept = result_options(self.config)
        del kept["batch_over_n"]
        if self.objective != "tac":
            kept = {name: kept[name] for name in kept if name not in _TAC_OPTIONS}
            kept["objective"] = self.objective
        return {**kept, "n_clusters": self.n_clusters, "seed": self.seed}


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
    training = HeadTraining(
        config=config,
        n_clusters=n_clusters,
        seed=seed,
        images=images,
        counterparts=counterparts,
        image_neighbors=image_neighbors,
        text_neighbors=text_neighbors,
    )
    return train_heads_together(store, [training], n_gpus=n_gpus)[0]


def train_heads_together(
    store: Store, trainings: Sequence[HeadTraining], *, n_gpus: int | None = None
) -> list[Artifact]:
    """Train many heads, one after the other, in one start of Ray Train.

    Each is what `train_heads` alone would give, to the bit, and is an artifact as soon as it ends.
    Those in the store are not trained. After a worker or the driver was lost, the head in work
    goes on from its last checkpoint.

    Args:
        store: where artifacts lie.
        trainings: the heads; their numbers of workers should be the same.
        n_gpus: GPUs that the cluster may grow to; default those it has.

    Returns:
        The artifacts of train_heads, in the order of `trainings`.

    Raises:
        ValueError: the loss of a head is no longer finite, or heads ask for different workers.

    Cost and memory: the sum and the most of what the single ones take, and one start.
    """
    n_gpus = n_gpus or int(ray.cluster_resources().get("GPU", 0))
    n_workers = _common(trainings, "n_workers") or max(1, n_gpus)
    by_key: dict[str, HeadTraining] = {}
    keys = []
    for given in trainings:
        config = dataclasses.replace(given.config.resolve(given.n_clusters), n_workers=n_workers)
        batch_size = check_batch(config, given.images.n_rows)
        training = dataclasses.replace(
            given, config=dataclasses.replace(config, batch_size=batch_size)
        )
        keys.append(hash_of([training.options, [i.fingerprint for i in training.inputs]]))
        by_key[keys[-1]] = training

    def stage(training: HeadTraining) -> dict[str, Any]:
        return {
            "stage": "train_heads",
            "version": 2,
            "options": training.options,
            "inputs": training.inputs,
        }

    found = {key: store.reuse(**stage(training)) for key, training in by_key.items()}
    made = {key: artifact for key, artifact in found.items() if artifact}
    missing = {key: training for key, training in by_key.items() if key not in made}
    checkpoints = Folder(Folder(store.path).join(f"train_heads-{hash_of(keys)[:8]}-checkpoints"))
    if missing:
        fewest = min(_common(trainings, "min_workers") or n_workers, n_workers)
        with _worker_group(store, missing, checkpoints, fewest, n_workers, n_gpus) as news:
            for i, (key, training) in enumerate(missing.items()):
                made[key] = store.run_stage(
                    **stage(training),
                    write=partial(_write_heads, training, key, news, alone=len(by_key) == 1),
                    title=None if len(missing) == 1 else f"train_heads {i + 1} of {len(missing)}",
                )
    # Not before the artifacts exist: a run killed here has nothing to repeat.
    checkpoints.remove()
    return [made[key] for key in keys]


def _common(trainings: Sequence[HeadTraining], option: str) -> Any:
    """The value that an option has in all trainings.

    Raises:
        ValueError: it has several.
    """
    values = {getattr(training.config, option) for training in trainings}
    if len(values) > 1:
        raise ValueError(
            f"{option}={', '.join(map(str, values))} should be the same for heads that are trained "
            f"together; give one --{option.replace('_', '-')}"
        )
    return values.pop() if values else None


def _write_heads(
    training: HeadTraining,
    key: str,
    news: Iterator["_News | None"],
    writer: ArtifactWriter,
    *,
    alone: bool,
) -> None:
    """The artifact of a head, as its training ends."""
    config = training.config
    assert config.epochs is not None
    writer.start(config.epochs, "epochs")
    board = config.tensorboard
    if board and not alone:
        board = str(Path(board) / posixpath.basename(writer.folder.path))
    state = _follow(key, news, writer, board)
    weights = {name: tensor.contiguous() for name, tensor in state["heads"].items()}
    writer.add_file("heads.safetensors", save_tensors(weights))
    metrics = state["metrics"]
    # SIC's loss has a term more after its first epoch, so that one is no measure.
    alike = metrics[1:] or metrics if training.objective == "sic" else metrics
    warnings = troubles(alike, training.n_clusters)
    about = {
        "width": weights["image.0.weight"].shape[1],
        "n_clusters": training.n_clusters,
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
        "batch_size": config.batch_size,
        "n_epochs": len(metrics),
        "warnings": warnings,
    }
    writer.note_memory(state["memory_gb"])


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


def load_heads(artifact: Artifact) -> TacHeads | ImageHead:
    """The trained heads in evaluation mode, on the CPU; the image head alone if it was."""
    about = json.loads(artifact.folder.read("heads.json"))
    weights = load_tensors(artifact.folder.read("heads.safetensors"))
    heads_of = TacHeads if "text.0.weight" in weights else ImageHead
    heads = heads_of(about["width"], about["n_clusters"])
    heads.load_state_dict(weights)
    return heads.eval()


class _News(NamedTuple):
    """What the first training worker tells of a head."""

    key: str
    """Of the head."""
    line: dict[str, float]
    """Metrics of the epoch that ended."""
    state: dict[str, Any] | None = None
    """What the training came to, once it has ended."""


class _NewsDesk:
    """Where the first training worker tells the driver of epochs, and hands heads over."""

    def __init__(self) -> None:
        self._news: list[_News] = []
        self._handed_over: set[str] = set()

    def add(self, told: _News) -> None:
        self._news.append(told)
        if told.state is not None:
            self._handed_over.add(told.key)

    def handed_over(self) -> set[str]:
        """Keys of the heads that need not be trained again."""
        return self._handed_over

    def take(self) -> list[_News]:
        taken, self._news = self._news, []
        return taken


@contextmanager
def _worker_group(
    store: Store,
    trainings: dict[str, HeadTraining],
    checkpoints: Folder,
    fewest: int,
    n_workers: int,
    n_gpus: int,
) -> Iterator[Iterator[_News | None]]:
    """Workers of Ray Train that train these heads, and what they tell."""
    n_cpus = int(ray.cluster_resources().get("CPU", 1))
    # On the driver's machine, which ends with it: others may be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    desk: Any = ray.remote(_NewsDesk).options(num_cpus=0, scheduling_strategy=here).remote()
    on_gpu = n_gpus > 0 and ray.get(_has_cuda.remote())
    if n_gpus and not on_gpu:
        store.progress.say("warning: torch finds no CUDA device; heads train on cores")
    fs, path = filesystem(checkpoints.path)
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "trainings": trainings,
            "desk": desk,
            "n_threads": max(1, n_cpus // n_workers),
        },
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
            if is_local(checkpoints.path)
            else PyFileSystem(FSSpecHandler(fs)),
            failure_config=FailureConfig(max_failures=3 * len(trainings)),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    with ThreadPoolExecutor(1) as background:
        try:
            yield _news(background.submit(trainer.fit), desk)
        finally:
            # Workers that still train find nobody to tell, and end: nothing would take their heads.
            ray.kill(desk)


def _news(training: Future[Any], desk: Any) -> Iterator[_News | None]:
    """What comes to the desk until the training has ended; None several times a second.

    Raises:
        Exception: why it ended, if not by itself.
    """
    running = True
    while running:
        running = not training.done()
        yield from ray.get(desk.take.remote())
        if running:
            yield None
            time.sleep(0.2)
    training.result()


def _follow(
    key: str, news: Iterator[_News | None], writer: ArtifactWriter, tensorboard: str | None
) -> dict[str, Any]:
    """Tell of a head's epochs as they end, and give what its training came to."""
    board = SummaryWriter(tensorboard) if tensorboard else None
    gauge = Gauge("tac_ray_heads_loss", "Loss of the last epoch of the cluster heads.")
    loss: float | None = None
    for told in news:
        if loss is not None:
            # Also between epochs: Ray forgets a gauge that has not been set for 20 s.
            gauge.set(loss)
        if told is None or told.key != key:
            continue  # no news, or of a head that was handed over before a worker was lost
        if told.state is not None:
            if board:
                board.close()
            return told.state
        line = told.line
        loss = line["loss"]
        if not math.isfinite(loss):
            raise ValueError(
                f"loss is not finite in epoch {line['epoch']}: {line}; lower --learning-rate"
            )
        gauge.set(loss)
        note = f"loss {loss:.3f}, {line['changed']:.1%} changed cluster"
        writer.progress.advance(1, f"{note}, {line['n_empty']} empty")
        if board:
            for name, value in line.items():
                board.add_scalar(f"heads/{name}", value, int(line["epoch"]))
    raise RuntimeError("training ended without these heads; run it again to go on")


@ray.remote(num_gpus=1, num_cpus=0)
def _has_cuda() -> bool:
    """Whether torch can use a GPU that Ray counts."""
    return torch.cuda.is_available()


def _read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    with checkpoint.as_directory() as folder:
        return torch.load(Path(folder) / STATE_FILE, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def _train_worker(told: dict[str, Any]) -> None:
    context = ray.train.get_context()
    # Ray Train names a GPU wherever it counts one.
    device = ray.train.torch.get_device() if torch.cuda.is_available() else torch.device("cpu")
    assert isinstance(device, torch.device)
    if device.type == "cpu":
        torch.set_num_threads(told["n_threads"])
    checkpoint = ray.train.get_checkpoint()
    begun = _read_state(checkpoint) if checkpoint else None
    handed_over = ray.get(told["desk"].handed_over.remote())
    rows, rows_of = None, None
    for key, training in told["trainings"].items():
        if key in handed_over:
            continue
        inputs = [artifact.fingerprint for artifact in training.inputs]
        if rows is None or inputs != rows_of:
            rows, rows_of = None, inputs  # the memory of the last ones is free for these
            if device.type == "cuda":
                torch.cuda.empty_cache()
            room = room_bytes(device, context.get_local_world_size())
            rows = load_rows(training, device, room)
        state = begun if begun and begun["key"] == key else None
        if not _train(key, training, rows, device, state, told["desk"]):
            return


def _train(
    key: str,
    training: HeadTraining,
    rows: TrainingRows,
    device: torch.device,
    state: dict[str, Any] | None,
    desk: Any,
) -> bool:
    """Train a head, from a state if it has begun, and hand it over; False if the loss broke."""
    config = training.config
    assert config.batch_size is not None
    context = ray.train.get_context()
    rank, n_workers = context.get_world_rank(), context.get_world_size()
    heads, compute_loss = _heads_and_loss(training, rows.images.shape[1])
    heads.to(device)
    model: torch.nn.Module = heads
    if n_workers > 1:
        model = torch.nn.parallel.DistributedDataParallel(heads, broadcast_buffers=False)
    optimizer = torch.optim.Adam(
        heads.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
        capturable=device.type == "cuda",
    )
    sizes = ClusterSizes(len(rows.images), training.n_clusters, device)
    metrics: list[dict[str, float]] = []
    if state is not None:
        heads.load_state_dict(state["heads"])
        # Its options are this device's, which may be of another kind than the one before.
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state["optimizer"]["state"]})
        sizes.cluster.copy_(state["cluster"])
        metrics = state["metrics"]

    model.train()
    while not _is_done(metrics, config):
        start = time.perf_counter()
        if isinstance(heads, SicHead) and metrics:
            heads.move_centers(rows.images)
        batches = rows.batches(
            batch_size=config.batch_size,
            seed=training.seed,
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
            ray.get(desk.add.remote(_News(key, metrics[-1])))
        if not math.isfinite(found["loss"]):
            return False  # the driver says so: to try again would not help
        if _is_done(metrics, config) or len(metrics) % config.checkpoint_every == 0:
            _report(key, heads, optimizer, sizes, metrics)
    if rank == 0:
        trained = {
            "heads": _on_cpu(heads),
            "metrics": metrics,
            "memory_gb": own_memory_gb(),
            "n_workers": n_workers,
        }
        ray.get(desk.add.remote(_News(key, metrics[-1], trained)))
    return True


def _heads_and_loss(
    training: HeadTraining, width: int
) -> tuple[TacHeads | ImageHead, Callable[..., dict[str, Tensor]]]:
    """New heads for a training's objective, and what is to be minimized."""
    config, n_clusters, seed = training.config, training.n_clusters, training.seed
    if training.objective == "scan":
        heads = ImageHead(width, n_clusters, seed=seed)
        return heads, ScanLoss(balance_weight=config.balance_weight)
    if training.objective == "sic":
        assert training.nouns is not None
        assert training.centroids is not None
        tables = training.nouns.tables(["embedding"])
        nouns = torch.cat([torch.tensor(matrix(table["embedding"])) for table in tables])
        centroids = torch.from_numpy(array_from(training.centroids.folder.read("centroids.npy")))
        nouns = nouns[semantic_space(nouns, centroids)].float()
        return SicHead(width, n_clusters, nouns, seed=seed), SicLoss(
            balance_weight=config.balance_weight
        )
    assert config.distillation_temperature is not None
    return TacHeads(width, n_clusters, seed=seed), TacLoss(
        temperature=config.distillation_temperature,
        balance_weight=config.balance_weight,
        distillation_form=config.distillation_form,
        confidence_form=config.confidence_form,
        distillation_weight=config.distillation_weight,
        confidence_weight=config.confidence_weight,
    )


def _is_done(metrics: list[dict[str, float]], config: TrainHeadsConfig) -> bool:
    if config.stable_below is not None and metrics:
        return len(metrics) == config.epochs or metrics[-1]["changed"] < config.stable_below
    return len(metrics) == config.epochs


def _report(
    key: str,
    heads: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    sizes: ClusterSizes,
    metrics: list[dict[str, float]],
) -> None:
    """Hand the state to Ray Train; all workers hold the same, the first one writes it."""
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(metrics[-1])
        return
    state = {
        "key": key,
        "heads": _on_cpu(heads),
        "optimizer": optimizer.state_dict(),
        "cluster": sizes.cluster.cpu(),
        "metrics": metrics,
    }
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / STATE_FILE)
        ray.train.report(metrics[-1], checkpoint=Checkpoint.from_directory(folder))


def _on_cpu(heads: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in heads.state_dict().items()}


def room_bytes(device: torch.device, n_sharing: int) -> int:
    """Memory that a worker may fill with rows, of what its device has free.

    Args:
        device: of the worker.
        n_sharing: workers on its machine, which share its memory; a GPU is a worker's own.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * 0.8)
    return psutil.virtual_memory().available // (2 * n_sharing)


def load_rows(training: HeadTraining, device: torch.device, room: int) -> TrainingRows:
    """The rows of a training, on the device if they fit, else in files of this worker's own.

    Args:
        training: names the artifacts.
        device: of the worker.
        room: bytes that the rows may take on it.
    """
    columns = {
        "images": (training.images, "embedding", torch.float16),
        "image_neighbors": (training.image_neighbors, "neighbor_row", torch.int32),
    }
    if training.counterparts and training.text_neighbors:
        columns["texts"] = (training.counterparts, "embedding", torch.float16)
        columns["text_neighbors"] = (training.text_neighbors, "neighbor_row", torch.int32)
    widths = {name: _width(artifact, column) for name, (artifact, column, _) in columns.items()}
    n_rows = training.images.n_rows
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
