"""Softmax with prices: entropic optimal transport that can be done in batches of rows."""

import math

import torch
from torch import Tensor

SCORE_TEMPERATURE = 0.05
"""Of the plan behind `transport_scores`."""
SWEEPS = 20
"""Of Sinkhorn's algorithm."""
MOST_ROWS = 16_384
"""Rows that prices are found on."""
BATCH_ROWS = 4096


def transport_prices(
    rows: Tensor, columns: Tensor, mass: Tensor, *, temperature: float, sweeps: int = SWEEPS
) -> Tensor:
    """Prices at which each column is in demand for its own mass, no more.

    A row that may choose freely spreads itself by softmax_j(similarity_j / temperature), and a
    column that is near to everything takes nearly everything. Subtracting from its similarity a
    price g_j turns that softmax into the entropic optimal transport plan between the rows, which
    weigh the same, and the columns, which take their mass (Cuturi, Sinkhorn Distances, 2013). The
    prices are all that a plan needs to be applied to further rows, one at a time.

    Each sweep raises a price by temperature * log(demand / mass). All sums are of logarithms, so
    that no temperature under- or overflows, and their number is fixed, so that the same input
    gives the same prices; the sums are then near the masses, not equal to them.

    Args:
        rows: unit norm, (n, d). Of more than `MOST_ROWS` evenly spaced ones are looked at.
        columns: unit norm, (m, d).
        mass: share of the rows that each column takes, above 0, (m,); its scale does not matter.
        temperature: of the softmax; also the plan's entropic regularization.
        sweeps: how often all prices are corrected.

    Returns:
        (m,) float32, of mean 0.

    Cost: 2 n m d operations a sweep; memory 8 m numbers for each of `BATCH_ROWS` rows.
    """
    rows = _evenly_spaced(rows)
    log_mass = torch.log(mass / mass.sum()).float()
    columns = columns.float()
    prices = torch.zeros(len(columns))
    for _ in range(sweeps):
        log_demand = torch.full_like(prices, -torch.inf)
        for batch in rows.split(BATCH_ROWS):
            log_share = torch.log_softmax((batch.float() @ columns.T - prices) / temperature, dim=1)
            log_demand = torch.logaddexp(log_demand, log_share.logsumexp(dim=0))
        prices += temperature * (log_demand - math.log(len(rows)) - log_mass)
    return prices - prices.mean()


def transport_scores(
    nouns: Tensor, centroids: Tensor, prices: Tensor, *, temperature: float = SCORE_TEMPERATURE
) -> tuple[Tensor, Tensor]:
    """Each noun's most probable centroid after transport: Eq. 4 with prices.

    Without prices the centroids that are near to all nouns take nearly all of them, and others are
    left without; with prices each is given nouns in proportion to its images.

    Source: CAE (Hierarchical Semantic Alignment for Image Clustering, AAAI 2026, arXiv 2512.00904)
    aligns images and nouns by optimal transport; only its summary could be read. Centroids with
    their sizes as mass in place of images, nouns of equal mass, the score p(centroid | noun) of the
    plan and the temperature are ours.

    Args:
        nouns: unit-norm text embeddings, (T, d).
        centroids: unit-norm image centroids, (k, d).
        prices: of the centroids, from `transport_prices` with these nouns as rows, (k,).
        temperature: that the prices were found at.

    Returns:
        centroid_id (T,) int64 and score (T,) float32.

    Cost: 2 T k d operations; memory T k numbers, so callers pass nouns in batches.
    """
    similarity = nouns.float() @ centroids.float().T
    score, centroid_id = torch.softmax((similarity - prices) / temperature, dim=1).max(dim=1)
    return centroid_id, score


def _evenly_spaced(rows: Tensor) -> Tensor:
    if len(rows) <= MOST_ROWS:
        return rows
    return rows[torch.arange(MOST_ROWS) * len(rows) // MOST_ROWS]
