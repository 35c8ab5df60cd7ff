"""What a run will need, told before it starts and refused if it cannot fit."""

from dataclasses import dataclass

import ray

from tac_ray.config import TacConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a run. Memory is of all nodes together, in GB."""

    n_images: int
    width: int
    n_nouns: int
    n_cpus: int
    n_gpus: int
    embeddings_gb: float
    index_gb: float
    """Embeddings and text counterparts side by side in the shards, and their working blocks."""
    heads_gb: float
    """Both embeddings and both neighbor lists in every training worker."""
    available_gb: float

    def lines(self) -> list[str]:
        """The plan in words."""
        gpus = f", {self.n_gpus} GPUs" if self.n_gpus else ""
        return [
            f"plan: {self.n_images:,} images and {self.n_nouns:,} nouns of width {self.width} on "
            f"{self.n_cpus} CPUs{gpus}",
            f"plan: {self.embeddings_gb:.2f} GB of embeddings; memory: index "
            f"{self.index_gb:.1f} GB, heads {self.heads_gb:.1f} GB of {self.available_gb:.1f} GB",
        ]

    def check(self) -> None:
        """Refuse a run that cannot fit.

        Raises:
            ValueError: the index or the heads need more memory than the cluster has.
        """
        needed = max(self.index_gb, self.heads_gb)
        if needed > self.available_gb:
            fits = int(self.n_images * self.available_gb / needed)
            raise ValueError(
                f"not enough memory: {needed:.1f} GB needed and {self.available_gb:.1f} GB there; "
                f"about {fits:,} images would fit, or a cluster with {needed:.0f} GB"
            )


def make_plan(config: TacConfig, *, n_images: int, n_nouns: int, width: int) -> Plan:
    """Sizes of a run on the cluster that Ray is connected to.

    The formulas are those in the docstrings of find_centroids and train_heads; 1 GB is for each
    process's libraries.
    """
    resources = ray.cluster_resources()
    n_cpus, n_gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    n_workers = config.train_heads.n_workers or max(1, n_gpus)
    columns = 2 if "train-free" in config.methods else 1
    row_index = 2 * width * columns
    row_heads = 4 * width + 16 * config.find_neighbors.n_neighbors
    return Plan(
        n_images=n_images,
        width=width,
        n_nouns=n_nouns,
        n_cpus=n_cpus,
        n_gpus=n_gpus,
        embeddings_gb=2 * width * n_images / 1e9,
        index_gb=1 + n_images * row_index / 1e9,
        heads_gb=n_workers * (1 + n_images * row_heads / 1e9) if "tac" in config.methods else 0,
        available_gb=resources.get("memory", 0) / 1e9,
    )
