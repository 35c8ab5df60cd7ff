"""The floors of the house: nothing imports upward."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tac_ray

PACKAGE = Path(tac_ray.__file__).parent

GROUND = {"algorithm"}
BELOW_STAGES = {"algorithm", "artifacts", "encoders", "index", "sources"}
BELOW_PIPELINE = BELOW_STAGES | {
    "config",
    "cluster",
    "stages",
    "report",
    "demo",
    "plan",
    "progress",
}
FLOORS: dict[str, set[str]] = {
    "algorithm": set(),
    "config": GROUND,
    "cluster": set(),
    "artifacts": GROUND,
    "encoders": GROUND,
    "index": GROUND | {"artifacts", "cluster"},
    "sources": GROUND | {"artifacts"},
    "stages": BELOW_STAGES | {"config", "cluster"},
    "report": BELOW_STAGES | {"config", "stages"},
    "demo": BELOW_STAGES | {"config", "stages"},
    "plan": BELOW_PIPELINE,
    "progress": BELOW_PIPELINE,
    "pipeline": BELOW_PIPELINE,
    "cli": BELOW_PIPELINE | {"pipeline"},
    "benchmark": BELOW_PIPELINE | {"pipeline"},
}
"""What each room (or module beside the rooms) may import apart from itself."""
FORBIDDEN_OUTSIDE = {"algorithm": {"ray", "faiss", "open_clip"}}
FACADE = "__init__"
"""The package itself: it names what users import and loads it late, so it stands above all."""


def imported_modules(tree: ast.Module, package: list[str]) -> Iterator[str]:
    """Dotted names of all modules that a file of `package` may load, wherever it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            if module == ["tac_ray"]:
                # The name may be a room or something of the facade.
                yield from (f"tac_ray.{alias.name}" for alias in node.names)
            else:
                yield ".".join(module)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            name = node.args[0]
            if (
                called in ("import_module", "__import__")
                and isinstance(name, ast.Constant)
                and isinstance(name.value, str)
            ):
                yield name.value


def violations(package: Path) -> list[str]:
    """Imports of the package under `package` that the floors do not allow."""
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).with_suffix("").parts
        room = inside[0]
        if room == FACADE:
            continue
        if room not in FLOORS:
            found.append(f"{'/'.join(inside)}.py: {room} has no floor")
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for module in imported_modules(tree, ["tac_ray", *inside[:-1]]):
            top, *rest = module.split(".")
            if top == "tac_ray":
                allowed = bool(rest) and rest[0] in FLOORS[room] | {room}
            else:
                allowed = top != "jobs" and top not in FORBIDDEN_OUTSIDE.get(room, set())
            if not allowed:
                found.append(f"{'/'.join(inside)}.py imports {module}")
    return found


def test_nothing_imports_upward():
    assert violations(PACKAGE) == []


def test_all_rooms_are_looked_at():
    rooms = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert {"algorithm", "artifacts", "encoders", "index", "stages", "config", "pipeline"} <= rooms


@pytest.mark.parametrize(
    ("file", "line", "module"),
    [
        (
            "algorithm/new.py",
            "from tac_ray.artifacts.store import Store",
            "tac_ray.artifacts.store",
        ),
        ("algorithm/new.py", "from tac_ray.config import TacConfig", "tac_ray.config"),
        ("algorithm/new.py", "import faiss", "faiss"),
        ("algorithm/new.py", "from ray.data import Dataset", "ray.data"),
        ("algorithm/new.py", "def f():\n    import open_clip", "open_clip"),
        ("algorithm/deep/new.py", "from ...stages import evaluate", "tac_ray.stages"),
        ("config.py", "from tac_ray.artifacts.store import Store", "tac_ray.artifacts.store"),
        ("artifacts/new.py", "from tac_ray.encoders.clip import Encoder", "tac_ray.encoders.clip"),
        ("artifacts/new.py", "from tac_ray.config import TacConfig", "tac_ray.config"),
        ("encoders/new.py", "from ..artifacts.store import Store", "tac_ray.artifacts.store"),
        ("index/new.py", "from tac_ray.encoders.clip import Encoder", "tac_ray.encoders.clip"),
        ("index/new.py", "import tac_ray.stages.evaluate", "tac_ray.stages.evaluate"),
        ("stages/new.py", "from tac_ray import pipeline", "tac_ray.pipeline"),
        ("stages/new.py", "from .. import run", "tac_ray.run"),
        ("stages/new.py", "import tac_ray", "tac_ray"),
        ("stages/new.py", "from tac_ray.cli import main", "tac_ray.cli"),
        ("stages/new.py", "from tac_ray.plan import make_plan", "tac_ray.plan"),
        ("stages/new.py", "from jobs.tac_s3 import main", "jobs.tac_s3"),
        ("report/new.py", "from tac_ray.pipeline import run", "tac_ray.pipeline"),
        ("plan.py", "from tac_ray.pipeline import run", "tac_ray.pipeline"),
        ("pipeline.py", "from tac_ray.benchmark.rows import main_rows", "tac_ray.benchmark.rows"),
        ("progress.py", "if TYPE_CHECKING:\n    import tac_ray.cli", "tac_ray.cli"),
        ("pipeline.py", "from tac_ray.cli import main", "tac_ray.cli"),
        (
            "index/new.py",
            "import importlib\nimportlib.import_module('tac_ray.pipeline')",
            "tac_ray.pipeline",
        ),
    ],
)
def test_a_planted_upward_import_is_caught(tmp_path: Path, file: str, line: str, module: str):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import numpy\n\n{line}\n")
    assert violations(tmp_path) == [f"{file} imports {module}"]


def test_a_room_without_a_floor_is_caught(tmp_path: Path):
    (tmp_path / "utils.py").write_text("import numpy\n")
    assert violations(tmp_path) == ["utils.py: utils has no floor"]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("algorithm/new.py", "from tac_ray.algorithm.losses import TacLoss"),
        ("algorithm/new.py", "from .losses import TacLoss\nimport torch"),
        ("config.py", "from tac_ray.algorithm.nouns import Precision"),
        ("artifacts/new.py", "from tac_ray.algorithm.kmeans import Sums"),
        ("index/new.py", "import faiss\nfrom tac_ray.artifacts.store import Store"),
        ("stages/new.py", "import ray\nfrom tac_ray.index.group import ShardGroup"),
        ("stages/new.py", "from tac_ray.config import TacConfig"),
        ("pipeline.py", "from tac_ray.stages.evaluate import evaluate"),
        ("cli.py", "from tac_ray.pipeline import run"),
        ("__init__.py", "from tac_ray.pipeline import run"),
    ],
)
def test_imports_of_lower_floors_are_allowed(tmp_path: Path, file: str, line: str):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{line}\n")
    assert violations(tmp_path) == []
