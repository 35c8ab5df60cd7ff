"""The losses of Eq. 11-17, published and paper forms, against plain formulas in float64."""

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from tac_ray.algorithm.losses import (
    ConfidenceForm,
    DistillationForm,
    TacLoss,
    agreement,
    balance_entropy,
    confidence_loss,
    distillation_loss,
    gram,
)

DISTILLATION_FORMS = get_args(DistillationForm)
CONFIDENCE_FORMS = get_args(ConfidenceForm)
Matrix = list[list[float]]


def random_probs(n: int, k: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(n, k, generator=generator, dtype=torch.float64), dim=1)


def columns(matrix: Matrix) -> Matrix:
    return [list(column) for column in zip(*matrix, strict=True)]


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def confidence(p: Tensor, q: Tensor, form: ConfidenceForm) -> Tensor:
    return confidence_loss(agreement(p, q, form=form), torch.tensor(len(p)), form=form)


def balance(p: Tensor, q: Tensor) -> Tensor:
    return balance_entropy(torch.cat([p, q], dim=1).mean(dim=0))


def plain_distillation(p: Matrix, q: Matrix, temperature: float, form: str) -> float:
    ours, theirs = columns(p), columns(q)
    k = len(ours)
    if form == "paper":
        return sum(
            -math.log(
                math.exp(cosine(ours[i], theirs[i]) / temperature)
                / sum(math.exp(cosine(ours[i], theirs[j]) / temperature) for j in range(k))
            )
            for i in range(k)
        )
    every = ours + theirs
    total = 0.0
    for i in range(2 * k):
        positive = math.exp(cosine(every[i], every[(i + k) % (2 * k)]) / temperature)
        others = sum(
            math.exp(cosine(every[i], every[j]) / temperature) for j in range(2 * k) if j != i
        )
        total -= math.log(positive / others)
    return total / (2 * k)


def plain_confidence(p: Matrix, q: Matrix, form: str) -> float:
    dots = [sum(a * b for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
    if form == "paper":
        return -math.log(sum(dots))
    return sum(-math.log(dot) for dot in dots) / len(dots)


def plain_balance(p: Matrix, q: Matrix) -> float:
    means = [sum(column) / len(column) for column in columns(p) + columns(q)]
    return -sum(mean * math.log(mean) for mean in means)


@pytest.mark.parametrize("form", DISTILLATION_FORMS)
@pytest.mark.parametrize("temperature", [0.5, 5.0])
@pytest.mark.parametrize("k", [2, 7])
def test_distillation_matches_the_plain_formula(form: DistillationForm, temperature: float, k: int):
    p, q = random_probs(11, k, seed=0), random_probs(11, k, seed=1)
    loss = distillation_loss(gram(p, q), temperature=temperature, form=form)
    expected = plain_distillation(p.tolist(), q.tolist(), temperature, form)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", CONFIDENCE_FORMS)
def test_confidence_matches_the_plain_formula(form: ConfidenceForm):
    p, q = random_probs(11, 7, seed=2), random_probs(11, 7, seed=3)
    loss = confidence(p, q, form)
    expected = plain_confidence(p.tolist(), q.tolist(), form)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_balance_matches_the_plain_formula():
    p, q = random_probs(11, 7, seed=4), random_probs(11, 7, seed=5)
    expected = plain_balance(p.tolist(), q.tolist())
    assert balance(p, q).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("distillation_form", DISTILLATION_FORMS)
@pytest.mark.parametrize("confidence_form", CONFIDENCE_FORMS)
def test_total_pairs_each_modality_with_the_neighbors_of_the_other(
    distillation_form: DistillationForm, confidence_form: ConfidenceForm
):
    p, q, p_neighbor, q_neighbor = (random_probs(11, 4, seed=seed) for seed in range(6, 10))
    terms = TacLoss(
        temperature=0.7,
        balance_weight=3.0,
        distillation_form=distillation_form,
        confidence_form=confidence_form,
    )(p, q, p_neighbor, q_neighbor)
    plain = [matrix.tolist() for matrix in (p, q, p_neighbor, q_neighbor)]
    distillation = plain_distillation(plain[0], plain[3], 0.7, distillation_form)
    distillation += plain_distillation(plain[1], plain[2], 0.7, distillation_form)
    sureness = plain_confidence(plain[0], plain[1], confidence_form)
    entropy = plain_balance(plain[0], plain[1])
    found = {name: value.item() for name, value in terms.items()}
    assert found == pytest.approx(
        {
            "loss": distillation + sureness - 3 * entropy,
            "distillation": distillation,
            "confidence": sureness,
            "balance": entropy,
        },
        rel=1e-12,
    )


def test_losses_of_two_rows_and_two_clusters_by_hand():
    # Every row is sure and everything agrees. Published: each of four columns has one positive at
    # cosine 1 and two negatives at 0. Paper: two columns with one negative each.
    one_hot = torch.eye(2, dtype=torch.float64)
    published = TacLoss(temperature=1.0, balance_weight=5.0)(one_hot, one_hot, one_hot, one_hot)
    assert published["distillation"].item() == pytest.approx(2 * (math.log(math.e + 2) - 1))
    assert published["confidence"].item() == pytest.approx(0, abs=1e-15)
    assert published["balance"].item() == pytest.approx(2 * math.log(2))
    assert published["loss"].item() == pytest.approx(
        2 * (math.log(math.e + 2) - 1) - 10 * math.log(2)
    )
    paper = TacLoss(
        temperature=1.0, balance_weight=5.0, distillation_form="paper", confidence_form="paper"
    )(one_hot, one_hot, one_hot, one_hot)
    assert paper["distillation"].item() == pytest.approx(4 * (math.log(math.e + 1) - 1))
    assert paper["confidence"].item() == pytest.approx(-math.log(2))


def test_losses_of_two_unsure_rows_by_hand():
    # p . q is 3/8 in both rows. Columns of p: (3, 1) and (1, 3) with cosine 6/10, and q is p with
    # its clusters swapped, so a positive has cosine 0.6 and the wrong cluster 1.
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    q = p.flip(1)
    published = distillation_loss(gram(p, q), temperature=0.5, form="published")
    others = math.log(2 * math.exp(1.2) + math.exp(2))
    assert published.item() == pytest.approx(others - 1.2)
    paper = distillation_loss(gram(p, q), temperature=0.5, form="paper")
    assert paper.item() == pytest.approx(2 * (math.log(math.exp(1.2) + math.exp(2)) - 1.2))
    assert confidence(p, q, "published").item() == pytest.approx(math.log(8 / 3))
    assert confidence(p, q, "paper").item() == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("distillation_form", DISTILLATION_FORMS)
@pytest.mark.parametrize("confidence_form", CONFIDENCE_FORMS)
def test_gradients_are_those_of_the_losses(
    distillation_form: DistillationForm, confidence_form: ConfidenceForm
):
    loss = TacLoss(
        temperature=0.5,
        balance_weight=5.0,
        distillation_form=distillation_form,
        confidence_form=confidence_form,
    )
    probs = [random_probs(4, 3, seed=seed).requires_grad_() for seed in range(4)]
    assert torch.autograd.gradcheck(lambda *rows: loss(*rows)["loss"], probs)


def test_weights_leave_terms_out():
    probs = [random_probs(4, 3, seed=seed) for seed in range(4)]
    terms = TacLoss(temperature=0.5, balance_weight=5.0)(*probs)
    weighted = TacLoss(
        temperature=0.5, balance_weight=0.0, distillation_weight=0.0, confidence_weight=2.0
    )
    assert weighted(*probs)["loss"] == 2 * terms["confidence"]


def test_balance_is_largest_for_even_clusters():
    even = torch.full((6, 4), 0.25, dtype=torch.float64)
    assert balance(even, even).item() == pytest.approx(2 * math.log(4))
    assert balance(random_probs(6, 4, seed=0), even).item() < 2 * math.log(4)


def test_balance_clamps_the_mean_probability_of_a_cluster_nobody_chose():
    probs = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(5, 1)
    expected = -2 * 1e-9 * math.log(1e-9)
    assert balance(probs, probs).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distillation_form", DISTILLATION_FORMS)
@pytest.mark.parametrize("confidence_form", CONFIDENCE_FORMS)
def test_sure_and_contrary_float32_rows_give_finite_losses_and_gradients(
    distillation_form: DistillationForm, confidence_form: ConfidenceForm
):
    # Cluster 2 is chosen by nobody, its probabilities are 0, and p and q have nothing in common.
    p = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    q = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    loss = TacLoss(
        temperature=0.5,
        balance_weight=5.0,
        distillation_form=distillation_form,
        confidence_form=confidence_form,
    )
    terms = loss(p, q, p, q)
    terms["loss"].backward()
    assert all(term.isfinite() for term in terms.values())
    for matrix in (p, q):
        assert matrix.grad is not None
        assert matrix.grad.isfinite().all()
