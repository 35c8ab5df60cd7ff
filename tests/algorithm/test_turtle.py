"""Clusters that linear maps can tell apart in two spaces."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tac_ray.algorithm.turtle import LinearHead, fit_linear_heads, mean_probs, turtle_loss

N_CLUSTERS, PER_CLUSTER, WIDTH = 4, 50, 16


def blobs(*, seed: int, noise: float = 0.1) -> Tensor:
    """Unit rows around four directions, in order."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(N_CLUSTERS, WIDTH, generator=generator)
    rows = F.normalize(directions, dim=1).repeat_interleave(PER_CLUSTER, dim=0)
    return F.normalize(rows + noise * torch.randn(rows.shape, generator=generator), dim=1)


def fit(spaces: list[Tensor], seed: int = 0, steps: int = 60) -> tuple[list[LinearHead], Tensor]:
    heads = fit_linear_heads(
        spaces, N_CLUSTERS, seed=seed, steps=steps, batch_size=100, learner_learning_rate=0.03
    )
    with torch.no_grad():
        return heads, mean_probs(heads, spaces)


def test_clusters_that_lie_apart_are_found():
    _, probs = fit([blobs(seed=0), blobs(seed=1)])
    found = probs.argmax(dim=1).view(N_CLUSTERS, PER_CLUSTER)
    assert (found == found[:, :1]).all()
    assert sorted(found[:, 0].tolist()) == [0, 1, 2, 3]


def test_the_same_seed_gives_the_same_clusters_and_another_seed_others():
    spaces = [blobs(seed=0), blobs(seed=1)]
    torch.manual_seed(5)
    first = fit(spaces, steps=5)[1]
    torch.manual_seed(6)
    assert torch.equal(fit(spaces, steps=5)[1], first)
    assert not torch.allclose(fit(spaces, seed=1, steps=5)[1], first)


def test_loss_matches_the_plain_formula():
    generator = torch.Generator().manual_seed(4)
    draws = torch.randn(2, 2, 5, 3, generator=generator, dtype=torch.float64)
    probs, scores = torch.softmax(draws[0], dim=2), draws[1]
    expected = 0.0
    for space in range(2):
        for row in range(5):
            exps = [math.exp(x) for x in scores[space, row].tolist()]
            for j, value in enumerate(exps):
                agreed = float(probs[0, row, j] + probs[1, row, j]) / 2
                expected -= agreed * math.log(value / sum(exps)) / 5
        sizes = [sum(probs[space, :, j].tolist()) / 5 for j in range(3)]
        expected += 10 * sum(size * math.log(size) for size in sizes)
    found = turtle_loss(list(probs), list(scores), balance_weight=10)
    assert found.item() == pytest.approx(expected, abs=1e-10)


def test_a_head_is_the_softmax_of_a_weight_normed_map():
    head = LinearHead(
        torch.full((WIDTH,), 0.01), N_CLUSTERS, generator=torch.Generator().manual_seed(0)
    )
    rows = blobs(seed=3)[:7]
    weight, bias = head.linear.weight.double(), head.linear.bias.double()
    plain = torch.softmax((rows.double() - 0.01) * WIDTH**0.5 @ weight.T + bias, dim=1)
    torch.testing.assert_close(head(rows).double(), plain, atol=1e-6, rtol=0)
    with torch.no_grad():
        length = head.linear.parametrizations.weight.original0  # type: ignore[union-attr]
        length *= 2
    torch.testing.assert_close(head.linear.weight.double(), 2 * weight)


def test_new_images_are_assigned_by_the_mean_of_the_spaces():
    spaces = [blobs(seed=0), blobs(seed=1)]
    heads, _ = fit(spaces, steps=3)
    some = [space[5:9] for space in spaces]
    expected = (heads[0](some[0]) + heads[1](some[1])) / 2
    torch.testing.assert_close(mean_probs(heads, some), expected)


@pytest.mark.parametrize("batch_size", [7, 10_000])
def test_a_batch_is_at_most_all_rows(batch_size: int):
    heads = fit_linear_heads(
        [blobs(seed=0)], N_CLUSTERS, seed=0, steps=2, batch_size=batch_size, learner_steps=1
    )
    assert torch.isfinite(mean_probs(heads, [blobs(seed=0)])).all()
