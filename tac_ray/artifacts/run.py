"""A run: what was asked for, which artifacts answered, and where the answer is."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.storage import Folder, filesystem, is_local

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run in its `--out` folder. `status`, `assign` and `report` read nothing else."""

    out: str
    config: dict[str, Any]
    question: dict[str, Any]
    """The options that change the result: a run with others may not take this one's place."""
    artifacts: dict[str, str]
    """Name of the step -> path of its artifact, in the order they were made."""
    seconds: dict[str, float]
    """Seconds each step took in this run; 0 when its artifact was there already."""
    scores: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    """Split -> method -> ACC, NMI, ARI, where there are labels."""
    finished: bool = False

    def write(self) -> None:
        """Write run.json."""
        data = json.dumps(asdict(self), indent=1).encode()
        Folder(self.out).write(RUN_FILE, data)

    @classmethod
    def load(cls, out: str) -> "Run":
        """Read a run.

        Raises:
            FileNotFoundError: `out` holds no run.
        """
        try:
            raw = json.loads(Folder(out).read(RUN_FILE))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no run at {out}: it has no {RUN_FILE}; give the --out of `tac-ray run`"
            ) from error
        return cls(**{**raw, "out": out})

    def artifact(self, step: str) -> Artifact:
        """The artifact of a step, by its name in `artifacts`."""
        return Artifact.load(self.artifacts[step])

    @property
    def answer(self) -> str:
        """The method whose table is the answer."""
        return str(self.config["methods"][-1])

    @property
    def page(self) -> str:
        """Folder of the run's page, whose index.html opens in a browser."""
        return Folder(self.out).join("page")

    @property
    def clusters(self) -> ds.Dataset:
        """The answer, a row an image: uri, cluster_id, cluster_name, probability, runner-up."""
        path = Folder(self.out).join("clusters")
        fs, inner = filesystem(path)
        return ds.dataset(inner, format="parquet", filesystem=None if is_local(path) else fs)

    @property
    def names(self) -> pa.Table:
        """One row a cluster: cluster_id, name, runners_up, size, mean_probability."""
        return Folder(self.out).read_table("names.parquet")
