"""Weights of edges from looks and words."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tac_ray.algorithm import affinity
from tac_ray.algorithm.affinity import semantic_overlap


def unit_rows(n: int, d: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def some_neighbors(n: int, m: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator)[:m] for _ in range(n)]).int()


def plain_weight(one: list[float], other: list[float], nouns: list[list[float]], t: float) -> float:
    def dot(x: list[float], y: list[float]) -> float:
        return sum(a * b for a, b in zip(x, y, strict=True))

    def probs(image: list[float]) -> list[float]:
        exps = [math.exp(dot(image, noun) / t) for noun in nouns]
        return [value / sum(exps) for value in exps]

    return max(dot(one, other), 0) * dot(probs(one), probs(other))


def test_weights_match_the_plain_formula():
    images, nouns = unit_rows(12, 6, seed=0), unit_rows(9, 6, seed=1)
    neighbors = some_neighbors(12, 4, seed=2)
    found = semantic_overlap(images, nouns, neighbors, temperature=0.3)
    assert found.dtype == torch.float32
    assert found.shape == (12, 4)
    assert (found == 0).any()
    for i, line in enumerate(neighbors.tolist()):
        for column, j in enumerate(line):
            expected = plain_weight(images[i].tolist(), images[j].tolist(), nouns.tolist(), 0.3)
            assert found[i, column].item() == pytest.approx(expected, abs=1e-6)


def test_images_alike_that_mean_other_nouns_come_apart():
    images = F.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.12], [1.0, -0.1]]), dim=1)
    nouns = torch.tensor([[0.0, 1.0], [0.0, -1.0]])
    neighbors = torch.tensor([[1, 2], [0, 2], [0, 1]])
    found = semantic_overlap(images, nouns, neighbors, temperature=0.02)
    assert (images @ images.T).min() > 0.97
    assert found[0, 0] > 0.99
    assert found[0, 1] < 0.01


def test_an_edge_weighs_the_same_from_both_ends():
    images, nouns = unit_rows(10, 5, seed=3), unit_rows(40, 5, seed=4)
    neighbors = torch.tensor([[(i + 1) % 10, (i - 1) % 10] for i in range(10)])
    found = semantic_overlap(images, nouns, neighbors, temperature=0.05, n_strongest=3)
    torch.testing.assert_close(found[:, 0], found.roll(-1, dims=0)[:, 1])


def test_few_strong_nouns_hold_nearly_all_of_the_overlap():
    images, nouns = unit_rows(30, 16, seed=5), unit_rows(300, 16, seed=6)
    neighbors = some_neighbors(30, 5, seed=7)
    exact = semantic_overlap(images, nouns, neighbors, temperature=0.02, n_strongest=300)
    kept = semantic_overlap(images, nouns, neighbors, temperature=0.02)
    assert (kept <= exact + 1e-6).all()
    assert (exact - kept).max() < 1e-3


def test_weights_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch):
    images, nouns = unit_rows(23, 8, seed=8), unit_rows(50, 8, seed=9)
    neighbors = some_neighbors(23, 6, seed=10)
    whole = semantic_overlap(images, nouns, neighbors, temperature=0.05)
    monkeypatch.setattr(affinity, "BATCH_ROWS", 5)
    torch.testing.assert_close(whole, semantic_overlap(images, nouns, neighbors, temperature=0.05))
