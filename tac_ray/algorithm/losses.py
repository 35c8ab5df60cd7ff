"""The losses of TAC on the *global* batch (Eq. 11-17).

Every loss is a function of sums over rows (a Gram matrix, a sum of log-similarities, column
means), so each worker sums its rows, one all-reduce adds the workers' sums, and any number of
workers gets the same loss up to the rounding of products of matrices. Cost a step, forward and
backward: 28 n K^2 operations on each worker's n rows, 16 K^2 numbers over the network.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tac_ray.algorithm.distributed import all_reduce_sum, sum_workers

DistillationForm = Literal["published", "paper"]
ConfidenceForm = Literal["published", "paper"]


class _Gram(torch.autograd.Function):
    """C^T C of the rows C (n, 2K) of all workers, (2K, 2K).

    It is symmetric, and so is what its gradient needs: 14 n K^2 operations forward and backward,
    24 of a product that knows nothing of it.
    """

    @staticmethod
    def forward(ctx: Any, columns: Tensor) -> Tensor:
        ctx.save_for_backward(columns)
        kind = columns.device.type
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }
        left, right = columns.chunk(2, dim=1)
        across = left.T @ right
        upper = torch.cat([left.T @ left, across], dim=1)
        gram = torch.cat([upper, torch.cat([across.T, right.T @ right], dim=1)])
        return sum_workers(gram.to(columns.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (columns,) = ctx.saved_tensors
        symmetric = sum_workers(grads[0] + grads[0].T)
        with torch.autocast(**ctx.autocast):
            return (columns @ symmetric).to(columns.dtype)


def distillation_loss(
    probs: Tensor, neighbor_probs: Tensor, *, temperature: float, form: DistillationForm
) -> Tensor:
    """How badly column i of one matrix agrees with column i of the other, against other columns.

    Args:
        probs: cluster_probs of this worker's anchors in one modality, (n, K).
        neighbor_probs: cluster_probs of the other modality's neighbors, (n, K).
        temperature: tau^.
        form: "published": NT-Xent over the 2K columns of both, negatives from both modalities,
            mean over 2K. "paper": Eq. 12 or 13, negatives of the other modality only, sum over K.

    Returns:
        Scalar, the same on every worker.
    """
    k = probs.shape[1]
    gram = _Gram.apply(torch.cat([probs, neighbor_probs], dim=1))
    norm = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    logits = gram / torch.outer(norm, norm) / temperature
    positive = logits[:k, k:].diagonal()
    if form == "paper":
        return (torch.logsumexp(logits[:k, k:], dim=1) - positive).sum()
    itself = torch.eye(2 * k, dtype=torch.bool, device=logits.device)
    others = torch.logsumexp(logits.masked_fill(itself, -torch.inf), dim=1)
    return (others - torch.cat([positive, positive])).mean()


def confidence_loss(image_probs: Tensor, text_probs: Tensor, *, form: ConfidenceForm) -> Tensor:
    """How far p and q are from the same one-hot vector.

    Args:
        image_probs: p, (n, K) on this worker.
        text_probs: q, (n, K).
        form: "published": mean over the global batch of -log(p . q). "paper": -log of the sum of
            p . q (Eq. 14).
    """
    agreement = (image_probs * text_probs).sum(dim=1)
    tiny = torch.finfo(agreement.dtype).tiny
    if form == "paper":
        return -all_reduce_sum(agreement.sum()).clamp_min(tiny).log()
    n_rows = all_reduce_sum(torch.full_like(agreement[0], len(agreement)).detach())
    return all_reduce_sum(-agreement.clamp_min(tiny).log().sum()) / n_rows


def balance_entropy(image_probs: Tensor, text_probs: Tensor) -> Tensor:
    """H(mean p) + H(mean q), natural logarithm, means over the global batch (Eq. 15, 16)."""
    probs = torch.cat([image_probs, text_probs], dim=1)
    n_rows = all_reduce_sum(torch.full_like(probs[0, 0], len(probs)).detach())
    mean = (all_reduce_sum(probs.sum(dim=0)) / n_rows).clamp_min(1e-9)
    return -(mean * mean.log()).sum()


@dataclass(frozen=True, kw_only=True)
class TacLoss:
    """L = L_Dis + L_Con - alpha L_Bal (Eq. 17)."""

    temperature: float
    balance_weight: float
    distillation_form: DistillationForm = "published"
    confidence_form: ConfidenceForm = "published"

    def __call__(
        self, image: Tensor, text: Tensor, neighbor_image: Tensor, neighbor_text: Tensor
    ) -> dict[str, Tensor]:
        """Losses of a batch: `loss` to minimize, and its terms.

        All arguments are cluster_probs of this worker's rows, (n, K): of the anchors in both
        modalities, of an image neighbor and of a text-counterpart neighbor.
        """
        t, form = self.temperature, self.distillation_form
        distillation = distillation_loss(
            image, neighbor_text, temperature=t, form=form
        ) + distillation_loss(text, neighbor_image, temperature=t, form=form)
        confidence = confidence_loss(image, text, form=self.confidence_form)
        balance = balance_entropy(image, text)
        return {
            "loss": distillation + confidence - self.balance_weight * balance,
            "distillation": distillation,
            "confidence": confidence,
            "balance": balance,
        }
