"""What a person sees while a run goes on: a line a stage, then a table."""

import time

from ray.util.metrics import Counter, Gauge
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from tac_ray.artifacts.manifest import Artifact
from tac_ray.config import METHOD_TITLES
from tac_ray.plan import Plan, duration

LOG_EVERY_S = 15.0
"""Seconds between lines of a stage where the output is a file or a job's log."""


class _Metrics:
    """The same as Ray metrics: on the dashboard, and for Prometheus."""

    def __init__(self) -> None:
        tags = ("stage", "unit")
        self.done = Counter("tac_ray_units_done_total", "Units of a stage that are done.", tags)
        self.rate = Gauge("tac_ray_units_per_second", "Units of a stage done in a second.", tags)
        # Not a gauge, which Ray would forget after 20 s.
        self.seconds = Counter(
            "tac_ray_stage_seconds_total", "Time of the finished stages.", ("stage",)
        )


class ConsoleProgress:
    """Progress of stages on a terminal, or as plain lines in a log, and as Ray metrics."""

    def __init__(self) -> None:
        self._metrics = _Metrics()
        self.console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._title, self._unit = "", ""
        self._total: int | None = None
        self._done, self._note = 0, ""
        self._started = self._logged = 0.0

    def start(self, title: str, total: int | None, unit: str) -> None:
        """Open the line of a stage."""
        self._title, self._total, self._unit = title, total, unit
        self._done, self._note = 0, ""
        self._started = self._logged = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<26}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]} {task.fields[note]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, rate="", note="")
            self._bar.start()
        else:
            self.console.print(f"{title}: starting")

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` units done."""
        self._done += n
        self._note = note or self._note
        tags = {"stage": self._title, "unit": self._unit}
        if n:
            self._metrics.done.inc(n, tags)
        self._metrics.rate.set(self._per_second(), tags)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=n, rate=self._rate(), note=self._note)
        elif time.monotonic() - self._logged > LOG_EVERY_S:
            self._logged = time.monotonic()
            of = "" if self._total is None else f" of {self._total:,}, {self._left()}"
            self.console.print(
                f"{self._title}: {self._done:,}{of} {self._rate()} {self._note}".rstrip()
            )

    def finish(self, title: str, artifact: Artifact) -> None:
        """Close the line of a stage."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if not artifact.reused and artifact.manifest.seconds > 0:
            self._metrics.seconds.inc(artifact.manifest.seconds, {"stage": title})
        took = "done before" if artifact.reused else f"{artifact.manifest.seconds:.1f} s"
        facts = artifact.facts
        counts = "".join(
            f", {facts[f'n_{what}']:,} {what}"
            for what in ("new", "reused", "failed")
            if facts.get(f"n_{what}") and not (artifact.reused and what != "failed")
        )
        rows = f"{artifact.n_rows:,} rows{counts}, " if artifact.n_rows else ""
        self.console.print(f"{title}: {rows}{took}")
        if "bottleneck" in facts and not artifact.reused:
            self.console.print(
                f"{title}: {facts['images_per_s']:,} images/s after {facts['startup_s']} s of "
                f"start-up; alone, download does {facts['download_per_s']:,}/s, decode "
                f"{facts['decode_per_s']:,}/s, encode {facts['encode_per_s']:,}/s: "
                f"{facts['bottleneck']} is the bottleneck"
            )

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text)

    def _per_second(self) -> float:
        return self._done / max(1e-9, time.monotonic() - self._started)

    def _rate(self) -> str:
        return f"{self._per_second():,.1f} {self._unit}/s"

    def _left(self) -> str:
        assert self._total is not None
        passed = time.monotonic() - self._started
        left = passed / max(1, self._done) * (self._total - self._done)
        return f"{left / 60:.1f} min left" if left > 90 else f"{left:.0f} s left"


def stage_table(stages: dict[str, Artifact], seconds: dict[str, float]) -> Table:
    """Stage, rows, seconds, rows/s and size of a run's artifacts; 0 s is one found done."""
    table = Table("stage", box=None, pad_edge=False)
    for title in ("rows", "seconds", "rows/s", "MB"):
        table.add_column(title, justify="right")
    for stage, artifact in stages.items():
        n, spent = artifact.n_rows, seconds[stage]
        table.add_row(
            stage,
            f"{n:,}" if n else "",
            f"{spent:.1f}" if spent else "done before",
            f"{n / spent:,.0f}" if n and spent else "",
            f"{artifact.manifest.n_bytes / 1e6:,.1f}",
        )
    return table


def plan_table(plan: Plan) -> Table:
    """Workers, memory, operations, time and size of each stage of a planned run."""
    table = Table("stage", box=None, pad_edge=False)
    for title in ("workers", "GB each", "operations", "time", "GB written"):
        table.add_column(title, justify="right")
    for stage in plan.stages:
        table.add_row(
            stage.stage,
            f"{stage.n_workers:,}",
            f"{stage.memory_gb:,.1f}",
            f"{stage.flops:.1e}" if stage.flops else "",
            duration(stage.hours),
            f"{stage.written_gb:,.1f}",
        )
    return table


def score_table(scores: dict[str, dict[str, dict[str, float]]]) -> Table:
    """ACC, NMI and ARI of each method on each split, in percent."""
    table = Table("images", "method", box=None, pad_edge=False)
    for title in ("ACC", "NMI", "ARI"):
        table.add_column(title, justify="right")
    for split, methods in scores.items():
        for method, found in methods.items():
            name, _, fitted = method.partition("@")
            title = METHOD_TITLES[name] + (f", fitted on {fitted}" if fitted else "")
            numbers = [f"{100 * found[key]:.1f}" for key in ("acc", "nmi", "ari")]
            table.add_row(split, title, *numbers)
    return table


def glyph_table(accuracy: dict[str, dict[str, float]]) -> Table:
    """ACC of each method on the demo's seen and unseen glyphs, in percent."""
    table = Table("ACC by glyph", box=None, pad_edge=False)
    for title in ("seen in training", "unseen"):
        table.add_column(title, justify="right")
    for method, found in accuracy.items():
        numbers = [f"{100 * found[key]:.1f}" for key in ("seen", "unseen")]
        table.add_row(METHOD_TITLES[method], *numbers)
    return table
