"""Every option of a run: one frozen dataclass per stage, and `TacConfig` around them.

`best()` is the default, `reference()` computes what the paper's published code computes; a variant
of either is `dataclasses.replace`. Options that cannot change a result (worker counts, sizes of
inference batches) are marked, and stay out of the artifacts' fingerprints.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from tac_ray.algorithm.losses import ConfidenceForm, DistillationForm
from tac_ray.algorithm.nouns import Precision

Method = Literal["kmeans", "train-free", "tac", "turtle", "graph"]
METHOD_TITLES: dict[str, str] = {
    "kmeans": "k-means on embeddings",
    "train-free": "TAC without training",
    "tac": "TAC",
    "turtle": "TURTLE",
    "graph": "graph of images and words",
}


def _unhashed(default: Any) -> Any:
    return field(default=default, metadata={"changes_result": False})


def _added(default: Any) -> Any:
    """An option that is younger than artifacts people keep: its default leaves their hashes."""
    return field(default=default, metadata={"hash_default": False})


def _at_least(config: Any, **least: float) -> None:
    for name, minimum in least.items():
        value = getattr(config, name)
        if value is None or value is tyro.MISSING:
            continue
        if not value >= minimum:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{name}={value} should be >= {minimum}; change {flag}")


def _above_0(config: Any, name: str) -> None:
    value = getattr(config, name)
    if value is not None and not value > 0:
        raise ValueError(f"{name}={value} should be > 0; change --{name.replace('_', '-')}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which dual encoder, and how it sees images."""

    model: str = "ViT-B-32-quickgelu"
    """open_clip architecture, or `local-dir:PATH` or `hf-hub:NAME`, which bring their weights."""
    pretrained: str | None = "openai"
    """open_clip tag or path of the weights; not used with `local-dir:` and `hf-hub:`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of both towers; auto is fp16 on CUDA, on CPU bf16 if it computes in it."""
    resize: int | None = None
    """Resize the short side to this before the crop; default is the encoder's own size."""
    compile: bool = False
    """Compile the image tower (torch.compile): a minute more to start, faster on GPUs after it."""
    decode_on_gpu: bool = False
    """Decode plain JPEGs on the GPU (nvImageCodec), where the CPU cannot keep up with it."""


@dataclass(frozen=True, kw_only=True)
class EmbedImagesConfig:
    """How images become sealed parts of embeddings."""

    part_rows: int = 32_768
    """Rows of a part, at most; parts are equal. Blocks of arithmetic are cut at parts, so it enters
    the bits."""
    image_batch_size: int | None = _unhashed(None)
    """Images a forward pass; every batch is padded to it. Default 256 on a GPU, 16 on CPU, where
    larger ones leave the cache."""
    n_encoders: int | None = _unhashed(None)
    """Encoder actors; default is one per GPU, or one on CPU."""
    max_failures: float = _unhashed(0.5)
    """Stop when more images than this cannot be read: a share of them below 1, a count from 1."""

    def __post_init__(self) -> None:
        _at_least(self, part_rows=1, image_batch_size=1, n_encoders=1, max_failures=0)


@dataclass(frozen=True, kw_only=True)
class EmbedNounsConfig:
    """Which nouns, and how they are prompted."""

    nouns: str = "wordnet"
    """wordnet (all nouns of WordNet 3.0), short (about 8,000 visible things), or a text file
    with one noun a line, such as the class names."""
    noun_form: Literal["clean", "raw"] = "clean"
    """clean: distinct nouns, underscores to spaces. raw: every (synset, lemma) row as it is."""
    text_batch_size: int | None = _unhashed(None)
    """Prompts a forward pass. Default 256 on a GPU, 64 on CPU, where larger ones leave the cache
    and hold more padding."""

    def __post_init__(self) -> None:
        _at_least(self, text_batch_size=1)


@dataclass(frozen=True, kw_only=True)
class KMeansConfig:
    """Spherical k-means, for the semantic centroids and for the answer without training."""

    max_iterations: int = 300
    """Passes over all rows a restart, at most."""
    tolerance: float = 1e-5
    """Stop a restart when the objective improves by less than this share; 0: when it no longer
    improves at all."""
    centroid_restarts: int = 3
    """Restarts for the semantic centroids; the best objective wins."""
    cluster_restarts: int = 20
    """Restarts for the final clusters without training."""
    max_points_per_centroid: int | None = None
    """Fit on a sample of at most this many rows a centroid (FAISS silently takes 256); default
    all rows."""
    seeding: Literal["random", "spread"] = "random"
    """Start from random rows, or from rows far apart (k-means++ among ten random ones a centroid).
    """
    prune: bool = True
    """Let passes on CPU skip centroids that are unlikely to be the nearest, where that is faster;
    the last pass compares all."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            max_iterations=1,
            tolerance=0,
            centroid_restarts=1,
            cluster_restarts=1,
            max_points_per_centroid=1,
        )


@dataclass(frozen=True, kw_only=True)
class SelectNounsConfig:
    """The text space: semantic centroids and their nouns (Eq. 2-6)."""

    centroid_method: Literal["kmeans", "agglomerative", "spectral", "dbscan", "none"] = "kmeans"
    """What finds the semantic centroids. All but kmeans are for comparison on small collections;
    none keeps all nouns, whatever their score."""
    n_centroids: int | None = None
    """k; default max(N / images_per_centroid, centroids_per_cluster * K) (Eq. 2)."""
    images_per_centroid: int = 300
    """Images that the same nouns can describe."""
    centroids_per_cluster: int = 3
    """Semantic centroids a cluster has at least."""
    max_centroids: int = 20_000
    """Upper bound of the formula."""
    nouns_per_centroid: int = 5
    """gamma."""
    selection_precision: Precision = "float32"
    """Arithmetic of Eq. 4; float16 gives the published code's ties."""
    noun_score: Literal["confidence", "gradient", "transport"] = _added("confidence")
    """How a noun is found good. confidence: Eq. 4; gradient: by how strongly it is pulled towards
    one group of images (after GradNorm); transport: Eq. 4 after optimal transport, by which each
    centroid draws nouns in proportion to its images (after CAE)."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            n_centroids=1,
            images_per_centroid=1,
            centroids_per_cluster=1,
            max_centroids=1,
            nouns_per_centroid=1,
        )


@dataclass(frozen=True, kw_only=True)
class BuildCounterpartsConfig:
    """Text counterparts of images (Eq. 7, 8)."""

    retrieval_temperature: float = 0.005
    """tau~; smaller is closer to the single nearest noun."""
    counterpart_precision: Precision = "float32"
    """Arithmetic of Eq. 7; float16 rounds where the published code does."""

    def __post_init__(self) -> None:
        _above_0(self, "retrieval_temperature")


@dataclass(frozen=True, kw_only=True)
class FindNeighborsConfig:
    """Nearest neighbors of images and of their text counterparts."""

    n_neighbors: int = 50
    """N^."""
    self_neighbor: Literal["row", "first_column"] = "row"
    """How an image is kept from being its own neighbor: by its row, or by dropping the first
    result (published code; wrong for duplicates)."""
    search: Literal["auto", "exact", "join"] = "auto"
    """exact compares all pairs; join compares those in nearby lists, and misses a few; auto is
    exact up to `exact_up_to` images."""
    exact_up_to: int = 300_000
    """Images that auto compares exactly: some minutes on 8 cores, growing with the square."""
    recall: float = 0.95
    """Share of the true neighbors that a join should find."""

    def __post_init__(self) -> None:
        _at_least(self, n_neighbors=1, exact_up_to=0)
        if not 0 < self.recall <= 1:
            raise ValueError(
                f"recall={self.recall} should be above 0 and at most 1; change --recall"
            )

    def joins(self, n_rows: int) -> bool:
        """Whether neighbors of so many rows are found by a join."""
        return self.search == "join" or (self.search == "auto" and n_rows > self.exact_up_to)


@dataclass(frozen=True, kw_only=True)
class TrainHeadsConfig:
    """Cluster heads (Eq. 9-17). The defaults of the first three follow K, as in the paper."""

    epochs: int | None = None
    """Default 20 up to K = 100, 100 above."""
    batch_size: int | None = None
    """Global batch over all workers, at most N; default 512 up to K = 100, 8192 above."""
    distillation_temperature: float | None = None
    """tau^; default 0.5 up to K = 100, 5.0 above."""
    batch_over_n: Literal["shrink", "refuse"] = "shrink"
    """What to do with a batch larger than N: make it N, or refuse (the published code would make
    no step)."""
    balance_weight: float = 5.0
    """alpha."""
    distillation_weight: float = _added(1.0)
    """Of L_Dis; 0 leaves it out."""
    confidence_weight: float = _added(1.0)
    """Of L_Con; 0 leaves it out."""
    learning_rate: float = 1e-3
    """Of Adam, without schedule."""
    beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    beta2: float = 0.99
    """Adam's decay of the mean squared gradient."""
    distillation_form: DistillationForm = "published"
    """published: negatives of both modalities, mean; paper: Eq. 11-13."""
    confidence_form: ConfidenceForm = "published"
    """published: mean of -log(p . q); paper: Eq. 14."""
    products: Literal["fp32", "bf16"] = "fp32"
    """Precision of the products of matrices, which are summed up in fp32; all else is fp32. bf16 is
    about twice as fast where the processor computes in it, and the number of workers then enters
    the result by more than fp32's rounding."""
    stable_below: float | None = None
    """End once a smaller share of the images changes cluster in an epoch; default: never."""
    n_workers: int | None = _unhashed(None)
    """Training workers; default is one per GPU, or one on CPU."""
    min_workers: int | None = _unhashed(None)
    """Begin, and go on after losing machines, with as few as these; default: all."""
    checkpoint_every: int = _unhashed(10)
    """Epochs between checkpoints."""
    tensorboard: str | None = _unhashed(None)
    """Folder on the driver's machine for TensorBoard's event files; default: none."""

    def __post_init__(self) -> None:
        _at_least(
            self,
            epochs=1,
            batch_size=2,
            n_workers=1,
            min_workers=1,
            checkpoint_every=1,
            balance_weight=0,
            distillation_weight=0,
            confidence_weight=0,
            stable_below=0,
        )
        _above_0(self, "distillation_temperature")

    def resolve(self, n_clusters: int) -> "TrainHeadsConfig":
        """The same with the defaults that follow K filled in."""
        large = n_clusters > 100
        return dataclasses.replace(
            self,
            epochs=self.epochs or (100 if large else 20),
            batch_size=self.batch_size or (8192 if large else 512),
            distillation_temperature=self.distillation_temperature or (5.0 if large else 0.5),
        )


@dataclass(frozen=True, kw_only=True)
class CutGraphConfig:
    """The graph of neighbors, and how it is cut into clusters."""

    n_edges: int = 40
    """Neighbors of each kind that an image is joined with, of those that were found."""
    edge_weight: Literal["similarity", "overlap"] = "similarity"
    """What an edge weighs. similarity: how alike its ends look; overlap: that times how far they
    mean the same nouns (after NTK-SC)."""
    text_edges: Literal["gated", "all", "none"] = "gated"
    """Edges to neighbors of the text counterpart. gated: weakened to the share of images that words
    say something about; all: as strong as those of images; none: images alone."""
    significance: float = 0.5
    """How often a noun would stand out from the others for an image that none fits (Grubbs' test),
    for gated edges: at 0.5 they weigh half where words say no more than chance."""
    cluster_balance: float = 0.4
    """How much clusters of equal sizes are worth beside similar images; 0: nothing."""
    max_graph_rows: int = 50_000
    """Cut the graph of a sample of so many images where there are more; the head tells the cluster
    of the others. TURTLE is fitted to the same."""

    def __post_init__(self) -> None:
        _at_least(self, n_edges=1, cluster_balance=0, max_graph_rows=2)
        if not 0 < self.significance < 1:
            raise ValueError(
                f"significance={self.significance} should be between 0 and 1; change --significance"
            )


@dataclass(frozen=True, kw_only=True)
class FitHeadConfig:
    """The head that is fitted to the clusters of a graph."""

    head_epochs: int = 5
    """Passes over the rows of the graph; more where they are few."""
    head_batch_size: int = 256
    """Rows a step, at most all."""

    def __post_init__(self) -> None:
        _at_least(self, head_epochs=1, head_batch_size=2)


_Flat = tyro.conf.OmitArgPrefixes


@dataclass(frozen=True, kw_only=True)
class TacConfig:
    """A whole run, from a folder or bucket of images to the table of named clusters."""

    images: str
    """Folder or s3:// prefix of images (a tree with one folder a class is scored), of tar shards,
    of Parquet tables of uris, image bytes or embeddings; or one such file, or a .txt of uris."""
    n_clusters: int
    """K, how many clusters to find."""
    out: str
    """Folder or s3:// prefix of this run's results."""
    store: str | None = _unhashed(None)
    """Where artifacts are kept and shared by runs; default `artifacts` beside --out."""
    val_images: str | None = None
    """More images to assign without training on them, and to score if labeled."""
    labels: Literal["auto", "folder", "none"] = "auto"
    """Where labels come from. folder: the first folder below --images. auto: what tars (.cls, .txt)
    and tables (column label) say, else the folder if every image lies in one."""
    methods: tuple[Method, ...] = ("kmeans", "train-free", "graph")
    """What to run; the last is the answer in `clusters/`, the others lie beside it."""
    match_run: str | None = None
    """--out of an earlier run over some of the same images: clusters that are found again keep the
    ids and names they had there."""
    seed: int = 0
    """Of k-means, of the heads and of their samples."""
    n_gpus: int | None = _unhashed(None)
    """GPUs to use, for which an autoscaled cluster starts nodes; default those it has."""
    n_shards: int | None = _unhashed(None)
    """Index actors; default one per node or GPU."""
    replace: bool = _unhashed(False)
    """Replace the run of other options that --out holds."""
    verbose: bool = _unhashed(False)
    """Show Ray's own log lines."""
    encoder: Annotated[EncoderConfig, _Flat] = EncoderConfig()
    embed_images: Annotated[EmbedImagesConfig, _Flat] = EmbedImagesConfig()
    embed_nouns: Annotated[EmbedNounsConfig, _Flat] = EmbedNounsConfig()
    kmeans: Annotated[KMeansConfig, _Flat] = KMeansConfig()
    select_nouns: Annotated[SelectNounsConfig, _Flat] = SelectNounsConfig()
    build_counterparts: Annotated[BuildCounterpartsConfig, _Flat] = BuildCounterpartsConfig()
    find_neighbors: Annotated[FindNeighborsConfig, _Flat] = FindNeighborsConfig()
    train_heads: Annotated[TrainHeadsConfig, _Flat] = TrainHeadsConfig()
    cut_graph: Annotated[CutGraphConfig, _Flat] = CutGraphConfig()
    fit_head: Annotated[FitHeadConfig, _Flat] = FitHeadConfig()

    def __post_init__(self) -> None:
        _at_least(self, n_clusters=2, n_gpus=1, n_shards=1, seed=0)
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise ValueError(
                f"methods={self.methods} should name each of {', '.join(METHOD_TITLES)} "
                "at most once and one at least; change --methods"
            )
        n_edges, n_neighbors = self.cut_graph.n_edges, self.find_neighbors.n_neighbors
        if "graph" in self.methods and n_edges > n_neighbors:
            raise ValueError(
                f"n_edges={n_edges} should be <= n_neighbors={n_neighbors}; lower --n-edges or "
                "raise --n-neighbors"
            )

    @property
    def answer(self) -> Method:
        """The method whose table is the run's answer."""
        return self.methods[-1]


def best(**options: Any) -> TacConfig:
    """The published text space with its faults repaired, and the graph of it (the default)."""
    return TacConfig(**options)


def reference(**options: Any) -> TacConfig:
    """What the published code computes, to compare with its figures.

    One option a difference: noun rows, k-means on a sample with fixed restarts, half precision in
    Eq. 4 and 7, neighbors without the first column.
    """
    published: dict[str, Any] = {
        "methods": ("kmeans", "train-free", "tac"),
        "encoder": EncoderConfig(precision="fp32"),
        "embed_nouns": EmbedNounsConfig(noun_form="raw"),
        "kmeans": KMeansConfig(
            tolerance=0.0,
            centroid_restarts=10,
            cluster_restarts=20,
            max_points_per_centroid=256,
        ),
        "select_nouns": SelectNounsConfig(selection_precision="float16"),
        "build_counterparts": BuildCounterpartsConfig(counterpart_precision="float16"),
        "find_neighbors": FindNeighborsConfig(self_neighbor="first_column"),
        "train_heads": TrainHeadsConfig(batch_over_n="refuse"),
    }
    return TacConfig(**{**published, **options})


def from_dict(options: dict[str, Any]) -> TacConfig:
    """The configuration that run.json holds; what is younger than the run has its default."""
    values = dict(options)
    for spec in dataclasses.fields(TacConfig):
        if dataclasses.is_dataclass(spec.default):
            values[spec.name] = type(spec.default)(**options.get(spec.name, {}))
    values["methods"] = tuple(options["methods"])
    return TacConfig(**values)
