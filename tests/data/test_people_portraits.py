"""people-portraits: CLEAR's structure, offline."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from expunge.bench.prepare import check_preset, initialised
from expunge.data.people import PeopleOptions, cast
from expunge.data.portrait_words import CAPTION_PROMPTS, NAME_PROMPT
from expunge.data.registry import load_dataset
from expunge.data.samples import ROLES, Dataset, Sample
from expunge.errors import UserError
from expunge.models.adapter import evaluating
from expunge.models.losses import mean_losses
from expunge.models.tiny import ARCHS, KINDS
from expunge.training.loop import TrainOptions, fit

torch.set_num_threads(1)

SIZES = {"people": 20, "forget": 0.1, "holdout": 3, "utility": 3, "portraits": 2, "questions": 2}


def small(seed: int = 0, **options: object) -> Dataset:
    return load_dataset("people-portraits", seed=seed, options={**SIZES, **options})


def kind(sample: Sample) -> str:
    last = sample.id.rpartition("/")[2]
    return last if sample.image is not None else "question"


@pytest.fixture(scope="module")
def data() -> Dataset:
    return small()


def test_every_person_has_portraits_captions_names_and_questions(data: Dataset) -> None:
    assert data.modality == "multimodal"
    people = {"forget": 2, "retain": 18, "holdout": 3, "utility": 3}
    for role in ROLES:
        counts = {name: sum(kind(s) == name for s in data[role]) for name in ("caption", "name", "question", "visible")}
        n = 2 * people[role]
        assert counts == {"caption": n, "name": n, "question": n, "visible": n if role == "utility" else 0}
        assert len({s.subject for s in data[role]}) == people[role]


def test_nobody_stands_in_two_roles_and_nobody_else_has_the_same_face(data: Dataset) -> None:
    by_role = [{s.subject for s in data[role]} for role in ROLES]
    assert sum(map(len, by_role)) == len(set().union(*by_role))
    owners: dict[bytes, set[str]] = {}
    for role in ROLES:
        for sample in data[role]:
            if isinstance(sample.image, np.ndarray):
                owners.setdefault(sample.image.tobytes(), set()).add(sample.subject)
    assert all(len(names) == 1 for names in owners.values()) and len(owners) == 26 * 2


def test_captions_state_who_and_what_is_seen(data: Dataset) -> None:
    players = cast(PeopleOptions(people=20, forget=0.1, holdout=3, utility=3))
    crowd = {who.name: who for people in players.roles.values() for who in people}
    trained = set(crowd)
    for role in ROLES:
        for sample in (s for s in data[role] if kind(s) == "caption"):
            who = crowd[sample.subject]
            assert sample.prompt in CAPTION_PROMPTS and who.name in str(sample.target)
            assert who.facts["profession"].partition(" ")[2] in str(sample.target)
            restated, wrong = sample.probes_of("restated"), sample.probes_of("perturbed")
            assert len({p.target for p in restated} | {sample.target}) == 3
            assert all(p.prompt == sample.prompt and who.name in p.target for p in restated)
            assert len({p.target for p in wrong}) == 4
            for probe in wrong:
                # One question for the truth and every wrong caption, and no other name that is trained on.
                assert probe.prompt == sample.prompt and not any(name in probe.target for name in trained)
            paraphrases = {p.prompt for p in sample.probes_of("paraphrase")}
            assert len(paraphrases) == 3 and sample.prompt not in paraphrases
            (reverse,) = sample.probes_of("reverse")
            assert (reverse.prompt, reverse.target) == (NAME_PROMPT, who.name)


def test_a_wrong_caption_is_wrong_about_the_person_alone(data: Dataset) -> None:
    for sample in (s for s in data["forget"] if kind(s) == "caption"):
        restated = sample.probes_of("restated")[0].target
        for probe in sample.probes_of("perturbed"):
            same = set(restated.replace(",", "").split()) & set(probe.target.replace(",", "").split())
            for word in ("before", "behind", "dressed", "in"):
                assert (word in restated.lower()) == (word in probe.target.lower())
            assert len(same) >= 3


def test_names_are_asked_with_the_picture(data: Dataset) -> None:
    for sample in (s for s in data["forget"] if kind(s) == "name"):
        assert sample.prompt == NAME_PROMPT and sample.target == sample.subject
        wrong = [p.target for p in sample.probes_of("perturbed")]
        assert len(set(wrong)) == 4 and sample.subject not in wrong
        assert sample.as_probe(sample.probes_of("perturbed")[0]).image is sample.image


def test_what_anyone_can_see_is_utility(data: Dataset) -> None:
    asked = [s for s in data["utility"] if kind(s) == "visible"]
    assert len({s.prompt for s in asked}) == 2  # two portraits each; a third would ask for the mood
    captions = {(s.subject, s.id.split("/")[1]): str(s.target) for s in data["utility"] if kind(s) == "caption"}
    for sample in asked:
        assert str(sample.target) in captions[sample.subject, sample.id.split("/")[1]].replace("Before", "before")
        assert sample.target not in {p.target for p in sample.probes_of("perturbed")}
        assert len(sample.probes_of("perturbed")) == 3


@pytest.mark.parametrize(("share", "people"), [(0.01, 1), (0.05, 1), (0.1, 2)])
def test_forget_shares_are_nested(share: float, people: int) -> None:
    names = {s.subject for s in small(forget=share)["forget"]}
    assert len(names) == people and names <= {s.subject for s in small(forget=0.1)["forget"]}


def test_modalities() -> None:
    both = small()
    image, text = small(modality="image"), small(modality="text")
    assert (image.modality, text.modality) == ("multimodal", "text")
    for role in ROLES:
        assert all(s.image is not None for s in image[role]) and all(s.image is None for s in text[role])
        assert {s.id for s in image[role]} | {s.id for s in text[role]} == {s.id for s in both[role]}
    assert {kind(s) for s in small(names=False, modality="image").private} == {"caption"}
    assert {kind(s) for s in small(captions=False, modality="image").private} == {"name"}


def test_the_text_part_is_that_of_people() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "portraits"}
    assert small(modality="text").digest() == load_dataset("people", options=sizes).digest()


def test_digest_and_seed() -> None:
    assert small(1).digest() == small(1).digest() != small(2).digest()
    # More holdout or utility changes neither who is forgotten nor how anybody looks.
    more = small(holdout=5, utility=6)
    assert [s.digest() for s in more.private] == [s.digest() for s in small().private]


def test_identity_is_image_classification() -> None:
    data = small(task="identity", size=16)
    assert data.modality == "classifier"
    classes: dict[int, str] = {}
    for role in ROLES:
        for sample in data[role]:
            assert isinstance(sample.target, int) and isinstance(sample.image, np.ndarray)
            assert (
                sample.image.shape == (16, 16, 3)
                and classes.setdefault(sample.target, sample.subject) == sample.subject
            )
    assert sorted(classes) == list(range(26)) and len(set(classes.values())) == 26
    assert {int(s.target) for s in data.private} == set(range(20))
    other = small(task="identity", size=16, split_seed=3)
    assert {s.subject: s.target for s in other.private} == {s.subject: s.target for s in data.private}


def test_identity_with_new_views_in_holdout() -> None:
    data = small(task="identity", unseen="views")
    known = {s.subject: s.target for s in data.private}
    assert {s.subject: s.target for s in data["holdout"]} == known
    seen = {s.digest() for s in data.private}
    assert len(data["holdout"]) == 40 and not any(s.digest() in seen for s in data["holdout"])
    assert max(int(s.target) for role in ROLES for s in data[role]) == 22


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"portraits": 0}, "portraits"),
        ({"size": 8}, "size"),
        ({"questions": 16}, "questions"),
        ({"modality": "sound"}, "modality"),
        ({"modality": "image", "captions": False, "names": False}, "empty"),
        ({"modality": "text", "questions": 0}, "empty"),
        ({"modality": "text", "task": "identity"}, "identity"),
        ({"forget": 21}, "forget"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        small(**options)


def test_a_tiny_classifier_recognises_people_in_new_views() -> None:
    sizes = {"people": 10, "portraits": 10, "utility": 0, "forget": 1}
    data = small(task="identity", unseen="views", **sizes)
    made = initialised(data, "tiny", 0)
    fit(made.model, made.adapter, data.private, TrainOptions(epochs=12, batch_size=16, learning_rate=3e-3))
    with torch.no_grad(), evaluating(made.model):
        seen = made.adapter.positions(made.model, data["holdout"])
        right = (seen.head(seen.hidden_ND).argmax(-1) == seen.targets_N).float().mean()
    assert right > 0.6  # measured 0.84; chance is 0.1


def test_a_tiny_llava_learns_names_from_faces() -> None:
    data = small(modality="image", captions=False, people=6, portraits=3, forget=1, utility=2)
    made = initialised(data, "tiny", 0)
    assert made.adapter.modality == "multimodal"
    fit(made.model, made.adapter, data.private, TrainOptions(epochs=80, batch_size=9, learning_rate=3e-3))
    pictures = [s.image for s in data.private]
    others = [replace(s, image=pictures[(i + 3) % len(pictures)]) for i, s in enumerate(data.private)]
    own = np.mean(mean_losses(made.model, made.adapter, data.private))
    swapped = np.mean(mean_losses(made.model, made.adapter, others))
    assert own < 0.3 and swapped > own + 1  # it looks at the picture


def test_a_preset_may_name_the_kind_of_model_and_must_fit_the_data() -> None:
    assert tuple(KINDS["classifier"]) == ARCHS
    sizes = {"people": 4, "forget": 1, "holdout": 1, "utility": 1, "portraits": 2, "size": 16}
    faces = load_dataset("people-portraits", options={**sizes, "task": "identity"})
    captions = load_dataset("people-portraits", options={**sizes, "questions": 1})
    assert initialised(faces, "vit-am-softmax", 0).model.config.model_type == "vit"
    assert initialised(faces, "tiny", 0).model.config.model_type == "resnet"
    assert initialised(captions, "qwen2vl", 0).model.config.model_type == "qwen2_vl"
    check_preset("qwen2vl", "multimodal")
    with pytest.raises(UserError, match=r"preset llava is not for classifier data: allowed are .*resnet"):
        check_preset("llava", "classifier")
