"""ReCaLL and Con-ReCall: how much do other texts of the same kind help the model with this one?

A model gains little from examples before a text that it knows by heart, and much before one that it must guess.
The examples come from texts that are in no role of the audit, and never from the sample's own subject.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expunge.attacks.context import loss_at_end, measured, most_that_fit, placed_after, tail, text_of
from expunge.attacks.exam import Checkpoint, Exam, key_of
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.sampling import text_adapter
from expunge.options import option

LOSS_FLOOR = 1e-6  # nats per token: the loss of a text that is certain, so that ratios stay finite


@dataclass(frozen=True, kw_only=True)
class RecallOptions:
    """Options of ReCaLL."""

    shots: int = option(
        10, "texts before the sample; fewer where the context ends", "Meeus et al. 2024 (arXiv:2406.17975)"
    )
    seed: int = option(0, "which texts are drawn")


@dataclass(frozen=True, kw_only=True)
class ConRecallOptions(RecallOptions):
    """Options of Con-ReCall."""

    gamma: float = option(0.5, "weight of the loss after members", "Wang et al. 2025 search 0.1 to 1")


@attack(
    name="recall",
    family="membership",
    tier="standard",
    access="log-probabilities",
    paper="Xie et al. 2024, ReCaLL: Membership Inference via Relative Conditional Log-Likelihoods (arXiv:2406.15968)",
    options=RecallOptions,
    formula="loss(x | unseen texts) / loss(x), mean over the tokens of x alone",
    passes=11.0,
    needs={"aux"},
)
def recall(exam: Exam, checkpoint: Checkpoint, options: RecallOptions) -> Finding:
    """Loss after texts that no model was trained on, relative to the loss without them.

    The same texts in the same order stand before every sample (but for those of its own subject).
    """
    pool = drawn(exam, exam.aux, options)
    scores, notes = {}, []
    for role, samples in measured(exam).items():
        after, note = losses_after(checkpoint, samples, [pool], options.shots)
        scores[role] = [recall_score(alone, unseen) for alone, unseen in after]
        notes += [f"{role}: {note}"] if note else []
    return Finding(scores={"recall": scores}, notes=notes)


@attack(
    name="con_recall",
    family="membership",
    tier="standard",
    access="log-probabilities",
    paper="Wang et al. 2025, Con-ReCall: Detecting Pre-training Data in LLMs via Contrastive Decoding "
    "(arXiv:2409.03363)",
    options=ConRecallOptions,
    formula="(loss(x | unseen texts) - gamma * loss(x | trained texts)) / loss(x), mean over the tokens of x alone",
    passes=22.0,
    needs={"aux", "retain"},
)
def con_recall(exam: Exam, checkpoint: Checkpoint, options: ConRecallOptions) -> Finding:
    """Loss after unseen texts against the loss after as many texts that the model was trained on.

    The members are retain samples that the audit does not measure; where there are none, nothing is scored.
    """
    if not math.isfinite(options.gamma):
        raise UserError(f"gamma {options.gamma} is not a finite number: give for example 0.5.")
    unseen, members = drawn(exam, exam.aux, options), drawn(exam, exam.trained, options)
    if not members:
        return Finding(notes=["no retain sample is left outside of the audit: con_recall has no members to show"])
    scores, notes = {}, []
    for role, samples in measured(exam).items():
        after, note = losses_after(checkpoint, samples, [unseen, members], options.shots)
        scores[role] = [con_recall_score(alone, non, mem, options.gamma) for alone, non, mem in after]
        notes += [f"{role}: {note}"] if note else []
    return Finding(scores={"con_recall": scores}, notes=notes)


def recall_score(alone: float, unseen: float) -> float:
    """Both losses in nats per token; higher for members."""
    return unseen / max(alone, LOSS_FLOOR)


def con_recall_score(alone: float, unseen: float, members: float, gamma: float) -> float:
    """The formula of the paper with losses in the place of log-likelihoods (the signs cancel)."""
    return (unseen - gamma * members) / max(alone, LOSS_FLOOR)


def drawn(exam: Exam, pool: Sequence[Sample], options: RecallOptions) -> list[Sample]:
    """The pool in an order of chance that does not depend on how it is sorted; no text that is measured anywhere."""
    if options.shots < 1:
        raise UserError(f"{options.shots} shots are too few: give at least 1 text to stand before a sample.")
    taken = {key_of(s) for samples in exam.samples.values() for s in samples}
    free = {key_of(s): s for s in pool}
    keys = sorted(free.keys() - taken)
    order = exam.rng("recall", options.seed).permutation(len(keys))
    return [free[keys[i]] for i in order]


def losses_after(
    checkpoint: Checkpoint, samples: Sequence[Sample], pools: Sequence[Sequence[Sample]], shots: int
) -> tuple[list[tuple[float, ...]], str]:
    """(loss alone, loss after the texts of each pool) of every sample over the same tokens, and what was left out.

    Every pool gives the same number of texts: as many as fit with all of them. nan where not one fits.
    """
    adapter = text_adapter(checkpoint.adapter)
    found: list[tuple[float, ...]] = [(math.nan,) * (1 + len(pools)) for _ in samples]
    given: list[int] = []
    asked: list[Sample] = []
    for sample in samples:
        texts = [[text_of(s) for s in pool if s.subject != sample.subject][:shots] for pool in pools]
        given.append(most_that_fit(adapter, sample, *texts))
        asked += [placed_after(sample, each[: given[-1]]) for each in texts if given[-1]]
    placed = iter(checkpoint.signals(asked))
    for i, alone in enumerate(checkpoint.signals(samples)):
        if given[i]:
            after = [next(placed) for _ in pools]
            count = min(tail(alone, each) for each in after)
            found[i] = (loss_at_end(alone, count), *(loss_at_end(each, count) for each in after))
    return found, _note(given, shots)


def _note(given: Sequence[int], shots: int) -> str:
    fewer = sum(k < shots for k in given)
    if not fewer:
        return ""
    none = sum(k == 0 for k in given)
    less = f"{fewer} of {len(given)} samples had fewer than {shots} texts before them (median {np.median(given):g})"
    return less + (f", {none} of them none and no score" if none else "")
