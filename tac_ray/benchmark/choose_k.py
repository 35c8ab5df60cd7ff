"""How good each number of clusters is, without labels, and which one to take."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import silhouette_score

from tac_ray.algorithm.agreement import mean_agreement
from tac_ray.algorithm.training import LEAST_ENTROPY
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix
from tac_ray.benchmark.measure import Measurement
from tac_ray.benchmark.tables import table

SAMPLE_ROWS = 4000
"""Rows that silhouettes and agreement are measured on."""


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """What can be said of K without labels; means over the seeds."""

    n_clusters: int
    agreement: float | None
    """Adjusted mutual information of the clusters of two seeds: 1 if they are the same, 0 if they
    agree by chance. None with a single seed."""
    silhouette: float
    """Of the image embeddings by cosine, from -1 to 1."""
    entropy: float
    """Of the cluster sizes, as a share of that of equal ones."""
    n_empty: float


def judge(n_clusters: int, cluster_ids: Sequence[NDArray[np.int32]], images: Artifact) -> Judgment:
    """Judge the clusters that several seeds gave the same rows.

    Args:
        n_clusters: K.
        cluster_ids: of each seed, (N,).
        images: artifact of embed_images.

    Cost: 2 m^2 d operations and 8 m^2 bytes for a sample of m = 4,000 rows, a seed.
    """
    n_rows = len(cluster_ids[0])
    rows = np.sort(np.random.default_rng(0).permutation(n_rows)[:SAMPLE_ROWS])
    vectors = _rows(images, rows)
    sampled = [ids[rows] for ids in cluster_ids]
    sizes = [np.bincount(ids, minlength=n_clusters) for ids in cluster_ids]
    return Judgment(
        n_clusters=n_clusters,
        agreement=float(mean_agreement(sampled).mean()) if len(sampled) > 1 else None,
        silhouette=float(np.mean([_silhouette(vectors, ids) for ids in sampled])),
        entropy=float(np.mean([_entropy(counts) / math.log(n_clusters) for counts in sizes])),
        n_empty=float(np.mean([(counts == 0).sum() for counts in sizes])),
    )


def judge_all(measurements: Sequence[Measurement]) -> list[Judgment]:
    """A judgment for each K of one case, by the images that it was fitted on."""
    groups: dict[int, list[Measurement]] = {}
    for found in measurements:
        if found.split != "test":
            groups.setdefault(found.row.n_clusters, []).append(found)
    return [
        judge(k, [found.scored.column("cluster_id").to_numpy() for found in group], group[0].images)
        for k, group in groups.items()
    ]


def suggestion(judgments: Sequence[Judgment]) -> str:
    """Which K to take, and why.

    Clusters that another seed finds again, in other images, are in the data rather than in the
    sample, so agreement decides, and the silhouette where there is one seed; K whose sizes have
    collapsed stay out.
    """
    sound = [found for found in judgments if found.entropy >= LEAST_ENTROPY] or list(judgments)
    if sound[0].agreement is None:
        best = max(sound, key=lambda found: found.silhouette)
        others = ", ".join(f"{f.silhouette:.3f} for {f.n_clusters}" for f in sound if f is not best)
        reason = f"its silhouette, {best.silhouette:.3f}, is the highest"
    else:
        best = max(sound, key=lambda found: (found.agreement or 0, found.silhouette))
        others = ", ".join(f"{f.agreement:.3f} for {f.n_clusters}" for f in sound if f is not best)
        reason = f"other seeds find its clusters again best: they agree by {best.agreement:.3f}"
    left_out = len(judgments) - len(sound)
    collapsed = f"; {left_out} collapsed and stay out" if left_out else ""
    beside = f" ({others})" if others else ""
    return f"take --n-clusters {best.n_clusters}: {reason}{beside}{collapsed}"


def markdown(judgments: Sequence[Judgment]) -> str:
    """The judgments as a Markdown table, and the suggestion."""
    header = ["clusters", "agreement of seeds (AMI)", "silhouette", "entropy of sizes", "empty"]
    rows = [
        [
            str(found.n_clusters),
            "" if found.agreement is None else f"{found.agreement:.3f}",
            f"{found.silhouette:.3f}",
            f"{found.entropy:.3f}",
            f"{found.n_empty:g}",
        ]
        for found in judgments
    ]
    return f"{table(header, rows)}\n{suggestion(judgments)}\n"


def _rows(images: Artifact, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Embeddings of sorted rows."""
    found, start = [], 0
    for part in images.tables(["embedding"]):
        mine = rows[(rows >= start) & (rows < start + part.num_rows)] - start
        found.append(matrix(part["embedding"])[mine].astype(np.float32))
        start += part.num_rows
    return np.concatenate(found)


def _silhouette(vectors: NDArray[np.float32], cluster_id: NDArray[np.int32]) -> float:
    """0 where it is not defined: one cluster, or as many as rows."""
    n = len(np.unique(cluster_id))
    if not 1 < n < len(vectors):
        return 0.0
    return float(silhouette_score(vectors, cluster_id, metric="cosine"))


def _entropy(counts: NDArray[np.int64]) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())
