"""Which nouns describe a collection: Eq. 2 and Eq. 4-6 of the paper.

N images, K clusters, k centroids, d embedding width, T nouns.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Precision = Literal["float16", "float32"]

GRADIENT_TEMPERATURE = 0.02
"""Of the softmax behind `gradient_scores`. Similarities of nouns and images differ by some
hundredths: at 1, as in Eq. 4, that softmax is nearly uniform and its gradient says little."""


def n_semantic_centroids(
    n_images: int,
    n_clusters: int,
    *,
    images_per_centroid: int = 300,
    centroids_per_cluster: int = 3,
    max_centroids: int = 20_000,
) -> int:
    """K = max(N / 300, 3 K), at most `max_centroids` and at most N (Eq. 2).

    The cap is not the paper's: past 7 M images five nouns a centroid would exceed the nouns
    there are.
    """
    compact = (2 * n_images + images_per_centroid) // (2 * images_per_centroid)
    wanted = max(compact, centroids_per_cluster * n_clusters)
    return min(wanted, max_centroids, n_images)


def classify_nouns(
    nouns: Tensor, centroids: Tensor, *, precision: Precision = "float32"
) -> tuple[Tensor, Tensor]:
    """Each noun's most probable centroid: argmax and max of p(centroid | noun) (Eq. 4).

    Args:
        nouns: unit-norm text embeddings, (T, d).
        centroids: unit-norm image centroids, (k, d).
        precision: "float16" rounds inputs, similarities and softmax as the published code does,
            whose GPU adds up products of halves in float32; that makes thousands of ties, and
            "float32" does not.

    Returns:
        centroid_id (T,) int64 and confidence (T,) float32.

    Cost: 2 T k d operations; memory T k numbers, so callers pass nouns in batches.
    """
    dtype = torch.float16 if precision == "float16" else torch.float32
    nouns, centroids = nouns.to(dtype).float(), centroids.to(dtype).float()
    similarity = (nouns @ centroids.T).to(dtype)
    confidence, centroid_id = torch.softmax(similarity, dim=1).max(dim=1)
    if precision == "float16":
        # max() of tied halves may return any of them; the first centroid is the stated rule.
        probability = torch.softmax(similarity, dim=1)
        centroid_id = (probability == confidence[:, None]).to(torch.int8).argmax(dim=1)
    return centroid_id, confidence.float()


def gradient_scores(
    nouns: Tensor, centroids: Tensor, *, temperature: float = GRADIENT_TEMPERATURE
) -> tuple[Tensor, Tensor]:
    """Each noun's most probable centroid, and how strongly the noun is pulled towards images.

    The score is the norm of the gradient of a cross-entropy with respect to the noun's embedding,
    between a target distribution over the centroids and the noun's softmax p over them, up to the
    constant 1 / temperature: |sum_c (p_c - 1 / k) s_c|. A noun that is sure of one group of images
    scores high also where several centroids share that group, between which its confidence would
    be divided; a noun that fits all images alike scores 0.

    Source: GradNorm (On the Provable Importance of Gradients for Language-Assisted Image
    Clustering, ICCV 2025, arXiv 2510.16335), of which only the summary could be read. The uniform
    target, the derivative with respect to the noun, the centroids in place of images and the
    temperature are ours.

    Args:
        nouns: unit-norm text embeddings, (T, d).
        centroids: unit-norm image centroids, (k, d).
        temperature: of the softmax.

    Returns:
        centroid_id (T,) int64 and score (T,) float32.

    Cost: 4 T k d operations; memory T k numbers, so callers pass nouns in batches.
    """
    nouns, centroids = nouns.float(), centroids.float()
    probs = torch.softmax(nouns @ centroids.T / temperature, dim=1)
    gradient = probs @ centroids - centroids.mean(dim=0)
    return probs.argmax(dim=1), gradient.norm(dim=1)


def top_nouns_per_centroid(
    centroid_id: Tensor, confidence: Tensor, *, nouns_per_centroid: int
) -> Tensor:
    """Rows of the most confident nouns of every centroid (Eq. 5, 6), ties broken by noun row.

    Args:
        centroid_id: (T,) int64, the centroid of each noun.
        confidence: (T,) float32, its probability.
        nouns_per_centroid: gamma of the paper; centroids with fewer nouns keep what they have.

    Returns:
        Selected noun rows in increasing order, (M,) int64 with M <= gamma k.
    """
    by_confidence = torch.argsort(confidence, descending=True, stable=True)
    order = by_confidence[torch.argsort(centroid_id[by_confidence], stable=True)]
    ids = centroid_id[order]
    starts = torch.searchsorted(ids, ids, side="left")
    rank = torch.arange(len(ids)) - starts
    return order[rank < nouns_per_centroid].sort().values


def mean_over_templates(embeddings: Tensor) -> Tensor:
    """Unit-norm mean of a noun's *unnormalized* embeddings over its prompts.

    Args:
        embeddings: (n_nouns, n_templates, d), as the text tower gives them.

    Returns:
        (n_nouns, d) float32. The published code averages before it normalizes, so a prompt with a
        longer vector counts for more.
    """
    return F.normalize(embeddings.float().mean(dim=1), dim=-1)
