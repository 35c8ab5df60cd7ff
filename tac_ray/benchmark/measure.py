"""Fit every row with every seed, train all heads in one start of Ray Train, and score them."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tac_ray.algorithm.small import check_small
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.store import Store
from tac_ray.benchmark.rows import Case, Row
from tac_ray.config import TacConfig
from tac_ray.encoders.clip import Encoder, EncoderSpec
from tac_ray.encoders.nouns import load_nouns
from tac_ray.index.group import ShardGroup
from tac_ray.pipeline import embed, encoder_spec, for_all_nodes
from tac_ray.plan import n_semantic
from tac_ray.stages.assign_clusters import Model
from tac_ray.stages.build_counterparts import build_counterparts
from tac_ray.stages.cut_graph import check_graph, cut_graph
from tac_ray.stages.embed_nouns import embed_nouns
from tac_ray.stages.find_centroids import find_centroids, find_small_centroids
from tac_ray.stages.find_neighbors import find_neighbors
from tac_ray.stages.fit_head import fit_head
from tac_ray.stages.fit_turtle import fit_turtle
from tac_ray.stages.list_images import list_images
from tac_ray.stages.sample_rows import graph_rows
from tac_ray.stages.score_clusters import score_clusters, score_zero_shot
from tac_ray.stages.select_nouns import select_nouns
from tac_ray.stages.train_heads import HeadTraining, check_batch, train_heads_together

Split = Literal["all", "train", "test"]
Protocol = Literal["fitted on train", "fitted on test"]
"""What k-means was fitted on. The published code fits it on the images that it scores; heads are
always trained on train."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row, with one seed, on one split."""

    case: Case
    row: Row
    seed: int
    split: Split
    protocol: Protocol
    images: Artifact
    """Of embed_images, of the split."""
    scored: Artifact
    """Of score_clusters."""
    seconds: float
    """Of the head's training, of k-means, or of cutting the graph and fitting its head."""

    @property
    def is_papers(self) -> bool:
        """Whether this is the split and the protocol of the paper's numbers."""
        by_kmeans = self.row.method in ("kmeans", "train-free")
        fitted = "fitted on test" if by_kmeans else "fitted on train"
        return self.split == "test" and self.protocol == fitted


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """The images of a case and their embeddings; train and test are the same if it has no test."""

    spec: EncoderSpec
    encoder: Encoder
    splits: dict[Split, tuple[Artifact, Artifact]]
    """Listing and embeddings of each."""

    @property
    def train(self) -> Artifact:
        """Embeddings to fit on."""
        return next(iter(self.splits.values()))[1]


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """A row with a seed: its model, or the training that will give it."""

    case: Case
    row: Row
    seed: int
    seen: _Seen
    model: Model | None = None
    training: HeadTraining | None = None
    class_nouns: Artifact | None = None
    """Embedded names of the classes: the model of "zero-shot"."""
    graph_s: float = 0.0
    """Seconds of cutting the graph that the model was fitted to."""
    counterparts: dict[Split, Artifact] = dataclasses.field(default_factory=dict)
    """Of every split, for models of [t~, v]."""
    on_test: Model | None = None
    """k-means fitted on the test images themselves."""


def measure(
    store: Store, wanted: Sequence[tuple[Case, list[Row]]], *, seeds: Sequence[int]
) -> list[Measurement]:
    """Measure all rows of all cases.

    Artifacts are shared among rows and seeds, and with every run over the same store that asks for
    the same, the precision of the encoder included.

    Args:
        store: where artifacts lie.
        wanted: cases with their rows.
        seeds: of k-means and heads; what depends on none is measured once.

    Raises:
        ValueError: a case has too few images for the clusters or the batch of a row, too many for
            its way to find centroids, or other labels in test than in train.

    Cost: that of the stages, each once for what it depends on.
    """
    fits: list[_Fit] = []
    for case, rows in wanted:
        config = rows[0].config
        seen = _see(store, case, config)
        for row in rows:
            _check_sizes(case, row, seen.train.n_rows)
        with ShardGroup(config.n_shards, config.n_gpus) as index:
            for row in rows:
                for seed in seeds[:1] if row.method == "zero-shot" else seeds:
                    fits.append(_fit(store, index, seen, case, row, seed))
    trainings = [fit.training for fit in fits if fit.training]
    n_gpus = fits[0].row.config.n_gpus
    heads = iter(train_heads_together(store, trainings, n_gpus=n_gpus))
    fits = [
        dataclasses.replace(fit, model=Model(method="tac", artifact=next(heads)))
        if fit.training
        else fit
        for fit in fits
    ]
    return [measurement for fit in fits for measurement in _score(store, fit)]


def _see(store: Store, case: Case, config: TacConfig) -> _Seen:
    data = case.dataset
    options = dataclasses.replace(case.encoder, resize=case.encoder.resize or data.resize)
    config = dataclasses.replace(config, encoder=options, images=data.train, val_images=data.test)
    spec = encoder_spec(config)
    encoder = spec.load()
    spec = for_all_nodes(store, config, spec, encoder)
    places: dict[Split, str] = {"all": data.train}
    if data.test is not None:
        places = {"train": data.train, "test": data.test}
    splits = {}
    for split, place in places.items():
        listing = list_images(store, place, labels=data.labels)
        splits[split] = (listing, embed(store, config, spec, encoder, listing))
    labels = [listing.facts["labels"] for listing, _ in splits.values()]
    if labels[0] != labels[-1]:
        raise ValueError(
            f"{case.title} has {len(labels[0])} labels in train and {len(labels[-1])} in test, "
            "which should be the same; complete the one that lacks some"
        )
    return _Seen(spec=spec, encoder=encoder, splits=splits)


def _check_sizes(case: Case, row: Row, n_images: int) -> None:
    if n_images < row.n_clusters:
        raise ValueError(
            f"n_images={n_images} of {case.title} should be >= n_clusters={row.n_clusters}; "
            "lower --n-clusters"
        )
    if row.config.select_nouns.centroid_method != "kmeans":
        check_small(n_images, row.config.select_nouns.centroid_method)
    if row.method in ("scan", "sic", "tac"):
        check_batch(row.config.train_heads.resolve(row.n_clusters), n_images)
    if row.method == "graph":
        check_graph(row.config.cut_graph, int(row.graph_share * n_images), row.n_clusters)


def _fit(store: Store, index: ShardGroup, seen: _Seen, case: Case, row: Row, seed: int) -> _Fit:
    config = dataclasses.replace(row.config, n_clusters=row.n_clusters, seed=seed)
    images = seen.train
    fit = _Fit(case=case, row=row, seed=seed, seen=seen)

    def clusters_of(*embeddings: Artifact) -> Artifact:
        return find_centroids(
            store,
            config.kmeans,
            index,
            list(embeddings),
            n_centroids=row.n_clusters,
            restarts=config.kmeans.cluster_restarts,
            seed=seed,
            title=row.method,
        )

    def neighbors_of(embeddings: Artifact, title: str) -> Artifact:
        return find_neighbors(
            store, config.find_neighbors, index, embeddings, seed=seed, title=title
        )

    def training(**inputs: Artifact) -> HeadTraining:
        return HeadTraining(
            config=config.train_heads,
            n_clusters=row.n_clusters,
            seed=seed,
            images=images,
            image_neighbors=neighbors_of(images, "image"),
            objective=row.method if row.method in ("scan", "sic") else "tac",  # type: ignore[arg-type]
            **inputs,
        )

    if row.method == "zero-shot":
        return dataclasses.replace(fit, class_nouns=_class_nouns(store, seen, case, config))
    if row.method == "kmeans":
        on_test = None
        if "test" in seen.splits:
            on_test = Model(method="kmeans", artifact=clusters_of(seen.splits["test"][1]))
        model = Model(method="kmeans", artifact=clusters_of(images))
        return dataclasses.replace(fit, model=model, on_test=on_test)
    if row.method == "scan":
        return dataclasses.replace(fit, training=training())
    if row.method == "sic":
        nouns = _nouns(store, seen, config)
        made = training(nouns=nouns, centroids=clusters_of(images))
        return dataclasses.replace(fit, training=made)

    selected = _selected_nouns(store, index, seen, case, row, config)
    counterparts = {
        split: build_counterparts(store, config.build_counterparts, embedded, selected)
        for split, (_, embedded) in seen.splits.items()
        # Heads see the words of the images that they are trained on only.
        if embedded is images or row.method in ("train-free", "turtle")
    }
    fit = dataclasses.replace(fit, counterparts=counterparts)
    words = next(iter(counterparts.values()))
    if row.method == "tac":
        made = training(counterparts=words, text_neighbors=neighbors_of(words, "text"))
        return dataclasses.replace(fit, training=made)
    most = config.cut_graph.max_graph_rows
    if row.method == "turtle":
        rows = graph_rows(store, images, words, most=most, seed=seed)
        turtle = fit_turtle(store, *rows, n_clusters=row.n_clusters, seed=seed)
        return dataclasses.replace(fit, model=Model(method="turtle", artifact=turtle))
    if row.method == "graph":
        most = min(most, int(row.graph_share * images.n_rows))
        rows = graph_rows(store, images, words, most=most, seed=seed)
        neighbors = (neighbors_of(rows[0], "image"), neighbors_of(rows[1], "text"))
        clusters = cut_graph(
            store, config.cut_graph, *rows, *neighbors, selected, n_clusters=row.n_clusters
        )
        head = fit_head(
            store,
            config.fit_head,
            rows[0],
            clusters,
            n_clusters=row.n_clusters,
            seed=seed,
            n_gpus=config.n_gpus,
        )
        model = Model(method="graph", artifact=head)
        return dataclasses.replace(fit, model=model, graph_s=clusters.manifest.seconds)
    on_test = None
    if "test" in seen.splits:
        artifact = clusters_of(counterparts["test"], seen.splits["test"][1])
        on_test = Model(method="train-free", artifact=artifact)
    model = Model(method="train-free", artifact=clusters_of(words, images))
    return dataclasses.replace(fit, model=model, on_test=on_test)


def _selected_nouns(
    store: Store, index: ShardGroup, seen: _Seen, case: Case, row: Row, config: TacConfig
) -> Artifact:
    if row.by_class_names:
        class_nouns = _class_nouns(store, seen, case, config)
        return select_nouns(store, config.select_nouns, None, class_nouns)
    method, centroids = config.select_nouns.centroid_method, None
    n_centroids = n_semantic(config, seen.train.n_rows)
    if method == "kmeans":
        centroids = find_centroids(
            store,
            config.kmeans,
            index,
            [seen.train],
            n_centroids=n_centroids,
            restarts=config.kmeans.centroid_restarts,
            seed=config.seed,
            title="semantic",
        )
    elif method != "none":
        centroids = find_small_centroids(
            store, method, seen.train, n_centroids=n_centroids, seed=config.seed
        )
    return select_nouns(store, config.select_nouns, centroids, _nouns(store, seen, config))


def _nouns(store: Store, seen: _Seen, config: TacConfig) -> Artifact:
    nouns = load_nouns(config.embed_nouns.nouns, config.embed_nouns.noun_form)
    return _embedded(store, seen, config, nouns)


def _class_nouns(store: Store, seen: _Seen, case: Case, config: TacConfig) -> Artifact:
    """The names of the classes, in the order of the listing's labels."""
    labels = next(iter(seen.splits.values()))[0].facts["labels"]
    return _embedded(store, seen, config, [case.dataset.class_names[label] for label in labels])


def _embedded(store: Store, seen: _Seen, config: TacConfig, nouns: list[str]) -> Artifact:
    return embed_nouns(
        store,
        config.embed_nouns,
        seen.spec,
        seen.encoder.text_fingerprint,
        nouns,
        n_gpus=config.n_gpus,
    )


def _score(store: Store, fit: _Fit) -> Iterator[Measurement]:
    for split, (listing, images) in fit.seen.splits.items():
        counterparts = fit.counterparts.get(split)
        models: dict[Protocol, Model | None] = {"fitted on train": fit.model}
        if split == "test" and fit.on_test:
            models["fitted on test"] = fit.on_test
        for protocol, model in models.items():
            if fit.class_nouns:
                scored, seconds = score_zero_shot(store, fit.class_nouns, listing, images), 0.0
            else:
                assert model is not None
                scored = score_clusters(
                    store, model, listing, images, counterparts, n_clusters=fit.row.n_clusters
                )
                seconds = fit.graph_s + model.artifact.manifest.seconds
            yield Measurement(
                case=fit.case,
                row=fit.row,
                seed=fit.seed,
                split=split,
                protocol=protocol,
                images=images,
                scored=scored,
                seconds=seconds,
            )
