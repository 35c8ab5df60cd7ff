"""What an image would be in words: the text counterpart of Eq. 7 and 8."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tac_ray.algorithm.nouns import Precision


class Counterparts(NamedTuple):
    """Text counterparts of a batch and the nouns they come from."""

    embedding: Tensor
    """Unit-norm, (n, d) float32."""
    noun_row: Tensor
    """Rows of the strongest nouns, (n, n_strongest) int64, strongest first."""
    weight: Tensor
    """Their retrieval weights, (n, n_strongest) float32."""
    standing: Tensor
    """How far the most similar noun is above the mean of all, in their standard deviations, (n,)
    float32."""


def text_counterparts(
    images: Tensor,
    nouns: Tensor,
    *,
    temperature: float,
    precision: Precision = "float32",
    n_strongest: int = 3,
) -> Counterparts:
    """t~ = normalize(sum_j softmax_j(v . t_j / tau) t_j)   (Eq. 7, 8).

    Args:
        images: unit-norm image embeddings, (n, d).
        nouns: unit-norm embeddings of the selected nouns, (M, d).
        temperature: tau, 0.005 in the paper.
        precision: "float16" rounds inputs, similarities, weights and sums as the published code
            does, whose GPU adds up products of halves in float32; "float32" does not.
        n_strongest: how many nouns to report per image, at most M.

    Cost: 4 n M d operations and n M numbers of memory.
    """
    dtype = torch.float16 if precision == "float16" else torch.float32
    # Products of halves themselves may be fifty times slower on cores.
    images, nouns = images.to(dtype).float(), nouns.to(dtype).float()
    similarity = (images @ nouns.T).to(dtype)
    standing = _standing(similarity.float())
    weights = torch.softmax(similarity.div_(temperature), dim=1).float()
    embedding = F.normalize((weights @ nouns).to(dtype), dim=1).float()
    strongest = weights.topk(min(n_strongest, nouns.shape[0]), dim=1)
    return Counterparts(embedding, strongest.indices, strongest.values, standing)


def _standing(similarity: Tensor) -> Tensor:
    """Of the largest of each row; 0 where all are the same."""
    if similarity.shape[1] < 2:
        return torch.zeros(len(similarity))
    spread, mean = torch.std_mean(similarity, dim=1)
    tiny = torch.finfo(spread.dtype).tiny
    return (similarity.max(dim=1).values - mean) / spread.clamp_min(tiny)
