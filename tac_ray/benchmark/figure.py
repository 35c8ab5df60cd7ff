"""Figure 5 as an SVG: ACC over each of the six options, mean and standard deviation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from tac_ray.benchmark.rows import TITLES
from tac_ray.benchmark.tables import Line

PANEL_WIDTH, PANEL_HEIGHT = 250, 170
COLUMNS = 3
COLORS = {TITLES["tac"]: "#1f6fb4", TITLES["train-free"]: "#d1762a"}
N_TICKS = 4


def figure_5(title: str, found: Sequence[Line]) -> str:
    """The figure of one case.

    Args:
        title: of the case.
        found: its lines; those without a setting, and of other splits and protocols than the
            heads' own, are not drawn.
    """
    drawn = [f for f in found if f.setting and f.protocol == "fitted on train"]
    drawn = [f for f in drawn if f.split != "train"]  # the paper scores test
    panels = []
    for option in dict.fromkeys(line.setting[0] for line in drawn if line.setting):
        of = [line for line in drawn if line.setting and line.setting[0] == option]
        column, row = len(panels) % COLUMNS, len(panels) // COLUMNS
        x, y = 60 + column * (PANEL_WIDTH + 60), 45 + row * (PANEL_HEIGHT + 60)
        panels.append({"x": x, "y": y, "title": option.replace("_", " "), **_panel(of)})
    template = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    ).get_template("figure.svg.j2")
    n_rows = -(-len(panels) // COLUMNS)
    return template.render(
        title=f"ACC, {title}",
        panels=panels,
        panel_width=PANEL_WIDTH,
        panel_height=PANEL_HEIGHT,
        width=COLUMNS * (PANEL_WIDTH + 60) + 40,
        height=45 + n_rows * (PANEL_HEIGHT + 60) + 20,
        legend=[
            {"x": 60 + 220 * i, "title": name, "color": color}
            for i, (name, color) in enumerate(COLORS.items())
        ],
    )


def _panel(found: Sequence[Line]) -> dict[str, Any]:
    """Ticks and curves of one option; its values stand at equal distances."""
    values = sorted({line.setting[1] for line in found if line.setting})
    ends = [
        spread.mean + sign * (spread.deviation or 0)
        for line in found
        for spread in [line.scores["acc"]]
        for sign in (-1, 1)
    ]
    bottom, top = min(ends) - 0.5, max(ends) + 0.5

    def x(value: float) -> float:
        return round((values.index(value) + 0.5) * PANEL_WIDTH / len(values), 1)

    def y(acc: float) -> float:
        return round((top - acc) / (top - bottom) * PANEL_HEIGHT, 1)

    curves = []
    for name, color in COLORS.items():
        points = []
        for line in found:
            if line.setting and line.title.startswith(f"{name}, "):
                acc = line.scores["acc"]
                low, high = (y(acc.mean + sign * (acc.deviation or 0)) for sign in (-1, 1))
                at = {"x": x(line.setting[1]), "y": y(acc.mean), "low": low, "high": high}
                points.append({**at, "text": f"{line.setting[1]:g}: {acc}"})
        curves.append({"color": color, "points": points})
    heights = [bottom + (top - bottom) * i / N_TICKS for i in range(N_TICKS + 1)]
    return {
        "x_ticks": [{"x": x(value), "text": f"{value:g}"} for value in values],
        "y_ticks": [{"y": y(acc), "text": f"{acc:.1f}"} for acc in heights],
        "curves": curves,
    }
