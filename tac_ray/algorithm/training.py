"""Epochs over the global batch (Eq. 11-17): gather rows, step, and what became of the clusters."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tac_ray.algorithm.distributed import n_workers as count_workers
from tac_ray.algorithm.distributed import sum_workers
from tac_ray.algorithm.sampling import epoch_neighbors, epoch_rows


class Batch(NamedTuple):
    """What a worker sees of a step, on its device."""

    rows: Tensor
    """Row numbers of the anchors, (n,)."""
    image: Tensor
    """Embeddings of the anchors and of a neighbor of each, (n, 2, d) float32."""
    text: Tensor | None
    """The same of their counterparts; None where training sees no text."""


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """All rows, on the device or memory-mapped."""

    images: Tensor
    """(N, d) float16."""
    image_neighbors: Tensor
    """Row numbers, (N, n) int32."""
    texts: Tensor | None = None
    """Text counterparts, (N, d) float16; None where training sees no text."""
    text_neighbors: Tensor | None = None
    """(N, n) int32."""

    def batches(
        self,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        rank: int,
        n_workers: int,
        device: torch.device,
    ) -> Iterator[Batch]:
        """One worker's shares of the steps of an epoch.

        Rows that lie on the device are gathered there; others by a thread, a batch ahead.
        """
        n_rows, n_neighbors = self.image_neighbors.shape
        home = self.images.device
        steps = epoch_rows(n_rows, batch_size=batch_size, seed=seed, epoch=epoch).to(home)
        image_draws, text_draws = epoch_neighbors(n_rows, n_neighbors, seed=seed, epoch=epoch)

        def gather(step: Tensor) -> Batch:
            rows = step.tensor_split(n_workers)[rank]
            image_rows = self.image_neighbors[rows, image_draws[rows]]
            image = self.images[torch.stack([rows, image_rows], dim=1)].to(device).float()
            if self.texts is None or self.text_neighbors is None:
                return Batch(rows.to(device), image, None)
            text_rows = self.text_neighbors[rows, text_draws[rows]]
            text = self.texts[torch.stack([rows, text_rows], dim=1)].to(device).float()
            return Batch(rows.to(device), image, text)

        image_draws, text_draws = image_draws.to(home), text_draws.to(home)
        if home == device and not _is_mapped(self.images):
            yield from map(gather, steps)
            return
        with ThreadPoolExecutor(1) as ahead:
            coming = ahead.submit(gather, steps[0])
            for step in steps[1:]:
                batch, coming = coming.result(), ahead.submit(gather, step)
                yield batch
            yield coming.result()


class ClusterSizes:
    """Clusters of the anchors as they were seen last, over all workers."""

    def __init__(self, n_rows: int, n_clusters: int, device: torch.device) -> None:
        self._n_clusters = n_clusters
        self.cluster = torch.full((n_rows,), -1, dtype=torch.int32, device=device)
        """Of each row, (N,) int32; -1 before it was seen."""
        self._seen = torch.zeros_like(self.cluster)

    def see(self, rows: Tensor, probs: Tensor) -> None:
        """Take note of a batch: rows (n,) and their cluster_probs (n, K)."""
        self._seen[rows] = probs.argmax(dim=1).int() + 1

    def end_epoch(self) -> dict[str, float]:
        """`entropy` of the cluster sizes (nats), `n_empty`, and `changed`.

        Changed is the share of rows that have another cluster than an epoch ago; 1 at first.
        """
        seen = sum_workers(self._seen) - 1
        known = (seen >= 0) & (self.cluster >= 0)
        n_changed = ((seen != self.cluster) & known).sum()
        changed = (n_changed / known.sum()).item() if known.any() else 1.0
        self.cluster = torch.where(seen >= 0, seen, self.cluster)
        self._seen.zero_()
        sizes = torch.bincount(self.cluster[self.cluster >= 0], minlength=self._n_clusters)
        share = sizes[sizes > 0] / sizes.sum()
        return {
            "entropy": -(share * share.log()).sum().item(),
            "n_empty": int((sizes == 0).sum()),
            "changed": changed,
        }


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    compute_loss: Callable[..., dict[str, Tensor]],
    batches: Iterator[Batch],
    sizes: ClusterSizes,
    *,
    products: torch.dtype,
) -> dict[str, float]:
    """One pass over the batches; nothing is read from the device before its end.

    Args:
        model: the heads, in training mode; the first of what they give are the anchors'
            cluster_probs.
        optimizer: of their parameters; on a GPU one that can be recorded (`capturable`).
        compute_loss: losses of the global batch, of all that the model gives; `loss` is minimized.
        batches: this worker's shares of the steps, all of one size.
        sizes: takes note of the clusters.
        products: precision of the products of matrices: float32 or bfloat16, which is summed up in
            float32; all else is float32.

    Returns:
        The mean of each loss over the steps, and what `ClusterSizes` says of the clusters.
    """
    step = partial(_step, model, optimizer, compute_loss, sizes, products)
    if sizes.cluster.is_cuda and count_workers() == 1:
        step = _RecordedStep(step)
    total: dict[str, Tensor] = {}
    n_steps = 0
    for batch in batches:
        for name, value in step(batch).items():
            total[name] = total.get(name, 0) + value
        n_steps += 1
    return {
        **{name: value.item() / n_steps for name, value in total.items()},
        **sizes.end_epoch(),
    }


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    compute_loss: Callable[..., dict[str, Tensor]],
    sizes: ClusterSizes,
    products: torch.dtype,
    batch: Batch,
) -> dict[str, Tensor]:
    """Make a step and give its losses."""
    kind = batch.image.device.type
    with torch.autocast(kind, products, enabled=products != torch.float32):
        image_probs, *others = model(batch.image, batch.text)
        losses = compute_loss(image_probs, *others)
    optimizer.zero_grad()
    losses["loss"].backward()
    optimizer.step()
    sizes.see(batch.rows, image_probs.detach())
    return {name: value.detach() for name, value in losses.items()}


class _RecordedStep:
    """A step on a GPU, recorded once and then played back.

    It is hundreds of kernels, and to launch them one by one takes longer than they do.
    """

    N_BEFORE = 3
    """Steps before the record: libraries choose their kernels, and the optimizer its state."""

    def __init__(self, step: Callable[[Batch], dict[str, Tensor]]) -> None:
        self._step = step
        self._n_seen = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch
        self._losses: dict[str, Tensor]

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Make a step; its losses hold until the next one."""
        self._n_seen += 1
        if self._n_seen <= self.N_BEFORE:
            return self._step_aside(batch)
        if self._graph is None:
            self._batch = Batch(*(None if t is None else torch.empty_like(t) for t in batch))  # type: ignore[arg-type]
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._losses = self._step(self._batch)
        for own, new in zip(self._batch, batch, strict=True):
            if own is not None and new is not None:
                own.copy_(new)
        self._graph.replay()
        return self._losses

    def _step_aside(self, batch: Batch) -> dict[str, Tensor]:
        """On the stream that is recorded later, where gradients must have been all along."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            losses = self._step(batch)
        here.wait_stream(self._stream)
        return losses


LEAST_ENTROPY = 0.5
"""Cluster sizes are a collapse below this share of the entropy that equal sizes have."""


def troubles(metrics: list[dict[str, float]], n_clusters: int) -> list[str]:
    """What went wrong in a training, and what to change; empty if nothing did.

    Args:
        metrics: of each epoch, as `train_epoch` gives them.
        n_clusters: K.
    """
    first, last = metrics[0], metrics[-1]
    found = []
    share = last["entropy"] / math.log(n_clusters) if n_clusters > 1 else 1.0
    if share < LEAST_ENTROPY:
        found.append(
            f"clusters have collapsed: the entropy of their sizes is {share:.0%} of that of equal "
            f"ones and should be >= {LEAST_ENTROPY:.0%}; raise --balance-weight or --batch-size"
        )
    if last["n_empty"] > 1:
        found.append(
            f"{last['n_empty']:.0f} of {n_clusters} clusters are empty; lower --n-clusters, or "
            "raise --balance-weight or --batch-size"
        )
    if len(metrics) > 1 and last["loss"] >= first["loss"]:
        found.append(
            f"the loss did not improve: {first['loss']:.3f} in the first epoch, "
            f"{last['loss']:.3f} in the last; lower --learning-rate"
        )
    return found


def _is_mapped(rows: Tensor) -> bool:
    """Whether the rows lie in a file."""
    return rows.device.type == "cpu" and rows.untyped_storage().filename is not None
