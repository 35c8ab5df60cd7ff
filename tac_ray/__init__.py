"""Named clusters for very large image collections: Text-Aided Clustering on Ray.

    import tac_ray
    run = tac_ray.run(tac_ray.best(images="photos", n_clusters=20, out="runs/photos"))
    table = run.clusters.to_table()
"""

from tac_ray.artifacts.run import Run
from tac_ray.config import TacConfig, best, reference
from tac_ray.pipeline import assign, run

__all__ = ["Run", "TacConfig", "assign", "best", "reference", "run"]
