"""Clusters that linear maps can tell apart in several spaces at once (TURTLE)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

STEPS, BATCH_SIZE, LEARNER_STEPS = 150, 1024, 10


class LinearHead(nn.Module):
    """Softmax of a linear map of one space's embeddings.

    The map has weights of learned length and direction apart (weight norm), as in the published
    code: without it a few clusters outgrow the others.
    """

    mean: Tensor

    def __init__(self, mean: Tensor, n_clusters: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.linear = weight_norm(_linear(len(mean), n_clusters, generator))

    def standardize(self, embedding: Tensor) -> Tensor:
        """Embeddings about their mean, of length near sqrt(d), (n, d) float32.

        Ours: embeddings have unit norm, and steps of Adam suit coordinates of the order of 1.
        """
        return (embedding.float() - self.mean) * math.sqrt(embedding.shape[1])

    def forward(self, embedding: Tensor) -> Tensor:
        """cluster_probs (n, K) of embeddings (n, d)."""
        return torch.softmax(self.linear(self.standardize(embedding)), dim=1)


def fit_linear_heads(
    spaces: Sequence[Tensor],
    n_clusters: int,
    *,
    seed: int,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    learner_steps: int = LEARNER_STEPS,
    learning_rate: float = 1e-2,
    learner_learning_rate: float = 1e-3,
    balance_weight: float = 10.0,
) -> list[LinearHead]:
    """A head for each space, such that the clusters they agree on separate linearly in all of them.

    What they agree on is the mean of their cluster_probs. In each step fresh linear learners, one a
    space, are fitted to it on a batch by a few steps of Adam; then the heads move so that the
    learners' cross-entropy falls, while the entropy of each space's mean cluster_probs, times
    `balance_weight`, keeps clusters from emptying. That the learners depend on the heads is left
    out of the gradient (first order, as published).

    Source: TURTLE (Gadetsky, Jiang and Brbic, Let Go of Your Labels with Unsupervised Transfer,
    ICML 2024, arXiv 2406.07236), with its published code as the reading of it. Its 6,000 steps of
    10,000 rows at a learning rate of 0.001 are here few steps of small batches at 0.01, and the
    standardizing is ours.

    Args:
        spaces: unit-norm embeddings of the same N images, each (N, d).
        n_clusters: K.
        seed: of the first weights and the batches.
        steps: of the heads.
        batch_size: rows a step, at most N.
        learner_steps: of the learners in each of those.
        learning_rate: of the heads' Adam.
        learner_learning_rate: of the learners' Adam.
        balance_weight: gamma of the paper.

    Returns:
        A head for each space, in their order; `mean_probs` asks them all.

    Cost: 6 d K (learner_steps + 1) operations a row, space and step. Memory: 4 batch_size (d + 3 K)
    and 36 d K bytes a space.
    """
    generator = torch.Generator().manual_seed(seed)
    heads = [
        LinearHead(space.float().mean(dim=0), n_clusters, generator=generator) for space in spaces
    ]
    optimizer = _adam(heads, learning_rate)
    n_rows = len(spaces[0])
    for _ in range(steps):
        rows = torch.randperm(n_rows, generator=generator)[:batch_size]
        batch = [head.standardize(space[rows]) for head, space in zip(heads, spaces, strict=True)]
        probs = [
            torch.softmax(head.linear(embedding), dim=1)
            for head, embedding in zip(heads, batch, strict=True)
        ]
        agreed = torch.stack(probs).mean(dim=0).detach()
        learners = [_linear(embedding.shape[1], n_clusters, generator) for embedding in batch]
        _fit_learners(learners, batch, agreed, learner_steps, learner_learning_rate)
        with torch.no_grad():
            scores = [
                learner(embedding) for learner, embedding in zip(learners, batch, strict=True)
            ]
        optimizer.zero_grad()
        turtle_loss(probs, scores, balance_weight).backward()
        optimizer.step()
    return heads


def turtle_flops(width: int, n_clusters: int, *, n_spaces: int) -> float:
    """Operations of `fit_linear_heads` with its own steps, in spaces of one width."""
    return 6.0 * width * n_clusters * (LEARNER_STEPS + 1) * BATCH_SIZE * STEPS * n_spaces


def turtle_loss(probs: Sequence[Tensor], scores: Sequence[Tensor], balance_weight: float) -> Tensor:
    """How badly fitted learners find the clusters, less the entropy of the clusters' sizes.

    Args:
        probs: cluster_probs of a batch in each space, each (n, K); they agree on their mean.
        scores: of the learner that was fitted in each space, each (n, K), before the softmax and
            without a gradient.
        balance_weight: of the entropy of each space's mean cluster_probs, natural logarithm.
    """
    agreed = torch.stack(list(probs)).mean(dim=0)
    error = torch.stack([functional.cross_entropy(found, agreed) for found in scores]).sum()
    entropy = torch.special.entr(torch.stack([p.mean(dim=0) for p in probs])).sum()
    return error - balance_weight * entropy


def mean_probs(heads: Sequence[LinearHead], embeddings: Sequence[Tensor]) -> Tensor:
    """cluster_probs of images, the mean over spaces, (n, K).

    Args:
        heads: of `fit_linear_heads`.
        embeddings: of n images in each space, in the same order, each (n, d).
    """
    found = [head(rows) for head, rows in zip(heads, embeddings, strict=True)]
    return torch.stack(found).mean(dim=0)


def _fit_learners(
    learners: list[nn.Linear], batch: list[Tensor], agreed: Tensor, steps: int, rate: float
) -> None:
    """Move the learners towards cluster_probs (n, K), each in its own space."""
    optimizer = _adam(learners, rate)
    for _ in range(steps):
        optimizer.zero_grad()
        for learner, embedding in zip(learners, batch, strict=True):
            functional.cross_entropy(learner(embedding), agreed).backward()
        optimizer.step()


def _adam(modules: Sequence[nn.Module], rate: float) -> torch.optim.Adam:
    return torch.optim.Adam([p for module in modules for p in module.parameters()], lr=rate)


def _linear(width: int, n_clusters: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer drawn as torch draws it, from a generator of its own."""
    linear = nn.Linear(width, n_clusters)
    bound = width**-0.5
    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
    return linear
