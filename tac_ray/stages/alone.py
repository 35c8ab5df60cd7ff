"""Run a function on one worker that has a machine's cores to itself."""

from collections.abc import Callable
from typing import Any, TypeVar

import ray
import torch
from threadpoolctl import threadpool_limits

from tac_ray.cluster import Workers

T = TypeVar("T")


def run_alone(
    function: Callable[..., T], *arguments: Any, gpu: bool = False, n_gpus: int | None = None
) -> T:
    """The result of `function(*arguments)`, computed on the cluster, not in the driver.

    The number of cores enters the last bits of what it computes.

    Args:
        function: takes `arguments`.
        arguments: whatever can be sent.
        gpu: give it a GPU if the cluster has one.
        n_gpus: GPUs that the cluster may grow to; default those it has.
    """
    workers = Workers.over_cluster(1, n_gpus)
    # One call a process: another task in it would find threads it did not ask for.
    task = ray.remote(
        num_cpus=workers.num_cpus, num_gpus=workers.num_gpus if gpu else 0, max_calls=1
    )(_with_threads)
    return ray.get(task.remote(workers.n_threads, function, *arguments))  # type: ignore[no-any-return]


def _with_threads(n_threads: int, function: Callable[..., T], *arguments: Any) -> T:
    torch.set_num_threads(n_threads)
    with threadpool_limits(n_threads):
        return function(*arguments)
