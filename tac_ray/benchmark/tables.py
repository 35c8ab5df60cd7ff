"""Measurements as tables: mean and standard deviation over seeds, in Markdown and JSON."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tac_ray.benchmark.measure import Measurement, Protocol, Split
from tac_ray.benchmark.paper import Numbers
from tac_ray.benchmark.rows import Case

SCORES = ("nmi", "acc", "ari")


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Several values of one quantity."""

    mean: float
    deviation: float | None
    """Standard deviation of the sample; None of a single value."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Mean and deviation of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(mean=statistics.fmean(values), deviation=deviation)

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if self.deviation is None else f" ± {self.deviation:.1f}")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row on a split, over its seeds."""

    case: Case
    title: str
    split: Split
    protocol: Protocol
    scores: dict[str, Spread]
    """NMI, ACC and ARI in percent."""
    seeds: tuple[int, ...]
    seconds: float
    """Median over the seeds."""
    paper: Numbers | None
    """The paper's numbers, where split and protocol are the paper's."""
    setting: tuple[str, float] | None

    @property
    def where(self) -> str:
        """Split and protocol in words; "all" where there is one of each."""
        return self.split if self.split != "test" else f"test, {self.protocol}"


def lines(measurements: Sequence[Measurement]) -> list[Line]:
    """Labeled measurements, joined over their seeds, in their order."""
    groups: dict[tuple[str, str, str, str], list[Measurement]] = {}
    for found in measurements:
        if "acc" in found.scored.facts:
            key = (found.case.title, found.row.title, found.split, found.protocol)
            groups.setdefault(key, []).append(found)
    return [
        Line(
            case=group[0].case,
            title=group[0].row.title,
            split=group[0].split,
            protocol=group[0].protocol,
            scores={
                name: Spread.of([100 * found.scored.facts[name] for found in group])
                for name in SCORES
            },
            seeds=tuple(found.seed for found in group),
            seconds=statistics.median(found.seconds for found in group),
            paper=group[0].row.paper if group[0].is_papers else None,
            setting=group[0].row.setting,
        )
        for group in groups.values()
    ]


def markdown(found: Sequence[Line]) -> str:
    """A table a case, and one of all cases if there are several."""
    by_case: dict[str, list[Line]] = {}
    for line in found:
        by_case.setdefault(line.case.title, []).append(line)
    sections = [f"## {title}\n\n{_case_table(of)}" for title, of in by_case.items()]
    if len(by_case) > 1:
        sections.insert(0, f"## ACC of all cases\n\n{_overview(by_case)}")
    return "\n".join(sections)


def as_json(found: Sequence[Line]) -> list[dict[str, Any]]:
    """The same as JSON values, without rounding."""
    return [
        {
            "dataset": line.case.dataset.name,
            "model": line.case.encoder.model,
            "pretrained": line.case.encoder.pretrained,
            "row": line.title,
            "split": line.split,
            "protocol": line.protocol,
            **{
                name: {"mean": spread.mean, "deviation": spread.deviation}
                for name, spread in line.scores.items()
            },
            "seeds": line.seeds,
            "seconds": line.seconds,
            "paper": line.paper and dict(zip(SCORES, line.paper, strict=True)),
            "setting": line.setting,
        }
        for line in found
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all but the first column to the right."""
    rule = ["---", *("---:" for _ in header[1:])]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def _case_table(found: Sequence[Line]) -> str:
    known = any(line.paper for line in found)
    header = ["row", "images", "NMI", "ACC", "ARI", *(["paper NMI, ACC, ARI"] if known else [])]
    rows = []
    for line in found:
        row = [line.title, line.where, *(str(line.scores[name]) for name in SCORES)]
        if known:
            row.append(", ".join(f"{number:.1f}" for number in line.paper or ()))
        rows.append([*row, f"{line.seconds:.1f}", str(len(line.seeds))])
    return table([*header, "seconds", "seeds"], rows)


def _overview(by_case: dict[str, list[Line]]) -> str:
    titles = dict.fromkeys((line.title, line.where) for of in by_case.values() for line in of)
    rows = []
    for title, where in titles:
        cells = []
        for of in by_case.values():
            there = [line for line in of if (line.title, line.where) == (title, where)]
            cells.append(str(there[0].scores["acc"]) if there else "")
        rows.append([title, where, *cells])
    return table(["row", "images", *by_case], rows)
