"""Prices that turn a softmax into a transport plan."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tac_ray.algorithm import transport
from tac_ray.algorithm.transport import transport_prices, transport_scores


def unit_rows(n: int, d: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def demand(rows: Tensor, columns: Tensor, prices: Tensor, temperature: float) -> Tensor:
    return torch.softmax((rows @ columns.T - prices) / temperature, dim=1).mean(dim=0)


def plain_prices(
    rows: Tensor, columns: Tensor, mass: list[float], temperature: float
) -> list[float]:
    """Sinkhorn by scaling rows and columns of the kernel in turn, in float64 without logarithms."""
    kernel = torch.exp(rows.double() @ columns.double().T / temperature).tolist()
    scale = [1.0] * len(mass)
    for _ in range(2000):
        of_row = [1 / sum(k * s for k, s in zip(line, scale, strict=True)) for line in kernel]
        scale = [
            mass[j] * len(kernel) / sum(kernel[i][j] * of_row[i] for i in range(len(kernel)))
            for j in range(len(mass))
        ]
    prices = [-temperature * math.log(s) for s in scale]
    return [price - sum(prices) / len(prices) for price in prices]


def test_prices_match_sinkhorn_without_logarithms():
    rows, columns = unit_rows(30, 6, seed=0), unit_rows(4, 6, seed=1)
    mass = [0.1, 0.4, 0.3, 0.2]
    found = transport_prices(rows, columns, torch.tensor(mass), temperature=0.2, sweeps=200)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(plain_prices(rows, columns, mass, 0.2), abs=1e-5)


def test_each_column_is_in_demand_for_its_mass():
    rows, columns = unit_rows(200, 8, seed=2), unit_rows(10, 8, seed=3)
    mass = torch.arange(1, 11) / 55.0
    prices = transport_prices(rows, columns, 7 * mass, temperature=0.1, sweeps=100)
    found = demand(rows, columns, prices.double(), 0.1)
    torch.testing.assert_close(found, mass.double(), atol=1e-4, rtol=0)
    assert prices.mean().item() == pytest.approx(0, abs=1e-6)


def test_a_column_near_everything_no_longer_takes_everything():
    rows = F.normalize(torch.tensor([[1.0, 0.3], [1.0, -0.3], [1.0, 0.2], [1.0, -0.2]]), dim=1)
    columns = F.normalize(torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]]), dim=1)
    mass = torch.tensor([0.0001, 0.5, 0.5])
    assert (rows @ columns.T).argmax(dim=1).tolist() == [0, 0, 0, 0]
    prices = transport_prices(rows, columns, mass, temperature=0.02, sweeps=100)
    assert (rows @ columns.T - prices).argmax(dim=1).tolist() == [1, 2, 1, 2]


def test_small_temperatures_neither_overflow_nor_vanish():
    rows, columns = unit_rows(50, 8, seed=4), unit_rows(6, 8, seed=5)
    prices = transport_prices(rows, columns, torch.ones(6), temperature=1e-4)
    assert prices.isfinite().all()


def test_prices_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch):
    rows, columns = unit_rows(50, 8, seed=6), unit_rows(6, 8, seed=7)
    whole = transport_prices(rows, columns, torch.ones(6), temperature=0.1)
    monkeypatch.setattr(transport, "BATCH_ROWS", 7)
    batched = transport_prices(rows, columns, torch.ones(6), temperature=0.1)
    torch.testing.assert_close(whole, batched, atol=1e-6, rtol=0)


def test_prices_of_many_rows_are_those_of_evenly_spaced_ones(monkeypatch: pytest.MonkeyPatch):
    rows, columns = unit_rows(60, 8, seed=8), unit_rows(6, 8, seed=9)
    expected = transport_prices(rows[::3], columns, torch.ones(6), temperature=0.1)
    monkeypatch.setattr(transport, "MOST_ROWS", 20)
    assert torch.equal(transport_prices(rows, columns, torch.ones(6), temperature=0.1), expected)


def test_scores_are_the_plan_of_a_noun():
    nouns, centroids = unit_rows(40, 6, seed=10), unit_rows(4, 6, seed=11)
    prices = transport_prices(nouns, centroids, torch.ones(4), temperature=0.1)
    centroid_id, score = transport_scores(nouns, centroids, prices, temperature=0.1)
    assert score.dtype == torch.float32
    for row, noun in enumerate(nouns):
        exps = [
            math.exp((float(noun @ centroid) - price) / 0.1)
            for centroid, price in zip(centroids, prices.tolist(), strict=True)
        ]
        assert centroid_id[row] == max(range(4), key=exps.__getitem__)
        assert score[row].item() == pytest.approx(max(exps) / sum(exps), abs=1e-5)


def test_no_centroid_draws_all_nouns():
    # All nouns lie nearest to the first centroid, half of them on either side of it.
    nouns = F.normalize(torch.tensor([[1.0, 0.1 + 0.01 * i] for i in range(10)]), dim=1)
    nouns = torch.cat([nouns, nouns * torch.tensor([1.0, -1.0])])
    centroids = F.normalize(torch.tensor([[1.0, 0.0], [0.5, 0.8], [0.5, -0.8]]), dim=1)
    assert (nouns @ centroids.T).argmax(dim=1).tolist() == [0] * 20
    prices = transport_prices(nouns, centroids, torch.tensor([2, 9, 9]), temperature=0.05)
    centroid_id, _ = transport_scores(nouns, centroids, prices, temperature=0.05)
    counts = torch.bincount(centroid_id, minlength=3)
    assert counts[1] >= 7
    assert counts[2] >= 7
