"""Many leading eigenvectors of a large symmetric matrix that is known by its products."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Vectors = NDArray[np.float64]

BLOCKS_A_RESTART = 20
"""Products with the matrix between two restarts, of a block each."""
BLOCKS_OF_K = 20
"""A block has a share 1 / BLOCKS_OF_K of the wanted vectors: narrow ones wait for memory, wide ones
need more products."""
FEWEST_IN_BLOCK = 8
TOLERANCE = 1e-4
"""Of an eigenvector: length of A x - value x, as a share of the value."""
NOTHING = 1e-10
"""Length of a product's new part, as a share of the largest eigenvalue, that may be rounding. Where
the matrix gives nothing new, any vector goes on."""
MOST_RESTARTS = 20
"""Five are usual. Eigenvalues that are not told apart after so many lie so dense that any vectors
from among them do as well."""


class Eigenvectors(NamedTuple):
    """The leading ones."""

    values: Vectors
    """(k,), largest first."""
    vectors: Vectors
    """(n, k), orthonormal."""
    residual: float
    """The longest A x - value x, as a share of the value; above TOLERANCE if restarts ran out."""


def fewest_rows(k: int) -> int:
    """Rows that a matrix must have for k eigenvectors."""
    block, kept = _block(k)
    return kept + (BLOCKS_A_RESTART + 1) * block


def leading_eigenvectors(multiply: Callable[[Vectors], Vectors], n: int, k: int) -> Eigenvectors:
    """The k largest eigenvalues of a symmetric matrix and their vectors; the same each time.

    Block Lanczos (Golub and Underwood, 1977) with thick restarts (Wu and Simon, 2000): a basis
    grows by the part of A times its last block that is new to it; when it is full, it is replaced
    by its best vectors. ARPACK does the same vector by vector, which for many vectors waits for
    memory: with blocks most of the work is products of matrices.

    Args:
        multiply: A X for X (n, any).
        n: rows of A, at least `fewest_rows(k)`.
        k: how many.

    Cost: 17 n k^2 operations a restart beside k products with A, five restarts usually. Memory:
    26 n k bytes.
    """
    block, kept = _block(k)
    most = kept + BLOCKS_A_RESTART * block
    basis = np.empty((n, most + block), order="F")
    inner = np.zeros((most, most))  # basis^T A basis, upper triangle
    rng = np.random.default_rng(0)
    basis[:, :block] = _orthonormal(rng.uniform(-1, 1, size=(n, block)))[0]
    size = 0
    n_restarts = 0
    while True:
        beyond = np.zeros((block, block))  # what A makes of the last block outside the basis
        while size < most:
            known, here = basis[:, : size + block], slice(size, size + block)
            product = multiply(np.ascontiguousarray(basis[:, here]))
            inner[: size + block, here] = known.T @ product
            product -= known @ inner[: size + block, here]
            new, beyond = _orthonormal(product)
            nothing = abs(beyond.diagonal()) <= NOTHING * abs(inner).max()
            new[:, nothing], beyond[nothing] = rng.uniform(-1, 1, size=(n, nothing.sum())), 0
            # Once more, for what rounding left of the known ones.
            new, again = _orthonormal(new - known @ (known.T @ new))
            beyond = again @ beyond
            size += block
            basis[:, size : size + block] = new
        wanted = (most - kept, most - 1)
        values, turn = scipy.linalg.eigh(inner, lower=False, subset_by_index=wanted)
        values, turn = values[::-1], turn[:, ::-1]
        errors = np.linalg.norm(beyond @ turn[-block:, :k], axis=0)
        residual = float((errors / np.abs(values[:k]).clip(np.finfo(float).tiny)).max())
        n_restarts += 1
        if residual <= TOLERANCE or n_restarts == MOST_RESTARTS:
            return Eigenvectors(values[:k], basis[:, :most] @ turn[:, :k], residual)
        basis[:, :kept] = basis[:, :most] @ turn
        basis[:, kept : kept + block] = basis[:, most:]
        inner[:] = 0
        np.fill_diagonal(inner[:kept, :kept], values)
        size = kept


def _block(k: int) -> tuple[int, int]:
    """Vectors of a block, and those that a restart keeps: whole blocks, one more than needed."""
    block = max(FEWEST_IN_BLOCK, math.ceil(k / BLOCKS_OF_K))
    return block, block * (math.ceil(k / block) + 1)


def _orthonormal(columns: Vectors) -> tuple[Vectors, Vectors]:
    """QR factorization."""
    return scipy.linalg.qr(columns, mode="economic", overwrite_a=True, check_finite=False)  # type: ignore[return-value]
