"""What TAC is compared with: SCAN's clustering loss and SIC, as one head on image embeddings.

K clusters, d embedding width, T nouns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tac_ray.algorithm.distributed import all_reduce_sums
from tac_ray.algorithm.head import ImageHead
from tac_ray.algorithm.losses import agreement, balance_entropy, confidence_loss
from tac_ray.algorithm.nouns import top_nouns_per_centroid

NEAR_NOUNS = 500
"""Nouns of each image centroid that SIC's semantic space takes."""
NOUNS_PER_CENTER = 5
"""Nouns whose mean is a semantic center of SIC; as TAC's gamma."""
BATCH_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class ScanLoss:
    """Neighbors agree and clusters are even: mean of -log(p . q) - weight * H(mean p).

    The semantic clustering loss of SCAN (Van Gansbeke et al., ECCV 2020), whose weight is 5.
    """

    balance_weight: float

    def __call__(self, image: Tensor, neighbor: Tensor) -> dict[str, Tensor]:
        """Losses of a batch: `loss` to minimize, and its terms.

        Args:
            image: cluster_probs p of this worker's anchors, (n, K).
            neighbor: cluster_probs q of an image neighbor of each, (n, K).
        """
        agreed, columns, n_rows = all_reduce_sums(
            agreement(image, neighbor, form="published"),
            image.sum(dim=0),
            torch.full_like(image[0, 0], len(image)).detach(),
        )
        consistency = confidence_loss(agreed, n_rows, form="published")
        balance = balance_entropy(columns / n_rows)
        return {
            "loss": consistency - self.balance_weight * balance,
            "consistency": consistency,
            "balance": balance,
        }


@dataclass(frozen=True, kw_only=True)
class SicLoss:
    """SCAN's loss and, beside it, the cross-entropy with the semantic centers' pseudo-labels.

    The three terms of SIC (Cai et al., AAAI 2023). Its weights were tuned for each data set; a
    weight of 1 for the pseudo-labels is ours.
    """

    balance_weight: float
    semantic_weight: float = 1.0

    def __call__(self, image: Tensor, neighbor: Tensor, pseudo_label: Tensor) -> dict[str, Tensor]:
        """Losses of a batch, as of `ScanLoss`, and `semantic`.

        Args:
            image: cluster_probs of this worker's anchors, (n, K).
            neighbor: cluster_probs of an image neighbor of each, (n, K).
            pseudo_label: cluster that the semantic centers give each anchor, (n,); -1 for none.
        """
        found = ScanLoss(balance_weight=self.balance_weight)(image, neighbor)
        labeled = pseudo_label >= 0
        probs = image.gather(1, pseudo_label.clamp_min(0)[:, None])[:, 0]
        logs = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
        total, n_labeled = all_reduce_sums(
            torch.where(labeled, logs, 0).sum(), labeled.sum().to(image.dtype)
        )
        semantic = -total / n_labeled.clamp_min(1)
        return {
            **found,
            "loss": found["loss"] + self.semantic_weight * semantic,
            "semantic": semantic,
        }


class SicHead(ImageHead):
    """An image head, and the semantic centers that tell it which cluster an image should have.

    SIC's adjusted mapping: before each epoch but the first, a cluster's most confident images give
    its image centroid, the nouns nearest to that one give its semantic center, and an image's
    pseudo-label is the nearest semantic center. Ours, where the paper leaves it open or tunes it:
    N / 2K images and 5 nouns a cluster; and the head has a hidden layer as TAC's have, so that it
    cannot begin as the image centroids.
    """

    def __init__(self, width: int, n_clusters: int, nouns: Tensor, *, seed: int = 0) -> None:
        super().__init__(width, n_clusters, seed=seed)
        self._n_clusters = n_clusters
        self.nouns: Tensor
        self.register_buffer("nouns", nouns, persistent=False)
        self.centers: Tensor | None = None

    def forward(self, image: Tensor, text: None = None) -> tuple[Tensor, ...]:
        """As of `ImageHead`, and the anchors' pseudo-labels (n,), -1 in the first epoch."""
        probs, neighbor_probs = super().forward(image)
        anchors = image[:, 0]
        if self.centers is None:
            return probs, neighbor_probs, torch.full_like(anchors[:, 0], -1, dtype=torch.long)
        with torch.autocast(image.device.type, enabled=False):
            return probs, neighbor_probs, (anchors @ self.centers.T).argmax(dim=1)

    @torch.no_grad()
    def move_centers(self, images: Tensor) -> None:
        """Move the semantic centers to where the head now sees its clusters.

        Args:
            images: all embeddings, (N, d) float16.

        Cost: 2 N d (d + K) operations, the same on each worker.
        """
        was_training = self.training
        self.eval()
        found = [
            self.image(batch.to(self.nouns.device).float()).max(dim=1)
            for batch in images.split(BATCH_ROWS)
        ]
        self.train(was_training)
        self.centers = semantic_centers(
            images,
            torch.cat([f.indices for f in found]).cpu(),
            torch.cat([f.values for f in found]).cpu(),
            self.nouns,
            n_clusters=self._n_clusters,
            n_confident=max(1, len(images) // (2 * self._n_clusters)),
        )


def semantic_space(nouns: Tensor, centroids: Tensor) -> Tensor:
    """Rows of the nouns that SIC looks at: near an image centroid, and unlike the average noun.

    The paper keeps nouns by both rules with thresholds of its own; that the less unique half of
    the near ones goes is ours.

    Args:
        nouns: unit-norm text embeddings, (T, d).
        centroids: unit-norm centroids of the images by k-means with K, (K, d).

    Returns:
        Noun rows in increasing order, (M,) int64 with M <= 500 K.

    Cost: 2 T K d operations; memory 4 T d bytes and 4 T for a centroid at a time.
    """
    nouns = nouns.float()
    n_near = min(NEAR_NOUNS, len(nouns))
    near = torch.cat([(nouns @ centroid).topk(n_near).indices for centroid in centroids.float()])
    near = near.unique()
    likeness = nouns[near] @ functional.normalize(nouns.mean(dim=0), dim=0)
    unique = likeness.argsort(stable=True)[: (len(near) + 1) // 2]
    return near[unique].sort().values


def semantic_centers(
    images: Tensor,
    cluster_id: Tensor,
    confidence: Tensor,
    nouns: Tensor,
    *,
    n_clusters: int,
    n_confident: int,
) -> Tensor:
    """The direction in words of each cluster, (K, d) float32; zero for an empty one.

    Args:
        images: embeddings, (N, d).
        cluster_id: of each, (N,) int64.
        confidence: probability of it, (N,).
        nouns: embeddings of the semantic space, (M, d).
        n_clusters: K.
        n_confident: images of a cluster whose mean is its image centroid, at most.
    """
    rows = top_nouns_per_centroid(cluster_id, confidence, nouns_per_centroid=n_confident)
    confident = images[rows.to(images.device)].to(nouns.device, torch.float32)
    sums = torch.zeros(n_clusters, images.shape[1], device=nouns.device)
    sums.index_add_(0, cluster_id[rows].to(nouns.device), confident)
    similarity = functional.normalize(sums, dim=1) @ nouns.float().T
    nearest = similarity.topk(min(NOUNS_PER_CENTER, len(nouns)), dim=1).indices
    centers = functional.normalize(nouns.float()[nearest].mean(dim=1), dim=1)
    return torch.where(sums.any(dim=1, keepdim=True), centers, 0.0)
