"""Rows of a step: a permutation cut into batches, set by seed and epoch."""

import pytest
import torch

from tac_ray.algorithm.sampling import epoch_neighbors, epoch_rows


@pytest.mark.parametrize(
    ("n_rows", "batch_size", "n_steps"), [(103, 10, 10), (40, 8, 5), (7, 7, 1)]
)
def test_an_epoch_sees_rows_once_in_full_batches(n_rows: int, batch_size: int, n_steps: int):
    rows = epoch_rows(n_rows, batch_size=batch_size, seed=0, epoch=0)
    assert rows.shape == (n_steps, batch_size)
    assert rows.dtype == torch.int64
    seen = rows.flatten().tolist()
    assert len(set(seen)) == n_steps * batch_size
    assert set(seen) <= set(range(n_rows))


def test_a_batch_larger_than_the_collection_makes_no_step():
    assert epoch_rows(5, batch_size=8, seed=0, epoch=0).shape == (0, 8)


def test_rows_are_shuffled_and_not_the_same_ones_are_dropped():
    epochs = [epoch_rows(50, batch_size=8, seed=0, epoch=epoch) for epoch in range(20)]
    assert epochs[0].flatten().tolist() != sorted(epochs[0].flatten().tolist())
    dropped = [set(range(50)) - set(rows.flatten().tolist()) for rows in epochs]
    assert all(len(rows) == 2 for rows in dropped)
    assert len(set().union(*dropped)) > 10


def test_order_depends_on_seed_and_epoch_only():
    def order(seed: int, epoch: int) -> list[int]:
        return epoch_rows(200, batch_size=20, seed=seed, epoch=epoch).flatten().tolist()

    first = order(1, 2)
    torch.rand(3)  # the global generator plays no part
    assert first == order(1, 2)
    orders = [tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_order_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    epoch_rows(20, batch_size=4, seed=5, epoch=6)
    epoch_neighbors(20, 4, seed=5, epoch=6)
    assert torch.equal(torch.rand(2), expected)


def test_neighbors_are_drawn_evenly_for_images_and_for_texts_apart():
    drawn = epoch_neighbors(4000, 5, seed=0, epoch=0)
    assert drawn.shape == (2, 4000)
    assert drawn.dtype == torch.int64
    for modality in drawn:
        share = torch.bincount(modality, minlength=5) / 4000
        assert len(share) == 5
        assert share.tolist() == pytest.approx([0.2] * 5, abs=0.04)
    # Two draws that know nothing of each other agree in one case of five.
    assert (drawn[0] == drawn[1]).double().mean().item() == pytest.approx(0.2, abs=0.04)


def test_neighbors_depend_on_seed_and_epoch_only():
    first = epoch_neighbors(100, 50, seed=1, epoch=2)
    assert torch.equal(first, epoch_neighbors(100, 50, seed=1, epoch=2))
    draws = [
        tuple(epoch_neighbors(100, 50, seed=seed, epoch=epoch).flatten().tolist())
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(draws)) == 16
