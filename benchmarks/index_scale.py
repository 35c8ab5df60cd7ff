"""The index at the size of ImageNet-1K: k-means and the neighbors of all rows.

    python benchmarks/index_scale.py
    python benchmarks/index_scale.py --rows 100000

One JSON object: seconds of loading, of each pass of k-means with 4271 centroids and of the join,
the most memory of a shard beside what `Shard` says of itself, and two extrapolations from counted
operations: whole fits and exact neighbors on these cores, from the rate of the passes here, and all
of it on one H200, at the rate that `tac-ray plan` assumes of one. There is no peer: benchmarks
kmeans.py and neighbors.py have them, at sizes where they end.
"""

import json
import platform
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import faiss
import tyro
from session import Silent, WorkersMemory, ray_session
from synthetic import synthetic_artifact

from tac_ray.artifacts.store import Store
from tac_ray.config import FindNeighborsConfig
from tac_ray.index.group import ShardGroup
from tac_ray.index.kmeans import fit
from tac_ray.index.shard import SEGMENT_ROWS
from tac_ray.plan import GPU, PROCESS_GB, TYPICAL_PASSES
from tac_ray.stages.find_neighbors import find_neighbors


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    rows: int = 1_281_167
    """N."""
    width: int = 512
    """d."""
    centroids: int = 4271
    """k."""
    iterations: int = 5
    """Passes of k-means."""
    kind: str = "overlapping"
    """Of the data: overlapping or separated."""
    shards: int = 2
    """Actors; they share the cores."""


def main(options: Options) -> None:
    """Measure and print."""
    n, d, k = options.rows, options.width, min(options.centroids, options.rows // 20)
    with (
        tempfile.TemporaryDirectory() as folder,
        ray_session(),
        ShardGroup(options.shards) as index,
    ):
        artifact = synthetic_artifact(folder, n, d, options.kind)
        began = time.perf_counter()
        index.load([artifact])
        load_s = time.perf_counter() - began
        with WorkersMemory() as kmeans_memory:
            result = fit(
                index,
                k,
                seed=0,
                restarts=1,
                max_iterations=options.iterations,
                tolerance=0,
                max_points_per_centroid=None,
                on_iteration=lambda _: None,
            )
        store, config = Store(folder, Silent()), FindNeighborsConfig(search="join")
        with WorkersMemory() as join_memory:
            found = find_neighbors(store, config, index, artifact, seed=0, title="synthetic")
    seconds = [line["seconds"] for line in result.iterations]
    facts: dict[str, Any] = found.facts
    passes = TYPICAL_PASSES * seconds[-2] + 2 * seconds[0]
    pass_flops = 2.0 * n * k * d
    met = facts["n_lists"] + facts["n_probe"] * n / facts["n_lists"]
    figures = {
        "benchmark": "index_scale",
        "n_rows": n,
        "width": d,
        "n_centroids": k,
        "data": options.kind,
        "shards": options.shards,
        "load_s": round(load_s, 2),
        "kmeans_pass_s": seconds,
        "kmeans_depth": [line["depth"] for line in result.iterations],
        "objective": round(result.objective, 5),
        "corrected": result.corrected,
        "neighbors_s": found.manifest.seconds,
        "recall": facts["recall"],
        **{name: facts[name] for name in ("lists_s", "n_lists", "n_probe")},
        "kmeans_peak_gb": round(kmeans_memory.peak_gb, 2),
        "formula_gb": round(formula_gb(n, d, k, options.shards), 2),
        "join_peak_gb": round(join_memory.peak_gb, 2),
        "full_kmeans_s": round(passes),
        "exact_neighbors_s": round(2.0 * n * n * d / (pass_flops / seconds[0])),
        "h200_kmeans_s": round((TYPICAL_PASSES + 2) * pass_flops / GPU.flops, 1),
        "h200_join_s": round(2.0 * n * met * d / GPU.flops, 1),
        "h200_exact_neighbors_s": round(2.0 * n * n * d / GPU.flops, 1),
        "h200_flops_assumed": GPU.flops,
        "machine": f"{platform.machine()}, {faiss.omp_get_max_threads()} threads",
    }
    print(json.dumps(figures), flush=True)


def formula_gb(n: int, d: int, k: int, n_shards: int) -> float:
    """Memory of a shard of one thread, as its docstring has it."""
    return PROCESS_GB + (4 * n * d / n_shards + 16 * k * d + 4 * SEGMENT_ROWS * (d + 1024)) / 1e9


if __name__ == "__main__":
    main(tyro.cli(Options))
