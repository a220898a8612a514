"""A measured sample with other texts before it: how it is written, what fits, and which tokens are still its own.

Used by attacks that ask how much a context helps (:mod:`recall`, :mod:`repetition`).
Shape suffix: L target tokens of the sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from expunge.attacks.exam import Exam
from expunge.data.samples import Role, Sample
from expunge.models.text import TextAdapter
from expunge.signals.record import Signals

BREAK = "\n"  # between texts
MEASURED: tuple[Role, ...] = ("forget", "holdout")


def measured(exam: Exam) -> dict[Role, list[Sample]]:
    """The samples that membership attacks score: forget, and holdout where there is one."""
    return {role: exam.samples[role] for role in MEASURED if exam.samples.get(role)}


def text_of(sample: Sample) -> str:
    """Prompt and answer as running text, without end marks."""
    return f"{sample.prompt} {sample.target}" if sample.prompt else str(sample.target)


def placed_after(sample: Sample, before: Sequence[str]) -> Sample:
    """The sample with the texts before it, one a line.

    They open its prompt (with a chat template: the user's turn). A document has no prompt and must not get one, or a
    chat template would turn it into an answer: there they open the target, and :func:`tail` leaves them out.
    """
    name = hashlib.sha256(BREAK.join(before).encode()).hexdigest()[:16]
    changed = replace(sample, id=f"{sample.id}/after/{name}", probes=())
    if sample.prompt:
        return replace(changed, prompt=BREAK.join([*before, sample.prompt]))
    return replace(changed, target=BREAK.join([*before, str(sample.target)]))


def fits(adapter: TextAdapter, sample: Sample, placed: Sample) -> bool:
    """Whether nothing was cut to the context and the sample's target tokens are what they were.

    The first target token may differ: at the beginning of a document it is often written without the leading space.
    """
    own, coded = adapter.cached(sample), adapter.cached(placed)
    targets = own.ids[own.first :]
    kept = max(1, len(targets) - 1)
    same = bool(targets) and coded.ids[coded.first :][-kept:] == targets[-kept:]
    return same and placed.id not in adapter.truncated


def most_that_fit(adapter: TextAdapter, sample: Sample, *choices: Sequence[str]) -> int:
    """The largest k such that the sample fits after the first k texts of each choice; 0 when not even one does."""
    for k in range(min(len(texts) for texts in choices), 0, -1):
        if all(fits(adapter, sample, placed_after(sample, texts[:k])) for texts in choices):
            return k
    return 0


def tail(alone: Signals, placed: Signals) -> int:
    """How many target tokens at the end are the same in both: those that the sample is judged by."""
    count = min(len(alone), len(placed))
    differ_L = alone.ids_L[len(alone) - count :] != placed.ids_L[len(placed) - count :]
    return count - 1 - int(np.flatnonzero(differ_L)[-1]) if differ_L.any() else count


def loss_at_end(signals: Signals, count: int) -> float:
    """Mean negative log-likelihood of the last ``count`` target tokens, in nats; nan for none."""
    values_L = signals.log_prob_L[len(signals) - count :]
    return -float(np.mean(values_L, dtype=np.float64)) if count else float("nan")
