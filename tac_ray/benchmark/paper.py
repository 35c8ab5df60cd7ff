"""The numbers of Li et al., ICML 2024: NMI, ACC and ARI in percent, by data set."""

from tac_ray.config import EncoderConfig

Numbers = tuple[float, float, float]
"""NMI, ACC, ARI."""

BACKBONES = {
    "RN50-quickgelu": "ResNet-50",
    "RN101-quickgelu": "ResNet-101",
    "ViT-B-32-quickgelu": "ViT-B/32",
    "ViT-B-16-quickgelu": "ViT-B/16",
}
"""open_clip's names of the paper's encoders, all with OpenAI's weights."""

METHODS: dict[str, dict[str, Numbers]] = {
    "kmeans": {
        "STL-10": (91.7, 94.3, 89.1),
        "CIFAR-10": (70.3, 74.2, 61.6),
        "CIFAR-20": (49.9, 45.5, 28.3),
        "ImageNet-10": (96.9, 98.2, 96.1),
        "ImageNet-Dogs": (39.8, 38.1, 20.1),
        "DTD": (57.3, 42.6, 27.4),
        "UCF-101": (79.5, 58.2, 47.6),
        "ImageNet-1K": (72.3, 38.9, 27.1),
    },
    "zero-shot": {
        "STL-10": (93.9, 97.1, 93.7),
        "CIFAR-10": (80.7, 90.0, 79.3),
        "CIFAR-20": (55.3, 58.3, 39.8),
        "ImageNet-10": (95.8, 97.6, 94.9),
        "ImageNet-Dogs": (73.5, 72.8, 58.2),
        "DTD": (56.5, 43.1, 26.9),
        "UCF-101": (79.9, 63.4, 50.2),
        "ImageNet-1K": (81.0, 63.6, 45.4),
    },
    "scan": {
        "DTD": (59.4, 46.4, 31.7),
        "UCF-101": (79.7, 61.1, 53.1),
        "ImageNet-1K": (74.7, 44.7, 32.4),
    },
    "sic": {
        "STL-10": (95.3, 98.1, 95.9),
        "CIFAR-10": (84.7, 92.6, 84.4),
        "CIFAR-20": (59.3, 58.3, 43.9),
        "ImageNet-10": (97.0, 98.2, 96.1),
        "ImageNet-Dogs": (69.0, 69.7, 55.8),
        "DTD": (59.6, 45.9, 30.5),
        "UCF-101": (81.0, 61.9, 53.6),
        "ImageNet-1K": (77.2, 47.0, 34.3),
    },
    "train-free": {
        "STL-10": (92.3, 94.5, 89.5),
        "CIFAR-10": (80.8, 90.1, 79.8),
        "CIFAR-20": (60.7, 55.8, 42.7),
        "ImageNet-10": (97.5, 98.6, 97.0),
        "ImageNet-Dogs": (75.1, 75.1, 63.6),
        "DTD": (60.1, 45.9, 29.0),
        "UCF-101": (81.6, 61.3, 52.4),
        "ImageNet-1K": (77.8, 48.9, 36.4),
    },
    "tac": {
        "STL-10": (95.5, 98.2, 96.1),
        "CIFAR-10": (84.1, 92.3, 83.9),
        "CIFAR-20": (61.1, 60.7, 44.8),
        "ImageNet-10": (98.5, 99.2, 98.3),
        "ImageNet-Dogs": (80.6, 83.0, 72.2),
        "DTD": (62.1, 50.1, 34.4),
        "UCF-101": (82.3, 68.7, 60.1),
        "ImageNet-1K": (79.9, 58.2, 43.5),
    },
}
"""Tables II and III, ViT-B/32. SCAN's numbers of Table II are not of CLIP and stay out."""

CLASS_NAMES: dict[str, Numbers] = {
    "DTD": (60.8, 48.0, 32.6),
    "UCF-101": (83.0, 71.3, 61.9),
    "ImageNet-1K": (81.2, 63.9, 47.0),
}
"""TAC with class names as nouns (Table III)."""

CENTROIDS: dict[str, dict[str, dict[str, Numbers]]] = {
    "train-free": {
        "kmeans": {"ImageNet-Dogs": (75.1, 75.1, 63.6), "UCF-101": (81.6, 61.3, 52.4)},
        "agglomerative": {"ImageNet-Dogs": (73.4, 72.0, 61.2), "UCF-101": (81.9, 63.7, 54.8)},
        "spectral": {"ImageNet-Dogs": (77.4, 75.2, 65.9), "UCF-101": (82.2, 65.5, 54.7)},
        "dbscan": {"ImageNet-Dogs": (68.8, 64.3, 51.0), "UCF-101": (81.1, 61.8, 52.3)},
        "none": {"ImageNet-Dogs": (70.3, 68.7, 53.6), "UCF-101": (81.3, 63.2, 52.8)},
    },
    "tac": {
        "kmeans": {"ImageNet-Dogs": (80.6, 83.0, 72.2), "UCF-101": (82.3, 68.7, 60.1)},
        "agglomerative": {"ImageNet-Dogs": (78.4, 81.7, 69.5), "UCF-101": (82.4, 69.3, 60.2)},
        "spectral": {"ImageNet-Dogs": (79.2, 83.1, 70.8), "UCF-101": (82.3, 69.1, 60.4)},
        "dbscan": {"ImageNet-Dogs": (75.5, 80.4, 65.5), "UCF-101": (80.6, 66.2, 56.4)},
        "none": {"ImageNet-Dogs": (75.7, 78.7, 66.0), "UCF-101": (81.2, 67.0, 58.3)},
    },
}
"""Table IV."""

LOSS_TERMS: dict[tuple[bool, bool, bool], dict[str, Numbers]] = {
    (True, False, False): {"ImageNet-Dogs": (71.4, 69.5, 38.1), "UCF-101": (69.3, 7.6, 13.6)},
    (False, True, False): {"ImageNet-Dogs": (57.2, 14.3, 24.3), "UCF-101": (52.1, 3.4, 8.6)},
    (False, False, True): {"ImageNet-Dogs": (15.1, 19.3, 4.1), "UCF-101": (43.5, 16.2, 5.7)},
    (True, True, False): {"ImageNet-Dogs": (72.5, 57.0, 45.3), "UCF-101": (55.6, 3.6, 9.9)},
    (True, False, True): {"ImageNet-Dogs": (80.6, 83.5, 72.3), "UCF-101": (70.5, 45.1, 34.5)},
    (False, True, True): {"ImageNet-Dogs": (78.2, 81.8, 69.6), "UCF-101": (81.6, 67.3, 59.1)},
    (True, True, True): {"ImageNet-Dogs": (80.6, 83.0, 72.2), "UCF-101": (82.3, 68.7, 60.1)},
}
"""Table V, by L_Dis, L_Con and L_Bal; which row has which terms is read off the paper's text."""

ENCODERS: dict[str, dict[str, dict[str, Numbers]]] = {
    "kmeans": {
        "ResNet-50": {"ImageNet-Dogs": (35.3, 35.2, 18.9), "UCF-101": (75.9, 53.5, 42.6)},
        "ResNet-101": {"ImageNet-Dogs": (50.5, 47.9, 32.9), "UCF-101": (78.5, 56.3, 46.3)},
        "ViT-B/32": {"ImageNet-Dogs": (39.8, 38.1, 20.1), "UCF-101": (79.5, 58.2, 47.6)},
        "ViT-B/16": {"ImageNet-Dogs": (48.5, 42.3, 29.4), "UCF-101": (81.4, 60.2, 51.9)},
    },
    "train-free": {
        "ResNet-50": {"ImageNet-Dogs": (75.5, 74.7, 62.6), "UCF-101": (76.1, 55.7, 44.4)},
        "ResNet-101": {"ImageNet-Dogs": (76.8, 74.0, 62.8), "UCF-101": (77.9, 59.1, 48.8)},
        "ViT-B/32": {"ImageNet-Dogs": (75.1, 75.1, 63.6), "UCF-101": (81.6, 61.3, 52.4)},
        "ViT-B/16": {"ImageNet-Dogs": (81.3, 80.8, 71.2), "UCF-101": (82.5, 63.3, 54.8)},
    },
    "zero-shot": {
        "ResNet-50": {"ImageNet-Dogs": (76.0, 75.9, 60.6), "UCF-101": (75.2, 59.9, 45.2)},
        "ResNet-101": {"ImageNet-Dogs": (72.9, 73.6, 58.2), "UCF-101": (77.4, 62.0, 48.6)},
        "ViT-B/32": {"ImageNet-Dogs": (73.5, 72.8, 58.2), "UCF-101": (79.9, 63.4, 50.2)},
        "ViT-B/16": {"ImageNet-Dogs": (80.4, 80.4, 68.4), "UCF-101": (81.9, 68.0, 57.0)},
    },
    "tac": {
        "ResNet-50": {"ImageNet-Dogs": (76.1, 79.8, 66.6), "UCF-101": (76.3, 60.6, 49.3)},
        "ResNet-101": {"ImageNet-Dogs": (79.1, 81.4, 70.6), "UCF-101": (79.8, 66.2, 56.1)},
        "ViT-B/32": {"ImageNet-Dogs": (80.6, 83.0, 72.2), "UCF-101": (82.3, 68.7, 60.1)},
        "ViT-B/16": {"ImageNet-Dogs": (82.1, 85.7, 74.5), "UCF-101": (83.3, 70.4, 61.8)},
    },
}
"""Table VI."""


def backbone(encoder: EncoderConfig) -> str | None:
    """The paper's name of an encoder, None if the paper has no numbers with it."""
    return BACKBONES.get(encoder.model) if encoder.pretrained == "openai" else None
