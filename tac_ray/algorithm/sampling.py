"""Which rows a training step sees: a function of (seed, epoch, row), never of the worker."""

import torch
from torch import Tensor


def epoch_rows(n_rows: int, *, batch_size: int, seed: int, epoch: int) -> Tensor:
    """Row numbers of each step of an epoch, (n_steps, batch_size) int64.

    A permutation of all rows cut into batches; the last, smaller one is dropped (published code).
    """
    order = torch.randperm(n_rows, generator=_generator(seed, epoch, stream=0))
    n_steps = n_rows // batch_size
    return order[: n_steps * batch_size].reshape(n_steps, batch_size)


def epoch_neighbors(n_rows: int, n_neighbors: int, *, seed: int, epoch: int) -> Tensor:
    """For every row which of its neighbors to draw, (2, n_rows) int64: image, then text."""
    generator = _generator(seed, epoch, stream=1)
    return torch.randint(n_neighbors, (2, n_rows), generator=generator)


def _generator(seed: int, epoch: int, *, stream: int) -> torch.Generator:
    # Distinct for every (seed, epoch, stream) with epoch below 2^20.
    return torch.Generator().manual_seed((seed << 21) + (epoch << 1) + stream)
