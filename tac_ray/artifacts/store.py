"""When a stage runs, where its artifact lies, and when it exists."""

import hashlib
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol

import psutil
import pyarrow as pa

from tac_ray.artifacts.manifest import (
    MANIFEST,
    Artifact,
    Manifest,
    Part,
    describe,
    write_part,
)
from tac_ray.artifacts.storage import Folder

_RECORDED_VERSIONS = ("tac-ray", "ray", "torch", "open_clip_torch", "faiss-cpu", "faiss-gpu")


class Progress(Protocol):
    """Who is told what a stage is doing."""

    def start(self, title: str, total: int | None, unit: str) -> None:
        """A stage begins; `total` units are to be done, None if unknown."""
        ...

    def advance(self, n: int = 1, note: str = "") -> None:
        """`n` more units are done."""
        ...

    def finish(self, title: str, artifact: Artifact) -> None:
        """The stage's artifact exists."""
        ...

    def say(self, text: str) -> None:
        """A line worth reading."""
        ...


@dataclass
class ArtifactWriter:
    """What a stage writes its artifact with."""

    folder: Folder
    progress: Progress
    title: str
    parts: list[Part] = field(default_factory=list)
    files: list[Part] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    peak_memory_gb: float = 0.0

    def start(self, total: int | None, unit: str) -> None:
        """Tell that work begins; `total` units are to be done, None if unknown."""
        self.progress.start(self.title, total, unit)

    def add_part(self, table: pa.Table, *, plain: bool = False) -> None:
        """Write the next part."""
        self.parts.append(write_part(self.folder, len(self.parts), table, plain=plain))

    def add_file(self, name: str, data: bytes, rows: int = 0) -> None:
        """Write a file beside the parts."""
        self.folder.write(name, data)
        self.files.append(describe(name, data, rows))

    def note_memory(self, gb: float) -> None:
        """Remember the memory of a worker."""
        self.peak_memory_gb = max(self.peak_memory_gb, gb)


@dataclass(frozen=True)
class Store:
    """The place where artifacts of all runs lie."""

    path: str
    progress: Progress

    def run_stage(
        self,
        stage: str,
        *,
        version: int,
        options: Any,
        inputs: Sequence[Artifact | str],
        write: Callable[[ArtifactWriter], None],
        title: str | None = None,
        begun: float | None = None,
    ) -> Artifact:
        """The artifact of a stage: the one that exists, else a new one.

        Args:
            stage: name, first half of the folder's name.
            version: raised when the same options give another result.
            options: dataclass or dict. Fields whose metadata say `changes_result=False` are
                left out of the fingerprint, and those that say `hash_default=False` at their
                default.
            inputs: artifacts it reads, or strings that stand for other inputs.
            write: makes the artifact; the manifest is written after it returns, so a stage that
                was killed has left nothing that counts; it finds its unfinished files and may use
                them.
            title: what people see of a stage that runs more than once; default its name.
            begun: `time.perf_counter()` of when its work began, if that was before this call.
        """
        done = self.reuse(stage, version=version, options=options, inputs=inputs, title=title)
        if done is not None:
            return done
        kept, prints, fingerprint = _identity(stage, version, options, inputs)
        folder = self._folder(stage, fingerprint)
        if folder.exists(MANIFEST):
            folder.remove()  # another artifact with the same first eight digits
        start = time.perf_counter() if begun is None else begun
        writer = ArtifactWriter(folder, self.progress, title or stage)
        write(writer)
        writer.note_memory(own_memory_gb())
        manifest = Manifest(
            stage=stage,
            version=version,
            fingerprint=fingerprint,
            options=kept,
            inputs=prints,
            parts=writer.parts,
            files=writer.files,
            facts=writer.facts,
            seconds=round(time.perf_counter() - start, 3),
            peak_memory_gb=round(writer.peak_memory_gb, 3),
            versions=_versions(),
        )
        folder.write(MANIFEST, manifest.to_json())
        artifact = Artifact(folder, manifest)
        self.progress.finish(title or stage, artifact)
        return artifact

    def reuse(
        self,
        stage: str,
        *,
        version: int,
        options: Any,
        inputs: Sequence[Artifact | str],
        title: str | None = None,
    ) -> Artifact | None:
        """The artifact that `run_stage` would find with these arguments, None if it would write."""
        fingerprint = _identity(stage, version, options, inputs)[2]
        folder = self._folder(stage, fingerprint)
        if not folder.exists(MANIFEST):
            return None
        artifact = Artifact.load(folder.path)
        if artifact.fingerprint != fingerprint:
            return None
        artifact = replace(artifact, reused=True)
        self.progress.finish(title or stage, artifact)
        return artifact

    def _folder(self, stage: str, fingerprint: str) -> Folder:
        return Folder(Folder(self.path).join(f"{stage}-{fingerprint[:8]}"))


def result_options(options: Any) -> dict[str, Any]:
    """The options that change a result, as a dict that JSON can hold; dataclasses may nest."""
    if isinstance(options, dict):
        return options
    return {
        spec.name: result_options(value) if is_dataclass(value) else value
        for spec in fields(options)
        if spec.metadata.get("changes_result", True)
        for value in [getattr(options, spec.name)]
        if spec.metadata.get("hash_default", True) or value != spec.default
    }


def _identity(
    stage: str, version: int, options: Any, inputs: Sequence[Artifact | str]
) -> tuple[dict[str, Any], list[str], str]:
    """Options that count, fingerprints of the inputs, and the fingerprint of it all."""
    kept = result_options(options)
    prints = [i if isinstance(i, str) else i.fingerprint for i in inputs]
    question = {"stage": stage, "version": version, "options": kept, "inputs": prints}
    return kept, prints, hash_of(question)


def hash_of(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def own_memory_gb() -> float:
    """Memory of this process alone, GB: without the files and the object store it maps."""
    memory = psutil.Process().memory_info()
    return (memory.rss - getattr(memory, "shared", 0)) / 1e9  # macOS does not say what is shared


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": sys.platform}
    for package in _RECORDED_VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
