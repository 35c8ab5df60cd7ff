"""Cluster heads: from an embedding to the probability of each cluster (Eq. 9, 10)."""

import torch
from torch import Tensor, nn

from tac_ray.algorithm.distributed import all_reduce_sum, n_workers


class GlobalBatchNorm(nn.BatchNorm1d):
    """Batch norm whose statistics are those of the global batch, on any device and backend.

    torch's SyncBatchNorm is CUDA only. Alone it is nn.BatchNorm1d, up to rounding.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalize (n, d) by the mean and variance over the rows of all workers."""
        if not self.training or n_workers() == 1:
            return super().forward(input)
        n_rows = all_reduce_sum(torch.full_like(input[0, 0], len(input)).detach())
        mean = all_reduce_sum(input.sum(dim=0)) / n_rows
        variance = all_reduce_sum((input - mean).square().sum(dim=0)) / n_rows
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n_rows / (n_rows - 1), self.momentum)
        return (input - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class ClusterHead(nn.Sequential):
    """Linear(d, d), batch norm, ReLU, Linear(d, K), softmax.

    Weights are drawn from a normal of standard deviation 0.02 truncated at -2 and 2, biases as
    torch's Linear draws them (the published code).
    """

    def __init__(self, width: int, n_clusters: int, *, generator: torch.Generator) -> None:
        first, last = nn.Linear(width, width), nn.Linear(width, n_clusters)
        bound = width**-0.5
        for linear in (first, last):
            nn.init.trunc_normal_(linear.weight, std=0.02, generator=generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
        super().__init__(first, GlobalBatchNorm(width), nn.ReLU(), last, nn.Softmax(dim=1))


class TacHeads(nn.Module):
    """The image head f and the text head g."""

    def __init__(self, width: int, n_clusters: int, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.image = ClusterHead(width, n_clusters, generator=generator)
        self.text = ClusterHead(width, n_clusters, generator=generator)

    def forward(
        self, image: Tensor, text: Tensor, neighbor_image: Tensor, neighbor_text: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """cluster_probs (n, K) of each argument (n, d), in the same order.

        Anchors and neighbors pass separately, so each has its own batch statistics, as in the
        published code.
        """
        return (
            self.image(image),
            self.text(text),
            self.image(neighbor_image),
            self.text(neighbor_text),
        )
