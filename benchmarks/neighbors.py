"""Neighbors of a collection in itself against FAISS's indexes.

    python benchmarks/neighbors.py
    python benchmarks/neighbors.py --cases join-200k --kind separated

| case | what | peer |
|---|---|---|
| exact-50k | exact search over shards, 50,000 rows | IndexFlatIP, all rows as queries |
| join-50k, join-100k, join-200k | the join, with its lists | exact search over shards, a sample |

One JSON object a line. A join is also compared with IndexIVFFlat at the same recall: its lists are
built and searched with the number of probes that a sample asks for; both are timed, and the search
is timed on a sample of the rows. Recall is the share of the 50 true neighbors found.
"""

import json
import math
import platform
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import tyro
from numpy.typing import NDArray
from session import Silent, ray_session
from synthetic import synthetic_artifact

from tac_ray.algorithm.kmeans import random_rows
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.artifacts.store import Store
from tac_ray.config import FindNeighborsConfig
from tac_ray.index.group import ShardGroup
from tac_ray.stages.find_neighbors import find_neighbors

CASES = {"exact-50k": 50_000, "join-50k": 50_000, "join-100k": 100_000, "join-200k": 200_000}
N_NEIGHBORS = 50
SAMPLE = 4096


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    cases: tuple[str, ...] = tuple(CASES)
    """Which of the four."""
    width: int = 512
    """d."""
    kind: str = "overlapping"
    """Of the data: overlapping or separated."""
    recall: float = 0.95
    """That a join should reach."""
    shards: int = 2
    """Actors; they share the cores."""
    quick: bool = False
    """Little of everything."""


def main(options: Options) -> None:
    """Measure and print."""
    for case in options.cases:
        n = CASES[case] // 10 if options.quick else CASES[case]
        with tempfile.TemporaryDirectory() as folder, ray_session():
            artifact = synthetic_artifact(folder, n, options.width, options.kind)
            line = (exact if case.startswith("exact") else join)(folder, artifact, options)
        figures = {
            "benchmark": "neighbors",
            "case": case,
            **line,
            "n_rows": n,
            "width": options.width,
            "data": options.kind,
            "shards": options.shards,
            "machine": f"{platform.machine()}, {faiss.omp_get_max_threads()} threads",
        }
        print(json.dumps(figures), flush=True)


def exact(folder: str, artifact: Artifact, options: Options) -> dict[str, Any]:
    """All pairs, against one flat index."""
    found = searched(folder, artifact, options, search="exact")
    rows = matrix(artifact.column("embedding")).astype(np.float32)
    began = time.perf_counter()
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    similarity, expected = index.search(rows, N_NEIGHBORS + 1)
    peer_seconds = time.perf_counter() - began
    mine = matrix(found.column("neighbor_row"))
    theirs = without_itself(expected, np.arange(len(rows)))
    last = np.sort(similarity, axis=1)[:, 1:2]
    tied = matrix(found.column("similarity")) <= last + 1e-6
    return {
        "seconds": found.manifest.seconds,
        "peer": "IndexFlatIP",
        "peer_seconds": round(peer_seconds, 3),
        "speedup": round(peer_seconds / found.manifest.seconds, 3),
        "agreement": round(float((np.sort(mine, 1) == np.sort(theirs, 1)).mean()), 6),
        "recall": round(recall(mine, theirs), 6),
        "share_tied": round(float(tied.mean()), 6),
        "peak_rss_gb": found.manifest.peak_memory_gb,
    }


def join(folder: str, artifact: Artifact, options: Options) -> dict[str, Any]:
    """The join, against exact search on shards and against an inverted file."""
    found = searched(folder, artifact, options, search="join")
    rows = matrix(artifact.column("embedding")).astype(np.float32)
    sample = random_rows(len(rows), min(SAMPLE, len(rows)), seed=1, restart=0)
    with ShardGroup(options.shards) as index:
        index.load([artifact])
        began = time.perf_counter()
        _, truth = index.search(sample, N_NEIGHBORS + 1)
        exact_s = (time.perf_counter() - began) * len(rows) / len(sample)
    true = without_itself(truth, sample)
    reached = recall(matrix(found.column("neighbor_row"))[sample], true)
    ivf = inverted_file(rows, sample, true, reached)
    seconds = found.manifest.seconds
    return {
        "seconds": seconds,
        "peer": f"exact search over shards, from {len(sample)} rows",
        "peer_seconds": round(exact_s, 1),
        "speedup": round(exact_s / seconds, 2),
        "recall": round(reached, 4),
        "recall_told": found.facts["recall"],
        "lists_s": found.facts["lists_s"],
        "n_lists": found.facts["n_lists"],
        "n_probe": found.facts["n_probe"],
        **ivf,
        "speedup_over_ivf": round((ivf["ivf_build_s"] + ivf["ivf_search_s"]) / seconds, 2),
        "peak_rss_gb": found.manifest.peak_memory_gb,
    }


def inverted_file(
    rows: NDArray[np.float32], sample: NDArray[np.int64], true: NDArray[np.int64], wanted: float
) -> dict[str, Any]:
    """IndexIVFFlat with the fewest probes that reach the same recall."""
    began = time.perf_counter()
    n_lists = round(4 * math.sqrt(len(rows)))
    quantizer = faiss.IndexFlatIP(rows.shape[1])
    index = faiss.IndexIVFFlat(quantizer, rows.shape[1], n_lists, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.add(rows)
    build_s = time.perf_counter() - began
    one_probe, n_probe, reached, search_s = 0.0, 0, 0.0, 0.0
    while reached < wanted and n_probe < n_lists:
        n_probe = n_probe + 1 if n_probe < 8 else math.ceil(n_probe * 1.1)
        index.nprobe = n_probe
        began = time.perf_counter()
        _, found = index.search(rows[sample], N_NEIGHBORS + 1)
        search_s = (time.perf_counter() - began) * len(rows) / len(sample)
        reached = recall(without_itself(found, sample), true)
        one_probe = one_probe or reached
    return {
        "ivf_build_s": round(build_s, 1),
        "ivf_search_s": round(search_s, 1),
        "ivf_lists": n_lists,
        "ivf_probes": n_probe,
        "ivf_recall": round(reached, 4),
        "ivf_recall_of_one_probe": round(one_probe, 3),
    }


def searched(folder: str, artifact: Artifact, options: Options, *, search: str) -> Artifact:
    """The stage's artifact."""
    config = FindNeighborsConfig(search=search, recall=options.recall)  # type: ignore[arg-type]
    with ShardGroup(options.shards) as index:
        store = Store(folder, Silent())
        # Workers that run already, as in a run, where other stages come before.
        few = synthetic_artifact(folder, 2000, options.width, options.kind)
        find_neighbors(store, config, index, few, seed=0, title="few")
        index.load([artifact])
        return find_neighbors(store, config, index, artifact, seed=0, title="synthetic")


def without_itself(found: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Neighbors without the row itself, (m, n) of (m, n + 1)."""
    others = found != rows[:, None]
    others[others.all(axis=1), -1] = False
    return found[others].reshape(len(found), -1)


def recall(found: NDArray[np.int64], true: NDArray[np.int64]) -> float:
    """Share of the true neighbors that were found."""
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found, true, strict=True))
    return hits / true.size


if __name__ == "__main__":
    main(tyro.cli(Options))
