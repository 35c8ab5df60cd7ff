"""The stages in order: from a folder or bucket of images to named clusters."""

import dataclasses
import json
import logging
import os
import posixpath
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data

from tac_ray.algorithm.small import check_small
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.run import RUN_FILE, Run
from tac_ray.artifacts.storage import Folder, absolute, is_local
from tac_ray.artifacts.store import Progress, Store, result_options
from tac_ray.cluster import Cluster, lost_nodes, nodes_without
from tac_ray.config import EncoderConfig, Method, TacConfig, from_dict
from tac_ray.encoders.clip import Encoder, EncoderSpec, resolve_precision
from tac_ray.encoders.nouns import load_nouns
from tac_ray.index.group import ShardGroup
from tac_ray.plan import make_plan, n_semantic
from tac_ray.progress import ConsoleProgress
from tac_ray.report.page import write_page
from tac_ray.report.pictures import report
from tac_ray.stages.assign_clusters import Model, assign_clusters
from tac_ray.stages.build_counterparts import build_counterparts
from tac_ray.stages.cut_graph import check_graph, cut_graph
from tac_ray.stages.embed_images import embed_images
from tac_ray.stages.embed_nouns import embed_nouns
from tac_ray.stages.evaluate import evaluate, read_scores
from tac_ray.stages.find_centroids import find_centroids, find_small_centroids
from tac_ray.stages.find_neighbors import find_neighbors
from tac_ray.stages.fit_head import fit_head
from tac_ray.stages.fit_turtle import fit_turtle
from tac_ray.stages.import_embeddings import import_embeddings
from tac_ray.stages.list_images import check_place, list_images
from tac_ray.stages.match_clusters import MATCHING_FILE, match_clusters
from tac_ray.stages.parts import map_parts
from tac_ray.stages.sample_rows import graph_rows
from tac_ray.stages.select_nouns import select_nouns
from tac_ray.stages.share_encoder import share_encoder
from tac_ray.stages.train_heads import check_batch, train_heads

PROTOCOLS: dict[str, str] = {
    "kmeans": "k-means fitted on the embeddings of --images; other splits by nearest centroid",
    "train-free": "k-means fitted on [t~, v] of --images; other splits by nearest centroid",
    "tac": "heads trained on --images; other splits by the image head",
    "turtle": "linear heads fitted on --images or a sample of them; all splits by the heads",
    "graph": "graph of --images or a sample cut, a head fitted to it; all splits by the head",
    "kmeans@val": "k-means fitted on the embeddings of the scored split (published protocol)",
    "train-free@val": "k-means fitted on [t~, v] of the scored split (published protocol)",
}


def run(config: TacConfig, progress: Progress | None = None) -> Run:
    """Cluster a collection.

    Finished stages are found in the store and not run again, so the same call goes on where a
    killed one stopped.

    Args:
        config: what to do; `tac_ray.best(...)` or `tac_ray.reference(...)`.
        progress: who is told; default prints to the terminal.

    Returns:
        The run, with its table as `clusters`, an Arrow dataset.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: bad input, before any long work.
    """
    config = absolute_paths(config)
    steps = _Steps(config, progress or ConsoleProgress())
    store = steps.store

    for place in (config.images, config.val_images):
        if place is not None:
            check_place(place)
    noun_list = load_nouns(config.embed_nouns.nouns, config.embed_nouns.noun_form)
    earlier = _run_to_match(config)
    with ray_session(config.verbose):
        listing = list_images(store, config.images, labels=config.labels)
        _check_sizes(config, listing.n_rows)
        if config.val_images:
            list_images(store, config.val_images, labels=config.labels)
        spec = encoder_spec(config)
        encoder = spec.load()
        plan = make_plan(
            config,
            Cluster.connected(config.n_gpus),
            n_images=listing.n_rows,
            n_nouns=len(noun_list),
            width=encoder.width,
        )
        plan.check()
        steps.progress.say(plan.line())
        spec = for_all_nodes(store, config, spec, encoder)

        # The run begins to exist here, so that one refused above can be put right and repeated.
        steps.add("list_images", listing)
        images = steps.add("embed_images", embed(store, config, spec, encoder, listing))
        _check_sizes(config, images.n_rows)
        nouns = steps.add(
            "embed_nouns",
            embed_nouns(
                store,
                config.embed_nouns,
                spec,
                encoder.text_fingerprint,
                noun_list,
                n_gpus=config.n_gpus,
            ),
        )
        with ShardGroup(config.n_shards, config.n_gpus) as index:
            centroids = _semantic_centroids(steps, index, images)
            selected = steps.add(
                "select_nouns", select_nouns(store, config.select_nouns, centroids, nouns)
            )
            counterparts = steps.add(
                "build_counterparts",
                build_counterparts(store, config.build_counterparts, images, selected),
            )
            models = _cluster_without_training(steps, index, images, counterparts)
            joined = {
                method: _with_neighbors(steps, index, *rows)
                for method, rows in _rows_to_join(steps, images, counterparts).items()
            }
        if "tac" in joined:
            heads = train_heads(
                store,
                config.train_heads,
                *joined["tac"],
                n_clusters=config.n_clusters,
                seed=config.seed,
                n_gpus=config.n_gpus,
            )
            models["tac"] = Model(method="tac", artifact=steps.add("train_heads", heads))
        if "turtle" in config.methods:
            most = config.cut_graph.max_graph_rows
            turtle = fit_turtle(
                store,
                *graph_rows(store, images, counterparts, most=most, seed=config.seed),
                n_clusters=config.n_clusters,
                seed=config.seed,
            )
            models["turtle"] = Model(method="turtle", artifact=steps.add("fit_turtle", turtle))
        if "graph" in joined:
            clusters = cut_graph(
                store,
                config.cut_graph,
                *joined["graph"],
                selected,
                n_clusters=config.n_clusters,
            )
            steps.add("cut_graph", clusters)
            head = fit_head(
                store,
                config.fit_head,
                joined["graph"][0],
                clusters,
                n_clusters=config.n_clusters,
                seed=config.seed,
                n_gpus=config.n_gpus,
            )
            models["graph"] = Model(method="graph", artifact=steps.add("fit_head", head))
        fitted = Fitted(spec, encoder, selected, models)
        assignments = {
            method: assign_clusters(store, models[method], listing, images, counterparts, selected)
            for method in config.methods
        }
        Folder(config.out).remove(MATCHING_FILE)
        if earlier:
            before = earlier.artifact(f"assign_clusters:{earlier.answer}")
            answer = config.answer
            matching = match_clusters(store, assignments[answer], before)
            steps.add("match_clusters", matching)
            Folder(config.out).write(MATCHING_FILE, matching.folder.read(MATCHING_FILE))
            models[answer] = dataclasses.replace(models[answer], matching=matching)
            assignments[answer] = assign_clusters(
                store, models[answer], listing, images, counterparts, selected
            )
        for method, assignment in assignments.items():
            steps.add(f"assign_clusters:{method}", assignment)
            suffix = "" if method == config.answer else f"-{method}"
            _publish(assignment, config.out, suffix)
        if config.val_images is None:
            splits = {"all": (listing, assignments)}
        else:
            val = _assign_split(
                steps, fitted, config.val_images, assignments, prefix="val/", fit_too=True
            )
            splits = {"train": (listing, assignments), "val": val}
            _publish(val[1][config.answer], config.out, "-val")
        return steps.finish(splits)


def assign(
    run_path: str, *, images: str, out: str, verbose: bool = False, progress: Progress | None = None
) -> Run:
    """Put new images into the clusters of a finished run, without training.

    Args:
        run_path: the `--out` of the run.
        images: folder or prefix of the new images.
        out: where the new table goes.
        verbose: show Ray's own log lines.
        progress: who is told; default prints to the terminal.

    Returns:
        A run that holds the new images' table.

    Raises:
        FileNotFoundError: no run there, or it is not finished.
    """
    earlier = _finished_run(run_path)
    config = dataclasses.replace(
        from_dict(earlier.config),
        images=images,
        out=out,
        val_images=None,
        match_run=None,
        verbose=verbose,
    )
    config = absolute_paths(config)
    steps = _Steps(config, progress or ConsoleProgress(), model_run=earlier.out)
    with ray_session(verbose):
        spec = encoder_spec(config)
        heads = {"tac": "train_heads", "turtle": "fit_turtle", "graph": "fit_head"}
        step = heads.get(config.answer, f"find_centroids:{config.answer}")
        matched = "match_clusters" in earlier.artifacts
        model = Model(
            method=config.answer,
            artifact=earlier.artifact(step),
            matching=earlier.artifact("match_clusters") if matched else None,
        )
        named = earlier.artifact(f"assign_clusters:{config.answer}")
        encoder = spec.load()
        spec = for_all_nodes(steps.store, config, spec, encoder)
        fitted = Fitted(spec, encoder, earlier.artifact("select_nouns"), {config.answer: model})
        split = _assign_split(steps, fitted, config.images, {config.answer: named})
        _publish(split[1][config.answer], config.out, "")
        return steps.finish({"new": split})


def _finished_run(path: str) -> Run:
    run = Run.load(absolute(path))
    if not run.finished:
        raise FileNotFoundError(f"the run at {path} is not finished; run it again to its end")
    return run


def _run_to_match(config: TacConfig) -> Run | None:
    if config.match_run is None:
        return None
    if config.match_run == config.out:
        raise ValueError(
            f"out={config.out} should not be match_run={config.match_run}, which it would replace; "
            "give another --out"
        )
    earlier = _finished_run(config.match_run)
    earlier.artifact(f"assign_clusters:{earlier.answer}")  # there, before any work
    n_clusters, n_earlier = config.n_clusters, earlier.config["n_clusters"]
    if n_clusters < n_earlier:
        raise ValueError(
            f"n_clusters={n_clusters} should be >= n_clusters={n_earlier} of {config.match_run}, "
            "or ids would be lost; raise --n-clusters or leave out --match-run"
        )
    return earlier


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a run needs to see new images as it saw its own."""

    spec: EncoderSpec
    encoder: Encoder
    selected: Artifact
    models: dict[Method, Model]


Split = tuple[Artifact, dict[str, Artifact]]
"""A listing, and its assignments by method."""


class _Steps:
    """The run as it grows: each step is in run.json as soon as it is done."""

    def __init__(self, config: TacConfig, progress: Progress, model_run: str | None = None) -> None:
        self.config, self.progress = config, progress
        beside = posixpath.join(posixpath.dirname(config.out), "artifacts")
        self.store = Store(config.store or beside, progress)
        self._question = {**result_options(config), "model_run": model_run}
        self._refuse_other_run()
        self._artifacts: dict[str, Artifact] = {}
        self._seconds: dict[str, float] = {}
        self._lost: dict[str, str] | None = None

    def add(self, step: str, artifact: Artifact) -> Artifact:
        lost, before = lost_nodes(), self._lost
        for node in () if before is None else lost.keys() - before.keys():
            self.progress.say(f"{step}: node {lost[node]} was lost; what it held was made again")
        self._lost = lost
        self._artifacts[step] = artifact
        # Two methods may ask for one step; the second finds it done.
        self._seconds.setdefault(step, 0.0 if artifact.reused else artifact.manifest.seconds)
        self._run({}, finished=False).write()
        return artifact

    def finish(self, splits: dict[str, Split]) -> Run:
        """Score what has labels, write the page and the run."""
        answer = self.config.answer
        labeled = {name: split for name, split in splits.items() if split[0].facts["labels"]}
        found: dict[str, dict[str, dict[str, float]]] = {}
        if labeled:
            evaluation = evaluate(
                self.store,
                labeled,
                n_clusters=self.config.n_clusters,
                protocol=PROTOCOLS,
                seed=self.config.seed,
            )
            found = read_scores(self.add("evaluate", evaluation))
        assignment, listing = (
            self._artifacts[name] for name in (f"assign_clusters:{answer}", "list_images")
        )
        self.add("report", report(self.store, assignment, listing))
        done = self._run(found, finished=True)
        Folder(done.page).remove()
        write_page(done)
        done.write()
        return done

    def _run(self, found: dict[str, dict[str, dict[str, float]]], *, finished: bool) -> Run:
        return Run(
            out=self.config.out,
            config=dataclasses.asdict(self.config),
            question=self._question,
            artifacts={step: artifact.folder.path for step, artifact in self._artifacts.items()},
            seconds=self._seconds,
            scores=found,
            finished=finished,
        )

    def _refuse_other_run(self) -> None:
        out = Folder(self.config.out)
        if not out.exists(RUN_FILE) or self.config.replace:
            return
        before = Run.load(out.path).question
        # As JSON gives it back: tuples are lists there.
        now = json.loads(json.dumps(self._question))
        if before != now:
            differing = _first_difference(before, now)
            raise FileExistsError(
                f"--out {out.path} holds a run with other options ({differing}); add --replace "
                "to replace it, or give another --out"
            )


def _semantic_centroids(steps: _Steps, index: ShardGroup, images: Artifact) -> Artifact | None:
    """The centroids that nouns are chosen by; None if all nouns are kept."""
    config, method = steps.config, steps.config.select_nouns.centroid_method
    if method == "none":
        return None
    n_centroids = n_semantic(config, images.n_rows)
    if method == "kmeans":
        centroids = find_centroids(
            steps.store,
            config.kmeans,
            index,
            [images],
            n_centroids=n_centroids,
            restarts=config.kmeans.centroid_restarts,
            seed=config.seed,
            title="semantic",
        )
    else:
        centroids = find_small_centroids(
            steps.store, method, images, n_centroids=n_centroids, seed=config.seed
        )
    return steps.add("find_centroids", centroids)


def _cluster_without_training(
    steps: _Steps, index: ShardGroup, images: Artifact, counterparts: Artifact, prefix: str = ""
) -> dict[Method, Model]:
    """k-means with K on v and on [t~, v], as far as the run asks for them."""
    config, models = steps.config, {}
    for method in config.methods:
        if method not in ("kmeans", "train-free"):
            continue
        centroids = find_centroids(
            steps.store,
            config.kmeans,
            index,
            [images] if method == "kmeans" else [counterparts, images],
            n_centroids=config.n_clusters,
            restarts=config.kmeans.cluster_restarts,
            seed=config.seed,
            title=method,
        )
        steps.add(f"{prefix}find_centroids:{method}", centroids)
        models[method] = Model(method=method, artifact=centroids)
    return models


def _rows_to_join(
    steps: _Steps, images: Artifact, counterparts: Artifact
) -> dict[Method, tuple[Artifact, Artifact]]:
    """Images and counterparts whose neighbors a method needs: all, or a sample for a graph."""
    config = steps.config
    rows: dict[Method, tuple[Artifact, Artifact]] = {}
    if "tac" in config.methods:
        rows["tac"] = images, counterparts
    if "graph" in config.methods:
        most = config.cut_graph.max_graph_rows
        rows["graph"] = graph_rows(steps.store, images, counterparts, most=most, seed=config.seed)
        for kind, sample in zip(("image", "text"), rows["graph"], strict=True):
            if sample.manifest.stage == "sample_rows":
                steps.add(f"sample_rows:{kind}", sample)
    return rows


def _with_neighbors(
    steps: _Steps, index: ShardGroup, images: Artifact, counterparts: Artifact
) -> tuple[Artifact, Artifact, Artifact, Artifact]:
    """Images, counterparts, and the neighbors of each."""
    neighbors = []
    for kind, embeddings in (("image", images), ("text", counterparts)):
        found = find_neighbors(
            steps.store,
            steps.config.find_neighbors,
            index,
            embeddings,
            seed=steps.config.seed,
            title=kind,
        )
        of = " of sample" if embeddings.manifest.stage == "sample_rows" else ""
        neighbors.append(steps.add(f"find_neighbors:{kind}{of}", found))
    return images, counterparts, neighbors[0], neighbors[1]


def _assign_split(
    steps: _Steps,
    fitted: Fitted,
    images_path: str,
    named: dict[str, Artifact],
    *,
    prefix: str = "",
    fit_too: bool = False,
) -> Split:
    """Assign images that took no part in the fit.

    Args:
        steps: the run.
        fitted: the models and the text space they were fitted in.
        images_path: folder or prefix.
        named: assignment of each method whose names hold.
        prefix: of the steps' names.
        fit_too: also fit k-means on these images themselves, as the published code does; those
            methods are called "kmeans@val" and "train-free@val".
    """
    config, store = steps.config, steps.store
    listing = list_images(store, images_path, labels=config.labels)
    steps.add(f"{prefix}list_images", listing)
    images = embed(store, config, fitted.spec, fitted.encoder, listing)
    steps.add(f"{prefix}embed_images", images)
    selected = fitted.selected
    counterparts = build_counterparts(store, config.build_counterparts, images, selected)
    steps.add(f"{prefix}build_counterparts", counterparts)
    assignments: dict[str, Artifact] = {}
    for method, model in fitted.models.items():
        assignments[method] = assign_clusters(
            store, model, listing, images, counterparts, selected, named_by=named[method]
        )
    if fit_too and images.n_rows >= config.n_clusters:
        with ShardGroup(config.n_shards, config.n_gpus) as index:
            own = _cluster_without_training(steps, index, images, counterparts, prefix)
        for method, model in own.items():
            assignments[f"{method}@val"] = assign_clusters(
                store, model, listing, images, counterparts, selected
            )
    for method, assignment in assignments.items():
        steps.add(f"{prefix}assign_clusters:{method}", assignment)
    return listing, assignments


def embed(
    store: Store, config: TacConfig, spec: EncoderSpec, encoder: Encoder, listing: Artifact
) -> Artifact:
    """The embeddings of a listing: computed, or taken from where the listing found them."""
    if "vectors" in listing.facts:
        return import_embeddings(store, config.embed_images, encoder, listing)
    return embed_images(store, config.embed_images, spec, encoder, listing, n_gpus=config.n_gpus)


def _publish(assignment: Artifact, out: str, suffix: str) -> None:
    """Copy an assignment into the run's folder, where people look for it."""
    clusters = Folder(Folder(out).join(f"clusters{suffix}"))
    clusters.remove()
    parts = ((assignment.folder, clusters, part.name) for part in assignment.manifest.parts)
    for _ in map_parts(_copy, parts):
        pass
    Folder(out).write(f"names{suffix}.parquet", assignment.folder.read("names.parquet"))


def _copy(source: Folder, target: Folder, name: str) -> None:
    target.write(name, source.read(name))


def _check_sizes(config: TacConfig, n_images: int) -> None:
    if n_images < config.n_clusters:
        raise ValueError(
            f"n_images={n_images} should be >= n_clusters={config.n_clusters}; lower --n-clusters"
        )
    if config.select_nouns.centroid_method != "kmeans":
        check_small(n_images, config.select_nouns.centroid_method)
    if "tac" in config.methods:
        check_batch(config.train_heads.resolve(config.n_clusters), n_images)
    if "graph" in config.methods:
        check_graph(config.cut_graph, n_images, config.n_clusters)


def encoder_spec(config: TacConfig) -> EncoderSpec:
    """What the workers of a run load, as far as the cluster decides it.

    Raises:
        ValueError: decoding on the GPU was asked for and there is none.
    """
    on_gpu = Cluster.connected(config.n_gpus).n_gpus > 0
    options = config.encoder
    if options.decode_on_gpu and not on_gpu:
        raise ValueError(
            "decode_on_gpu=True needs a GPU and the cluster has 0; leave out --decode-on-gpu"
        )
    return EncoderSpec(
        model=options.model,
        pretrained=options.pretrained,
        precision=resolve_precision(options.precision, on_gpu=on_gpu),
        resize=options.resize,
        compile=options.compile,
        decode_on_gpu=options.decode_on_gpu,
    )


def for_all_nodes(
    store: Store, config: TacConfig, spec: EncoderSpec, encoder: Encoder
) -> EncoderSpec:
    """What the workers load, wherever they run.

    Raises:
        ValueError: a path of the run is on the disk of one machine among several.
    """
    _check_shared(config, store.path)
    if is_local(store.path) and Cluster.connected(config.n_gpus).n_nodes == 1:
        return spec
    return share_encoder(store, spec, encoder)


def _check_shared(config: TacConfig, store: str) -> None:
    """Refuse local paths that the other nodes of the cluster do not see.

    Raises:
        ValueError: a node has another disk.
    """
    if Cluster.connected().n_nodes == 1:
        return
    written = {"out": config.out, "store": store}
    for name, path in {"images": config.images, "val_images": config.val_images, **written}.items():
        if path is None or not is_local(path):
            continue
        if name in written:
            # What other nodes see may be a folder of the same name on a disk of their own.
            mark = f".{uuid.uuid4().hex}"
            Folder(path).write(mark, b"")
            try:
                blind = nodes_without(Folder(path).join(mark))
            finally:
                Folder(path).remove(mark)
        else:
            blind = nodes_without(path)
        if blind:
            raise ValueError(
                f"{name}={path} should be seen by all nodes of the cluster and {', '.join(blind)} "
                f"cannot see it; give s3:// or a folder that all of them mount to "
                f"--{name.replace('_', '-')}"
            )


def absolute_paths(config: TacConfig) -> TacConfig:
    """Paths that mean the same on every machine and in every folder.

    Raises:
        ValueError: a relative path in a Ray job.
    """
    paths = {"images": config.images, "out": config.out, "store": config.store}
    paths |= {"val_images": config.val_images, "match_run": config.match_run}
    made = {name: path and lasting_path(name, path) for name, path in paths.items()}
    encoder = absolute_encoder(config.encoder)
    return dataclasses.replace(config, encoder=encoder, **made)  # type: ignore[arg-type]


def lasting_path(option: str, path: str) -> str:
    """The path that an option gives, absolute.

    Raises:
        ValueError: it is relative in a Ray job, whose folder is a copy that the job deletes.
    """
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_job and is_local(path) and not Path(path).is_absolute():
        raise ValueError(
            f"{option}={path} is relative to the job's temporary folder; give an absolute path or "
            f"s3:// to --{option.replace('_', '-')}"
        )
    return absolute(path)


def absolute_encoder(encoder: EncoderConfig) -> EncoderConfig:
    """The encoder, its folder absolute."""
    if not encoder.model.startswith("local-dir:"):
        return encoder
    folder = absolute(encoder.model.removeprefix("local-dir:"))
    return dataclasses.replace(encoder, model=f"local-dir:{folder}")


@contextmanager
def ray_session(verbose: bool) -> Iterator[None]:
    """Ray: the cluster of RAY_ADDRESS (set in every job), else one on this machine for the run."""
    quiet = not verbose
    if quiet:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # C++ lines on standard error
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR if quiet else logging.INFO)
    data = ray.data.DataContext.get_current()
    data.enable_progress_bars = verbose
    started = not ray.is_initialized()
    if started:
        level = logging.ERROR if quiet else logging.INFO
        # Left to itself Ray joins the machine's last cluster, and waits for it if it is gone.
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(address, log_to_driver=verbose, logging_level=level)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict) and old != new:
            return _first_difference(old, new)
        if old != new:
            return f"{name} was {old}, now {new}"
    return "none"
