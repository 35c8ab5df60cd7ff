"""Eq. 7 and 8: images in words."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tac_ray.algorithm.counterparts import text_counterparts


def unit_rows(n: int, d: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def plain_counterpart(
    image: list[float], nouns: list[list[float]], temperature: float
) -> tuple[list[float], list[float]]:
    logits = [sum(a * b for a, b in zip(image, noun, strict=True)) / temperature for noun in nouns]
    exps = [math.exp(logit - max(logits)) for logit in logits]
    weights = [value / sum(exps) for value in exps]
    mixed = [
        sum(weight * noun[axis] for weight, noun in zip(weights, nouns, strict=True))
        for axis in range(len(image))
    ]
    norm = math.sqrt(sum(x * x for x in mixed))
    return [x / norm for x in mixed], weights


def test_counterpart_of_two_nouns_by_hand():
    # Similarities 1 and 0 at temperature 1: weights e / (e + 1) and 1 / (e + 1).
    found = text_counterparts(torch.tensor([[0.0, 1.0]]), torch.eye(2), temperature=1.0)
    norm = math.hypot(math.e, 1)
    assert found.embedding.tolist()[0] == pytest.approx([1 / norm, math.e / norm], abs=1e-6)
    assert found.noun_row.tolist() == [[1, 0]]
    expected = [math.e / (math.e + 1), 1 / (math.e + 1)]
    assert found.weight.tolist()[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.005, 0.1])
def test_counterparts_match_the_plain_formula(temperature: float):
    images, nouns = unit_rows(12, 16, seed=0), unit_rows(20, 16, seed=1)
    found = text_counterparts(images, nouns, temperature=temperature, n_strongest=4)
    assert found.embedding.dtype == torch.float32
    assert found.noun_row.shape == found.weight.shape == (12, 4)
    for row, image in enumerate(images.tolist()):
        embedding, weights = plain_counterpart(image, nouns.tolist(), temperature)
        assert found.embedding[row].tolist() == pytest.approx(embedding, abs=1e-4)
        strongest = sorted(range(20), key=lambda j: -weights[j])[:4]
        assert found.noun_row[row].tolist() == strongest
        assert found.weight[row].tolist() == pytest.approx(
            [weights[j] for j in strongest], abs=1e-4
        )


def test_counterparts_have_unit_norm():
    found = text_counterparts(unit_rows(9, 8, seed=2), unit_rows(30, 8, seed=3), temperature=0.05)
    torch.testing.assert_close(found.embedding.norm(dim=1), torch.ones(9))


def test_no_more_strongest_nouns_than_there_are_nouns():
    found = text_counterparts(
        unit_rows(3, 8, seed=4), unit_rows(2, 8, seed=5), temperature=0.5, n_strongest=3
    )
    assert found.noun_row.shape == found.weight.shape == (3, 2)
    torch.testing.assert_close(found.weight.sum(dim=1), torch.ones(3))


def test_float16_does_not_see_differences_below_its_precision_and_float32_does():
    image = torch.tensor([[1.0, 0.0, 0.0]])
    nouns = torch.tensor([[0.3, 0.8, 0.0], [0.3 + 5e-5, 0.0, 0.8]])
    rounded = text_counterparts(image, nouns, temperature=0.005, precision="float16")
    assert rounded.weight.tolist() == [[0.5, 0.5]]
    exact = text_counterparts(image, nouns, temperature=0.005)
    assert exact.noun_row.tolist() == [[1, 0]]
    odds = math.exp(5e-5 / 0.005)
    expected = [odds / (odds + 1), 1 / (odds + 1)]
    assert exact.weight.tolist()[0] == pytest.approx(expected, abs=2e-5)


def test_float16_rounds_the_result_and_stays_near_the_formula():
    images, nouns = unit_rows(10, 16, seed=6), unit_rows(20, 16, seed=7)
    found = text_counterparts(images, nouns, temperature=0.1, precision="float16")
    assert found.embedding.dtype == found.weight.dtype == torch.float32
    assert torch.equal(found.embedding, found.embedding.half().float())
    for row, image in enumerate(images.tolist()):
        embedding, _ = plain_counterpart(image, nouns.tolist(), 0.1)
        assert found.embedding[row].tolist() == pytest.approx(embedding, abs=1e-2)
