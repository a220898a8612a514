"""Repetition: does the model gain from reading the text once before? (CAMIA's features of repeated text.)

Having just read a stranger's text makes its second reading easy; a text known by heart was easy at once. The sign
is fixed by this argument, not by looking at labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from expunge.attacks.context import loss_at_end, measured, most_that_fit, placed_after, tail, text_of
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.models.sampling import text_adapter
from expunge.options import option


@dataclass(frozen=True, kw_only=True)
class RepetitionOptions:
    """Options of the repetition attack."""

    times: int = option(2, "readings of the text; each after the second gives a score of its own", "CAMIA: 5 to 10")


@attack(
    name="repetition",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="Chang et al. 2024, Context-Aware Membership Inference Attacks against Pre-trained LLMs (arXiv:2409.13745)",
    options=RepetitionOptions,
    formula="loss(x | x) - loss(x); repetition.k: loss(x | x, k - 1 times) - loss(x)",
    passes=2.0,
)
def repetition(exam: Exam, checkpoint: Checkpoint, options: RepetitionOptions) -> Finding:
    """Loss of the second reading less the loss of the first: the gain that is missing when the text is known.

    A question is read again together with its answer. nan where the repeated text does not fit into the context.
    """
    if options.times < 2:
        raise UserError(
            f"{options.times} reading(s) are too few: give at least 2, the second is compared to the first."
        )
    scores: dict[str, dict[Role, list[float]]] = {}
    short = 0
    for role, samples in measured(exam).items():
        for k in range(2, options.times + 1):
            found = gains(checkpoint, samples, k - 1)
            short += sum(map(math.isnan, found))
            scores.setdefault("repetition" if k == 2 else f"repetition.{k}", {})[role] = found
    notes = [f"{short} repeated text(s) do not fit into the context and have no score"] if short else []
    return Finding(scores=scores, notes=notes)


def gains(checkpoint: Checkpoint, samples: list[Sample], before: int) -> list[float]:
    """Loss after ``before`` readings less the loss of the first one, over the same tokens, in nats per token."""
    adapter = text_adapter(checkpoint.adapter)
    readings = [[text_of(s)] * before for s in samples]
    fit = [most_that_fit(adapter, s, r) == before for s, r in zip(samples, readings, strict=True)]
    again = [placed_after(s, r) for s, r, ok in zip(samples, readings, fit, strict=True) if ok]
    later = iter(checkpoint.signals(again))
    found = []
    for alone, ok in zip(checkpoint.signals(samples), fit, strict=True):
        if not ok:
            found.append(math.nan)
            continue
        placed = next(later)
        count = tail(alone, placed)
        found.append(loss_at_end(placed, count) - loss_at_end(alone, count))
    return found
