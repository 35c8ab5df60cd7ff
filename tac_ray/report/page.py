"""One folder that opens from disk: index.html and the sheets of pictures beside it."""

import base64
import hashlib
import json
import posixpath
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from numpy.typing import NDArray

from tac_ray.artifacts.manifest import Artifact
from tac_ray.artifacts.run import Run
from tac_ray.artifacts.storage import Folder
from tac_ray.config import METHOD_TITLES
from tac_ray.encoders.nouns import WordNet
from tac_ray.report.pictures import KINDS, PER_KIND, sheet_name

PAGE = "index.html"
MAX_MATRIX = 40
"""The confusion matrix is drawn up to this many clusters and labels; beyond, its largest entries
off the matched labels are listed."""
MAX_CONFUSIONS = 100
MAX_REASONS = 20
COPIES_IN_FLIGHT = 32

_HERE = Path(__file__).parent


def write_page(run: Run, to: str | None = None) -> str:
    """Write the page of a finished run.

    Args:
        run: any finished run.
        to: folder or prefix of the page; default `page` in the run's own folder.

    Returns:
        Path of index.html.

    Raises:
        FileNotFoundError: the run is not finished or has no pictures, or its artifacts are gone.

    Cost: copies a sheet of about 40 kB a cluster; memory about 3 kB a cluster.
    """
    if not run.finished:
        raise FileNotFoundError(f"the run at {run.out} is not finished; run it again to its end")
    if "report" not in run.artifacts:
        raise FileNotFoundError(
            f"the run at {run.out} has no pictures, as an earlier version left it; give its "
            "`tac-ray run` again"
        )
    sheets = run.artifact("report").folder
    page = Folder(to or run.page)
    names = [sheet_name(cluster) for cluster in range(run.names.num_rows)]
    with ThreadPoolExecutor(COPIES_IN_FLIGHT) as copies:
        list(copies.map(lambda name: page.write(name, sheets.read(name)), names))
    page.write(PAGE, render_page(run).encode())  # last: what it shows is there
    return page.join(PAGE)


def render_page(run: Run) -> str:
    """The HTML of a finished run's page.

    What comes from outside (file names, nouns, labels) is escaped by Jinja or set as text by the
    page's script. The content security policy names the hashes of the page's own style and
    script, so that nothing else runs, and allows no connection.
    """
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    templates = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(_HERE),
    )
    images = run.artifact("embed_images")
    confusion = _confusion(run)
    return templates.get_template("page.html.j2").render(
        style=style,
        script=script,
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        run=run,
        method=METHOD_TITLES[run.answer],
        titles=METHOD_TITLES,
        n_images=images.n_rows,
        failures=_failures(images),
        data=_data(run, confusion),
        matrix=confusion and _matrix(run, confusion),
        confusions=confusion and _largest_confusions(run, confusion),
        options=_flat(run.config),
        stages=[(step, run.artifact(step), seconds) for step, seconds in run.seconds.items()],
    )


class _Confusion(NamedTuple):
    """Clusters against labels of the images the run was fitted on."""

    counts: NDArray[np.int64]
    """(n_clusters, n_labels)"""
    labels: list[str]
    matched: list[int]
    """Label matched to each cluster, -1 for none."""


def _confusion(run: Run) -> _Confusion | None:
    if not run.scores:
        return None
    splits = json.loads(run.artifact("evaluate").folder.read("metrics.json"))["splits"]
    found = next(iter(splits.values()))[run.answer]
    labels = [_readable(label) for label in found["labels"]]
    return _Confusion(np.array(found["confusion"]), labels, found["matched_label"])


def _readable(label: str) -> str:
    """A class id of ImageNet with the noun it stands for; other labels as they are."""
    synset = re.fullmatch(r"n(\d{8})", label)
    if synset is None:
        return label
    try:
        lemma = WordNet.load().lemmas(int(synset[1]))[0]
    except ValueError:  # only looks like one
        return label
    return f"{lemma.replace('_', ' ')} ({label})"


def _data(run: Run, confusion: _Confusion | None) -> dict[str, Any]:
    """What the page's script draws the clusters from."""
    pictures = run.artifact("report").folder.read_table("pictures.parquet").to_pylist()
    # The common beginning of all names is said once.
    folder = posixpath.commonprefix([row["uri"] for row in pictures])
    folder = folder[: folder.rfind("/") + 1]
    clusters = []
    for row in run.names.to_pylist():
        cluster = {
            "name": row["name"],
            "nouns": row["runners_up"],
            "size": row["size"],
            "p": round(row["mean_probability"], 3),
            "pictures": [],
        }
        if confusion and row["size"]:
            counts = confusion.counts[row["cluster_id"]]
            most = int(counts.argmax())
            cluster["label"] = confusion.labels[most]
            cluster["purity"] = round(counts[most] / counts.sum(), 3)
        clusters.append(cluster)
    for row in pictures:
        clusters[row["cluster_id"]]["pictures"].append(
            [
                row["kind"],
                row["uri"][len(folder) :] + (f" : {row['member']}" if row["member"] else ""),
                round(row["probability"], 3),
                row["next_cluster_id"],
                round(row["next_probability"], 3),
            ]
        )
    return {"kinds": KINDS, "perKind": PER_KIND, "folder": folder, "clusters": clusters}


def _matrix(run: Run, confusion: _Confusion) -> dict[str, Any] | None:
    """Rows of the matrix with the matched labels along the diagonal, each cell with a shade 0-9."""
    counts, labels, matched = confusion
    if max(counts.shape) > MAX_MATRIX:
        return None
    clusters = sorted(range(len(counts)), key=lambda c: (matched[c] < 0, matched[c]))
    largest = np.maximum(counts.sum(axis=1), 1)
    names = run.names["name"].to_pylist()
    rows = [
        (names[c], [(int(n), int(np.ceil(9 * n / largest[c]))) for n in counts[c]])
        for c in clusters
    ]
    return {"labels": labels, "rows": rows}


def _largest_confusions(run: Run, confusion: _Confusion) -> list[tuple[str, str, str, int]]:
    """Cluster, its matched label, another label, and how many images of that it holds."""
    off = confusion.counts.copy()
    for cluster, label in enumerate(confusion.matched):
        if label >= 0:
            off[cluster, label] = 0
    order = np.argsort(-off, axis=None, kind="stable")[:MAX_CONFUSIONS]
    names, labels = run.names["name"].to_pylist(), confusion.labels
    return [
        (
            names[cluster],
            labels[confusion.matched[cluster]] if confusion.matched[cluster] >= 0 else "",
            labels[label],
            int(off[cluster, label]),
        )
        for cluster, label in zip(*np.unravel_index(order, off.shape), strict=True)
        if off[cluster, label]
    ]


def _failures(images: Artifact) -> list[tuple[str, str, int, str]]:
    """Step, reason, how many images and the first of them; the most frequent reasons."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for row in images.folder.read_table("failures.parquet").to_pylist():
        # Sizes and offsets differ from file to file; the reason is the same.
        reason = row["step"], re.sub(r"\d+", "N", row["error"])
        counts[reason] += 1
        first.setdefault(reason, row["uri"])
    return [(*reason, n, first[reason]) for reason, n in counts.most_common(MAX_REASONS)]


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Options without their groups, as the command line has them."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _csp_hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
