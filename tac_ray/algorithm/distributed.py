"""Sums over training workers that gradients can pass through."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return sum_workers(local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_workers(grads[0])


def n_workers() -> int:
    """Number of training workers; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_workers(local: Tensor) -> Tensor:
    """Sum of `local` over all workers, without a gradient."""
    if n_workers() == 1:
        return local
    total = local.contiguous().clone()
    dist.all_reduce(total)
    return total


def all_reduce_sums(*locals: Tensor) -> list[Tensor]:
    """Sums of tensors over all workers, in one message; differentiable.

    Every worker computes the same global loss from the sums, so together they differentiate
    n_workers times that loss: the backward pass sums the workers' gradients, and averaging the
    parameter gradients afterwards (as DistributedDataParallel does) gives the exact gradient.

    Args:
        locals: of one type and device.
    """
    if n_workers() == 1:
        return list(locals)
    joined = _AllReduceSum.apply(torch.cat([local.flatten() for local in locals]))
    parts = joined.split([local.numel() for local in locals])  # type: ignore[union-attr]
    return [part.view_as(local) for part, local in zip(parts, locals, strict=True)]
