"""Cutting a graph of neighbors against scikit-learn's spectral clustering.

    python benchmarks/graph.py
    python benchmarks/graph.py --cases K=10

Both have the same weights, of 40 neighbors a row. Ours finds eigenvectors in blocks and assigns
clusters by pivots and balanced k-means; the peer does it by ARPACK and k-means from ten random
starts, its defaults. One JSON object a case, with how well each finds the directions that the rows
were made about (ACC, after the best matching; there are as many clusters as directions).
"""

import json
import platform
import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import psutil
import torch
import tyro
from numpy.typing import NDArray
from sklearn.cluster import SpectralClustering

from tac_ray.algorithm.graph import cut, edge_weights, join_edges
from tac_ray.algorithm.metrics import accuracy, contingency

CASES = {"K=10": (10_000, 10), "K=200": (10_000, 200)}
N_EDGES = 40
SPREAD = 1.5
"""Standard deviation of a row about its direction, in each coordinate of 64, to a direction's 1."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    cases: tuple[str, ...] = tuple(CASES)
    """Which of the two."""
    width: int = 64
    """d."""
    quick: bool = False
    """A tenth of the rows and clusters."""


def main(options: Options) -> None:
    """Measure and print."""
    for case in options.cases:
        n, k = CASES[case]
        if options.quick:
            n, k = n // 5, max(5, k // 10)
        rng = np.random.default_rng(0)
        direction = rng.integers(k, size=n)
        middles = rng.standard_normal((k, options.width))
        rows = middles[direction] + SPREAD * rng.standard_normal((n, options.width))
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        ends = faiss.knn(rows, rows, N_EDGES + 1, metric=faiss.METRIC_INNER_PRODUCT)[1]
        weights = edge_weights(torch.from_numpy(rows), torch.from_numpy(ends)).numpy()
        graph = join_edges((ends, weights))

        began = time.perf_counter()
        found = cut(graph, k, balance=0.4)
        seconds = time.perf_counter() - began
        began = time.perf_counter()
        peer = SpectralClustering(k, affinity="precomputed", random_state=0).fit_predict(graph)
        peer_seconds = time.perf_counter() - began

        def acc(cluster_id: NDArray[np.integer], of: Any = direction, k: int = k) -> float:
            return round(accuracy(contingency(cluster_id, of, k, k)), 4)

        figures = {
            "benchmark": "graph",
            "case": case,
            "seconds": round(seconds, 3),
            "peer": "SpectralClustering",
            "peer_seconds": round(peer_seconds, 3),
            "speedup": round(peer_seconds / seconds, 3),
            "acc": acc(found.cluster_id),
            "peer_acc": acc(peer),
            "peak_rss_gb": round(psutil.Process().memory_info().rss / 1e9, 3),
            "n_rows": n,
            "n_clusters": k,
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        }
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
