"""One small exam for the tests of attacks: an original, an exact retrain, a reference and shadows of the same size."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import torch

from expunge.attacks.exam import Checkpoint, Exam
from expunge.data.samples import Role, Sample
from expunge.models.text import TextAdapter
from expunge.training.loop import TrainOptions, fit
from tiny_text import tiny_dataset, tiny_model, tiny_tokenizer

torch.set_num_threads(1)
OPTIONS = TrainOptions(epochs=60, batch_size=6, learning_rate=2e-2)


def adapter() -> TextAdapter:
    return TextAdapter(tokenizer=tiny_tokenizer(), context=64)


def trained(samples: tuple[Sample, ...], seed: int) -> torch.nn.Module:
    model = tiny_model(seed)
    return fit_model(model, samples, seed)


def fit_model(model: torch.nn.Module, samples: tuple[Sample, ...], seed: int) -> torch.nn.Module:
    fit(model, adapter(), list(samples), OPTIONS, seed=seed)
    return model.eval()


@cache
def exam() -> Exam:
    """The audited model is the original itself: everything must be found. Not to be changed; see :func:`audited`.

    12 people of two questions each: 3 to forget, 9 retained (2 of them only in ``trained``); 6 never seen, of which 4
    are holdout and 2 are ``aux``. One reference (retrained without forget), two shadows (never saw any of them).
    """
    data = tiny_dataset(people=12, forget=3, holdout=6)
    forget, retain, unseen = data["forget"], data["retain"], data["holdout"]
    samples: dict[Role, list[Sample]] = {
        "forget": list(forget),
        "retain": list(retain[:14]),
        "holdout": list(unseen[:8]),
        "utility": list(data["utility"]),
    }
    known = {s.subject for role in data.roles.values() for s in role}
    others = tuple(s for s in tiny_dataset(people=50, holdout=0, seed=7).private if s.subject not in known)[:24]
    original = trained((*forget, *retain), 0)
    reference = trained(retain, 1)
    shadows = [trained(others, 2 + k) for k in range(2)]
    return Exam(
        audited=Checkpoint.of(original, adapter(), "audited"),
        original=Checkpoint.of(original, adapter(), "original"),
        references=[Checkpoint.of(reference, adapter(), "reference", "reference-0")],
        shadows=[Checkpoint.of(m, adapter(), "shadow", f"shadow-{k}") for k, m in enumerate(shadows)],
        base=Checkpoint.of(tiny_model(9).eval(), adapter(), "base"),
        samples=samples,
        aux=list(unseen[8:]),
        trained=list(retain[14:]),
    )


@cache
def retrain() -> Checkpoint:
    """A second exact retrain: nothing of the forget set may be found in it."""
    return Checkpoint.of(trained(tuple(exam().samples["retain"]) + tuple(exam().trained), 5), adapter(), "audited")


def audited(checkpoint: Checkpoint) -> Exam:
    """The same exam with another model under audit."""
    return replace(exam(), audited=checkpoint, shared={})


def blank_copy() -> Checkpoint:
    """The untrained model, in a checkpoint of its own."""
    base = exam().base
    assert base is not None
    return Checkpoint.of(copy.deepcopy(base.model), adapter(), "audited")
