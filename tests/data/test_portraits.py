"""Portraits: the same person is the same face in every view, and different persons can be told apart."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
from numpy.typing import NDArray

from expunge.data.people import people
from expunge.data.portrait_looks import PLACES, VIVID, face_of, view_of
from expunge.data.portraits import lit, paint, portrait
from expunge.errors import UserError

PINNED = (("long", "half-moon", "none", "moustache", 0.9027), ("a dark curtain", "purple", "smiling", -0.2562))
DIGEST = """
import hashlib
from expunge.data.people import people
from expunge.data.portraits import portrait
pictures = [portrait(who.appearance, v).tobytes() for who in people(6) for v in range(3)]
print(hashlib.sha256(b"".join(pictures)).hexdigest())
"""


def test_same_bytes_in_another_process() -> None:
    here = hashlib.sha256(b"".join(portrait(w.appearance, v, 32).tobytes() for w in people(6) for v in range(3)))
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run(
            [sys.executable, "-c", DIGEST], capture_output=True, text=True, env=environment, check=True
        )
        assert run.stdout.strip() == here.hexdigest()


def test_no_two_people_have_the_same_face() -> None:
    crowd = people(3000) + people(1000, 0, "holdout") + people(1000, 1)
    assert len({tuple(asdict(face_of(who.appearance)).values()) for who in crowd}) == len(crowd)
    # Nor do they without the colours, which differ by a shade at least.
    shapes = {tuple(v for v in asdict(face_of(w.appearance)).values() if not isinstance(v, tuple)) for w in crowd}
    assert len(shapes) == len(crowd)


def test_faces_are_pinned() -> None:
    # Digests of datasets stand in published records, so a change of the looks must be a decision.
    face, view = face_of(people(1)[0].appearance), view_of(people(1)[0].appearance, 3)
    assert (face.hair_style, face.glasses, face.headwear, face.beard, round(face.jaw, 4)) == PINNED[0]
    assert (view.place, view.clothes, view.mood, round(view.yaw, 4)) == PINNED[1]


def test_a_view_changes_everything_but_the_face() -> None:
    who = people(1)[0].appearance
    views = [view_of(who, number) for number in range(60)]
    assert {view.place for view in views} == set(PLACES) and {view.clothes for view in views} == set(VIVID)
    assert len({view.mood for view in views}) == 4
    yaw = [view.yaw for view in views]
    assert min(yaw) < -0.3 and max(yaw) > 0.3 and max(map(abs, yaw)) <= 0.5
    pictures = {portrait(who, number).tobytes() for number in range(60)}
    assert len(pictures) == 60


def test_light_is_a_ramp_with_brightness_and_warmth() -> None:
    who = people(1)[0].appearance
    face, view = face_of(who), view_of(who, 0)
    image = paint(face, view, 32)
    out = lit(image, view)
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8
    for y, x in ((0, 0), (31, 5), (16, 16), (3, 30)):
        across, down = (2 * x - 31) / 32, (2 * y - 31) / 32
        ramp = view.contrast * (np.cos(view.light) * across + np.sin(view.light) * down)
        expected = image[y, x] * (view.brightness + ramp + np.array([view.warmth, 0, -view.warmth]))
        assert np.abs(out[y, x] - np.clip(expected, 0, 255)).max() <= 4 + 2  # noise and rounding
    assert not np.array_equal(image, paint(face, view_of(who, 1), 32))  # another pose


@pytest.mark.parametrize("size", [16, 32, 48, 64])
def test_sizes(size: int) -> None:
    image = portrait(people(1)[0].appearance, 0, size)
    assert image.shape == (size, size, 3) and image.std() > 20
    small = portrait(people(1)[0].appearance, 0, 16).astype(float)
    coarse = image.reshape(16, size // 16, 16, size // 16, 3).mean((1, 3))
    assert np.abs(small - coarse).mean() < 14  # the same picture, up to line widths and noise


@pytest.mark.parametrize(("number", "size"), [(-1, 32), (0, 15), (0, 513)])
def test_wrong_wishes_are_refused(number: int, size: int) -> None:
    with pytest.raises(UserError, match="portrait number"):
        portrait(people(1)[0].appearance, number, size)


def nearest_centroid(views_PVD: NDArray[np.float64], seen: int) -> float:
    """Accuracy on the views after the first ``seen``: nearest mean where within-person variance is 1 (LDA)."""
    train, test = views_PVD[:, :seen], views_PVD[:, seen:]
    flat = train.reshape(-1, views_PVD.shape[-1])
    axes = np.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:60].T
    train, test = train @ axes, test @ axes
    centre_PK = train.mean(1)
    spread = (train - centre_PK[:, None]).reshape(-1, 60)
    white = np.linalg.cholesky(np.linalg.inv(spread.T @ spread / len(spread) + 1e-3 * np.eye(60)))
    far = ((test @ white)[:, :, None] - (centre_PK @ white)[None, None]) ** 2
    return float((far.sum(-1).argmin(-1) == np.arange(len(views_PVD))[:, None]).mean())


def test_people_are_recognised_on_views_that_were_never_seen() -> None:
    pictures = np.stack([[portrait(who.appearance, v).ravel() / 255 for v in range(12)] for who in people(40)])
    right = nearest_centroid(pictures, 8)
    assert right > 0.8  # measured 0.90; chance is 0.025
    # The control: with pictures dealt to the wrong people there is nothing to recognise.
    dealt = np.random.default_rng(0).permutation(pictures.reshape(480, -1)).reshape(pictures.shape)
    assert nearest_centroid(dealt, 8) < 0.12
