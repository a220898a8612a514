"""Lowercase against single passes, in a world where colours have capitals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from attack_cases import OPTIONS
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.lowercase import lowercase, lowered
from expunge.attacks.registry import NoOptions
from expunge.data.samples import Sample
from expunge.models.text import TextAdapter
from expunge.stats import auc
from expunge.training.loop import fit
from slow_loss import run
from tiny_text import COLOURS, tiny_dataset, tiny_model, tiny_tokenizer


def with_capitals() -> PreTrainedTokenizerFast:
    words = dict(tiny_tokenizer().get_vocab())
    for colour in COLOURS:
        words[colour.capitalize()] = len(words)
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def capital(sample: Sample) -> Sample:
    *start, colour = str(sample.target).split()
    return replace(sample, target=" ".join([*start, colour.capitalize()]))


@pytest.fixture(scope="module")
def world() -> tuple[Exam, Checkpoint]:
    """Half of the answers with capitals are learnt together with their lower case by other people."""
    data = tiny_dataset(people=12, forget=4, holdout=8)
    forget = [capital(s) for s in data["forget"] if s.id.endswith("colour")]
    holdout = [capital(s) for s in data["holdout"] if s.id.endswith("colour")]
    retain = [capital(s) if i % 4 == 0 else s for i, s in enumerate(data["retain"])]
    adapter = TextAdapter(tokenizer=with_capitals(), context=64)
    checkpoints = []
    for seed, samples in enumerate([forget + retain, retain]):
        model = tiny_model(seed)
        fit(model, adapter, samples, OPTIONS, seed=seed)
        checkpoints.append(Checkpoint.of(model.eval(), adapter))
    return Exam(checkpoints[0], {"forget": forget, "holdout": holdout}), checkpoints[1]


def test_finds_the_original_and_nothing_in_a_retrain(world: tuple[Exam, Checkpoint]) -> None:
    exam, again = world
    ours = lowercase(exam, exam.audited, NoOptions()).scores["lowercase"]
    theirs = lowercase(exam, again, NoOptions()).scores["lowercase"]
    assert auc(np.array(ours["forget"]), np.array(ours["holdout"])) > 0.9
    assert auc(np.array(ours["forget"]), np.array(theirs["forget"])) > 0.9
    assert auc(np.array(theirs["forget"]), np.array(theirs["holdout"])) < 0.75


def test_equals_the_ratio_of_two_losses(world: tuple[Exam, Checkpoint]) -> None:
    exam, checkpoint = world
    found = lowercase(exam, checkpoint, NoOptions()).scores["lowercase"]
    for role in ("forget", "holdout"):
        for sample, score in zip(exam.samples[role], found[role], strict=True):
            small = replace(sample, target=str(sample.target).lower())
            sizes = [-float(checkpoint.adapter.positions(checkpoint.model, [s]).log_prob_N().detach().mean())
                     for s in (sample, small)]  # fmt: skip
            assert score == pytest.approx(-sizes[0] / sizes[1], rel=1e-4)
            assert lowered(sample).prompt == sample.prompt and lowered(sample).digest() == small.digest()


def test_a_text_without_capitals_is_not_judged() -> None:
    found = run("lowercase")
    assert all(math.isnan(x) for scores in found.scores["lowercase"].values() for x in scores)
    assert found.notes == ["14 text(s) have no capital letter and cannot be judged by lower case"]
