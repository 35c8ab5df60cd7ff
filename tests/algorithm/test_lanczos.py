"""Leading eigenvectors, against those of the whole matrix."""

import numpy as np
import pytest

from tac_ray.algorithm import lanczos
from tac_ray.algorithm.lanczos import fewest_rows, leading_eigenvectors


def with_spectrum(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric matrix and its eigenvectors."""
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((len(values), len(values))))[0]
    return (turn * values) @ turn.T, turn


@pytest.mark.parametrize("k", [1, 12, 200])
def test_the_leading_eigenvectors_are_found_also_of_negative_spectra(k: int):
    n = 700
    values = np.sort(np.random.default_rng(0).uniform(-2, 1, size=n))[::-1]
    matrix, vectors = with_spectrum(values)
    found = leading_eigenvectors(lambda x: matrix @ x, n, k)
    np.testing.assert_allclose(found.values, values[:k], atol=1e-6)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(k), atol=1e-10)
    overlap = np.linalg.svd(vectors[:, :k].T @ found.vectors, compute_uv=False)
    assert overlap.min() > 0.999
    errors = np.linalg.norm(matrix @ found.vectors - found.vectors * found.values, axis=0)
    assert found.residual <= lanczos.TOLERANCE
    assert found.residual == pytest.approx((errors / abs(found.values)).max(), rel=0.1, abs=1e-9)


@pytest.mark.parametrize("rank", [3, 60])
def test_a_matrix_of_few_ranks_ends_in_no_fault(rank: int):
    values = np.zeros(fewest_rows(5) + 300)
    values[:rank] = np.linspace(3, 1, rank)
    _, vectors = with_spectrum(values)
    part = vectors[:, :rank] * np.sqrt(values[:rank])
    found = leading_eigenvectors(lambda x: part @ (part.T @ x), len(values), 5)
    np.testing.assert_allclose(found.values, values[:5], atol=1e-9)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(5), atol=1e-10)
    np.testing.assert_allclose(abs(vectors[:, 0] @ found.vectors[:, 0]), 1)


def test_where_restarts_run_out_the_best_so_far_are_given(monkeypatch: pytest.MonkeyPatch):
    values = np.linspace(1, 0.9, 900)  # nothing tells the first 5 from the next
    matrix, _ = with_spectrum(values)
    monkeypatch.setattr(lanczos, "MOST_RESTARTS", 1)
    found = leading_eigenvectors(lambda x: matrix @ x, 900, 5)
    assert found.residual > lanczos.TOLERANCE
    assert (found.values > 0.995).all()
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(5), atol=1e-10)
