"""Edges, what they weigh, how far words are heard, and clusters of the graph."""

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F

from tac_ray.algorithm import graph
from tac_ray.algorithm.graph import (
    balanced_clusters,
    cut,
    edge_weights,
    join_edges,
    share_in_words,
)


def test_edges_weigh_what_their_ends_look_alike_apart_from_what_all_share(
    monkeypatch: pytest.MonkeyPatch,
):
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(50, 6, generator=generator) + 2, dim=1)
    ends = torch.randint(50, (50, 7), generator=generator)
    centered = images.double() - images.double().mean(dim=0)
    expected = [
        [max(0.0, float(F.cosine_similarity(centered[i], centered[j], dim=0))) for j in row]
        for i, row in enumerate(ends)
    ]
    np.testing.assert_allclose(edge_weights(images, ends), expected, atol=1e-6)
    assert (edge_weights(images, ends) == 0).any()
    monkeypatch.setattr(graph, "BATCH_EDGES", 30)
    np.testing.assert_allclose(edge_weights(images, ends), expected, atol=1e-6)


@pytest.mark.parametrize(("n_nouns", "critical"), [(10, 2.176), (30, 2.745), (100, 3.207)])
def test_a_noun_stands_out_by_grubbs_test(n_nouns: int, critical: float):
    # The critical values of the one-sided test at 5%, as tables print them.
    standing = np.array([critical - 0.01, critical + 0.01, critical + 1, 0])
    assert share_in_words(standing, n_nouns, 0.05) == 0.5


def test_words_that_do_not_fit_are_hardly_heard():
    similarity = np.random.default_rng(0).normal(size=(4000, 200))
    standing = (similarity.max(1) - similarity.mean(1)) / similarity.std(1, ddof=1)
    assert share_in_words(standing, 200, 0.05) == pytest.approx(0.05, abs=0.012)
    assert share_in_words(standing, 2, 0.05) == 0


def test_edges_of_both_kinds_add_up_and_of_both_ends_the_larger_counts():
    images = np.array([[1], [0], [0]]), np.array([[0.5], [0.25], [0.75]])
    words = np.array([[1], [1], [1]]), np.array([[0.25], [9.0], [0.125]])
    found = join_edges(images, words).toarray()
    expected = np.zeros((3, 3))
    expected[0, 1] = expected[1, 0] = 0.75  # 0.5 + 0.25 from row 0; 0.25 from row 1
    expected[0, 2] = expected[2, 0] = 0.75
    expected[1, 2] = expected[2, 1] = 0.125  # row 1 is its own neighbor, which is no edge
    np.testing.assert_array_equal(found, expected)


def planted(sizes: list[int], n_edges: int, *, stray: float, seed: int = 0):
    """A graph in which a share `stray` of the edges leaves the group of its row."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(sizes)), sizes)
    n = len(group)
    starts = np.cumsum([0, *sizes])[group][:, None]
    inside = starts + rng.integers(np.array(sizes)[group][:, None], size=(n, n_edges))
    ends = np.where(rng.random((n, n_edges)) < stray, rng.integers(n, size=(n, n_edges)), inside)
    return join_edges((ends, rng.uniform(0.5, 1, ends.shape))), group


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two clusterings are the same but for the ids."""
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    return len(pairs) == len(set(one.tolist())) == len(set(other.tolist()))


@pytest.mark.parametrize("n", [60, 700])  # all eigenvectors, and Lanczos
def test_groups_of_a_graph_are_found(n: int):
    weights, group = planted([n] * 3 + [n // 2], 12, stray=0.2)
    found = cut(weights, 4, balance=0.4)
    assert same(found.cluster_id, group)
    assert found.eigenvalues[0] == pytest.approx(1)
    assert (np.diff(found.eigenvalues) <= 1e-9).all()
    np.testing.assert_array_equal(cut(weights, 4, balance=0.4).cluster_id, found.cluster_id)


def test_lanczos_finds_the_eigenvectors_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch):
    weights, _ = planted([100, 90, 80, 70], 12, stray=0.3)
    whole = cut(weights, 4, balance=0.4)
    monkeypatch.setattr(graph, "DENSE_ROWS", 10)
    found = cut(weights, 4, balance=0.4)
    np.testing.assert_allclose(found.eigenvalues, whole.eigenvalues, rtol=1e-3)
    assert same(found.cluster_id, whole.cluster_id)


def test_parts_without_an_edge_between_them_are_clusters_and_a_few_odd_rows_are_none():
    weights, group = planted([300, 300, 300], 12, stray=0)
    assert same(cut(weights, 3, balance=0.4).cluster_id, group)
    # Three rows that know each other only.
    weights, group = planted([300, 300, 300, 3], 12, stray=0.001)
    found = cut(weights, 3, balance=0.4).cluster_id
    assert same(found[:900], group[:900])


@pytest.mark.parametrize("n", [40, 1500])
def test_images_without_anything_in_common_are_shared_out(n: int):
    nothing = join_edges((np.zeros((n, 3), dtype=np.int64), np.zeros((n, 3))))
    assert np.bincount(cut(nothing, 2, balance=0.4).cluster_id, minlength=2).min() > 0


def test_many_equal_images_are_no_fault():
    rng = np.random.default_rng(0)
    images = F.normalize(torch.from_numpy(rng.standard_normal((1200, 8))).float(), dim=1)
    images[50:] = images[50]
    similarity = images @ images.T
    ends = similarity.topk(41, dim=1).indices
    found = cut(join_edges((ends.numpy(), edge_weights(images, ends).numpy())), 5, balance=0.4)
    assert len(np.unique(found.cluster_id[50:])) == 1


def test_equal_sizes_are_worth_something():
    # Many rows at one place, few at another, and some between them.
    angle = torch.cat([torch.zeros(400), torch.linspace(0.1, 1.3, 160), torch.full((40,), 1.4)])
    rows = torch.stack([angle.cos(), angle.sin()], dim=1)
    start = (angle > 1.2).long()

    def worth(clusters: torch.Tensor, balance: float) -> float:
        sums = torch.stack([rows[clusters == k].sum(dim=0) for k in range(2)])
        share = torch.bincount(clusters, minlength=2).double() / len(rows)
        mean = (rows * F.normalize(sums, dim=1)[clusters]).sum(dim=1).double().mean()
        return float(mean + balance * scipy.stats.entropy(share))

    plain = balanced_clusters(rows, start, 2, balance=0)
    even = balanced_clusters(rows, start, 2, balance=0.4)
    assert worth(plain, 0) > worth(start, 0)
    assert worth(even, 0.4) > max(worth(start, 0.4), worth(plain, 0.4))
    sizes = [torch.bincount(clusters).min() for clusters in (start, plain, even)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_clusters_that_begin_empty_are_filled():
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(200, 5, generator=generator), dim=1)
    found = balanced_clusters(rows, torch.zeros(200, dtype=torch.long), 3, balance=0.4)
    assert len(found.unique()) == 3
