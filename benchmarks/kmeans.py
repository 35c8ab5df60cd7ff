"""Spherical k-means over shards against FAISS's own, in its plain and its pruned form.

    python benchmarks/kmeans.py
    python benchmarks/kmeans.py --rows 50000 --iterations 5

| case | centroids |
|---|---|
| kmeans-k667 | 667, as N / 300 gives for 200,000 rows |
| kmeans-k4271 | 4271, as for ImageNet-1K |

One JSON object a line. The plain form is faiss.Kmeans, the pruned one faiss.SuperKmeans; the peer
is the faster of the two. All start from the same rows, use all rows and the same threads; time is
of the whole fit, per iteration, FAISS having as many as the shards needed. The objective is the
mean similarity of a row and its nearest centroid, compared for all alike.
"""

import json
import platform
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import tyro
from numpy.typing import NDArray
from session import ray_session
from synthetic import synthetic_artifact

from tac_ray.algorithm.kmeans import normalize_rows, random_rows
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.index.group import ShardGroup
from tac_ray.index.kmeans import fit

SEED = 1234
CASES = {"kmeans-k667": 667, "kmeans-k4271": 4271}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    cases: tuple[str, ...] = tuple(CASES)
    """Which of the two."""
    rows: int = 200_000
    """N."""
    width: int = 512
    """d."""
    kind: str = "overlapping"
    """Of the data: overlapping or separated."""
    iterations: int = 20
    """Passes."""
    shards: int = 2
    """Actors; they share the cores."""
    quick: bool = False
    """Little of everything."""


def main(options: Options) -> None:
    """Measure and print."""
    n, iterations = (20_000, 4) if options.quick else (options.rows, options.iterations)
    with tempfile.TemporaryDirectory() as folder:
        artifact = synthetic_artifact(folder, n, options.width, options.kind)
        rows = matrix(artifact.column("embedding")).astype(np.float32)
        for case in options.cases:
            k = min(CASES[case], n // 20)
            ours = sharded(artifact, k, iterations, options.shards)
            plain = peer(rows, k, ours["iterations"], pruned=False)
            pruned = peer(rows, k, ours["iterations"], pruned=True)
            faster = min(plain, pruned, key=lambda figures: figures["seconds"])
            figures = {
                "benchmark": "kmeans",
                "case": case,
                "seconds": round(ours["seconds"], 3),
                "peer": "faiss.SuperKmeans" if faster is pruned else "faiss.Kmeans",
                "peer_seconds": round(faster["seconds"], 3),
                "speedup": round(faster["seconds"] / ours["seconds"], 3),
                "unit": "seconds an iteration",
                "objective_ratio": round(ours["objective"] / faster["objective"], 5),
                "objective": round(ours["objective"], 5),
                "iterations": ours["iterations"],
                "corrected": ours["corrected"],
                "first_pass_s": ours["first_pass_s"],
                "faiss_plain_s": round(plain["seconds"], 3),
                "faiss_pruned_s": round(pruned["seconds"], 3),
                "n_rows": n,
                "width": options.width,
                "n_centroids": k,
                "data": options.kind,
                "shards": options.shards,
                "peak_rss_gb": round(ours["peak_rss_gb"], 2),
                "machine": f"{platform.machine()}, {faiss.omp_get_max_threads()} threads",
            }
            print(json.dumps(figures), flush=True)


def sharded(artifact: Artifact, k: int, iterations: int, n_shards: int) -> dict[str, Any]:
    """The fit on shards."""
    ends: list[float] = []
    with ray_session(), ShardGroup(n_shards) as index:
        index.load([artifact])
        began = time.perf_counter()
        result = fit(
            index,
            k,
            seed=0,
            restarts=1,
            max_iterations=iterations,
            tolerance=0,
            max_points_per_centroid=None,
            on_iteration=lambda _: ends.append(time.perf_counter()),
        )
        memory_gb = index.peak_memory_gb
    if any(line["depth"] for line in result.iterations):
        ends = ends[:-1]  # the last pass only checks how far pruning went wrong
    return {
        "seconds": (ends[-1] - began) / len(ends),
        "first_pass_s": round(ends[0] - began, 3),
        "objective": result.objective,
        "iterations": len(ends),
        "corrected": result.corrected,
        "peak_rss_gb": memory_gb,
    }


def peer(rows: NDArray[np.float32], k: int, iterations: int, *, pruned: bool) -> dict[str, float]:
    """FAISS on the same rows from the same start."""
    n, width = rows.shape
    start = random_rows(n, k, seed=0, restart=0)
    same = {"niter": iterations, "spherical": True, "max_points_per_centroid": n}
    if pruned:
        # It takes no start: rows are put where it will look for one. (faiss.Kmeans has a flag for
        # this form, which a spherical index turns off without a word.)
        kmeans: Any = faiss.SuperKmeans(width, k, seed=SEED, **same)
        looked_at = np.empty(n, dtype=np.int32)
        faiss.rand_perm(faiss.swig_ptr(looked_at), n, SEED + 1)
        others = np.setdiff1d(np.arange(n), start)
        placed = np.empty_like(rows)
        placed[looked_at] = rows[np.concatenate([start, others])]
        began = time.perf_counter()
        kmeans.train(placed)
    else:
        kmeans = faiss.Kmeans(width, k, **same)
        began = time.perf_counter()
        kmeans.train(rows, init_centroids=normalize_rows(rows[start]))
    seconds = time.perf_counter() - began
    index = faiss.IndexFlatIP(width)
    index.add(normalize_rows(kmeans.centroids))
    similarity = index.search(rows, 1)[0].astype(np.float64).mean()
    return {"seconds": seconds / len(kmeans.iteration_stats), "objective": float(similarity)}


if __name__ == "__main__":
    main(tyro.cli(Options))
