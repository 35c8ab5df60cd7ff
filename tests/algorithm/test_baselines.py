"""SCAN's and SIC's losses against plain formulas in float64, and SIC's way to its pseudo-labels."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tac_ray.algorithm.baselines import (
    ScanLoss,
    SicHead,
    SicLoss,
    semantic_centers,
    semantic_space,
)
from tac_ray.algorithm.head import ImageHead
from tac_ray.algorithm.training import ClusterSizes, TrainingRows, train_epoch

N, WIDTH, K = 90, 16, 3


def random_probs(n: int, k: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, k, generator=generator, dtype=torch.float64)
    return torch.softmax(2 * logits, dim=1)


def plain_scan(p: list[list[float]], q: list[list[float]], weight: float) -> float:
    agreed = [
        -math.log(sum(a * b for a, b in zip(x, y, strict=True))) for x, y in zip(p, q, strict=True)
    ]
    means = [sum(column) / len(p) for column in zip(*p, strict=True)]
    return sum(agreed) / len(agreed) + weight * sum(m * math.log(m) for m in means)


def test_scan_is_its_formula():
    p, q = random_probs(20, 5, seed=0), random_probs(20, 5, seed=1)
    found = ScanLoss(balance_weight=5.0)(p, q)
    assert found["loss"].item() == pytest.approx(plain_scan(p.tolist(), q.tolist(), 5.0), rel=1e-12)
    assert found["loss"] == found["consistency"] - 5 * found["balance"]


def test_sic_adds_the_cross_entropy_of_rows_that_have_a_pseudo_label():
    p, q = random_probs(20, 5, seed=0), random_probs(20, 5, seed=1)
    label = torch.arange(20) % 6 - 1
    found = SicLoss(balance_weight=5.0, semantic_weight=0.5)(p, q, label)
    logs = [math.log(p[i, y]) for i, y in enumerate(label.tolist()) if y >= 0]
    semantic = -sum(logs) / len(logs)
    expected = plain_scan(p.tolist(), q.tolist(), 5.0) + 0.5 * semantic
    assert found["semantic"].item() == pytest.approx(semantic, rel=1e-12)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-12)
    none = SicLoss(balance_weight=5.0)(p, q, torch.full((20,), -1))
    assert none["loss"] == ScanLoss(balance_weight=5.0)(p, q)["loss"]


def test_the_semantic_space_holds_near_nouns_that_are_unlike_the_average():
    generator = torch.Generator().manual_seed(0)
    nouns = functional.normalize(torch.randn(2000, 8, generator=generator) + 0.3, dim=1)
    centroids = functional.normalize(torch.randn(2, 8, generator=generator), dim=1)
    rows = semantic_space(nouns, centroids)
    near = set()
    for centroid in centroids:
        near |= set((nouns @ centroid).argsort(descending=True)[:500].tolist())
    likeness = nouns @ nouns.mean(dim=0)
    kept = set(rows.tolist())
    assert kept < near
    assert len(kept) == (len(near) + 1) // 2
    assert rows.tolist() == sorted(kept)
    assert max(likeness[list(kept)]) <= min(likeness[list(near - kept)])


def test_semantic_centers_follow_the_most_confident_images():
    axes = torch.eye(4)
    images = torch.stack([axes[0], axes[1], axes[2], axes[2]])
    nouns = functional.normalize(axes[[0] * 5 + [1] * 5 + [2] * 5] + 0.01, dim=1)
    centers = semantic_centers(
        images,
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([0.6, 0.9, 0.5, 0.8]),
        nouns,
        n_clusters=3,
        n_confident=1,
    )
    # Of the first cluster's images the second is more sure; the last cluster is empty.
    assert centers.argmax(dim=1).tolist() == [1, 2, 0]
    torch.testing.assert_close(centers.norm(dim=1), torch.tensor([1.0, 1.0, 0.0]))


def grouped_rows() -> tuple[TrainingRows, Tensor]:
    """Images in K groups, neighbors of the group, and nouns about each group's direction."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randn(K, WIDTH, generator=generator)
    noise = torch.randn(N, WIDTH, generator=generator) / 2
    images = functional.normalize(groups[torch.arange(N) % K] + noise, dim=1)
    mates = torch.stack([torch.roll(torch.arange(N), -K * (i + 1)) for i in range(4)], dim=1)
    spread = torch.randn(8 * K, WIDTH, generator=generator) / 4
    nouns = functional.normalize(groups.repeat(8, 1) + spread, dim=1)
    return TrainingRows(images=images.half(), image_neighbors=mates.int()), nouns


@pytest.mark.parametrize("objective", ["scan", "sic"])
def test_a_head_without_text_finds_the_groups(objective: str):
    rows, nouns = grouped_rows()
    heads = SicHead(WIDTH, K, nouns) if objective == "sic" else ImageHead(WIDTH, K)
    loss = SicLoss(balance_weight=5.0) if objective == "sic" else ScanLoss(balance_weight=5.0)
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    sizes = ClusterSizes(N, K, torch.device("cpu"))
    metrics = []
    for epoch in range(12):
        if epoch and isinstance(heads, SicHead):
            heads.move_centers(rows.images)
        batches = rows.batches(
            batch_size=15, seed=0, epoch=epoch, rank=0, n_workers=1, device=torch.device("cpu")
        )
        metrics.append(train_epoch(heads, optimizer, loss, batches, sizes, products=torch.float32))
    assert metrics[-1]["loss"] < metrics[1]["loss"]
    if objective == "sic":
        assert metrics[0]["semantic"] == 0 < metrics[1]["semantic"]
        assert heads.training
    clusters = heads.eval().image(rows.images.float()).argmax(dim=1)
    assert all(len(set(clusters[group::K].tolist())) == 1 for group in range(K))
    assert len(set(clusters.tolist())) == K
    assert set(heads.state_dict()) == set(ImageHead(WIDTH, K).state_dict())
