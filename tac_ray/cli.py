"""`tac-ray run | plan | assign | report | status | demo`."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import psutil
import tyro
from ray.exceptions import OutOfMemoryError, RayActorError, WorkerCrashedError
from rich.console import Console

from tac_ray.artifacts.run import Run
from tac_ray.artifacts.storage import Folder, absolute
from tac_ray.cluster import Cluster
from tac_ray.config import TacConfig, best, reference
from tac_ray.demo import accuracy_by_glyph, demo_config
from tac_ray.pipeline import assign, run
from tac_ray.plan import make_plan
from tac_ray.progress import glyph_table, plan_table, score_table, stage_table
from tac_ray.report.page import PAGE, write_page

T = TypeVar("T")


def main() -> None:
    """Entry point of the console script."""
    commands: dict[str, tuple[Callable[[list[str]], None], str]] = {
        "run": (run_command, "cluster a folder or bucket of images"),
        "plan": (_plan_command, "what a run would need, before there is anything to run on"),
        "assign": (_assign_command, "put new images into the clusters of a run"),
        "report": (_report_command, "write the page of a run, also to another place"),
        "status": (_status_command, "what a run has done"),
        "demo": (demo_command, "two minutes with pictures and an encoder that ship with tac-ray"),
    }
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in commands:
        known = "\n".join(f"  {command:<8}{about}" for command, (_, about) in commands.items())
        print(f"usage: tac-ray COMMAND [--help] ...\n\ncommands:\n{known}")
        sys.exit(0 if name in ("-h", "--help") else 2)
    commands[name][0](arguments)


@dataclass(frozen=True, kw_only=True)
class _Configuration:
    config: Literal["best", "reference"] = "best"
    """best: the published method with its faults repaired; reference: what its code computes."""


def run_command(arguments: Sequence[str], **defaults: Any) -> None:
    """`tac-ray run` with other defaults: what the jobs are made of.

    Args:
        arguments: the command line without the program's name.
        defaults: fields of TacConfig to start from.
    """
    chosen, rest = tyro.cli(
        _Configuration, args=arguments, return_unknown_args=True, add_help=False
    )
    required = dict.fromkeys(("images", "n_clusters", "out"), tyro.MISSING)
    start = {"best": best, "reference": reference}[chosen.config](**{**required, **defaults})
    config = _plainly(
        lambda: tyro.cli(
            TacConfig,
            prog="tac-ray run [--config {best,reference}]",
            description="Cluster a folder or bucket of images into named groups.",
            default=start,
            args=rest,
        ),
        verbose=False,
    )
    _show(_plainly(lambda: run(config), verbose=config.verbose))


@dataclass(frozen=True, kw_only=True)
class _Plan:
    n_images: float
    """Images, such as 100e6."""
    n_clusters: int
    """K."""
    width: int = 512
    """d, of the encoder's embeddings."""
    n_nouns: int = 119_034
    """Nouns; WordNet's by default."""
    nodes: int = 1
    """Machines."""
    cpus: int = os.cpu_count() or 1
    """Cores of all of them."""
    gpus: int = 0
    """GPUs of all of them."""
    memory_gb: float = round(psutil.virtual_memory().total / 1e9, 1)
    """Memory of all of them."""


def _plan_command(arguments: Sequence[str]) -> None:
    wanted = tyro.cli(_Plan, prog="tac-ray plan", args=arguments)
    plan = make_plan(
        best(images="", out="", n_clusters=wanted.n_clusters),
        Cluster(
            n_nodes=wanted.nodes,
            n_cpus=wanted.cpus,
            n_gpus=wanted.gpus,
            memory_gb=wanted.memory_gb,
        ),
        n_images=int(wanted.n_images),
        n_nouns=wanted.n_nouns,
        width=wanted.width,
    )
    console = Console(highlight=False, soft_wrap=True)
    console.print(plan_table(plan))
    console.print(plan.line())
    _plainly(plan.check, verbose=False)


@dataclass(frozen=True, kw_only=True)
class _Assign:
    run: tyro.conf.Positional[str]
    """Folder or s3:// prefix of a finished run."""
    images: str
    """Folder or s3:// prefix of the new images."""
    out: str
    """Where the new table goes."""
    verbose: bool = False
    """Show Ray's own log lines."""


def _assign_command(arguments: Sequence[str]) -> None:
    wanted = tyro.cli(_Assign, prog="tac-ray assign", args=arguments)
    _show(
        _plainly(
            lambda: assign(
                wanted.run, images=wanted.images, out=wanted.out, verbose=wanted.verbose
            ),
            verbose=wanted.verbose,
        )
    )


@dataclass(frozen=True, kw_only=True)
class _Report:
    run: tyro.conf.Positional[str]
    """Folder or s3:// prefix of a finished run."""
    to: str | None = None
    """Where the page goes, such as a folder on one's own disk; default is the run's own `page`."""


def _report_command(arguments: Sequence[str]) -> None:
    wanted = tyro.cli(_Report, prog="tac-ray report", args=arguments)
    to = None if wanted.to is None else absolute(wanted.to)
    page = _plainly(lambda: write_page(Run.load(absolute(wanted.run)), to), verbose=False)
    print(f"page: {page}")


def _status_command(arguments: Sequence[str]) -> None:
    path = tyro.cli(
        Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="run", metavar="RUN")],
        prog="tac-ray status",
        description="Stages of a run, their rows, seconds and sizes.",
        args=arguments,
    )
    found = _plainly(lambda: Run.load(absolute(path)), verbose=False)
    _show(found)


@dataclass(frozen=True, kw_only=True)
class _Demo:
    out: str = "runs/demo"
    """Where the demo's run goes."""
    verbose: bool = False
    """Show Ray's own log lines."""


def demo_command(arguments: Sequence[str]) -> None:
    """`tac-ray demo`."""
    wanted = tyro.cli(_Demo, prog="tac-ray demo", args=arguments)
    config = dataclasses.replace(demo_config(wanted.out), verbose=wanted.verbose)
    print(
        f"demo: {config.n_clusters} clusters of emoji on colored backgrounds, with a small encoder "
        "trained on emoji and the short list of nouns"
    )
    found = _plainly(lambda: run(config), verbose=wanted.verbose)
    _show(found)
    Console(highlight=False).print(glyph_table(accuracy_by_glyph(found)))
    print(f"open {Folder(found.page).join(PAGE)}")


def _show(found: Run) -> None:
    """The table of stages, the largest clusters, the scores, and where the results are."""
    console = Console(highlight=False, soft_wrap=True)
    artifacts = {step: found.artifact(step) for step in found.artifacts}
    console.print(stage_table(artifacts, found.seconds))
    if not found.finished:
        console.print("not finished; the same command goes on from here")
        return
    console.print(score_table(found.scores) if found.scores else "no labels, so no scores")
    names = found.names.sort_by([("size", "descending")]).to_pylist()
    shown = ", ".join(f"{row['name']} ({row['size']:,})" for row in names[:20])
    rest = f" and {len(names) - 20:,} more" if len(names) > 20 else ""
    console.print(f"clusters: {shown}{rest}", markup=False)
    console.print(f"table: {Folder(found.out).join('clusters')}", markup=False)
    console.print(f"page: {Folder(found.page).join(PAGE)}", markup=False)


def _plainly(work: Callable[[], T], *, verbose: bool) -> T:
    """Do the work; what a person can mend ends the program with one line.

    Exit code 2 is for bad input, 1 for workers that end again and again.
    """
    try:
        return work()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        if verbose:
            raise
        cause = getattr(error, "cause", error)  # what a Ray task raised
        print(f"error: {cause}", file=sys.stderr)
        sys.exit(2)
    except (RayActorError, WorkerCrashedError, OutOfMemoryError) as error:
        if verbose:
            raise
        reason = str(error).strip().splitlines()[0]
        print(
            f"error: a worker ended again and again, as for lack of memory: {reason}; lower "
            "--image-batch-size or --max-graph-rows, raise --n-shards, or take nodes with more "
            "memory; --verbose shows all of it",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
