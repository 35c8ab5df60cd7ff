"""Run a function on one worker that uses all cores of its node, when nothing else runs."""

from collections.abc import Callable
from typing import Any, TypeVar

import ray
import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")


def run_alone(function: Callable[..., T], *arguments: Any, num_gpus: int = 0) -> T:
    """The result of `function(*arguments)`, computed on the cluster, not in the driver.

    The number of cores of the node enters the last bits of what it computes.

    Args:
        function: takes `arguments`.
        arguments: whatever can be sent.
        num_gpus: that it needs.
    """
    # One call a process: another task in it would find threads it did not ask for.
    task = ray.remote(num_cpus=1, num_gpus=num_gpus, max_calls=1)(_with_all_cores)
    return ray.get(task.remote(function, *arguments))  # type: ignore[no-any-return]


def _with_all_cores(function: Callable[..., T], *arguments: Any) -> T:
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    n_threads = max(1, int(node["Resources"].get("CPU", 1)))
    torch.set_num_threads(n_threads)
    with threadpool_limits(n_threads):
        return function(*arguments)
