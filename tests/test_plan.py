"""What a run is said to need, and what is refused."""

import dataclasses

import pytest

import tac_ray
from tac_ray.cluster import Cluster
from tac_ray.plan import duration, make_plan

LAPTOP = Cluster(n_nodes=1, n_cpus=8, n_gpus=0, memory_gb=16)
FARM = Cluster(n_nodes=32, n_cpus=512, n_gpus=0, memory_gb=16_000)


def plan(n_images: int, cluster: Cluster = LAPTOP, **options):
    config = tac_ray.best(images="", out="", **{"n_clusters": 1000, **options})
    return make_plan(config, cluster, n_images=n_images, n_nouns=119_034, width=512)


def stages(found) -> dict:
    return {stage.stage.split(" ")[0]: stage for stage in found.stages}


def test_every_stage_of_a_run_has_its_line():
    whole = stages(plan(100_000, methods=("kmeans", "train-free", "tac", "graph")))
    assert {
        "embed_images",
        "embed_nouns",
        "find_centroids",
        "find_centroids:train-free",
        "find_neighbors",
        "train_heads",
        "cut_graph",
        "fit_head",
    } <= set(whole)
    assert all(stage.hours >= 0 and stage.memory_gb > 0 for stage in whole.values())
    fewer = stages(plan(100_000, methods=("kmeans",)))
    assert set(whole) - set(fewer) == {
        "find_centroids:train-free",
        "find_neighbors",
        "train_heads",
        "cut_graph",
        "fit_head",
    }


def test_the_graph_of_a_sample_takes_the_same_whatever_the_images():
    few, many = (stages(plan(n, methods=("graph",)))["cut_graph"] for n in (10**6, 10**7))
    assert few == many
    assert "of a sample" in plan(10**6, methods=("graph",)).stages[-4].stage


def test_exact_neighbors_grow_with_the_square_and_a_join_does_not():
    tac = {"methods": ("tac",)}
    exact = [stages(plan(n, **tac))["find_neighbors"].flops for n in (100_000, 200_000)]
    assert exact[1] == pytest.approx(4 * exact[0])
    joins = [plan(n, FARM, **tac) for n in (10_000_000, 20_000_000)]
    assert any("join" in stage.stage for stage in joins[0].stages)
    few, many = (stages(found)["find_neighbors"].flops for found in joins)
    assert many < 3.5 * few


def test_more_cores_take_less_time():
    wide = dataclasses.replace(LAPTOP, n_cpus=80)
    tac = {"methods": ("tac",)}
    assert plan(100_000, wide, **tac).hours < plan(100_000, **tac).hours / 5
    assert "8 CPUs" in plan(100_000).line()


def test_a_run_that_does_not_fit_a_node_is_refused_with_what_would():
    plan(1_000_000).check()
    with pytest.raises(ValueError, match=r"find_centroids needs 206.* on a node and 16\.0 GB") as e:
        plan(100_000_000).check()
    fits = int(str(e.value).split("about ")[1].split(" ")[0].replace(",", ""))
    assert 1_000_000 < fits < 10_000_000
    plan(100_000_000, FARM).check()


def test_hours_in_words():
    assert [duration(h) for h in (0.001, 0.5, 5, 500)] == ["4 s", "30 min", "5 h", "21 days"]
