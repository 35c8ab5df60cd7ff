"""Cluster heads: from an embedding to the probability of each cluster (Eq. 9, 10)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from tac_ray.algorithm.distributed import all_reduce_sums, n_workers


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm whose statistics are those of the global batch, on any device and backend.

    torch's SyncBatchNorm is CUDA only. Alone it is nn.BatchNorm1d, up to rounding.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (n, d) by the mean and variance over the rows of all workers.

        Batches that lie side by side, (n, batches, d), have statistics of their own, and are seen
        by the running ones in turn.
        """
        if not self.training:
            return super().forward(input)
        columns = input.flatten(1)
        n_batches = columns.shape[1] // self.num_features
        weight, bias = self.weight.repeat(n_batches), self.bias.repeat(n_batches)
        if n_workers() == 1:
            mean, variance = torch.zeros_like(columns[0]), torch.ones_like(columns[0])
            # With a momentum of 1 they become those of the batch.
            found = functional.batch_norm(
                columns, mean, variance, weight, bias, training=True, momentum=1.0, eps=self.eps
            )
        else:
            # About a point near the mean, so that the squares do not cancel.
            assert self.running_mean is not None
            near = self.running_mean.repeat(n_batches)
            offset = columns - near
            n_rows, total, squares = all_reduce_sums(
                torch.full_like(columns[0, :1], len(columns)),
                offset.sum(dim=0),
                offset.square().sum(dim=0),
            )
            beyond = total / n_rows
            mean = near + beyond
            variance = (squares / n_rows - beyond.square()).clamp_min(0)
            centred = offset - beyond
            found = centred * torch.rsqrt(variance + self.eps) * weight + bias
            variance = variance * n_rows / (n_rows - 1)
        self._see(mean.detach(), variance.detach())
        return found.view_as(input)

    def _see(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of each batch."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        width = self.num_features
        for batch_mean, batch_variance in zip(
            mean.split(width), variance.split(width), strict=True
        ):
            self.num_batches_tracked += 1
            self.running_mean.lerp_(batch_mean, self.momentum)
            self.running_var.lerp_(batch_variance, self.momentum)


class Linear(nn.Linear):
    """A linear layer that gives back the type it takes, also where autocast multiplies in bf16."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return super().forward(input).to(input.dtype)


class ClusterHead(nn.Sequential):
    """Linear(d, d), batch norm, ReLU, Linear(d, K), softmax.

    Weights are drawn from a normal of standard deviation 0.02 truncated at -2 and 2, biases as
    torch's Linear draws them (the published code).
    """

    def __init__(self, width: int, n_clusters: int, *, generator: torch.Generator) -> None:
        first, last = Linear(width, width), Linear(width, n_clusters)
        bound = width**-0.5
        for linear in (first, last):
            nn.init.trunc_normal_(linear.weight, std=0.02, generator=generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
        super().__init__(first, GlobalBatchNorm(width), nn.ReLU(), last, nn.Softmax(dim=-1))


class ImageHead(nn.Module):
    """The image head f alone, for objectives that see no text."""

    def __init__(self, width: int, n_clusters: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image = ClusterHead(width, n_clusters, generator=generator)

    def forward(self, image: Tensor, text: None = None) -> tuple[Tensor, ...]:
        """cluster_probs (n, K) of image anchors and of image neighbors, as in `TacHeads`.

        Args:
            image: embeddings of n anchors and of a neighbor of each, (n, 2, d).
            text: none; takes the place of what `TacHeads` sees.
        """
        return self.image(image).unbind(1)


class TacHeads(nn.Module):
    """The image head f and the text head g."""

    def __init__(self, width: int, n_clusters: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image = ClusterHead(width, n_clusters, generator=generator)
        self.text = ClusterHead(width, n_clusters, generator=generator)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """cluster_probs (n, K) of image anchors, text anchors, image neighbors, text neighbors.

        Anchors and neighbors pass a head side by side, in products twice as large, but each has
        its own batch statistics, as in the published code.

        Args:
            image: embeddings of n anchors and of a neighbor of each, (n, 2, d).
            text: the same of counterparts, (n, 2, d).
        """
        image_probs, neighbor_image_probs = self.image(image).unbind(1)
        text_probs, neighbor_text_probs = self.text(text).unbind(1)
        return image_probs, text_probs, neighbor_image_probs, neighbor_text_probs
