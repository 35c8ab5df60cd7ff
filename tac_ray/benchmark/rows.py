"""The rows of each table: which method, with which options, beside which number of the paper."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from tac_ray.benchmark import paper
from tac_ray.benchmark.datasets import Dataset
from tac_ray.benchmark.paper import Numbers
from tac_ray.config import METHOD_TITLES, EncoderConfig, TacConfig

RowMethod = Literal["kmeans", "zero-shot", "scan", "sic", "train-free", "tac", "turtle", "graph"]
TITLES = {**METHOD_TITLES, "zero-shot": "zero-shot (class names)", "scan": "SCAN", "sic": "SIC"}
CENTROID_METHODS = ("kmeans", "agglomerative", "spectral", "dbscan", "none")
FIGURE_5: dict[str, tuple[float, ...]] = {
    "images_per_centroid": (100, 200, 300, 500, 1000),
    "nouns_per_centroid": (1, 3, 5, 10, 20),
    "retrieval_temperature": (0.001, 0.005, 0.01, 0.02, 0.05),
    "n_neighbors": (10, 20, 50, 100),
    "distillation_temperature": (0.1, 0.5, 1.0, 2.0, 5.0),
    "balance_weight": (0.0, 1.0, 2.0, 5.0, 10.0),
}
"""Options of Figure 5 and their values. Section 4.4 names 300, 3-10, 0.01, 50 and 1 as where each
turns; the values around them are ours."""
JUDGED_SHARE = 0.8
"""Of the images, those that clusters are found in where several K are compared."""
_STAGE_OF: dict[str, str] = {
    "images_per_centroid": "select_nouns",
    "nouns_per_centroid": "select_nouns",
    "retrieval_temperature": "build_counterparts",
    "n_neighbors": "find_neighbors",
    "distillation_temperature": "train_heads",
    "balance_weight": "train_heads",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A data set seen by an encoder."""

    dataset: Dataset
    encoder: EncoderConfig

    @property
    def title(self) -> str:
        """Both in words."""
        model = self.encoder.model.removeprefix("local-dir:").rstrip("/").rpartition("/")[2]
        return f"{self.dataset.name}, {model}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a table, measured with every seed."""

    title: str
    method: RowMethod
    config: TacConfig
    """Options of the stages; images, encoder and seed are the case's and the seed's own."""
    n_clusters: int
    by_class_names: bool = False
    """Take the names of the classes for the nouns."""
    setting: tuple[str, float] | None = None
    """Option and value that this row stands for in a figure."""
    graph_share: float = 1.0
    """Of the images, those whose graph is cut; the seed draws them."""
    paper: Numbers | None = None


Rows = Callable[[Case, TacConfig, TacConfig], list[Row]]
"""The rows of a case, from the options of `reference` and of `best`."""


def main_rows(case: Case, reference: TacConfig, best: TacConfig) -> list[Row]:
    """Tables II and III: baselines, TAC, TAC that is told the class names, and `best`.

    The heads of SCAN and SIC train as long as TAC's, by the same optimizer on the same neighbors.
    `best` sees the embeddings of the other rows.
    """
    config = _published_k(case, reference)
    rows = [
        _row(case, config, method, numbers=_numbers(case, paper.METHODS[method]))
        for method in get_args(RowMethod)
        if method in paper.METHODS and (method != "zero-shot" or case.dataset.class_names)
    ]
    if case.dataset.class_names:
        named = _row(case, config, "tac", numbers=_numbers(case, paper.CLASS_NAMES))
        title = f"{TITLES['tac']} with class names as nouns"
        rows.append(dataclasses.replace(named, title=title, by_class_names=True))
    return [*rows, dataclasses.replace(_row(case, best, "graph"), title="best")]


def option_rows(case: Case, reference: TacConfig, best: TacConfig) -> list[Row]:
    """What `best` is made of, and what it might have been: each alone on top of `reference`."""
    config = _published_k(case, reference)
    plain = _with(config, "cut_graph", text_edges="all", cluster_balance=0.0)
    graphs = {
        "graph of both": plain,
        "graph of images": _with(plain, "cut_graph", text_edges="none"),
        "graph of both, overlap": _with(plain, "cut_graph", edge_weight="overlap"),
        "graph of both, gated": _with(plain, "cut_graph", text_edges="gated"),
        "graph of both, balanced": _with(
            plain, "cut_graph", cluster_balance=best.cut_graph.cluster_balance
        ),
    }
    titled = [(title, "graph", options) for title, options in graphs.items()]
    titled.append((TITLES["turtle"], "turtle", config))
    for score in ("gradient", "transport"):
        scored = _with(config, "select_nouns", noun_score=score)
        for method in ("train-free", "tac"):
            titled.append((f"{TITLES[method]}, nouns by {score}", method, scored))
    return [
        *(_row(case, config, method) for method in ("kmeans", "train-free", "tac")),
        *(
            dataclasses.replace(_row(case, options, method), title=title)  # type: ignore[arg-type]
            for title, method, options in titled
        ),
        dataclasses.replace(_row(case, best, "graph"), title="best"),
    ]


def centroid_rows(case: Case, reference: TacConfig, best: TacConfig) -> list[Row]:
    """Table IV: what finds the semantic centroids."""
    rows = []
    for method in ("train-free", "tac"):
        for way in CENTROID_METHODS:
            config = _with(_published_k(case, reference), "select_nouns", centroid_method=way)
            numbers = _numbers(case, paper.CENTROIDS[method][way])
            row = _row(case, config, method, numbers=numbers)
            rows.append(dataclasses.replace(row, title=f"{row.title}, {way}"))
    return rows


def loss_rows(case: Case, reference: TacConfig, best: TacConfig) -> list[Row]:
    """Table V: which terms the loss has."""
    rows = []
    for (distillation, confidence, balance), numbers in paper.LOSS_TERMS.items():
        config = _with(
            _published_k(case, reference),
            "train_heads",
            distillation_weight=float(distillation),
            confidence_weight=float(confidence),
            balance_weight=reference.train_heads.balance_weight if balance else 0.0,
        )
        there = {"L_Dis": distillation, "L_Con": confidence, "L_Bal": balance}
        row = _row(case, config, "tac", numbers=_numbers(case, numbers))
        title = " + ".join(name for name, used in there.items() if used)
        rows.append(dataclasses.replace(row, title=title))
    return rows


def encoder_rows(case: Case, reference: TacConfig, best: TacConfig) -> list[Row]:
    """Table VI: the same methods with each encoder."""
    rows = []
    for method in ("kmeans", "train-free", "zero-shot", "tac"):
        if method == "zero-shot" and not case.dataset.class_names:
            continue
        known = paper.ENCODERS[method].get(paper.backbone(case.encoder) or "", {})
        numbers = known.get(case.dataset.name)
        rows.append(_row(case, _published_k(case, reference), method, numbers=numbers))
    return rows


def figure_5_rows(case: Case, reference: TacConfig, best: TacConfig) -> list[Row]:
    """Figure 5: one option at a time; those of the heads say nothing of TAC without training."""
    rows = []
    for option, values in FIGURE_5.items():
        stage = _STAGE_OF[option]
        base = _published_k(case, reference)
        if option == "images_per_centroid":
            base = _with(base, "select_nouns", n_centroids=None)
        for value in values:
            kind = type(getattr(getattr(base, stage), option) or 0.0)
            config = _with(base, stage, **{option: kind(value)})
            for method in ("train-free", "tac"):
                if method == "train-free" and stage in ("find_neighbors", "train_heads"):
                    continue
                row = _row(case, config, method)
                title = f"{row.title}, {option.replace('_', ' ')} {value:g}"
                rows.append(dataclasses.replace(row, title=title, setting=(option, value)))
    return rows


def n_clusters_rows(n_clusters: Sequence[int]) -> Rows:
    """The default method with each of several K, for each seed on other images.

    Clusters that are found again in other images are more than an accident of those (Ben-Hur,
    Elisseeff, Guyon, 2002); the cut itself takes no random number.
    """

    def rows(case: Case, reference: TacConfig, best: TacConfig) -> list[Row]:
        row = dataclasses.replace(_row(case, best, "graph"), graph_share=JUDGED_SHARE)
        return [dataclasses.replace(row, title=f"{k} clusters", n_clusters=k) for k in n_clusters]

    return rows


def _row(
    case: Case, config: TacConfig, method: RowMethod, *, numbers: Numbers | None = None
) -> Row:
    return Row(
        title=TITLES[method],
        method=method,
        config=config,
        n_clusters=case.dataset.n_clusters,
        paper=numbers,
    )


def _with(config: TacConfig, stage: str, **options: Any) -> TacConfig:
    """The same with other options of one stage."""
    changed = dataclasses.replace(getattr(config, stage), **options)
    return dataclasses.replace(config, **{stage: changed})


def _published_k(case: Case, config: TacConfig) -> TacConfig:
    """With the number of semantic centroids that the published code takes for the data set."""
    if config.select_nouns.n_centroids is not None:
        return config
    return _with(config, "select_nouns", n_centroids=case.dataset.n_centroids)


def _numbers(case: Case, by_dataset: dict[str, Numbers]) -> Numbers | None:
    """The paper's numbers of a table that has one encoder, ViT-B/32, for this case."""
    known = paper.backbone(case.encoder) == "ViT-B/32"
    return by_dataset.get(case.dataset.name) if known else None
