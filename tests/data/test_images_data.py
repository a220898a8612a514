"""Digits and Fashion-MNIST: known contents, disjoint roles, forgetting by class, and files that are broken."""

from __future__ import annotations

import gzip
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import shared
from expunge.data.fashion_mnist import CLASSES
from expunge.data.idx import read_idx
from expunge.data.image_roles import ImageSizes, image_dataset
from expunge.data.pool import Pool, pool_of
from expunge.data.registry import load_dataset
from expunge.data.samples import Dataset
from expunge.errors import UserError
from expunge.models.tiny import init_classifier
from expunge.signals.forward import collect

SMALL = {"private": 60, "holdout": 50, "utility": 20}


def disjoint(data: Dataset) -> bool:
    contents = [s.digest() for role in data.roles.values() for s in role]
    return len(contents) == len(set(contents))


def test_digits_are_the_1797_of_scikit_learn() -> None:
    data = load_dataset("digits", options={"private": 1000, "holdout": 600, "utility": 197})
    everyone = [s for role in data.roles.values() for s in role]
    assert len(everyone) == 1797 and disjoint(data)
    # Class counts of the UCI test set that scikit-learn ships.
    assert sorted(Counter(s.target for s in everyone).items()) == list(
        enumerate([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    )
    first = next(s for s in everyone if s.id == "digits-00000")
    assert isinstance(first.image, np.ndarray) and first.image.shape == (8, 8) and first.target == 0
    assert first.image[0].tolist() == [round(v * 255 / 16) for v in (0, 0, 5, 13, 9, 1, 0, 0)]


def test_random_forgetting_and_seeds() -> None:
    data = load_dataset("digits", options={**SMALL, "forget": 7})
    assert [len(data[r]) for r in ("forget", "retain", "holdout", "utility")] == [7, 53, 50, 20]
    assert disjoint(data) and len({s.subject for s in data.private}) == 60
    again, other = (load_dataset("digits", options={**SMALL, "forget": 7, "split_seed": s}) for s in (0, 1))
    assert again.digest() == data.digest() != other.digest()
    more = load_dataset("digits", options={**SMALL, "forget": 7, "holdout": 90, "utility": 40})
    assert [s.id for s in more["forget"]] == [s.id for s in data["forget"]]


def test_forgetting_a_class() -> None:
    data = load_dataset("digits", options={**SMALL, "private": 200, "forget_class": 3})
    assert {s.target for s in data["forget"]} == {3} and 3 not in {s.target for s in data["retain"]}
    assert {s.subject for s in data["forget"]} == {"digit 3"}
    part = load_dataset("digits", options={**SMALL, "private": 200, "forget_class": 3, "class_share": 0.5})
    assert len(part["forget"]) == round(len(data["forget"]) / 2) and 3 in {s.target for s in part["retain"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"private": 1790}, "has 1797 images, and private [+] holdout [+] utility ask for 1860"),
        ({"private": 0}, "private = 0: give 1 or more"),
        ({"forget_class": 10}, "forget_class = 10: give 0 to 9"),
        ({"class_share": 0}, "above 0 and up to 1"),
        ({"private": 1, "forget": 1, "forget_class": 6}, "no private image is of class 6"),
    ],
)
def test_bad_sizes(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_dataset("digits", options={**SMALL, **options})


def test_a_model_reads_them() -> None:
    data = load_dataset("digits", options=SMALL)
    made = init_classifier(10, 8, 1)
    found = collect(made.model, made.adapter, data["forget"])
    assert len(found) == 6 and all(0 < s.prob < 1 for s in found)


# -- IDX -----------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    head = bytes((0, 0, 8, array.ndim)) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_fashion(folder: Path, count: int = 300) -> np.ndarray:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 28, 28))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    return images


def test_idx_comes_back(tmp_path: Path) -> None:
    images = write_fashion(tmp_path)
    assert (read_idx(tmp_path / "train-images-idx3-ubyte.gz", 3) == images).all()
    data = load_dataset("fashion-mnist", data_dir=tmp_path, options=SMALL)
    assert len(data.private) == 60 and disjoint(data)


def test_idx_that_is_broken(tmp_path: Path) -> None:
    good = idx(np.zeros((2, 3, 3)))
    for name, content, message in (
        ("short", good[:-1], "is cut off"),
        ("other", b"\x00\x00\x0d" + good[3:], "no IDX file"),
        ("empty", b"", "no IDX file"),
        ("packed.gz", gzip.compress(good)[:-4], "cannot be read"),
        ("plain.gz", good, "cannot be read"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_idx(path, 3)
    with pytest.raises(UserError, match="with 1 dimension"):
        read_idx(tmp_path / "other", 1)


def test_fashion_without_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --data-dir"):
        load_dataset("fashion-mnist")
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz"):
        load_dataset("fashion-mnist", data_dir=tmp_path)


def test_the_published_fashion_files() -> None:
    folder = shared("data/fashion_mnist")
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", 1)
    assert np.bincount(labels).tolist() == [1000] * 10  # as published: 1,000 test images of each class
    assert read_idx(folder / "t10k-images-idx3-ubyte.gz", 3).shape == (10000, 28, 28)
    assert CLASSES[labels[0]] == "Ankle boot"  # the first test image
    data = load_dataset("fashion-mnist", data_dir=folder, options={**SMALL, "part": "t10k"})
    assert len(data["holdout"]) == 50 and disjoint(data)


def test_only_the_places_asked_for(tmp_path: Path) -> None:
    images = write_fashion(tmp_path)
    (tmp_path / "plain").write_bytes(idx(images))
    for name in ("train-images-idx3-ubyte.gz", "plain"):
        assert (read_idx(tmp_path / name, 3, [0, 7, 299]) == images[[0, 7, 299]]).all()
        assert read_idx(tmp_path / name, 3, []).shape == (0, 28, 28)
    (tmp_path / "plain").write_bytes(idx(images)[:-1])  # cut off far behind what is wanted
    with pytest.raises(UserError, match="is cut off"):
        read_idx(tmp_path / "plain", 3, [0])
    (tmp_path / "more").write_bytes(idx(images) + b"x")
    with pytest.raises(UserError, match="is cut off"):
        read_idx(tmp_path / "more", 3)
    bomb = bytes((0, 0, 8, 3)) + (1 << 31).to_bytes(4, "big") * 3
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bomb))
    with pytest.raises(UserError, match="more than 1 GiB"):
        read_idx(tmp_path / "bomb.gz", 3, [0])


def test_mnist_is_read_like_fashion_and_dotted_names_too(tmp_path: Path) -> None:
    images = write_fashion(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").rename(tmp_path / "x.gz")
    (tmp_path / "train-images.idx3-ubyte").write_bytes(idx(images))
    data = load_dataset("mnist", data_dir=tmp_path, options=SMALL)
    for sample in data.private:
        place = int(sample.id.removeprefix("mnist-"))
        assert sample.target == place % 10 and (sample.image == images[place]).all()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(300) % 11))
    with pytest.raises(UserError, match="picture 10 has the label 10, outside of the 10 classes: allowed are 0 to 9"):
        load_dataset("mnist", data_dir=tmp_path, options=SMALL)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(299) % 10))
    with pytest.raises(UserError, match="has 300 images and 299 labels"):
        load_dataset("mnist", data_dir=tmp_path, options=SMALL)


# -- roles -----------------------------------------------------------------------------------------------------------


def noise(number: int, classes: int = 5) -> Pool:
    images = np.random.default_rng(0).integers(0, 256, (number, 4, 4), dtype=np.uint8)
    return pool_of(images, np.arange(number) % classes, [f"c{i}" for i in range(classes)], "noise")


def test_duplicates_are_taken_once_and_nothing_else_moves() -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 4, 4), dtype=np.uint8)
    images[100:250] = images[0]
    pool = pool_of(images, np.zeros(300, np.int64), ["one", "two"], "noise")
    data = image_dataset("x", pool, ImageSizes(private=100, holdout=40, utility=10))
    assert disjoint(data) and sum(map(len, data.roles.values())) == 150
    with pytest.raises(UserError, match=r"has 150 different images, and private \+ holdout \+ utility ask for 151"):
        image_dataset("x", pool, ImageSizes(private=100, holdout=40, utility=11))
    for more in (ImageSizes(private=100, holdout=41, utility=0), ImageSizes(private=100, holdout=0, utility=3)):
        assert [s.id for s in image_dataset("x", pool, more)["forget"]] == [s.id for s in data["forget"]]


def test_few_are_read_when_few_are_asked() -> None:
    whole, asked = noise(5000), []
    pool = replace(whole, read=lambda places: asked.extend(places) or whole.read(places))
    image_dataset("x", pool, ImageSizes(private=20, holdout=10, utility=5))
    assert len(asked) <= 35 + 64 and asked == sorted(asked)


def test_fractions_and_the_splits_of_iam() -> None:
    data = image_dataset("x", noise(301), ImageSizes(private=0.5, holdout=0.3, utility=0.2, forget=0.1))
    assert [len(data[r]) for r in ("forget", "retain", "holdout", "utility")] == [15, 135, 90, 60]
    cut = image_dataset("x", noise(500), ImageSizes(split="iam", forget=5))
    assert [len(cut[r]) for r in ("forget", "retain", "holdout", "utility")] == [5, 295, 200, 0]
    assert cut.notes == ("Cut as IAM does: target set 300, shadow set 200.",) and disjoint(cut)
    some = image_dataset("location30", noise(4500), ImageSizes(split="iam"))
    assert (len(some.private), len(some["holdout"])) == (3008, 1000)  # as published
    fewer = image_dataset("location30", noise(2500), ImageSizes(split="iam"))
    assert (len(fewer.private), len(fewer["holdout"])) == (1500, 1000)
    with pytest.raises(UserError, match="has 1999 different images here, and split = iam takes 1000"):
        image_dataset("location30", noise(1999), ImageSizes(split="iam"))


def test_a_class_is_the_subject_of_private_images_alone() -> None:
    data = image_dataset("x", noise(300), ImageSizes(private=100, holdout=60, utility=0, forget_class=2))
    assert {s.subject for s in data["retain"]} == {"c0", "c1", "c3", "c4"}
    assert len({s.subject for s in data["holdout"]}) == 60
    part = ImageSizes(private=100, holdout=60, utility=0, forget_class=2, class_share=0.3)
    data = image_dataset("x", noise(300), part)
    assert not {s.subject for s in data["forget"]} & {s.subject for s in data["retain"]}


@pytest.mark.parametrize("labels", [[0, 1, -1], [0, 3, 1]])
def test_labels_outside_of_the_classes(labels: list[int]) -> None:
    pool = pool_of(np.zeros((3, 2, 2), np.uint8), np.array(labels), ["a", "b", "c"], "here")
    with pytest.raises(UserError, match=r"'here': picture [12] has the label -?\d, outside of the 3 classes"):
        image_dataset("x", pool, ImageSizes(private=1, holdout=1, utility=1))
