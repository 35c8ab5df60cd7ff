"""Named clusters for very large image collections: Text-Aided Clustering on Ray.

import tac_ray

run = tac_ray.run(tac_ray.best(images="photos", n_clusters=20, out="runs/photos"))
table = run.clusters.to_table()
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tac_ray.artifacts.run import Run
    from tac_ray.config import TacConfig, best, reference
    from tac_ray.pipeline import assign, run

__all__ = ["Run", "TacConfig", "assign", "best", "reference", "run"]

_HOMES = {
    "Run": "tac_ray.artifacts.run",
    "TacConfig": "tac_ray.config",
    "assign": "tac_ray.pipeline",
    "best": "tac_ray.config",
    "reference": "tac_ray.config",
    "run": "tac_ray.pipeline",
}


def __getattr__(name: str) -> Any:
    # Ray, torch and open_clip take seconds to import, and a worker needs few of them.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
