"""The losses of TAC on the *global* batch (Eq. 11-17).

Every loss is a function of sums over rows (a Gram matrix, a sum of log-similarities, column
sums), so each worker sums its rows, one all-reduce adds the workers' sums, and any number of
workers gets the same loss up to the rounding of products of matrices. Cost a step, forward and
backward: 28 n K^2 operations on each worker's n rows, 16 K^2 numbers over the network.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tac_ray.algorithm.distributed import all_reduce_sums

DistillationForm = Literal["published", "paper"]
ConfidenceForm = Literal["published", "paper"]


class _Gram(torch.autograd.Function):
    """C^T C of rows C (n, 2K), (2K, 2K).

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
        return gram.to(columns.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (columns,) = ctx.saved_tensors
        symmetric = grads[0] + grads[0].T
        with torch.autocast(**ctx.autocast):
            return (columns @ symmetric).to(columns.dtype)


def gram(probs: Tensor, neighbor_probs: Tensor) -> Tensor:
    """Inner products of all columns of both, (2K, 2K); a sum over the rows.

    Args:
        probs: cluster_probs of anchors in one modality, (n, K).
        neighbor_probs: cluster_probs of the other modality's neighbors, (n, K).
    """
    return _Gram.apply(torch.cat([probs, neighbor_probs], dim=1))  # type: ignore[no-any-return]


def distillation_loss(gram: Tensor, *, temperature: float, form: DistillationForm) -> Tensor:
    """How badly column i of one matrix agrees with column i of the other, against other columns.

    Args:
        gram: `gram` of the global batch, (2K, 2K).
        temperature: tau^.
        form: "published": NT-Xent over the 2K columns of both, negatives from both modalities,
            mean over 2K. "paper": Eq. 12 or 13, negatives of the other modality only, sum over K.
    """
    k = len(gram) // 2
    norm = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).sqrt()
    logits = gram / torch.outer(norm, norm) / temperature
    positive = logits[:k, k:].diagonal()
    if form == "paper":
        return (torch.logsumexp(logits[:k, k:], dim=1) - positive).sum()
    itself = torch.eye(2 * k, dtype=torch.bool, device=logits.device)
    others = torch.logsumexp(logits.masked_fill(itself, -torch.inf), dim=1)
    return (others - torch.cat([positive, positive])).mean()


def agreement(image_probs: Tensor, text_probs: Tensor, *, form: ConfidenceForm) -> Tensor:
    """How near p and q are to the same one-hot vector; a sum over the rows.

    Args:
        image_probs: p, (n, K).
        text_probs: q, (n, K).
        form: "published": of log(p . q). "paper": of p . q.
    """
    products = (image_probs * text_probs).sum(dim=1)
    if form == "paper":
        return products.sum()
    return products.clamp_min(torch.finfo(products.dtype).tiny).log().sum()


def confidence_loss(agreement: Tensor, n_rows: Tensor, *, form: ConfidenceForm) -> Tensor:
    """How far p and q are from the same one-hot vector.

    Args:
        agreement: `agreement` of the global batch, in the same form.
        n_rows: of the global batch.
        form: "published": mean of -log(p . q). "paper": -log of the sum of p . q (Eq. 14).
    """
    if form == "paper":
        return -agreement.clamp_min(torch.finfo(agreement.dtype).tiny).log()
    return -agreement / n_rows


def balance_entropy(mean_probs: Tensor) -> Tensor:
    """H(mean p) + H(mean q), natural logarithm (Eq. 15, 16).

    Args:
        mean_probs: means of the columns of p and of q over the global batch, in one vector.
    """
    mean = mean_probs.clamp_min(1e-9)
    return -(mean * mean.log()).sum()


@dataclass(frozen=True, kw_only=True)
class TacLoss:
    """L = L_Dis + L_Con - alpha L_Bal (Eq. 17); the weights of the first two are for Table V."""

    temperature: float
    balance_weight: float
    distillation_form: DistillationForm = "published"
    confidence_form: ConfidenceForm = "published"
    distillation_weight: float = 1.0
    confidence_weight: float = 1.0

    def __call__(
        self, image: Tensor, text: Tensor, neighbor_image: Tensor, neighbor_text: Tensor
    ) -> dict[str, Tensor]:
        """Losses of a batch: `loss` to minimize, and its terms.

        All arguments are cluster_probs of this worker's rows, (n, K): of the anchors in both
        modalities, of an image neighbor and of a text-counterpart neighbor.
        """
        image_gram, text_gram, agreed, columns, n_rows = all_reduce_sums(
            gram(image, neighbor_text),
            gram(text, neighbor_image),
            agreement(image, text, form=self.confidence_form),
            torch.cat([image, text], dim=1).sum(dim=0),
            torch.full_like(image[0, 0], len(image)).detach(),
        )
        t, form = self.temperature, self.distillation_form
        distillation = distillation_loss(image_gram, temperature=t, form=form) + distillation_loss(
            text_gram, temperature=t, form=form
        )
        confidence = confidence_loss(agreed, n_rows, form=self.confidence_form)
        balance = balance_entropy(columns / n_rows)
        return {
            "loss": self.distillation_weight * distillation
            + self.confidence_weight * confidence
            - self.balance_weight * balance,
            "distillation": distillation,
            "confidence": confidence,
            "balance": balance,
        }
