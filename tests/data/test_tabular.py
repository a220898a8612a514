"""Purchase, Texas and Location: every form that they come in, vectors through the seam, bad tables."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expunge.data.registry import load_dataset
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.models.tiny import classifier_for
from expunge.signals.forward import collect
from expunge.training.loop import TrainOptions, fit

SMALL = {"private": 60, "holdout": 30, "utility": 10}
RNG = np.random.default_rng(0)
BITS = RNG.integers(0, 2, (150, 24))
LABELS = np.arange(150) % 100


def place(sample: Sample) -> int:
    return int(sample.id.rsplit("-", 1)[1])


def same(data: Dataset, bits: np.ndarray = BITS, labels: np.ndarray = LABELS) -> bool:
    everyone = [s for role in data.roles.values() for s in role]
    assert len(everyone) == 100
    return all(
        isinstance(s.image, np.ndarray)
        and s.image.shape == (1, 24, 1)
        and s.image.dtype == np.uint8
        and (s.image.reshape(-1) == 255 * bits[place(s)]).all()
        and s.target == labels[place(s)]
        for s in everyone
    )


def lines(bits: np.ndarray, labels: np.ndarray | None = None, quote: str = "") -> str:
    rows = [",".join(map(str, row)) for row in bits]
    if labels is not None:
        rows = [f"{quote}{label}{quote},{row}" for label, row in zip(labels, rows, strict=True)]
    return "\n".join(rows) + "\n"


def test_purchase_as_first_published_counts_from_one(tmp_path: Path) -> None:
    (tmp_path / "dataset_purchase").write_text(lines(BITS, LABELS + 1, '"'))
    assert same(load_dataset("purchase100", data_dir=tmp_path, options=SMALL))


def test_texas_in_two_files(tmp_path: Path) -> None:
    (tmp_path / "texas" / "100").mkdir(parents=True)
    (tmp_path / "texas" / "100" / "feats").write_text(lines(BITS))
    (tmp_path / "texas" / "100" / "labels").write_text("".join(f"{n}\n" for n in LABELS + 1))
    assert same(load_dataset("texas100", data_dir=tmp_path, options=SMALL))
    (tmp_path / "texas" / "100" / "labels").write_text("1\n2\n")
    with pytest.raises(UserError, match="has 150 records and 2 labels"):
        load_dataset("texas100", data_dir=tmp_path, options=SMALL)
    (tmp_path / "texas" / "100" / "labels").unlink()
    with pytest.raises(UserError, match=r"labels' cannot be read"):
        load_dataset("texas100", data_dir=tmp_path, options=SMALL)


@pytest.mark.parametrize("form", ["csv", "floats", "gz", "npz", "one-hot"])
def test_location_in_other_forms(tmp_path: Path, form: str) -> None:
    labels = LABELS % 30
    header = "label," + ",".join(f"f{i}" for i in range(24)) + "\n"
    if form == "csv":
        (tmp_path / "l.csv").write_text(header + lines(BITS, labels))
    elif form == "floats":
        (tmp_path / "l.csv").write_text(lines(BITS.astype(float), labels.astype(float)))
    elif form == "gz":
        (tmp_path / "l.csv.gz").write_bytes(gzip.compress((header + lines(BITS, labels)).encode()))
    elif form == "npz":
        np.savez_compressed(tmp_path / "l.npz", features=BITS.astype(np.float32), labels=labels + 1)
    else:
        np.savez(tmp_path / "l.npz", features=BITS.astype(bool), labels=np.eye(30)[labels])
    data = load_dataset("location30", data_dir=tmp_path, options=SMALL | {"forget_class": 7})
    assert same(data, labels=labels) and {s.subject for s in data["forget"]} == {"geosocial type 7"}


def test_a_small_mlp_learns_them_and_the_holdout_stays_unknown(tmp_path: Path) -> None:
    (tmp_path / "dataset_purchase").write_text(lines(BITS, LABELS % 10))
    data = load_dataset("purchase100", data_dir=tmp_path, options=SMALL)
    made = classifier_for([s for role in data.roles.values() for s in role])
    assert type(made.model).__name__ == "MlpForImageClassification"
    fit(made.model, made.adapter, data.private, TrainOptions(epochs=60, batch_size=16, learning_rate=1e-2), seed=0)
    known, unseen = (
        np.mean([s.prob for s in collect(made.model, made.adapter, data[role])]) for role in ("retain", "holdout")
    )
    assert known > 0.9 and unseen < 0.4  # labels here have nothing to do with the features


def csv(change: dict[int, str]) -> str:
    rows = lines(BITS, LABELS).splitlines()
    for number, row in change.items():
        rows[number] = row
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no line of numbers"),
        ("a,b\n", "no line of numbers"),
        (csv({3: "x,1,0"}), "line 4 does not begin with a whole number"),
        (csv({3: "1.5,1,0"}), "line 4 does not begin with a whole number"),
        (csv(dict.fromkeys(range(150), "7,1,0,2")), "a feature other than 0 and 1"),
        (csv({n: f"7,{n % 2},.,1" for n in range(150)}), "a feature other than 0 and 1"),
        (csv({n: f"7,{n % 2},none,1" for n in range(150)}), "has a cell that is no number"),
        (csv(dict.fromkeys(range(0, 150, 2), "7,1,0")), "records of 2 and of 24 features: it is cut off"),
        (csv({3: "100," + ",".join("1" * 24)}), "picture 3 has the label 100, outside of the 100 classes"),
        (csv({3: "-1," + ",".join("1" * 24)}), "picture 3 has the label -1"),
    ],
)
def test_bad_tables(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(UserError, match=words):
        load_dataset("purchase100", data_dir=tmp_path, options=SMALL)


def test_folders_and_arrays_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give --data-dir with bangkok"):
        load_dataset("location30")
    with pytest.raises(UserError, match=r"needs bangkok, or one \.npz or \.csv in '.*', and there is nothing"):
        load_dataset("location30", data_dir=tmp_path)
    for name in ("a.npz", "b.npz"):
        np.savez(tmp_path / name, features=np.zeros((3, 2, 2)), labels=np.arange(3))
    with pytest.raises(UserError, match=r"there is a\.npz, b\.npz"):
        load_dataset("location30", data_dir=tmp_path)
    (tmp_path / "b.npz").unlink()
    with pytest.raises(UserError, match=r"is float64 of shape \(3, 2, 2\): give \(N, D\) numbers"):
        load_dataset("location30", data_dir=tmp_path)


def test_only_the_records_asked_for_are_parsed(tmp_path: Path) -> None:
    rows = lines(BITS, LABELS).splitlines()
    options: dict[str, Any] = {"private": 3, "holdout": 2, "utility": 0}
    (tmp_path / "p.csv").write_text("\n".join(rows * 3))
    wanted = [
        place(s)
        for role in load_dataset("purchase100", data_dir=tmp_path, options=options).roles.values()
        for s in role
    ]
    assert len(wanted) == 5
    long = [*rows * 3]
    from expunge.data.chance import shuffled

    looked_at = set(shuffled(range(450), "purchase100", 0)[: 5 + 64])
    for n in range(450):
        if n not in looked_at:
            long[n] = f"{LABELS[n % 150]},broken"
    (tmp_path / "p.csv").write_text("\n".join(long))
    again = load_dataset("purchase100", data_dir=tmp_path, options=options)
    assert [place(s) for role in again.roles.values() for s in role] == wanted
