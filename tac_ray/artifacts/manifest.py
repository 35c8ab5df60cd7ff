"""What an artifact is: a folder whose manifest, written last, lists its parts."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from tac_ray.artifacts.storage import Folder, table_bytes

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of an artifact."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything known of a finished artifact."""

    stage: str
    version: int
    fingerprint: str
    """sha256 of stage, version, options and inputs: what the result depends on."""
    options: dict[str, Any]
    inputs: list[str]
    """Fingerprints of the artifacts it was made from."""
    parts: list[Part]
    """Aligned data files, in order."""
    files: list[Part] = field(default_factory=list)
    """Files beside the parts (failures, centroids, weights)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the stage found out and later stages or people want to know."""
    seconds: float
    peak_memory_gb: float
    """Most memory of any process that reported, driver included; see `own_memory_gb`."""
    versions: dict[str, str]

    @property
    def n_rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def n_bytes(self) -> int:
        """Bytes of all parts and files."""
        return sum(part.bytes for part in [*self.parts, *self.files])

    def to_json(self) -> bytes:
        """The manifest as a JSON document."""
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Manifest":
        """The inverse of `to_json`."""
        raw = json.loads(data)
        for key in ("parts", "files"):
            raw[key] = [Part(**part) for part in raw[key]]
        return cls(**raw)


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: where it is and what its manifest says."""

    folder: Folder
    manifest: Manifest
    reused: bool = field(default=False, compare=False)
    """Whether this run found it done."""

    @classmethod
    def load(cls, path: str) -> "Artifact":
        """Open the artifact at `path`.

        Raises:
            FileNotFoundError: there is no manifest, so there is no artifact.
        """
        folder = Folder(path)
        try:
            return cls(folder, Manifest.from_json(folder.read(MANIFEST)))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no artifact at {path}: it has no {MANIFEST}; run the stage that writes it"
            ) from error

    @property
    def fingerprint(self) -> str:
        """What the artifact depends on, as a hash."""
        return self.manifest.fingerprint

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage found out."""
        return self.manifest.facts

    @property
    def n_rows(self) -> int:
        """Rows of all parts."""
        return self.manifest.n_rows

    @property
    def part_rows(self) -> list[int]:
        """Rows of each part."""
        return [part.rows for part in self.manifest.parts]

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The parts as tables, in order, one at a time."""
        for part in self.manifest.parts:
            yield self.folder.read_table(part.name, columns)

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all parts, in memory."""
        return pa.concat_tables(self.tables([name])).column(name)


def describe(name: str, data: bytes, rows: int = 0) -> Part:
    """The manifest's line for a file with this content."""
    return Part(name=name, rows=rows, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_part(
    folder: Folder, index: int, table: pa.Table, *, plain: bool = False, prefix: str = "part"
) -> Part:
    """Write one part and return its line in the manifest. Runs anywhere."""
    name = f"{prefix}-{index:05d}.parquet"
    data = table_bytes(table, plain=plain)
    folder.write(name, data)
    return describe(name, data, table.num_rows)
