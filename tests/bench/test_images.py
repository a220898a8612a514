"""What an evaluation adds where there are pictures, on the two controls: the original itself and a retrained model."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from torch import nn

from expunge.bench.evaluate import Evaluation, References, evaluate
from expunge.bench.measuring import EvaluateOptions
from expunge.data.samples import Dataset, Sample
from expunge.methods.retrain import from_scratch
from expunge.metrics.vision import feature, mia_efficacy, zero_retrain_forgetting
from expunge.models.adapter import Adapter
from expunge.models.am_softmax import embeddings
from expunge.signals.distribution import class_probabilities
from expunge.signals.forward import collect
from expunge.training.loop import TrainOptions, fit
from matrix.worlds import World, world

OPTIONS = EvaluateOptions(suite="quick", resamples=200)


def dataset(here: World, **changes: tuple[Sample, ...]) -> Dataset:
    roles: dict[Any, tuple[Sample, ...]] = {"forget": here.forget, "retain": here.retain, "holdout": here.unseen}
    modality: Any = here.modality
    return Dataset(name=here.name, roles={k: v for k, v in (roles | changes).items() if v}, modality=modality)


def retrained(here: World, epochs: int, rate: float) -> nn.Module:
    model = copy.deepcopy(here.start)
    fit(model, here.adapter, list(here.retain), TrainOptions(epochs=epochs, batch_size=8, learning_rate=rate), seed=3)
    return model


def judged(model: nn.Module, adapter: Adapter, data: Dataset, references: References | None, **more: Any) -> Evaluation:
    return evaluate(model, adapter, data, options=OPTIONS, references=references, **more)


@pytest.fixture(scope="module")
def seen() -> tuple[World, Dataset, References, nn.Module]:
    here = world("resnet")
    data = dataset(here)
    gold = retrained(here, 25, 5e-3)
    references = References(here.adapter, data, OPTIONS)
    references.add(gold)
    return here, data, references, gold


def test_the_retrained_model_is_at_its_own_place(seen: tuple[World, Dataset, References, nn.Module]) -> None:
    here, data, references, gold = seen
    found = judged(gold, here.adapter, data, references).metrics
    assert found["tow"].value == found["tow_mia"].value == 1.0
    assert found["average_gap"].value == found["mia_efficacy.gap"].value == found["zrf.gap"].value == 0.0
    assert found["u_mia"].n == len(here.forget) + len(here.unseen)


def test_the_original_is_away_from_it(seen: tuple[World, Dataset, References, nn.Module]) -> None:
    here, data, references, gold = seen
    found = judged(here.original, here.adapter, data, references).metrics
    accuracy = {role: found[f"accuracy.{role}"].value for role in ("forget", "retain", "holdout")}
    theirs = {role: judged(gold, here.adapter, data, None).metrics[f"accuracy.{role}"].value for role in accuracy}
    expected = np.prod([1 - abs(accuracy[role] - theirs[role]) for role in accuracy])
    assert found["tow"].value == pytest.approx(expected) and found["tow"].value < 0.7
    assert found["average_gap"].low > 0
    forget = list(data["forget"])
    teacher = from_scratch(gold, 0)
    said = [class_probabilities(m, here.adapter, forget) for m in (here.original, teacher)]
    assert found["zrf.forget"].value == pytest.approx(zero_retrain_forgetting(*said).value)
    assert found["zrf.gap"].value > 0
    untaught = judged(teacher, here.adapter, data, references).metrics
    assert untaught["zrf.forget"].value == 1.0 and untaught["zrf.gap"].low > 0
    sides = [feature(collect(here.original, here.adapter, list(data[r]))) for r in ("forget", "retain", "holdout")]  # type: ignore[index]
    assert found["mia_efficacy.forget"].value == mia_efficacy(*sides).efficacy.value


def test_a_classifier_says_its_class_beside_the_picture(seen: tuple[World, Dataset, References, nn.Module]) -> None:
    here, data, references, gold = seen
    rows = {r["id"]: r for r in judged(gold, here.adapter, data, references).samples if r["role"] == "forget"}
    said = class_probabilities(gold, here.adapter, list(data["forget"])).argmax(axis=1)
    for sample, best in zip(data["forget"], said, strict=True):
        row = rows[sample.id]
        assert row["generated"] == f"class {best}" and row["image"].startswith("data:image/png;base64,")
        assert row["accuracy"] == float(best == sample.target)


def test_what_cannot_be_measured_is_said(seen: tuple[World, Dataset, References, nn.Module]) -> None:
    here, data, _, _ = seen
    alone = judged(here.original, here.adapter, data, None)
    assert "u_mia" in alone.metrics and alone.skipped["tow"] == "no reference model"
    less = judged(here.original, here.adapter, dataset(here, holdout=()), None)
    assert less.skipped["mia_efficacy"] == "the dataset has no holdout samples"
    text = world("text")
    assert not {"tow", "u_mia", "modality"} & set(judged(text.original, text.adapter, dataset(text), None).skipped)


def test_one_run_is_one_row_of_the_modality_matrix() -> None:
    here = world("llava")
    data = dataset(here)
    gold = retrained(here, 30, 1e-2)
    references = References(here.adapter, data, OPTIONS)
    references.add(gold)
    before = judged(here.original, here.adapter, data, references, original="self")
    after = judged(gold, here.adapter, data, references, original=before.summary()).metrics
    pictured = sum(s.image is not None for s in here.forget)
    assert 0 < pictured < len(here.forget)
    assert after["modality.image.forget"].n == pictured
    for asked in ("image", "text"):
        assert before.metrics[f"modality.{asked}.forget"].value == pytest.approx(0, abs=1e-6)
        assert after[f"modality.{asked}.forget"].value < -0.1
        assert after[f"modality.{asked}.closed"].value == pytest.approx(1.0, abs=1e-4)
        assert abs(after[f"modality.{asked}.retain"].value) < 0.1
    words = dataset(here, forget=tuple(s for s in here.forget if s.image is None))
    assert "one modality" in judged(here.original, here.adapter, words, None).skipped["modality"]


def test_people_are_found_by_other_pictures_of_theirs(seen: tuple[World, Dataset, References, nn.Module]) -> None:
    """Subjects of two pictures, by hand: the nearer mean of the first pictures decides."""
    here, _, _, gold = seen
    roles = {role: own[: len(own) // 2 * 2] for role, own in dataset(here).roles.items()}
    named = {
        role: tuple(replace(s, subject=f"{role} {i // 2}") for i, s in enumerate(own)) for role, own in roles.items()
    }
    data = replace(dataset(here), roles=named)
    references = References(here.adapter, data, OPTIONS)
    references.add(gold)
    found = judged(here.original, here.adapter, data, references).metrics
    everyone = [s for own in named.values() for s in own]
    unit = embeddings(here.original, here.adapter, everyone)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    right = (unit[1::2] @ unit[::2].T).argmax(1) == np.arange(len(everyone) // 2)
    start = 0
    for role, own in named.items():
        value = found[f"face_centroid.{role}"]
        assert value.n == len(own) // 2 and value.value == pytest.approx(right[start : start + value.n].mean())
        start += value.n
    assert judged(gold, here.adapter, data, references).metrics["face_centroid.gap.retain"].value == 0.0


def test_single_pictures_have_nobody_to_be_found_by(seen: tuple[World, Dataset, References, nn.Module]) -> None:
    here, data, _, gold = seen
    alone = {role: tuple(replace(s, subject=s.id) for s in own) for role, own in data.roles.items()}
    found = judged(gold, here.adapter, replace(data, roles=alone), None)
    assert found.skipped["face_centroid"] == "nobody (no subject) has several pictures in one role"
