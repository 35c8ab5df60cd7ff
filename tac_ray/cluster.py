"""What there is to run on, and what the stages take of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ray
from ray.core.generated.common_pb2 import NodeDeathInfo  # type: ignore[attr-defined]
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


class Workers(NamedTuple):
    """The actors of a stage."""

    n: int
    n_threads: int
    """Cores that each may use."""
    num_cpus: float
    """Cores that each reserves: half of them, so that tasks find room beside the actors; none of a
    single core, which some tasks need whole."""
    num_gpus: int
    """GPUs that each has: one or none."""

    @classmethod
    def over_cluster(cls, n: int | None = None, n_gpus: int | None = None) -> "Workers":
        """One a GPU, or one a node where there are none.

        Args:
            n: how many instead; beyond the GPUs they compute on cores.
            n_gpus: GPUs that the cluster may grow to; default those it has.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = [node["CPU"] for node in nodes if node.get("CPU")]
        there = n_gpus or int(sum(node.get("GPU", 0) for node in nodes))
        n = n or there or len(cpus) or 1
        if n <= there:
            beside = [node.get("CPU", 0) // node["GPU"] for node in nodes if node.get("GPU")]
            n_threads = max(1, int(min(beside, default=1)))
            return cls(n, n_threads, 0.5 if n_threads > 1 else 0, 1)
        if not cpus:
            # A head without cores: only what reserves one makes the cluster grow.
            return cls(n, 1, 1, 0)
        n_threads = max(1, int(min(cpus) * len(cpus) / n))
        reserved = min(n_threads, sum(cpus) / n) / 2 if min(cpus) > 1 else 0
        return cls(n, n_threads, reserved if reserved <= 1 else float(int(reserved)), 0)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What there is to run on."""

    n_nodes: int
    n_cpus: int
    n_gpus: int
    memory_gb: float
    """Of all nodes together; 0 if unknown."""

    @classmethod
    def connected(cls, n_gpus: int | None = None) -> "Cluster":
        """The one that Ray is connected to, grown to `n_gpus`."""
        resources = ray.cluster_resources()
        there = int(resources.get("GPU", 0))
        more = max(0, (n_gpus or 0) - there)
        return cls(
            n_nodes=max(1, sum(node["Alive"] for node in ray.nodes())) + more,
            n_cpus=int(resources.get("CPU", 1)),
            n_gpus=n_gpus or there,
            memory_gb=0.0 if more else resources.get("memory", 0) / 1e9,
        )


def lost_nodes() -> dict[str, str]:
    """NodeID -> address of the nodes that are gone, but for those that ended because they idled."""
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if not node["Alive"] and node["DeathReason"] != NodeDeathInfo.AUTOSCALER_DRAIN_IDLE
    }


def nodes_without(path: str) -> list[str]:
    """Addresses of the nodes that have no file or folder at a local path."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    look = ray.remote(num_cpus=0)(_exists)
    found = [
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(path)
        for node in nodes
    ]
    seen = zip(nodes, ray.get(found), strict=True)
    return [node["NodeManagerAddress"] for node, there in seen if not there]


def _exists(path: str) -> bool:
    return Path(path).exists()
