"""Which images there are: uri, size, etag and, in a tree of class folders, the label."""

import posixpath
from collections import Counter
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.schemas import IMAGES
from tac_ray.artifacts.storage import absolute, filesystem, is_local
from tac_ray.artifacts.store import ArtifactWriter, Store, hash_of

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
PART_ROWS = 65_536


def list_images(
    store: Store, images: str, *, labels: Literal["auto", "folder", "none"]
) -> Artifact:
    """List a folder or prefix, anew in every run since it may have grown.

    The artifact's fingerprint is that of the listing, so an unchanged place gives the same one.

    Raises:
        FileNotFoundError: no such place.
        ValueError: no image in it, or `labels="folder"` and an image outside of any folder.

    Cost: one listing; memory about 300 bytes an image on the driver.
    """
    rows, n_other = _scan(images)
    names = _folder_labels([row["relative"] for row in rows], labels, images)
    listing = [
        [row["uri"], row["size"], row["etag"], name] for row, name in zip(rows, names, strict=True)
    ]

    def write(writer: ArtifactWriter) -> None:
        for start in range(0, len(listing), PART_ROWS):
            block = listing[start : start + PART_ROWS]
            uri, size, etag, label = zip(*block, strict=True)
            ids = range(start, start + len(block))
            columns = [ids, uri, [None] * len(block), size, etag, label]
            arrays = [pa.array(c, f.type) for c, f in zip(columns, IMAGES, strict=True)]
            writer.add_part(pa.table(arrays, schema=IMAGES))
        writer.facts["n_other_files"] = n_other
        writer.facts["labels"] = sorted({name for name in names if name is not None})

    return store.run_stage(
        "list_images", version=1, options={}, inputs=[hash_of(listing)], write=write
    )


def _scan(images: str) -> tuple[list[dict[str, Any]], int]:
    root = absolute(images)
    fs, path = filesystem(root)
    found: dict[str, Any] = fs.find(path, detail=True)  # type: ignore[assignment]
    if not found:
        if is_local(root) and not fs.exists(path):
            raise FileNotFoundError(f"no folder {root}; check --images")
        raise ValueError(f"{root} holds no files; --images needs a folder or prefix of images")
    rows = []
    for name, info in sorted(found.items()):
        if PurePosixPath(name).suffix.lower() not in EXTENSIONS:
            continue
        etag = info.get("ETag") or f"{info['size']}-{info.get('mtime', info.get('LastModified'))}"
        rows.append(
            {
                "uri": name if is_local(root) else fs.unstrip_protocol(name),
                "relative": posixpath.relpath(name, path),
                "size": int(info["size"]),
                "etag": str(etag).strip('"'),
            }
        )
    if not rows:
        kinds = Counter(PurePosixPath(name).suffix or "no suffix" for name in found)
        most = ", ".join(kind for kind, _ in kinds.most_common(3))
        raise ValueError(
            f"{root} holds {len(found)} files ({most}) and no image; images end in "
            f"{', '.join(sorted(EXTENSIONS))}"
        )
    return rows, len(found) - len(rows)


def _folder_labels(
    relative: list[str], labels: Literal["auto", "folder", "none"], images: str
) -> list[str | None]:
    """The class folder of each image in ImageFolder layout (root/class/image), else None."""
    parts = [PurePosixPath(path).parts for path in relative]
    if labels == "none":
        return [None] * len(parts)
    if labels == "folder":
        outside = sum(len(p) < 2 for p in parts)
        if outside:
            raise ValueError(
                f"{outside} of {len(parts)} images lie in {images} itself, outside of any class "
                "folder; move them or use --labels none"
            )
        return [p[0] for p in parts]
    is_image_folder = all(len(p) == 2 for p in parts) and len({p[0] for p in parts}) > 1
    return [p[0] if is_image_folder else None for p in parts]
