"""Eq. 2 and Eq. 4-6: how many centroids, whose nouns, and which are kept."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tac_ray.algorithm.nouns import (
    classify_nouns,
    gradient_scores,
    mean_over_templates,
    n_semantic_centroids,
    top_nouns_per_centroid,
)


def unit_rows(n: int, d: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)


def plain_classify(nouns: Tensor, centroids: Tensor) -> tuple[list[int], list[float]]:
    ids, confidences = [], []
    for noun in nouns.tolist():
        exps = [
            math.exp(sum(a * b for a, b in zip(noun, centroid, strict=True)))
            for centroid in centroids.tolist()
        ]
        best = max(range(len(exps)), key=exps.__getitem__)
        ids.append(best)
        confidences.append(exps[best] / sum(exps))
    return ids, confidences


@pytest.mark.parametrize(
    ("n_images", "n_clusters", "expected"),
    [
        (60_000, 10, 200),  # N / 300 is larger
        (5_000, 10, 30),  # 3 K is larger
        (9_000, 10, 30),  # both the same
        (19_500, 15, 65),
        (3_000_000, 10, 10_000),
        (6_000_000, 10, 20_000),
        (100_000_000, 500, 20_000),  # capped by max_centroids
        (1_000_000, 9_000, 20_000),  # 3 K capped as well
        (20, 10, 20),  # capped by N
    ],
)
def test_n_semantic_centroids_is_the_larger_of_both_terms_up_to_the_caps(
    n_images: int, n_clusters: int, expected: int
):
    assert n_semantic_centroids(n_images, n_clusters) == expected


@pytest.mark.parametrize("n_images", [13_000, 50_000, 1_281_167])
def test_n_semantic_centroids_is_within_one_of_the_real_quotient(n_images: int):
    assert abs(n_semantic_centroids(n_images, 10) - n_images / 300) < 1


def test_n_semantic_centroids_follows_its_options():
    assert n_semantic_centroids(1000, 10, images_per_centroid=10) == 100
    assert n_semantic_centroids(1000, 10, centroids_per_cluster=7) == 70
    assert n_semantic_centroids(1000, 10, images_per_centroid=10, max_centroids=40) == 40


def test_classify_nouns_is_the_argmax_and_maximum_of_the_softmax_over_centroids():
    nouns, centroids = unit_rows(60, 16, seed=0), unit_rows(9, 16, seed=1)
    centroid_id, confidence = classify_nouns(nouns, centroids)
    ids, confidences = plain_classify(nouns, centroids)
    assert centroid_id.dtype == torch.int64
    assert confidence.dtype == torch.float32
    assert centroid_id.tolist() == ids
    torch.testing.assert_close(
        confidence.double(), torch.tensor(confidences, dtype=torch.float64), rtol=2e-6, atol=0
    )


def test_classify_nouns_gives_every_noun_the_same_answer_in_any_batch():
    nouns, centroids = unit_rows(40, 16, seed=2), unit_rows(7, 16, seed=3)
    whole = classify_nouns(nouns, centroids)
    parts = [classify_nouns(batch, centroids) for batch in nouns.split(11)]
    assert torch.equal(whole[0], torch.cat([centroid_id for centroid_id, _ in parts]))
    torch.testing.assert_close(whole[1], torch.cat([confidence for _, confidence in parts]))


def test_classify_nouns_in_float16_gives_ties_to_the_first_centroid():
    # The second centroid is nearer by less than half a unit in the last place of float16.
    near = 1e-5
    centroids = torch.tensor([[0.5, 0.1], [0.5 + near, 0.1], [-1.0, 0.0], [0.5, 0.1]])
    nouns = torch.tensor([[1.0, 0.0]]).repeat(50, 1)
    exact, _ = classify_nouns(nouns, centroids)
    tied, confidence = classify_nouns(nouns, centroids, precision="float16")
    assert exact.tolist() == [1] * 50
    assert tied.tolist() == [0] * 50
    assert tied.dtype == torch.int64
    assert confidence.dtype == torch.float32


def test_classify_nouns_in_float16_takes_the_first_of_many_tied_centroids():
    # With hundreds of centroids the probabilities are few distinct halves.
    nouns, centroids = unit_rows(200, 32, seed=4), unit_rows(500, 32, seed=5)
    centroid_id, confidence = classify_nouns(nouns, centroids, precision="float16")
    similarity = nouns.half() @ centroids.half().T
    n_tied = 0
    for row, half in enumerate(torch.softmax(similarity, dim=1).tolist()):
        tied = [column for column, value in enumerate(half) if value == max(half)]
        n_tied += len(tied) > 1
        assert centroid_id[row] == tied[0]
        assert confidence[row] == max(half)
    assert n_tied > 0


def test_classify_nouns_in_float16_stays_near_the_exact_confidence():
    nouns, centroids = unit_rows(30, 16, seed=6), unit_rows(8, 16, seed=7)
    _, confidence = classify_nouns(nouns, centroids, precision="float16")
    _, confidences = plain_classify(nouns, centroids)
    torch.testing.assert_close(confidence, torch.tensor(confidences), rtol=3e-3, atol=0)


def test_gradient_scores_are_the_norm_of_a_gradient_that_autograd_finds():
    nouns, centroids = unit_rows(20, 8, seed=10), unit_rows(6, 8, seed=11)
    found_id, found = gradient_scores(nouns, centroids, temperature=0.3)
    assert found.dtype == torch.float32
    for row, noun in enumerate(nouns):
        leaf = noun.clone().requires_grad_()
        logits = centroids @ leaf / 0.3
        F.cross_entropy(logits[None], torch.full((1, 6), 1 / 6, dtype=torch.float64)).backward()
        assert leaf.grad is not None
        assert found[row].item() == pytest.approx(0.3 * leaf.grad.norm().item(), abs=1e-6)
        assert found_id[row] == logits.argmax()


def test_gradient_scores_do_not_mind_that_centroids_share_a_group_of_images():
    # Three centroids of one kind of images, one of another; a noun for either, and one for both.
    centroids = F.normalize(
        torch.tensor([[1.0, 0, 0], [1, 0.01, 0], [1, 0, 0.01], [-0.6, 0.8, 0]]), dim=1
    )
    shared, alone, neither = [1.0, 0.0, 0.0], [-0.6, 0.8, 0.0], [0.0, 0.0, 1.0]
    nouns = torch.tensor([shared, alone, neither])
    _, confidence = classify_nouns(nouns, centroids)
    _, score = gradient_scores(nouns, centroids, temperature=0.1)
    assert confidence[0] < 0.5 * (1 - 1e-2)
    assert score[0] > 0.4
    assert score[0] > 2 * score[2]
    assert score[1] > 2 * score[2]


def test_gradient_score_of_a_noun_that_fits_all_images_alike_is_0():
    _, score = gradient_scores(torch.tensor([[0.0, 0.0, 1.0]]), torch.eye(3)[:2])
    assert score.tolist() == pytest.approx([0.0], abs=1e-6)


def test_top_nouns_keep_the_most_confident_of_each_centroid():
    #        row            0    1    2    3    4    5    6    7
    centroid_id = torch.tensor([2, 0, 0, 2, 0, 0, 3, 2])
    confidence = torch.tensor([0.1, 0.5, 0.9, 0.3, 0.7, 0.6, 0.2, 0.8])
    # Centroid 0: rows 2, 4 (not 5, 1). Centroid 2: rows 7, 3 (not 0). Centroid 3 has one noun,
    # centroid 1 none.
    selected = top_nouns_per_centroid(centroid_id, confidence, nouns_per_centroid=2)
    assert selected.dtype == torch.int64
    assert selected.tolist() == [2, 3, 4, 6, 7]


def test_top_nouns_break_ties_by_noun_row():
    centroid_id = torch.tensor([1, 0, 1, 1, 0, 1])
    confidence = torch.tensor([0.2, 0.4, 0.5, 0.5, 0.4, 0.5])
    # Centroid 0: 1 before 4. Centroid 1: 2, 3 before 5; 0 is weaker.
    assert top_nouns_per_centroid(centroid_id, confidence, nouns_per_centroid=1).tolist() == [1, 2]
    assert top_nouns_per_centroid(centroid_id, confidence, nouns_per_centroid=2).tolist() == [
        1,
        2,
        3,
        4,
    ]


def test_top_nouns_break_many_ties_by_noun_row():
    centroid_id = torch.arange(3000) % 3
    confidence = torch.full((3000,), 0.25)
    selected = top_nouns_per_centroid(centroid_id, confidence, nouns_per_centroid=5)
    assert selected.tolist() == list(range(15))


def test_top_nouns_agree_with_sorting_each_centroid():
    generator = torch.Generator().manual_seed(8)
    centroid_id = torch.randint(12, (150,), generator=generator)
    confidence = torch.randint(10, (150,), generator=generator) / 10
    expected = []
    for centroid in range(12):
        rows = [row for row in range(150) if centroid_id[row] == centroid]
        expected += sorted(rows, key=lambda row: (-confidence[row].item(), row))[:5]
    selected = top_nouns_per_centroid(centroid_id, confidence, nouns_per_centroid=5)
    assert selected.tolist() == sorted(expected)


def test_mean_over_templates_averages_before_it_normalizes():
    embeddings = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [0.0, 4.0]]])
    mean = mean_over_templates(embeddings)
    # Normalizing first would give (1, 1) / sqrt 2.
    expected = torch.tensor([[3 / math.sqrt(10), 1 / math.sqrt(10)], [0.0, 1.0]])
    torch.testing.assert_close(mean, expected, rtol=1e-6, atol=0)


def test_mean_over_templates_has_unit_norm_and_does_not_add_in_half_precision():
    generator = torch.Generator().manual_seed(9)
    embeddings = torch.randn(5, 7, 16, generator=generator).half()
    mean = mean_over_templates(embeddings)
    assert mean.dtype == torch.float32
    for row, prompts in zip(mean.tolist(), embeddings.tolist(), strict=True):
        plain = [sum(column) / 7 for column in zip(*prompts, strict=True)]
        norm = math.sqrt(sum(x * x for x in plain))
        assert row == pytest.approx([x / norm for x in plain], abs=1e-6)
