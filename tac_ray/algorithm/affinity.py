"""Weights of a neighbor graph's edges from words as well as from looks."""

import torch
from torch import Tensor

STRONGEST_NOUNS = 32
"""Nouns of an image whose probability is kept."""
BATCH_ROWS = 1024


def semantic_overlap(
    images: Tensor,
    nouns: Tensor,
    neighbor_row: Tensor,
    *,
    temperature: float,
    n_strongest: int = STRONGEST_NOUNS,
) -> Tensor:
    """Similarity of an image and its neighbor, times how far they mean the same nouns.

    A_ij = max(v_i . v_j, 0) sum_m p_m(v_i) p_m(v_j), where p(v) is the softmax of the similarities
    of v and the nouns: images that look alike and mean other nouns come apart.

    Source: the affinity of NTK-SC (Delving into Spectral Clustering with Vision-Language
    Representations, ICLR 2026, arXiv 2602.09586), of which only the summary could be read. Taking
    the edges of a neighbor graph alone, the floor at 0 and the sum over the strongest nouns are
    ours; the paper's average over prompt templates by diffusion is left out.

    Args:
        images: unit-norm image embeddings, (N, d).
        nouns: unit-norm embeddings of the selected nouns, (M, d).
        neighbor_row: rows of each image's neighbors, (N, m) integers.
        temperature: of the softmax; the smaller, the fewer nouns an image means.
        n_strongest: nouns an image that are summed over. All M give the formula itself.

    Returns:
        Weight of each edge, (N, m) float32, from 0 to 1.

    Cost: 2 N d (M + m) + N m n_strongest operations. Peak memory: 8 N n_strongest bytes, and 4 M
    and 4 m (d + 3 n_strongest) for each of `BATCH_ROWS` rows.
    """
    nouns = nouns.float()
    strongest = [
        torch.softmax(batch.float() @ nouns.T / temperature, dim=1).topk(
            min(n_strongest, len(nouns)), dim=1
        )
        for batch in images.split(BATCH_ROWS)
    ]
    noun_row = torch.cat([found.indices for found in strongest]).int()
    prob = torch.cat([found.values for found in strongest])
    weights = []
    for rows in torch.arange(len(images)).split(BATCH_ROWS):
        neighbors = neighbor_row[rows].long()
        alike = torch.einsum("nd,nmd->nm", images[rows].float(), images[neighbors].float())
        own = torch.zeros(len(rows), len(nouns)).scatter(1, noun_row[rows].long(), prob[rows])
        shared = own.gather(1, noun_row[neighbors].long().flatten(1)).view(*neighbors.shape, -1)
        weights.append(alike.clamp_min(0) * (shared * prob[neighbors]).sum(dim=2))
    return torch.cat(weights)
