"""How many actors a stage starts, and what each takes, on clusters of many shapes."""

from typing import Any

import pytest
from ray.core.generated.common_pb2 import NodeDeathInfo

from tac_ray import cluster
from tac_ray.cluster import Cluster, Workers, lost_nodes


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Resources of the nodes that Ray tells of; to be filled."""
    found: list[dict[str, Any]] = []

    class Told:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            return [{"Alive": True, "Resources": node} for node in found]

        @staticmethod
        def cluster_resources() -> dict[str, float]:
            return {key: sum(n.get(key, 0) for n in found) for key in ("CPU", "GPU", "memory")}

    monkeypatch.setattr(cluster, "ray", Told)
    return found


def test_a_node_without_gpus_has_one_worker_with_all_its_cores(nodes: list[dict[str, Any]]):
    nodes += [{"CPU": 16}, {"CPU": 16}, {"memory": 1e9}]
    assert Workers.over_cluster() == Workers(n=2, n_threads=16, num_cpus=8, num_gpus=0)
    assert Workers.over_cluster(8) == Workers(n=8, n_threads=4, num_cpus=2, num_gpus=0)


def test_two_cores_leave_one_to_the_tasks(nodes: list[dict[str, Any]]):
    nodes += [{"CPU": 2}]
    assert Workers.over_cluster() == Workers(n=1, n_threads=2, num_cpus=1, num_gpus=0)
    assert Workers.over_cluster(2) == Workers(n=2, n_threads=1, num_cpus=0.5, num_gpus=0)
    # However many, they find room.
    assert Workers.over_cluster(5) == Workers(n=5, n_threads=1, num_cpus=0.2, num_gpus=0)


def test_a_single_core_is_left_whole(nodes: list[dict[str, Any]]):
    nodes += [{"CPU": 1}, {"CPU": 1}]
    assert Workers.over_cluster() == Workers(n=2, n_threads=1, num_cpus=0, num_gpus=0)


def test_every_gpu_has_a_worker_and_it_fits_beside_one_core(nodes: list[dict[str, Any]]):
    nodes += [{"CPU": 1}, {"CPU": 32, "GPU": 4}, {"CPU": 32, "GPU": 4}]
    assert Workers.over_cluster() == Workers(n=8, n_threads=8, num_cpus=0.5, num_gpus=1)


def test_gpus_that_are_yet_to_come_are_counted(nodes: list[dict[str, Any]]):
    nodes += [{"CPU": 1, "memory": 4e9}]
    assert Workers.over_cluster(n_gpus=3) == Workers(n=3, n_threads=1, num_cpus=0, num_gpus=1)
    grown = Cluster.connected(3)
    assert (grown.n_gpus, grown.n_nodes, grown.memory_gb) == (3, 4, 0)
    assert Cluster.connected().memory_gb == 4


def test_a_head_without_cores_is_not_computed_on(nodes: list[dict[str, Any]]):
    nodes += [{"memory": 4e9}]
    assert Workers.over_cluster() == Workers(n=1, n_threads=1, num_cpus=1, num_gpus=0)


def test_workers_beyond_the_gpus_compute_on_cores(nodes: list[dict[str, Any]]):
    nodes += [{"CPU": 8, "GPU": 1}]
    assert Workers.over_cluster(2) == Workers(n=2, n_threads=4, num_cpus=2, num_gpus=0)


def test_nodes_that_ended_idle_are_not_lost(monkeypatch: pytest.MonkeyPatch):
    def node(i: int, reason: int, alive: bool = False) -> dict[str, Any]:
        about = {"NodeID": f"{i}", "NodeManagerAddress": f"10.0.0.{i}"}
        return {**about, "Alive": alive, "DeathReason": reason}

    told = [
        node(1, NodeDeathInfo.UNSPECIFIED, alive=True),
        node(2, NodeDeathInfo.UNEXPECTED_TERMINATION),
        node(3, NodeDeathInfo.AUTOSCALER_DRAIN_IDLE),
        node(4, NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED),
    ]
    monkeypatch.setattr(cluster.ray, "nodes", lambda: told)
    assert lost_nodes() == {"2": "10.0.0.2", "4": "10.0.0.4"}
