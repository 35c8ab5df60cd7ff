"""Run a function over the parts of an artifact, on Ray tasks."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

T = TypeVar("T")

FEWEST_CALLS = 8


def map_parts(function: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
    """Results of `function(*arguments)` in order, computed ahead on the cluster's CPUs.

    At most two calls a CPU are in flight, so memory is bounded whatever the number of parts; and
    some more than a small head has, so that a cluster sees that it should grow.
    """
    # Half a core each: room beside the shards also where there is one core.
    task = ray.remote(num_cpus=0.5)(function)
    running: deque[Any] = deque()
    for args in arguments:
        if len(running) >= max(FEWEST_CALLS, 2 * int(ray.cluster_resources().get("CPU", 1))):
            yield ray.get(running.popleft())
        running.append(task.remote(*args))
    while running:
        yield ray.get(running.popleft())
