"""Each data set in the layouts people have, made up and tiny."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tac_ray.artifacts.store import Store
from tac_ray.benchmark.datasets import IMAGENET_10, IMAGENET_DOGS, class_name, dataset
from tac_ray.config import TrainHeadsConfig

CIFAR_10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.fixture
def store(tmp_path: Path, silent_progress: Any) -> Store:
    return Store(str(tmp_path / "store"), silent_progress)


def rows(place: str | None) -> list[dict[str, Any]]:
    assert place is not None
    return [
        row
        for part in sorted(Path(place).glob("*.parquet"))
        for row in pq.read_table(part).to_pylist()
    ]


def pixels(row: dict[str, Any]) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(row["image"])))


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


def pack(folder: Path, archive: Path) -> None:
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, folder.name)


def cifar_row(labels: list[int], top_left: tuple[int, int, int]) -> bytes:
    planes = np.zeros((3, 32, 32), np.uint8)
    planes[:, 0, 0] = top_left
    planes[0, 0, 1] = 7  # the pixel to its right
    return bytes(labels) + planes.tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_10(store: Store, tmp_path: Path, packed: bool):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(cifar_row([i], (i, 2, 3)) * 2)
    (folder / "test_batch.bin").write_bytes(cifar_row([9], (9, 9, 9)))
    (folder / "batches.meta.txt").write_text("\n".join(CIFAR_10) + "\n\n")
    root = tmp_path
    if packed:
        root = tmp_path / "archives"
        pack(folder, root / "cifar-10-binary.tar.gz")
    found = dataset(store, "cifar-10", str(root))
    train = rows(found.train)
    assert [row["label"] for row in train] == [CIFAR_10[i] for i in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5)]
    assert pixels(train[0])[0, :2].tolist() == [[1, 2, 3], [7, 0, 0]]
    assert [row["label"] for row in rows(found.test)] == ["truck"]
    assert (found.n_clusters, found.n_centroids, found.resize) == (10, 167, None)
    assert found.class_names["airplane"] == "airplane"
    again = dataset(store, "cifar-10", str(root))
    assert again == found
    assert store.progress.finished[-1][1]  # type: ignore[attr-defined]  # made once


def test_cifar_20_has_the_coarse_labels_of_cifar_100(store: Store, tmp_path: Path):
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    (folder / "train.bin").write_bytes(cifar_row([1, 77], (1, 2, 3)))
    (folder / "test.bin").write_bytes(cifar_row([0, 99], (4, 5, 6)))
    names = ["aquatic_mammals", "fish", *(f"group_{i}" for i in range(18))]
    (folder / "coarse_label_names.txt").write_text("\n".join(names))
    found = dataset(store, "cifar-20", str(folder))
    assert [row["label"] for row in rows(found.train)] == ["fish"]
    assert pixels(rows(found.test)[0])[0, 0].tolist() == [4, 5, 6]
    assert (found.n_clusters, found.n_centroids) == (20, 167)
    assert found.class_names["aquatic_mammals"] == "aquatic mammals"


def test_stl_10(store: Store, tmp_path: Path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    planes = np.zeros((2, 3, 96, 96), np.uint8)
    planes[1, :, 1, 0] = (5, 6, 7)  # column 1, row 0: columns come first in the file
    for split in ("train", "test"):
        (folder / f"{split}_X.bin").write_bytes(planes.tobytes())
        (folder / f"{split}_y.bin").write_bytes(bytes([1, 10]))
    (folder / "class_names.txt").write_text(
        "airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck"
    )
    root = tmp_path / "archives"
    pack(folder, root / "stl10_binary.tar.gz")
    found = dataset(store, "stl-10", str(root / "stl10_binary.tar.gz"))
    train = rows(found.train)
    assert [row["label"] for row in train] == ["airplane", "truck"]
    assert pixels(train[1])[0, 1].tolist() == [5, 6, 7]
    assert (found.n_clusters, found.n_centroids) == (10, 17)


@pytest.mark.parametrize(
    ("name", "classes", "n_centroids"),
    [("imagenet-10", IMAGENET_10, 43), ("imagenet-dogs", IMAGENET_DOGS, 65)],
)
def test_subsets_of_imagenet(
    store: Store, tmp_path: Path, name: Any, classes: list[str], n_centroids: int
):
    assert len(set(classes)) == {43: 10, 65: 15}[n_centroids]
    for wnid in [*classes, "n01440764"]:
        write_image(tmp_path / "train" / wnid / "b.JPEG")
        write_image(tmp_path / "train" / wnid / "a.JPEG")
        write_image(tmp_path / "val" / wnid / "c.JPEG")
    found = dataset(store, name, str(tmp_path))
    train = rows(found.train)
    assert [row["label"] for row in train] == [wnid for wnid in classes for _ in range(2)]
    assert train[0]["uri"] == str(tmp_path / "train" / classes[0] / "a.JPEG")
    assert len(rows(found.test)) == len(classes)
    assert (found.n_centroids, found.resize) == (n_centroids, 256)
    assert found.class_names["n02085936"] == "Maltese dog"


def test_imagenet_is_read_where_it_lies(store: Store, tmp_path: Path):
    for split in ("train", "val"):
        write_image(tmp_path / split / "n01440764" / "a.JPEG")
        write_image(tmp_path / split / "n02102040" / "a.JPEG")
    found = dataset(store, "imagenet", str(tmp_path))
    assert (found.train, found.test) == (str(tmp_path / "train"), str(tmp_path / "val"))
    assert (found.labels, found.n_centroids, found.resize) == ("folder", 4271, 256)
    assert found.class_names == {"n01440764": "tench", "n02102040": "English springer"}


def test_links_to_classes_and_images_are_followed(store: Store, tmp_path: Path):
    write_image(tmp_path / "elsewhere" / "a.JPEG")
    for split in ("train", "val"):
        for wnid in IMAGENET_10[:9]:
            (tmp_path / split / wnid).mkdir(parents=True)
            (tmp_path / split / wnid / "a.JPEG").symlink_to(tmp_path / "elsewhere" / "a.JPEG")
        (tmp_path / split / IMAGENET_10[9]).symlink_to(tmp_path / "elsewhere")
    assert len(rows(dataset(store, "imagenet-10", str(tmp_path)).test)) == 10
    assert dataset(store, "imagenet", str(tmp_path)).n_clusters == 10
    (tmp_path / "val" / IMAGENET_10[0] / "a.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=rf"val/{IMAGENET_10[0]} holds no images"):
        dataset(store, "imagenet-10", str(tmp_path))


def test_dtd_trains_on_train_and_val(store: Store, tmp_path: Path):
    for i in range(3):
        write_image(tmp_path / "dtd" / "images" / "cob_webbed" / f"w_{i}.jpg")
        write_image(tmp_path / "dtd" / "images" / "dotted" / f"d_{i}.jpg")
    labels = tmp_path / "dtd" / "labels"
    labels.mkdir()
    for i, split in enumerate(("train", "val", "test")):
        (labels / f"{split}1.txt").write_text(f"cob_webbed/w_{i}.jpg\ndotted/d_{i}.jpg\n")
    found = dataset(store, "dtd", str(tmp_path))
    assert [Path(row["uri"]).name for row in rows(found.train)] == [
        "w_0.jpg",
        "d_0.jpg",
        "w_1.jpg",
        "d_1.jpg",
    ]
    assert [row["label"] for row in rows(found.test)] == ["cob_webbed", "dotted"]
    assert found.class_names == {"cob_webbed": "cob webbed", "dotted": "dotted"}
    assert (found.n_clusters, found.n_centroids) == (2, 141)


def test_ucf_101_has_a_frame_a_video(store: Store, tmp_path: Path):
    write_image(tmp_path / "ApplyEyeMakeup" / "v_a.jpg")
    write_image(tmp_path / "YoYo" / "v_b.png")
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("ApplyEyeMakeup/v_a.avi 1\n")
    (lists / "testlist01.txt").write_text("YoYo/v_b.avi\n")
    found = dataset(store, "ucf-101", str(tmp_path))
    assert rows(found.train) == [
        {"uri": str(tmp_path / "ApplyEyeMakeup" / "v_a.jpg"), "label": "ApplyEyeMakeup"}
    ]
    assert rows(found.test)[0]["label"] == "YoYo"
    assert found.class_names["ApplyEyeMakeup"] == "Apply Eye Makeup"
    assert found.n_centroids == 303
    (lists / "testlist01.txt").write_text("YoYo/v_c.avi\n")
    with pytest.raises(FileNotFoundError, match=r"no frame of v_c.avi"):
        dataset(store, "ucf-101", str(tmp_path))


def test_names_of_classes():
    assert class_name("n02102040") == "English springer"
    assert class_name("n99999999") == "n99999999"
    assert class_name("red_car") == "red car"


def test_what_is_not_there_is_named(store: Store, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"neither cifar-10-batches-bin/test_batch.bin nor"):
        dataset(store, "cifar-10", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no folder .*train/n02056570"):
        dataset(store, "imagenet-10", str(tmp_path))


def test_large_data_sets_train_as_the_paper_says():
    for n_clusters in (101, 1000):
        heads = TrainHeadsConfig().resolve(n_clusters)
        options = (heads.epochs, heads.batch_size, heads.distillation_temperature)
        assert options == (100, 8192, 5.0)
