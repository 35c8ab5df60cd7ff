"""Cluster heads: their parts, their start, and their batch statistics."""

import copy

import pytest
import torch
from torch import Tensor, nn

from tac_ray.algorithm.head import ClusterHead, TacHeads

WIDTH, K = 16, 5


def make_head(width: int = WIDTH, n_clusters: int = K, *, seed: int = 0) -> ClusterHead:
    return ClusterHead(width, n_clusters, generator=torch.Generator().manual_seed(seed))


def embeddings(n: int, *, seed: int, width: int = WIDTH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64)


def plain_head(head: ClusterHead) -> nn.Sequential:
    plain = nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        nn.BatchNorm1d(WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, K),
        nn.Softmax(dim=1),
    )
    plain.load_state_dict(head.state_dict())
    return plain.double()


def test_a_head_is_linear_batch_norm_relu_linear_softmax():
    head = make_head()
    kinds = (nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.Softmax)
    assert len(head) == 5
    assert all(isinstance(layer, kind) for layer, kind in zip(head, kinds, strict=True))
    assert {name: tuple(value.shape) for name, value in head.named_parameters()} == {
        "0.weight": (WIDTH, WIDTH),
        "0.bias": (WIDTH,),
        "1.weight": (WIDTH,),
        "1.bias": (WIDTH,),
        "3.weight": (K, WIDTH),
        "3.bias": (K,),
    }


def test_weights_start_truncated_normal_with_standard_deviation_two_hundredths():
    head = make_head(128, 100)
    for linear in (head[0], head[3]):
        weight = linear.weight.detach()
        assert weight.abs().max() <= 2
        assert weight.mean().item() == pytest.approx(0, abs=1e-3)
        assert weight.std().item() == pytest.approx(0.02, rel=0.04)
        # A normal, not a uniform of the same spread: 0.683 within one deviation, 0.954 in two.
        within = [(weight.abs() < n * 0.02).double().mean().item() for n in (1, 2)]
        assert within == pytest.approx([0.683, 0.954], abs=0.015)


def test_biases_start_uniform_within_the_root_of_the_width():
    head = make_head(400, 600)
    for linear in (head[0], head[3]):
        bias = linear.bias.detach()
        assert bias.abs().max() <= 0.05
        assert bias.abs().max() > 0.045
        assert bias.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.12)


def test_heads_are_set_by_the_seed_alone():
    torch.manual_seed(1)
    first = TacHeads(WIDTH, K, seed=3).state_dict()
    torch.manual_seed(2)
    again = TacHeads(WIDTH, K, seed=3).state_dict()
    other = TacHeads(WIDTH, K, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [name for name in first if ".0." in name or ".3." in name]
    assert len(drawn) == 8
    assert not any(torch.equal(first[name], other[name]) for name in drawn)


def test_image_head_and_text_head_start_apart():
    state = TacHeads(WIDTH, K, seed=0).state_dict()
    for name in ("0.weight", "0.bias", "3.weight", "3.bias"):
        assert not torch.equal(state[f"image.{name}"], state[f"text.{name}"])


@pytest.mark.parametrize("training", [True, False])
def test_probabilities_sum_to_one(training: bool):
    probs = make_head().double().train(training)(embeddings(11, seed=0) * 30)
    assert probs.shape == (11, K)
    assert (probs >= 0).all()
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(11, dtype=torch.float64))


def test_alone_a_head_trains_as_torchs_own_layers_do():
    head = make_head().double()
    plain = plain_head(head)
    for step in range(3):
        batch, weight = embeddings(9, seed=step) * 3 + 1, embeddings(9, seed=step + 50, width=K)
        for model in (head, plain):
            model.zero_grad()
            (model(batch) * weight).sum().backward()
        torch.testing.assert_close(head(batch), plain(batch), rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(head.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(head.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_training_uses_the_statistics_of_the_batch():
    head = make_head().double()
    batch = embeddings(9, seed=0)
    hidden = head[0](batch)
    mean, variance = hidden.mean(dim=0), hidden.var(dim=0, correction=0)
    expected = ((hidden - mean) / (variance + 1e-5).sqrt()).relu()
    expected = torch.softmax(head[3](expected), dim=1)
    torch.testing.assert_close(head(batch), expected, rtol=1e-10, atol=1e-12)
    # Running statistics step a tenth of the way from 0 and 1; the variance is the unbiased one.
    torch.testing.assert_close(head[1].running_mean, 0.1 * mean)
    torch.testing.assert_close(head[1].running_var, 0.9 + 0.1 * variance * 9 / 8)


def test_evaluation_uses_running_statistics_and_does_not_move_them():
    head = make_head().double()
    for step in range(3):
        head(embeddings(9, seed=step) * 2 + 1)
    head.eval()
    before = copy.deepcopy(head.state_dict())
    batch = embeddings(6, seed=9)
    hidden = (head[0](batch) - head[1].running_mean) / (head[1].running_var + 1e-5).sqrt()
    expected = torch.softmax(head[3](hidden.relu()), dim=1)
    torch.testing.assert_close(head(batch), expected, rtol=1e-10, atol=1e-12)
    # A row alone gets the same answer as among others.
    torch.testing.assert_close(head(batch[2:3]), expected[2:3], rtol=1e-10, atol=1e-12)
    assert all(torch.equal(before[name], value) for name, value in head.state_dict().items())


def test_anchors_and_neighbors_pass_separately_through_the_head_of_their_modality():
    heads = TacHeads(WIDTH, K, seed=0).double()
    apart = copy.deepcopy(heads)
    batches = [embeddings(8, seed=seed) + seed for seed in range(4)]
    image, text, neighbor_image, neighbor_text = batches
    side_by_side = torch.stack([image, neighbor_image], 1), torch.stack([text, neighbor_text], 1)
    probs = heads(*side_by_side)
    expected = (
        apart.image(image),
        apart.text(text),
        apart.image(neighbor_image),
        apart.text(neighbor_text),
    )
    for ours, theirs in zip(probs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    together = copy.deepcopy(apart).image(torch.cat([image, neighbor_image]))[:8]
    assert not torch.allclose(probs[0], together, rtol=1e-2)
    assert heads.image[1].num_batches_tracked == heads.text[1].num_batches_tracked == 2
