"""Digits and Fashion-MNIST: known contents, disjoint roles, forgetting by class, and files that are broken."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from conftest import shared
from expunge.data.fashion_mnist import CLASSES
from expunge.data.idx import read_idx
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
        ({"private": 1790}, "has 1797 different images"),
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
