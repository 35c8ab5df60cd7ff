"""What a run will need, told before it starts and refused if it cannot fit."""

import math
from dataclasses import dataclass

from tac_ray.algorithm.lanczos import fewest_rows
from tac_ray.algorithm.nouns import n_semantic_centroids
from tac_ray.algorithm.turtle import turtle_flops
from tac_ray.cluster import Cluster
from tac_ray.config import TacConfig
from tac_ray.index.join import LISTS_PER_ROOT
from tac_ray.index.kmeans import PRUNE_CENTROIDS

PROCESS_GB = 1.0
"""Libraries of one process."""
TYPICAL_PASSES = 30
"""Passes after which k-means improves by less than its tolerance, on embeddings of photographs."""
LANCZOS_RESTARTS = 7
"""Until K eigenvectors are found; it depends on the data."""
LANCZOS_FLOPS = 3e10
"""Operations a second: 50,000 rows and 1,000 clusters took 203 s on two cores (benchmarks/results).
They are in float64 and wait for memory, so more cores hardly help."""
PROBES = 40
"""Lists that each row of a join visits; assumed, since it depends on the data."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one core or one GPU does in a second."""

    images: float
    """ViT-B/32 on images of 500 x 375 pixels."""
    prompts: float
    """ViT-B/32's text tower on nouns in their templates."""
    flops: float
    """Multiplications and additions in products of matrices and the top-n after them."""
    pruned: float
    """How much less a pruned pass of k-means takes than one that compares everything."""


CORE = Rates(images=34, prompts=165, flops=9e10, pruned=2.0)
"""Measured on a core of an x86-64 server with AVX-512 and bf16: benchmarks/results."""
GPU = Rates(images=1750, prompts=20_000, flops=3e13, pruned=1.0)
"""Measured on an H100 beside 16 cores that decode (benchmarks/results); prompts are assumed."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage of a run."""

    stage: str
    n_workers: int
    """Processes that share the work."""
    memory_gb: float
    """Of each of them, at its peak."""
    flops: float
    """Operations of the largest part of the work; 0 where reading and writing are."""
    hours: float
    written_gb: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes and times of a run."""

    n_images: int
    width: int
    n_nouns: int
    n_centroids: int
    cluster: Cluster
    stages: list[StagePlan]

    @property
    def hours(self) -> float:
        """Of all stages."""
        return sum(stage.hours for stage in self.stages)

    def line(self) -> str:
        """The plan in a line."""
        cluster, largest = self.cluster, max(self.stages, key=lambda s: s.memory_gb * s.n_workers)
        gpus = f", {cluster.n_gpus} GPUs" if cluster.n_gpus else ""
        there = f"of {cluster.memory_gb:,.1f} GB of memory" if cluster.memory_gb else "GB of memory"
        return (
            f"plan: {self.n_images:,} images and {self.n_nouns:,} nouns of width {self.width} on "
            f"{cluster.n_cpus} CPUs{gpus}: about {duration(self.hours)} with a ViT-B/32, "
            f"{sum(stage.written_gb for stage in self.stages):,.1f} GB written, "
            f"{largest.memory_gb * largest.n_workers:,.1f} {there} for {largest.stage}"
        )

    def check(self) -> None:
        """Refuse a run that cannot fit, as far as the nodes are known.

        Raises:
            ValueError: the workers of a stage need more memory than their nodes have.
        """
        if not self.cluster.memory_gb:
            return
        nodes = self.cluster.n_nodes
        for stage in self.stages:
            needed = stage.memory_gb * math.ceil(stage.n_workers / nodes)
            there = self.cluster.memory_gb / nodes
            if needed > there:
                fits = int(self.n_images * there / needed)
                raise ValueError(
                    f"not enough memory: {stage.stage} needs {needed:.1f} GB on a node and "
                    f"{there:.1f} GB are there; about {fits:,} images would fit, or nodes with "
                    f"{needed:.0f} GB"
                )


def make_plan(
    config: TacConfig,
    cluster: Cluster,
    *,
    n_images: int,
    n_nouns: int,
    width: int,
) -> Plan:
    """Sizes and times of a run.

    The formulas are those in the docstrings of the stages.

    Args:
        config: what to do; its images are not looked at.
        cluster: on what.
        n_images: N.
        n_nouns: rows of the noun list.
        width: d.
    """
    n, d, n_clusters = n_images, width, config.n_clusters
    k = n_semantic(config, n)
    on_gpu = cluster.n_gpus > 0
    n_units = cluster.n_gpus or cluster.n_cpus
    rate = GPU if on_gpu else CORE
    n_encoders = cluster.n_gpus or cluster.n_nodes
    n_shards = config.n_shards or cluster.n_gpus or cluster.n_nodes
    n_workers = config.train_heads.n_workers or max(1, cluster.n_gpus)
    speed = rate.flops * n_units

    def stage(
        name: str,
        workers: int,
        memory_gb: float,
        *,
        flops: float,
        written_gb: float = 0,
        rate_of: float = speed,
    ) -> StagePlan:
        return StagePlan(
            stage=name,
            n_workers=workers,
            memory_gb=memory_gb,
            flops=flops,
            hours=flops / rate_of / 3600,
            written_gb=written_gb,
        )

    def at_rate(name: str, items: float, each_s: float, written_gb: float) -> StagePlan:
        hours = items / (each_s * n_units) / 3600
        return StagePlan(
            stage=name,
            n_workers=n_encoders,
            memory_gb=PROCESS_GB + 1.5,
            flops=0,
            hours=hours,
            written_gb=written_gb,
        )

    def k_means(name: str, n_columns: int, k: int, restarts: int) -> StagePlan:
        rows_gb = 2 * n * d * n_columns / 1e9 / n_shards
        pruned = rate.pruned if k >= PRUNE_CENTROIDS and config.kmeans.prune else 1
        passes = min(config.kmeans.max_iterations, TYPICAL_PASSES) / pruned + 2
        memory = PROCESS_GB + rows_gb * (2 if pruned > 1 else 1) + 24 * k * d * n_columns / 1e9
        flops = 2.0 * n * k * d * n_columns * passes * restarts
        return stage(name, n_shards, memory, flops=flops, written_gb=4 * n / 1e9)

    embedded_gb = 2 * n * d / 1e9
    n_selected = min(n_nouns, config.select_nouns.nouns_per_centroid * k)
    stages = [
        at_rate("embed_images", n, rate.images, embedded_gb),
        at_rate("embed_nouns", 7 * n_nouns, rate.prompts, 2 * n_nouns * d / 1e9),
        k_means("find_centroids", 1, k, config.kmeans.centroid_restarts),
        stage(
            "build_counterparts",
            cluster.n_cpus,
            PROCESS_GB,
            flops=4.0 * n * n_selected * d,
            written_gb=embedded_gb + 36 * n / 1e9,
        ),
    ]
    for method, n_columns in (("kmeans", 1), ("train-free", 2)):
        if method in config.methods:
            restarts = config.kmeans.cluster_restarts
            stages.append(k_means(f"find_centroids:{method}", n_columns, n_clusters, restarts))
    neighbors, n_graph = config.find_neighbors, min(n, config.cut_graph.max_graph_rows)
    joined = {n} if "tac" in config.methods else set()
    if "graph" in config.methods:
        joined |= {n_graph}
    for rows in sorted(joined):
        kind, flops = "exact", 4.0 * rows * rows * d
        if neighbors.joins(rows):
            n_lists = LISTS_PER_ROOT * math.sqrt(rows)
            kind, flops = "join", 4.0 * rows * d * (n_lists + min(PROBES / n_lists, 1) * rows)
        sample = "" if rows == n else "of a sample, "
        stages.append(
            stage(
                f"find_neighbors ({sample}{kind}, twice)",
                n_shards,
                PROCESS_GB + 2 * rows * d / 1e9 / n_shards,
                flops=flops,
                written_gb=2 * 12 * neighbors.n_neighbors * rows / 1e9,
            )
        )
    if "tac" in config.methods:
        heads = config.train_heads.resolve(n_clusters)
        assert heads.epochs is not None
        # What does not fit into half of a node's memory is read from files.
        rows_gb = n * (4 * d + 8 * neighbors.n_neighbors + 8) / 1e9
        on_node = math.ceil(n_workers / cluster.n_nodes)
        if cluster.memory_gb:
            rows_gb = min(rows_gb, cluster.memory_gb / cluster.n_nodes / on_node / 2)
        # Two heads on anchors and neighbors, forward and backward: 3 x 2 x 2 passes of d (d + K).
        each = 24.0 * d * (d + n_clusters) + 28.0 * n_clusters**2
        stages.append(
            stage("train_heads", n_workers, PROCESS_GB + rows_gb, flops=each * n * heads.epochs)
        )
    # These run on the cores of one node.
    node = CORE.flops * cluster.n_cpus / cluster.n_nodes
    if "turtle" in config.methods:
        memory_gb = PROCESS_GB + 4 * n_graph * d / 1e9
        flops = turtle_flops(d, n_clusters, n_spaces=2)
        stages.append(stage("fit_turtle", 1, memory_gb, flops=flops, rate_of=node))
    if "graph" in config.methods:
        edges = 4 * config.cut_graph.n_edges
        vectors = 24 * n_graph if n_graph <= fewest_rows(n_clusters) else 32 * n_clusters
        memory_gb = PROCESS_GB + n_graph * (vectors + 4 * d + 12 * edges) / 1e9
        flops = 17.0 * LANCZOS_RESTARTS * n_graph * n_clusters**2
        written_gb, rate_of = 4 * n_graph / 1e9, LANCZOS_FLOPS
        cut = stage("cut_graph", 1, memory_gb, flops=flops, written_gb=written_gb, rate_of=rate_of)
        stages.append(cut)
        epochs = config.fit_head.head_epochs
        flops = 6.0 * n_graph * d * (d + n_clusters) * epochs
        memory_gb = PROCESS_GB + 8 * n_graph * d / 1e9
        on_one = GPU.flops if on_gpu else node
        stages.append(stage("fit_head", 1, memory_gb, flops=flops, rate_of=on_one))
    stages.append(
        stage(
            "assign_clusters",
            cluster.n_cpus,
            PROCESS_GB,
            flops=2.0 * n * d * (d + n_clusters) * len(config.methods),
            written_gb=100 * n * len(config.methods) / 1e9,
        )
    )
    return Plan(
        n_images=n,
        width=d,
        n_nouns=n_nouns,
        n_centroids=k,
        cluster=cluster,
        stages=stages,
    )


def n_semantic(config: TacConfig, n_images: int) -> int:
    """k, how many semantic centroids a run has (Eq. 2)."""
    chosen = config.select_nouns
    return chosen.n_centroids or n_semantic_centroids(
        n_images,
        config.n_clusters,
        images_per_centroid=chosen.images_per_centroid,
        centroids_per_cluster=chosen.centroids_per_cluster,
        max_centroids=chosen.max_centroids,
    )


def duration(hours: float) -> str:
    """Hours in words."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 2:
        return f"{hours * 60:.0f} min"
    return f"{hours:,.0f} h" if hours < 72 else f"{hours / 24:,.0f} days"
