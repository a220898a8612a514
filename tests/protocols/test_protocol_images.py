"""Protocols on image files and on vectors of features: the models that fit, splits as IAM's, shifted samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from expunge.completeness.protocols.binui import shifted
from expunge.completeness.protocols.world import ProtocolOptions, make_world
from expunge.data.samples import Sample
from expunge.errors import UserError

torch.set_num_threads(1)
RNG = np.random.default_rng(0)
FAST: dict[str, Any] = {"targets": 1, "groups": 1, "shadows": 2, "halves": 0, "epochs": 1.0}


def vectors(folder: Path) -> None:
    np.savez(folder / "x.npz", features=RNG.integers(0, 2, (300, 12)), labels=np.arange(300) % 5)


def pictures(folder: Path) -> None:
    for i in range(60):
        path = folder / f"c{i % 3}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (9 + i % 4, 8, 3), dtype=np.uint8)).save(path)


@pytest.mark.parametrize(
    ("data", "write", "arch", "kind", "sizes"),
    [
        ("location30", vectors, "mlp", "MlpForImageClassification", {"private": 100, "holdout": 90}),
        ("images", pictures, "resnet", "SmallResNetForImageClassification", {"split": "iam"}),
    ],
)
def test_a_world(tmp_path: Path, data: str, write: Any, arch: str, kind: str, sizes: dict[str, Any]) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    options = ProtocolOptions(**FAST, arch=arch)
    world = make_world(data, tmp_path / "runs", options, data_dir=tmp_path / "data", data_options=sizes)
    target, group = world.target(0), world.group(0)
    assert {type(c.model).__name__ for c in (target.original, target.unlearned, *group.shadows)} == {kind}
    seen = {s.digest() for s in target.samples}
    shadows = [{s.digest() for s in part} for part in group.parts]
    assert len(seen) == len(world.private) and all(part and not part & seen for part in shadows)
    if "split" in sizes:
        assert (len(world.private), len(world.dataset["holdout"])) == (36, 24)


def test_vectors_need_their_own_architecture(tmp_path: Path) -> None:
    vectors(tmp_path)
    world = make_world(
        "location30", tmp_path / "runs", ProtocolOptions(**FAST), data_dir=tmp_path,
        data_options={"private": 60, "holdout": 60},
    )  # fmt: skip
    with pytest.raises(UserError, match=r"1 x 12 px images .* with the architecture mlp"):
        world.target(0)


def test_shifted_files_and_features(tmp_path: Path) -> None:
    array = RNG.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    moved = shifted(Sample(id="a", subject="a", target=0, image=tmp_path / "a.png")).image
    assert isinstance(moved, np.ndarray) and moved.shape == (4, 5, 3)
    assert moved[1, 3].tolist() == np.round(array[3, 1] / 2 + 64).tolist()
    bits = np.array([[0, 255, 255, 0, 0]], np.uint8)[:, :, None]
    moved = shifted(Sample(id="a", subject="a", target=0, image=bits)).image
    assert isinstance(moved, np.ndarray) and moved[0, :, 0].tolist() == [64, 64, 192, 192, 64]
