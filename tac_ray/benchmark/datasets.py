"""The paper's data sets in the layouts people have on disk, as what `--images` takes.

Each function takes a root (a local folder, a prefix on s3://, or the archive itself) and gives a
`Dataset`. Archives of pixels become Parquet tables of PNG bytes, lists become tables of uris; both
are artifacts, so they are made once. Pickled versions of CIFAR are never read.

Epochs, batch and temperature of the heads are the paper's on every data set without being named
here: `TrainHeadsConfig.resolve` has them follow K.
"""

import io
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from fsspec import AbstractFileSystem
from numpy.typing import NDArray
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image

from tac_ray.artifacts.storage import absolute, filesystem, is_local
from tac_ray.artifacts.store import ArtifactWriter, Store, hash_of
from tac_ray.encoders.nouns import WordNet
from tac_ray.sources.listing import IMAGE_EXTENSIONS
from tac_ray.stages.list_images import Labels, check_place, list_images

PART_ROWS = 10_000
"""Images of a table."""
ARCHIVES = (".tar.gz", ".tgz", ".tar")
IMAGENET_10 = [
    "n02056570",
    "n02085936",
    "n02128757",
    "n02690373",
    "n02692877",
    "n03095699",
    "n04254680",
    "n04285008",
    "n04467665",
    "n07747607",
]
IMAGENET_DOGS = [
    "n02085936",
    "n02086646",
    "n02088238",
    "n02091467",
    "n02097130",
    "n02099601",
    "n02101388",
    "n02101556",
    "n02102177",
    "n02105056",
    "n02105412",
    "n02105855",
    "n02107142",
    "n02110958",
    "n02112137",
]

DatasetName = Literal[
    "stl-10", "cifar-10", "cifar-20", "imagenet-10", "imagenet-dogs", "dtd", "ucf-101", "imagenet"
]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Images with labels, and what the paper does with them."""

    name: str
    train: str
    """What heads are trained on: a place that `list_images` reads."""
    test: str | None = None
    """What they are scored on; None if it is the same."""
    n_clusters: int
    """K."""
    class_names: dict[str, str] = field(default_factory=dict)
    """What to call each label in a prompt."""
    n_centroids: int | None = None
    """k of the published code; None follows Eq. 2."""
    resize: int | None = None
    """Short side before the crop; None is the encoder's own size."""
    labels: Labels = "auto"


def dataset(store: Store, name: DatasetName, root: str) -> Dataset:
    """One of the paper's data sets.

    Args:
        store: where converted images are kept.
        name: which.
        root: where its archive lies or was unpacked.

    Raises:
        FileNotFoundError: it is not there.
    """
    found: dict[str, Callable[[Store, str], Dataset]] = {
        "stl-10": stl_10,
        "cifar-10": cifar_10,
        "cifar-20": cifar_20,
        "imagenet-10": imagenet_10,
        "imagenet-dogs": imagenet_dogs,
        "dtd": dtd,
        "ucf-101": ucf_101,
        "imagenet": imagenet,
    }
    return found[name](store, absolute(root))


def class_folders(store: Store, root: str) -> Dataset:
    """Any folder with one folder a class, trained and scored on all of it.

    Args:
        store: where its listing is kept.
        root: the folder.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: an image lies outside of any folder, or fewer than two folders hold images.
    """
    root = absolute(root)
    check_place(root)
    classes = list_images(store, root, labels="folder").facts["labels"]
    if len(classes) < 2:
        raise ValueError(
            f"{root} has {len(classes)} folders of images and should have at least 2, one a class; "
            "give another --images"
        )
    return Dataset(
        name=posixpath.basename(root),
        train=root,
        n_clusters=len(classes),
        class_names={name: class_name(name) for name in classes},
        labels="folder",
    )


def class_name(label: str) -> str:
    """A label as people would say it: WordNet's first lemma of a class id, else its words."""
    synset = re.fullmatch(r"n(\d{8})", label)
    if synset is not None:
        with suppress(ValueError):  # only looks like one
            label = WordNet.load().lemmas(int(synset[1]))[0]
    return label.replace("_", " ")


def stl_10(store: Store, root: str) -> Dataset:
    """STL-10 in its binary version: 5,000 and 8,000 images of 96 x 96 pixels."""
    found = _Files.of(root, "stl10_binary", "stl10_binary.tar.gz", "train_X.bin")
    names = found.text("class_names.txt").split()

    def images(split: str) -> Iterator[tuple[bytes, str]]:
        content = found.read([f"{split}_X.bin", f"{split}_y.bin"])
        label = np.frombuffer(content[f"{split}_y.bin"], np.uint8) - 1  # counted from 1
        pixels = np.frombuffer(content[f"{split}_X.bin"], np.uint8).reshape(-1, 3, 96, 96)
        # Columns come before rows in this file.
        return _as_png(pixels.transpose(0, 3, 2, 1), [names[i] for i in label])

    return Dataset(
        name="STL-10",
        train=_pixel_tables(store, "STL-10", "train", found, lambda: images("train")),
        test=_pixel_tables(store, "STL-10", "test", found, lambda: images("test")),
        n_clusters=10,
        class_names=_said(names),
        n_centroids=17,
    )


def cifar_10(store: Store, root: str) -> Dataset:
    """CIFAR-10 in its binary version: 50,000 and 10,000 images of 32 x 32 pixels."""
    found = _Files.of(root, "cifar-10-batches-bin", "cifar-10-binary.tar.gz", "test_batch.bin")
    names = found.text("batches.meta.txt").split()
    batches = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    return _cifar(store, "CIFAR-10", found, names, batches, n_label_columns=1)


def cifar_20(store: Store, root: str) -> Dataset:
    """CIFAR-100 in its binary version, with its 20 coarse labels."""
    found = _Files.of(root, "cifar-100-binary", "cifar-100-binary.tar.gz", "test.bin")
    names = found.text("coarse_label_names.txt").split()
    batches = {"train": ["train.bin"], "test": ["test.bin"]}
    return _cifar(store, "CIFAR-20", found, names, batches, n_label_columns=2)


def _cifar(
    store: Store,
    name: str,
    found: "_Files",
    names: list[str],
    batches: dict[str, list[str]],
    *,
    n_label_columns: int,
) -> Dataset:
    """Rows of label bytes, of which the first counts, and 3 x 32 x 32 pixels."""

    def images(files: list[str]) -> Iterator[tuple[bytes, str]]:
        content = found.read(files)
        for file in files:
            rows = np.frombuffer(content[file], np.uint8).reshape(-1, n_label_columns + 3072)
            pixels = rows[:, n_label_columns:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            yield from _as_png(pixels, [names[i] for i in rows[:, 0]])

    made = {
        split: _pixel_tables(store, name, split, found, lambda files=files: images(files))
        for split, files in batches.items()
    }
    return Dataset(
        name=name,
        train=made["train"],
        test=made["test"],
        n_clusters=len(names),
        class_names=_said(names),
        n_centroids=167,
    )


def imagenet(store: Store, root: str) -> Dataset:
    """ImageNet-1K: folders `train` and `val` with one folder a class."""
    classes = _folders(posixpath.join(root, "train"))
    # CLIP's own names are in the order of the class ids.
    names = IMAGENET_CLASSNAMES if len(classes) == len(IMAGENET_CLASSNAMES) else None
    return Dataset(
        name="ImageNet-1K",
        train=posixpath.join(root, "train"),
        test=posixpath.join(root, "val"),
        n_clusters=len(classes),
        class_names=dict(zip(classes, names or map(class_name, classes), strict=True)),
        n_centroids=4271,
        resize=256,
        labels="folder",
    )


def imagenet_10(store: Store, root: str) -> Dataset:
    """Ten classes of ImageNet, from its folders `train` and `val`."""
    return _imagenet_classes(store, root, "ImageNet-10", IMAGENET_10, n_centroids=43)


def imagenet_dogs(store: Store, root: str) -> Dataset:
    """Fifteen dogs of ImageNet, from its folders `train` and `val`."""
    return _imagenet_classes(store, root, "ImageNet-Dogs", IMAGENET_DOGS, n_centroids=65)


def _imagenet_classes(
    store: Store, root: str, name: str, classes: list[str], *, n_centroids: int
) -> Dataset:
    made = {}
    for split in ("train", "val"):
        images = []
        for wnid in classes:
            folder = posixpath.join(root, split, wnid)
            uris = _images(folder)
            if not uris:
                raise FileNotFoundError(f"{folder} holds no images; check --data")
            images += [(uri, wnid) for uri in uris]
        made[split] = _uri_table(store, name, split, images)
    return Dataset(
        name=name,
        train=made["train"],
        test=made["val"],
        n_clusters=len(classes),
        class_names={wnid: class_name(wnid) for wnid in classes},
        n_centroids=n_centroids,
        resize=256,
    )


def dtd(store: Store, root: str) -> Dataset:
    """Describable Textures: `images` with one folder a texture, `labels` with the first split."""
    fs, path = filesystem(root)
    if fs.exists(posixpath.join(path, "dtd")):
        root = posixpath.join(root, "dtd")
    made = {}
    for split, lists in {"train": ["train1", "val1"], "test": ["test1"]}.items():
        lines = [
            line
            for listed in lists
            for line in _lines(posixpath.join(root, "labels", f"{listed}.txt"))
        ]
        images = [(posixpath.join(root, "images", line), line.split("/")[0]) for line in lines]
        made[split] = _uri_table(store, "DTD", split, images)
    classes = _folders(posixpath.join(root, "images"))
    return Dataset(
        name="DTD",
        train=made["train"],
        test=made["test"],
        n_clusters=len(classes),
        class_names=_said(classes),
        n_centroids=141,
    )


def ucf_101(store: Store, root: str) -> Dataset:
    """UCF-101 as one frame a video in class folders, with the first of its lists.

    A video `Class/video.avi` of the lists is the image `Class/video.jpg` (or another suffix). The
    lists lie in the root or in `ucfTrainTestlist`.
    """
    fs, path = filesystem(root)
    inner = posixpath.join(root, "ucfTrainTestlist")
    lists = inner if fs.exists(posixpath.join(path, "ucfTrainTestlist")) else root
    frames = {
        (name, posixpath.splitext(posixpath.basename(uri))[0]): uri
        for name in _folders(root)
        for uri in _images(posixpath.join(root, name))
    }
    made, classes = {}, set()
    for split, listed in {"train": "trainlist01.txt", "val": "testlist01.txt"}.items():
        images = []
        for line in _lines(posixpath.join(lists, listed)):
            name, video = line.split()[0].split("/")
            frame = frames.get((name, posixpath.splitext(video)[0]))
            if frame is None:
                raise FileNotFoundError(
                    f"{root}/{name} has no frame of {video}, which {listed} names; write one image "
                    "a video there, with the video's name"
                )
            images.append((frame, name))
            classes.add(name)
        made[split] = _uri_table(store, "UCF-101", split, images)
    words = {name: re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name) for name in sorted(classes)}
    return Dataset(
        name="UCF-101",
        train=made["train"],
        test=made["val"],
        n_clusters=len(classes),
        class_names=words,
        n_centroids=303,
    )


@dataclass(frozen=True, kw_only=True)
class _Files:
    """Files of a data set, in a folder or in an archive."""

    place: str
    folder: str
    """Their folder inside of an archive."""
    is_archive: bool

    @classmethod
    def of(cls, root: str, folder: str, archive: str, file: str) -> "_Files":
        """Find them, by one of them.

        Raises:
            FileNotFoundError: neither the unpacked folder nor the archive is there.
        """
        fs, path = filesystem(root)
        if root.endswith(ARCHIVES) and fs.exists(path):
            return cls(place=root, folder=folder, is_archive=True)
        for place in (posixpath.join(root, folder), root):
            if fs.exists(posixpath.join(filesystem(place)[1], file)):
                return cls(place=place, folder=folder, is_archive=False)
        packed = posixpath.join(root, archive)
        if fs.exists(filesystem(packed)[1]):
            return cls(place=packed, folder=folder, is_archive=True)
        raise FileNotFoundError(
            f"{root} holds neither {folder}/{file} nor {archive}; give the folder of one of them "
            "to --data"
        )

    @property
    def fingerprint(self) -> str:
        """Changes when the files do, as far as sizes and times tell."""
        fs, path = filesystem(self.place)
        files = [path] if self.is_archive else sorted(fs.find(path))
        found = [fs.info(file) for file in files]
        return hash_of([[f["name"], f["size"], f.get("ETag") or f.get("mtime")] for f in found])

    def read(self, names: Sequence[str]) -> dict[str, bytes]:
        """Contents of some of them, by name.

        Raises:
            FileNotFoundError: one is missing.
        """
        fs, path = filesystem(self.place)
        if not self.is_archive:
            return {name: fs.cat_file(posixpath.join(path, name)) for name in names}  # type: ignore[misc]
        wanted = {posixpath.join(self.folder, name): name for name in names}
        content: dict[str, bytes] = {}
        opened: Any = fs.open(path, "rb")
        with opened as file, tarfile.open(fileobj=file, mode="r|*") as packed:
            for member in packed:
                name = wanted.get(posixpath.normpath(member.name))
                found = packed.extractfile(member) if name else None
                if name and found:
                    content[name] = found.read()
                if len(content) == len(wanted):
                    break
        missing = sorted(set(names) - set(content))
        if missing:
            raise FileNotFoundError(
                f"{self.place} has no {', '.join(missing)} in {self.folder}; get the archive anew"
            )
        return content

    def text(self, name: str) -> str:
        """Content of a text file."""
        return self.read([name])[name].decode()


def _pixel_tables(
    store: Store,
    name: str,
    split: str,
    source: _Files,
    images: Callable[[], Iterator[tuple[bytes, str]]],
) -> str:
    """Path of the tables of a split's images and labels, in their order."""

    def write(writer: ArtifactWriter) -> None:
        writer.start(None, "images")
        rows = images()
        while block := list(islice(rows, PART_ROWS)):
            image, label = zip(*block, strict=True)
            columns = {"image": pa.array(image, pa.binary()), "label": pa.array(label, pa.string())}
            writer.add_part(pa.table(columns), plain=True)
            writer.progress.advance(len(block))

    return _imported(store, name, split, source.fingerprint, write)


def _uri_table(store: Store, name: str, split: str, images: list[tuple[str, str]]) -> str:
    """Path of a table of uris and labels."""

    def write(writer: ArtifactWriter) -> None:
        writer.start(len(images), "uris")
        uri, label = zip(*images, strict=True)
        writer.add_part(pa.table({"uri": uri, "label": label}))

    return _imported(store, name, split, hash_of(images), write)


def _imported(
    store: Store, name: str, split: str, source: str, write: Callable[[ArtifactWriter], None]
) -> str:
    made = store.run_stage(
        "import_dataset",
        version=1,
        options={"dataset": name, "split": split},
        inputs=[source],
        write=write,
        title=f"import_dataset {name} {split}",
    )
    return made.folder.path


def _as_png(pixels: NDArray[np.uint8], labels: Iterable[str]) -> Iterator[tuple[bytes, str]]:
    """Images (n, height, width, 3) as PNG files, with their labels."""
    for image, label in zip(pixels, labels, strict=True):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG", compress_level=1)
        yield file.getvalue(), label


def _said(names: Iterable[str]) -> dict[str, str]:
    return {name: name.replace("_", " ") for name in names}


def _listed(path: str) -> tuple[AbstractFileSystem, list[dict[str, Any]]]:
    fs, inner = filesystem(path)
    try:
        return fs, fs.ls(inner, detail=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no folder {path}; check --data or --images") from error


def _folders(path: str) -> list[str]:
    """Names of the folders in a folder, sorted."""
    fs, listed = _listed(path)
    # Links are neither files nor directories in a listing.
    folders = [f["name"] for f in listed if f["type"] != "file" and fs.isdir(f["name"])]
    names = [posixpath.basename(name.rstrip("/")) for name in folders]
    return sorted(name for name in names if not name.startswith("."))


def _images(path: str) -> list[str]:
    """Uris of the images in a folder, sorted."""
    _, listed = _listed(path)
    names = [f["name"] for f in listed if f["type"] != "directory"]
    images = [n for n in names if posixpath.splitext(n)[1].lower() in IMAGE_EXTENSIONS]
    return sorted(images if is_local(path) else [f"s3://{name}" for name in images])


def _lines(path: str) -> list[str]:
    fs, inner = filesystem(path)
    try:
        content: Any = fs.cat_file(inner)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no list {path}; check --data") from error
    return [line.strip() for line in content.decode().splitlines() if line.strip()]
