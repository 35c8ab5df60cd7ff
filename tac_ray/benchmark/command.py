"""The command line of the benchmark: cases, rows and seeds in, Markdown and JSON out."""

import dataclasses
import json
import posixpath
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.storage import Folder
from tac_ray.artifacts.store import Store
from tac_ray.benchmark import choose_k, tables
from tac_ray.benchmark.datasets import Dataset, DatasetName, class_folders, dataset
from tac_ray.benchmark.figure import figure_5
from tac_ray.benchmark.measure import Measurement, measure
from tac_ray.benchmark.rows import (
    Case,
    Rows,
    centroid_rows,
    encoder_rows,
    figure_5_rows,
    loss_rows,
    main_rows,
    n_clusters_rows,
    option_rows,
)
from tac_ray.config import EncoderConfig, TacConfig, best, reference
from tac_ray.pipeline import absolute_encoder, lasting_path, ray_session
from tac_ray.progress import ConsoleProgress
from tac_ray.stages.list_images import Labels

TABLES: dict[str, Rows] = {
    "main": main_rows,
    "options": option_rows,
    "4": centroid_rows,
    "5": loss_rows,
    "6": encoder_rows,
}


def _numbers(words: list[str]) -> tuple[int, ...]:
    return tuple(int(number) for number in words[0].split(","))


_Numbers = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT,...",
        instance_from_str=_numbers,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    ),
]


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What to measure. Options of the stages of `tac-ray run` are taken too, for every row."""

    out: str
    """Folder or s3:// prefix of results.md, results.json and figures."""
    store: str | None = None
    """Where artifacts are kept and shared by runs; default `artifacts` beside --out."""
    dataset: tuple[DatasetName, ...] = ()
    """Data sets of the paper."""
    data: tuple[str, ...] = ()
    """Where each of them lies: its archive, or the folder of it or of what was unpacked."""
    images: tuple[str, ...] = ()
    """Folders with one folder a class, as data sets of their own."""
    model: tuple[str, ...] = ("ViT-B-32-quickgelu",)
    """open_clip architectures, or `local-dir:PATH`; every data set is seen by each."""
    pretrained: str | None = "openai"
    """open_clip tag of the weights of all models; not used with `local-dir:`."""
    table: Literal["main", "options", "4", "5", "6"] = "main"
    """main: baselines, TAC and best; options: each part of best alone, and others; 4: ways to find
    centroids; 5: terms of the loss; 6: encoders, one --model each."""
    figure: Literal["5"] | None = None
    """5: six options of TAC over their ranges, instead of a table."""
    n_clusters: _Numbers = ()
    """Compare several K without labels, and suggest one, instead of a table. With --images, which
    need no class folders then."""
    seeds: _Numbers = (0, 1, 2, 3, 4)
    """Seeds of every row."""


class _NewWork(ConsoleProgress):
    """Tells of stages that run, and not of the many that were done before."""

    def finish(self, title: str, artifact: Artifact) -> None:
        """Close the line of a stage."""
        if not artifact.reused:
            super().finish(title, artifact)


def benchmark_command(arguments: Sequence[str]) -> None:
    """Measure what the command line asks for, write and print it."""
    wanted, rest = tyro.cli(
        Benchmark, prog="tac_benchmark.py", args=arguments, return_unknown_args=True
    )
    try:
        print(run_benchmark(wanted, rest))
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr)
        sys.exit(2)


def run_benchmark(wanted: Benchmark, options: Sequence[str] = ()) -> str:
    """Measure, write results.md and results.json, and return the Markdown.

    Args:
        wanted: what to measure.
        options: options of `tac-ray run`, for every row.

    Raises:
        ValueError: options that do not go together, or that the benchmark does not leave open.
        FileNotFoundError: a data set is not where it should be.
    """
    wanted = dataclasses.replace(
        wanted,
        out=lasting_path("out", wanted.out),
        store=wanted.store and lasting_path("store", wanted.store),
        data=tuple(lasting_path("data", place) for place in wanted.data),
        images=tuple(lasting_path("images", place) for place in wanted.images),
    )
    published, ours = (_options(wanted, start, options) for start in (reference, best))
    beside = posixpath.join(posixpath.dirname(wanted.out), "artifacts")
    store = Store(wanted.store or beside, _NewWork())
    rows_of = TABLES[wanted.table]
    if wanted.figure:
        rows_of = figure_5_rows
    if wanted.n_clusters:
        rows_of = n_clusters_rows(wanted.n_clusters)
    with ray_session(published.verbose):
        cases = [
            Case(dataset=data, encoder=encoder)
            for data in _datasets(store, wanted, published.labels)
            for encoder in _encoders(wanted, ours if wanted.n_clusters else published)
        ]
        _check_titles([case.title for case in cases])
        rows = [(case, rows_of(case, published, ours)) for case in cases]
        measurements = measure(store, rows, seeds=wanted.seeds)
        return _write(Folder(wanted.out), wanted, cases, measurements)


def _options(
    wanted: Benchmark, configuration: Callable[..., TacConfig], options: Sequence[str]
) -> TacConfig:
    """A configuration with the options of the command line.

    Raises:
        ValueError: one of them is what the benchmark itself decides.
    """
    # Images and K are those of each case.
    start = configuration(images=wanted.out, n_clusters=2, out=wanted.out)
    config = tyro.cli(TacConfig, default=start, args=list(options))
    decided = ["val_images", "methods", "match_run", "seed", "replace"]
    if not wanted.n_clusters:
        decided.append("labels")
    for name in decided:
        given, there = getattr(config, name), getattr(start, name)
        if given != there:
            raise ValueError(
                f"{name}={given} should be {there}: data sets, rows and --seeds decide it; leave "
                f"out --{name.replace('_', '-')}"
            )
    return config


def _check_titles(titles: Sequence[str]) -> None:
    """Tables know cases by their titles.

    Raises:
        ValueError: two are the same.
    """
    for title in titles:
        if titles.count(title) > 1:
            raise ValueError(
                f"{titles.count(title)} cases are called {title!r}, by the last folders of "
                "--images and --model; measure them in several commands over one --store"
            )


def _datasets(store: Store, wanted: Benchmark, labels: Labels) -> list[Dataset]:
    if len(wanted.dataset) != len(wanted.data) or not (wanted.dataset or wanted.images):
        raise ValueError(
            f"{len(wanted.dataset)} of --dataset and {len(wanted.data)} of --data should be as "
            "many, and at least one of them or of --images be there; give each data set its place"
        )
    named = [
        dataset(store, name, root) for name, root in zip(wanted.dataset, wanted.data, strict=True)
    ]
    if wanted.n_clusters:
        return named + [_unlabeled(place, labels) for place in wanted.images]
    return named + [class_folders(store, root) for root in wanted.images]


def _unlabeled(place: str, labels: Labels) -> Dataset:
    """Images of which nothing need be known: K is each of --n-clusters in turn."""
    name = posixpath.basename(place.rstrip("/"))
    return Dataset(name=name, train=place, n_clusters=2, labels=labels)


def _encoders(wanted: Benchmark, config: TacConfig) -> list[EncoderConfig]:
    """Every model, with the other options of the encoder, the same for all rows."""
    found = []
    for model in wanted.model:
        encoder = dataclasses.replace(config.encoder, model=model, pretrained=wanted.pretrained)
        found.append(absolute_encoder(encoder))
    return found


def _write(
    out: Folder, wanted: Benchmark, cases: Sequence[Case], measurements: Sequence[Measurement]
) -> str:
    lines = tables.lines(measurements)
    document = {"options": dataclasses.asdict(wanted), "lines": tables.as_json(lines)}
    text = tables.markdown(lines)
    by_case = {
        case.title: [found for found in measurements if found.case == case] for case in cases
    }
    if wanted.n_clusters:
        judgments = {title: choose_k.judge_all(found) for title, found in by_case.items()}
        document["judgments"] = {
            title: [dataclasses.asdict(judgment) for judgment in found]
            for title, found in judgments.items()
        }
        sections = [f"## {t}\n\n{choose_k.markdown(found)}" for t, found in judgments.items()]
        text = "\n".join([*sections, text])
    if wanted.figure:
        for i, case in enumerate(cases):
            of_case = [line for line in lines if line.case == case]
            name = "figure-5.svg" if len(cases) == 1 else f"figure-5-{i}.svg"
            out.write(name, figure_5(case.title, of_case).encode())
    out.write("results.md", text.encode())
    out.write("results.json", json.dumps(document, indent=1).encode())
    return text
