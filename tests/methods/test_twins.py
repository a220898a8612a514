"""Twins against a loop by hand on a face embedder: the target is the original's embedding of the mirror image."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.matrix.worlds import pictures, world
from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import Context, get_method
from expunge.methods.twins import mirrored, twins_of
from expunge.models.am_softmax import embeddings
from expunge.models.tiny import classifier_for, init_classifier
from slow_steps import PLAIN, assert_moved_alike, sgd

TWINS = get_method("twins")
FACES = pictures(6, 3, 5)
RATES: dict[Any, float] = {"resnet-am-softmax": 0.2, "vit-am-softmax": 4e-3, "vit": 4e-3}


def hidden(model: Any, sample: Sample, mirror: bool = False) -> Tensor:
    """The embedding of one picture, (D,), from pixels by hand."""
    assert isinstance(sample.image, np.ndarray)
    image = sample.image[:, ::-1].copy() if mirror else sample.image
    pixels = torch.from_numpy((image.astype(np.float32) / 255 - 0.5) / 0.5).permute(2, 0, 1)[None]
    if hasattr(model, "resnet"):
        out: Tensor = model.resnet(pixels).pooler_output[0, :, 0, 0]
        return out
    out = model.vit(pixels).last_hidden_state[0, 0]
    return out


@pytest.mark.parametrize("arch", RATES)
def test_steps_are_those_of_the_formula(arch: Any) -> None:
    loaded = init_classifier(3, 16, arch=arch, seed=4)
    start, slow = copy.deepcopy(loaded.model).eval(), copy.deepcopy(loaded.model).eval()
    context = Context(loaded.model, loaded.adapter, FACES)
    with torch.no_grad():
        wanted = {s.id: hidden(start, s, mirror=True) for s in FACES}
    for sample, twin in zip(FACES, twins_of(context, FACES).values(), strict=True):
        torch.testing.assert_close(twin, wanted[sample.id], rtol=1e-4, atol=1e-5)

    def objective() -> Tensor:
        return torch.stack([(hidden(slow, s) - wanted[s.id]).square().mean() for s in FACES]).mean()

    values = sgd(slow, [objective] * 3, RATES[arch])
    plain = {k: v for k, v in PLAIN.items() if k != "retain_batch"}
    outcome = TWINS(context, TWINS.configure({**plain, "epochs": 3, "learning_rate": RATES[arch]}))
    assert [step["forget"] for step in outcome.record["log"]] == pytest.approx(values, rel=1e-3)
    assert values[-1] < values[0]
    assert_moved_alike(outcome.model, slow, start)
    head = [n for n, _ in start.named_parameters() if n.startswith("classifier")]
    assert head and all(torch.equal(outcome.model.get_parameter(n), start.get_parameter(n)) for n in head)
    buffers = dict(start.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in outcome.model.named_buffers()), "batch statistics stay"


def test_pictures_come_to_lie_where_their_mirror_images_lay() -> None:
    here = world("vit")
    context = here.context()
    twins = np.stack([t.numpy() for t in twins_of(context, here.forget).values()])
    before = embeddings(here.original, here.adapter, here.forget)
    after = embeddings(TWINS(context, TWINS.configure({"learning_rate": 1e-3})).model, here.adapter, here.forget)
    assert np.linalg.norm(after - twins) < 0.3 * np.linalg.norm(before - twins)


def test_mirror_images_of_files_and_of_what_has_none(tmp_path: Path) -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    Image.fromarray(grey).save(tmp_path / "a.png")
    sample = Sample(id="x", subject="x", target=0, image=tmp_path / "a.png")
    twin = mirrored(sample)
    assert isinstance(twin.image, np.ndarray) and np.array_equal(twin.image[:, :, 0], grey[:, ::-1])
    assert np.array_equal(mirrored(twin).image[:, :, 0], grey) and twin.id == "x"  # type: ignore[index]
    vectors = [Sample(id=str(i), subject="x", target=i, image=np.zeros((1, 9, 1), np.uint8)) for i in range(2)]
    loaded = classifier_for(vectors)
    with pytest.raises(UserError, match="sample '0' is a row of features, which has no mirror image"):
        TWINS(Context(loaded.model, loaded.adapter, vectors))
    with pytest.raises(UserError, match="works on classifier, not on a text model"):
        TWINS(world("text").context())
