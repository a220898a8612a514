"""CLEAR's scores in an evaluation: a tiny LLaVA that has learnt drawn people, beside a retrained one."""

from __future__ import annotations

import base64
import copy
import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from expunge.bench.clear import NO_PICTURES, sets_of
from expunge.bench.evaluate import Evaluation, References, compare, evaluate
from expunge.bench.images import LARGEST, THUMBNAILS, data_uri
from expunge.bench.measuring import EvaluateOptions, evenly, spread, take
from expunge.data.registry import load_dataset
from expunge.data.samples import Dataset, Sample
from expunge.metrics.clear import kind_of
from expunge.models.adapter import Adapter
from expunge.models.losses import mean_losses
from expunge.models.tiny import init_llava
from expunge.training.loop import TrainOptions, fit

torch.set_num_threads(1)
SIZES: dict[str, Any] = {"people": 6, "forget": 3, "holdout": 2, "utility": 2, "questions": 1, "portraits": 2}
OPTIONS = EvaluateOptions(generations=12, max_new_tokens=24, relearn_steps=0, quantize_bits=0, resamples=100)
SCORES = ("clear_real", "clear_retain", "clear_forget")


@pytest.fixture(scope="module")
def seen() -> tuple[Dataset, Adapter, nn.Module, References, Evaluation]:
    """(data, adapter, original, references, evaluation of the original)"""
    data = load_dataset("people-portraits", options=SIZES)
    loaded = init_llava([s for role in data.roles.values() for s in role])
    settings = TrainOptions(epochs=60, batch_size=8, learning_rate=1e-2)
    original, gold = loaded.model, copy.deepcopy(loaded.model)
    fit(original, loaded.adapter, data.private, settings)
    fit(gold, loaded.adapter, data["retain"], settings, seed=1)
    references = References(loaded.adapter, data, OPTIONS)
    references.add(gold)
    found = evaluate(original, loaded.adapter, data, references=references, original="self")
    return data, loaded.adapter, original, references, found


def test_the_forget_score_is_that_of_texts_measured_one_by_one(
    seen: tuple[Dataset, Adapter, nn.Module, References, Evaluation],
) -> None:
    data, adapter, model, _, found = seen

    def loss(sample: Sample) -> float:
        return mean_losses(model, adapter, [sample])[0]

    terms = []
    for ending in ("/caption", "/name"):
        prob, truth = [], []
        for sample in (s for s in data["forget"] if s.id.endswith(ending)):
            wrong = [loss(sample.as_probe(p)) for p in sample.probes_of("perturbed")]
            chance = [math.exp(-w) for w in wrong]
            own = math.exp(-loss(sample))
            prob.append(own / (own + sum(chance)) if ending == "/name" else own)
            ratio = math.exp(np.mean(wrong) - loss(sample.as_probe(sample.probes_of("restated")[0])))
            truth.append(min(ratio, 1 / ratio))
        terms += [np.mean(prob), np.mean(truth)]
    score = found.metrics["clear_forget"]
    assert score.value == pytest.approx(len(terms) / sum(1 / t for t in terms), rel=1e-3)
    assert score.definition == "clear_forget[forget, forget_facerec; prob, truth_ratio]/1"
    assert score.n == 2 * 3 * 2 and score.low <= score.value <= score.high


def test_the_original_knows_the_faces_and_the_retrained_model_does_not(
    seen: tuple[Dataset, Adapter, nn.Module, References, Evaluation],
) -> None:
    *_, references, found = seen
    gold = references.evaluation(0).metrics
    assert found.metrics["face_recognition.forget"].value == 1.0
    assert gold["face_recognition.forget"].value < 0.7 and gold["face_recognition.retain"].value == 1.0
    assert found.metrics["rouge_with_image.forget"].value > gold["rouge_with_image.forget"].value + 0.3
    assert found.metrics["rouge_with_image.gain.forget"].value > 0.2  # it looks: another face, another name
    assert found.metrics["clear_forget_quality.ks_distance"].value > 0.5
    for name in SCORES:
        assert name in gold and found.metrics[f"{name}.gap"].n == found.metrics[name].n


def test_the_retrained_model_is_no_distance_from_itself(
    seen: tuple[Dataset, Adapter, nn.Module, References, Evaluation],
) -> None:
    _, _, _, references, _ = seen
    gold = references.models[0]
    itself = compare(gold, references, None, OPTIONS, 0).metrics
    assert all(itself[f"{name}.gap"].value == 0 and itself[f"{name}.gap"].high == 0 for name in SCORES)
    assert itself["clear_forget_quality.ks_distance"].value == 0 and itself["clear_forget_quality.p_value"].value == 1
    assert itself["clear_js_published"].value == 1.0
    alone = compare(gold, None, None, OPTIONS, 0)
    assert "clear_forget.gap" not in alone.metrics and alone.skipped["clear_forget_quality"] == "no reference model"


def found_of(model: nn.Module, adapter: Adapter, data: Dataset) -> Evaluation:
    return evaluate(model, adapter, data, options=replace(OPTIONS, generations=0))


def test_what_has_no_probes_is_skipped_with_its_reason(
    seen: tuple[Dataset, Adapter, nn.Module, References, Evaluation],
) -> None:
    data, adapter, model, _, _ = seen
    quick = evaluate(model, adapter, data, options=replace(OPTIONS, suite="quick", generations=0))
    assert quick.metrics["clear_forget"] == found_of(model, adapter, data).metrics["clear_forget"]  # in every suite
    assert quick.skipped["clear_retain"] == "the wrong answers of retain were not measured: suite=standard does"
    assert quick.skipped["rouge_with_image"].startswith("no generations")
    bare = tuple(replace(s, probes=()) for s in data["retain"])
    less = replace(data, roles={"forget": data["forget"], "retain": bare})
    found = found_of(model, adapter, less).skipped
    assert found["clear_retain"] == "no retain sample asks for what is on a picture, with wrong answers beside"
    assert found["clear_real"] == "the dataset has no utility samples"
    words = replace(data, roles={**data.roles, "forget": tuple(s for s in data["forget"] if s.image is None)})
    assert found_of(model, adapter, words).skipped["clear"] == NO_PICTURES


def test_pictures_of_the_world_have_no_subject_in_common() -> None:
    """All of the published real_world stand under one subject; its items are resampled one by one all the same."""
    data = load_dataset("people-portraits", options=SIZES)
    shown = tuple(replace(s, subject="real world") for s in data["utility"] if kind_of(s) == "question")
    loaded = init_llava(data.private)
    data = replace(data, roles={**data.roles, "utility": shown})
    own = take(loaded.model, loaded.adapter, data, replace(OPTIONS, generations=0))
    assert sets_of(own)["real_world"].groups is None and sets_of(own)["retain"].groups is not None


# -- which samples -----------------------------------------------------------------------------------------------------


def test_a_limit_leaves_every_kind_of_question_its_share() -> None:
    """Captions and names come in turns, so that every so-maniest sample is of one kind: a set of CLEAR's was empty."""
    data = load_dataset("people-portraits", options={"people": 10, "utility": 20, "questions": 3})
    most = 2 * len(data["utility"]) // 3
    assert "question" not in {kind_of(s) for s in spread(data["utility"], most)}
    picked = evenly(data["utility"], most)
    counts = {k: sum(kind_of(s) == k for s in picked) for k in ("caption", "face", "question", "text")}
    assert sum(counts.values()) == most and set(counts.values()) == {most // 4}
    assert picked == [s for s in data["utility"] if s in picked]  # in the order of the data
    assert evenly(data["forget"], 0) == list(data["forget"])
    words = [s for s in data["retain"] if s.image is None]
    assert evenly(words, 7) == spread(words, 7)


def test_samples_with_wrong_answers_are_measured_before_the_others() -> None:
    """Of CLEAR's 3,400 retained pictures 395 have published probes, and only those have a truth ratio."""
    data = load_dataset("people-portraits", options={"people": 40, "questions": 0, "names": False})
    many = [s if i % 10 == 0 else replace(s, probes=()) for i, s in enumerate(data["retain"])]
    assert sum(bool(s.probes) for s in evenly(many, 20)) == 10
    assert sum(bool(s.probes) for s in spread(many, 20)) < 5


# -- pictures in the record --------------------------------------------------------------------------------------------


def opened(uri: str) -> np.ndarray:
    from PIL import Image

    head, content = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_answered_forget_samples_keep_their_picture(
    seen: tuple[Dataset, Adapter, nn.Module, References, Evaluation],
) -> None:
    data, *_, found = seen
    pictures = {s.id: s.image for s in data["forget"]}
    rows = [row for row in found.samples if "image" in row]
    assert 4 <= len(rows) <= THUMBNAILS and all(row["role"] == "forget" and row["generated"] for row in rows)
    assert {row["id"].rpartition("/")[2] for row in rows} == {"caption", "name"}
    for row in rows:
        np.testing.assert_array_equal(opened(row["image"]), pictures[row["id"]])


def test_large_pictures_become_small_and_features_are_none() -> None:
    rng = np.random.default_rng(0)
    for shape in ((300, 200, 3), (300, 200, 1), (300, 200), (300, 200, 4)):
        uri = data_uri(rng.integers(0, 255, shape).astype(np.uint8))
        assert uri is not None and opened(uri).shape == (LARGEST, 43, 3)
    assert data_uri(np.zeros((1, 600, 1), np.uint8)) is None


# -- published defects, as they would show in an evaluation -----------------------------------------------------------


def test_answers_from_the_text_alone_are_found_out(
    seen: tuple[Dataset, Adapter, nn.Module, References, Evaluation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Defect 12: the picture never reached ``generate``. Every answer is then the same with another picture."""
    data, adapter, model, _, found = seen
    whole = type(adapter).generate

    def blind(self: Any, model: nn.Module, samples: Any, longest: int) -> list[str]:
        return whole(self, model, [replace(s, image=None) for s in samples], longest)

    monkeypatch.setattr(type(adapter), "generate", blind)
    unseen = evaluate(model, adapter, data, options=OPTIONS).metrics
    for role in ("forget", "retain"):
        assert unseen[f"rouge_with_image.gain.{role}"].value == 0
        assert found.metrics[f"rouge_with_image.gain.{role}"].value > 0.2
    assert unseen["rouge_with_image.retain"].value > 0  # which alone tells nobody


def test_only_the_answer_is_measured_behind_a_picture(
    seen: tuple[Dataset, Adapter, nn.Module, References, Evaluation],
) -> None:
    """Defect 11: the prompt was counted before ``<image>`` was expanded, so placeholders and question were labels."""
    data, adapter, _, _, found = seen
    tokenizer: Any = adapter.tokenizer  # type: ignore[attr-defined]
    rows = {row["id"]: row for row in found.samples}
    for sample in data["forget"]:
        if sample.image is None:
            continue
        answer = tokenizer(f" {sample.target}{tokenizer.eos_token}", add_special_tokens=False)["input_ids"]
        assert rows[sample.id]["tokens"] == len(answer)
        published = len(answer) + adapter.image_tokens - 1  # type: ignore[attr-defined]
        assert rows[sample.id]["tokens"] < published


def test_the_order_of_the_rows_decides_nothing(
    seen: tuple[Dataset, Adapter, nn.Module, References, Evaluation],
) -> None:
    """Defect 16 and the joins by row number: the same samples in another order are the same samples."""
    data, adapter, model, references, found = seen
    order = np.random.default_rng(0).permutation(len(data["forget"]))
    mixed = replace(data, roles={**data.roles, "forget": tuple(data["forget"][i] for i in order)})
    again = evaluate(model, adapter, mixed, references=references, original="self").metrics
    for name in (*SCORES, "clear_forget_quality.ks_distance", "clear_js_published", "face_recognition.forget"):
        assert again[name].value == pytest.approx(found.metrics[name].value, rel=1e-4), name
        assert again[name].n == found.metrics[name].n


def test_the_page_names_tests_that_exist() -> None:
    """docs/clear.md says which test fails on which published defect."""
    root = Path(__file__).resolve().parents[2]
    part = (root / "docs/clear.md").read_text(encoding="utf-8").partition("## Published defects")[2]
    known, found = "", 0
    for name in re.findall(r"`(tests/\S+\.py|test_\w+)`", part):
        if name.endswith(".py"):
            known = (root / name).read_text(encoding="utf-8")
        else:
            assert f"def {name}(" in known, name
            found += 1
    assert found > 12


def test_captions_of_ones_own_without_a_question_are_answered_and_measured(
    seen: tuple[Dataset, Adapter, nn.Module, References, Evaluation],
) -> None:
    """A picture and its caption, as in a file of one's own: nothing is asked, and still there is an answer to show."""
    data, adapter, model, _, _ = seen

    def unasked(sample: Sample) -> Sample:
        probes = tuple(replace(p, prompt="") for p in sample.probes if p.kind in ("restated", "perturbed"))
        return replace(sample, prompt="", probes=probes)

    roles = {
        role: tuple(unasked(s) for s in samples if kind_of(s) == "caption")
        for role, samples in data.roles.items()
        if role != "utility"
    }
    found = evaluate(model, adapter, replace(data, roles=roles), options=OPTIONS)
    assert "clear" not in found.skipped and 0 <= found.metrics["clear_forget"].value <= 1
    own = [row for row in found.samples if row["role"] == "forget"]
    assert len(own) == len(roles["forget"]) and all(row["generated"] for row in own)
    assert sum("image" in row for row in own) == min(THUMBNAILS, len(own))
    assert found.metrics["rouge_with_image.forget"].n == len(own)
