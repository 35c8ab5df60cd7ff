"""Embeddings as artifacts, and shard groups that run in this process."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tac_ray import cluster
from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import matrix_column
from tac_ray.artifacts.store import Store
from tac_ray.index import group

ArtifactMaker = Callable[..., Artifact]


@pytest.fixture
def make_artifact(tmp_path: Path, silent_progress: Any) -> ArtifactMaker:
    """Writes float16 rows as an artifact with parts of these numbers of rows."""

    def make(rows: np.ndarray, part_rows: list[int]) -> Artifact:
        assert sum(part_rows) == len(rows)
        rows = rows.astype(np.float16)

        def write(writer: Any) -> None:
            for part in np.split(rows, np.cumsum(part_rows)[:-1]):
                writer.add_part(pa.table({"embedding": matrix_column(part)}), plain=True)

        return Store(str(tmp_path / "store"), silent_progress).run_stage(
            "embed_images",
            version=1,
            options={"rows": hashlib.sha256(rows.tobytes()).hexdigest(), "parts": part_rows},
            inputs=[],
            write=write,
        )

    return make


class _Actor:
    def __init__(self, instance: Any) -> None:
        self._instance = instance

    def __getattr__(self, name: str) -> Any:
        return _Callable(getattr(self._instance, name))


class _Callable:
    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function

    def options(self, **_: Any) -> "_Callable":
        return self


class _InProcessRay:
    """As much of Ray as a shard group asks for, in this process."""

    def remote(self, kind: Callable[..., Any]) -> _Callable:
        return _Callable(lambda *args: _Actor(kind(*args)))

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def put(self, value: Any) -> Any:
        return value

    def get(self, value: Any) -> Any:
        return value

    def kill(self, actor: _Actor) -> None:
        pass


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> type[group.ShardGroup]:
    """ShardGroup without a cluster: its actors and tasks run in this process, in order."""
    write = group._write_found._function
    for module in (group, cluster):
        monkeypatch.setattr(module, "ray", _InProcessRay())
    monkeypatch.setattr(group, "_write_found", _Callable(write))
    return group.ShardGroup
