"""Relearning in two folds: every forget sample is measured after the others were learnt again.

One half of the forget set is learnt and the other half measured, then the halves change places, so that each sample
gets a number. It is the reading from which completeness under attack is computed
(:mod:`expunge.completeness.views`); :mod:`expunge.attacks.curves` shows how fast it comes back.
"""

from __future__ import annotations

import numpy as np

from expunge.attacks.curves import MEASURED, RATE, CurveOptions
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, attack
from expunge.attacks.relearning import relearn, split
from expunge.data.samples import Role, Sample
from expunge.signals.forward import collect
from expunge.training.optimizers import sized_rate

NAME = "relearn-folds"


@attack(
    name=NAME,
    family="recovery",
    tier="standard",
    access="weights",
    paper="Hu et al. 2025, arXiv:2406.13356",
    options=CurveOptions,
    formula="mean_t log p(x_t | x_<t) after learning the half of the forget set in which x is not; holdout: both means",
    passes=2 * (50 * 3 * 0.5 + 1),
    modalities={"text", "multimodal", "classifier"},
)
def relearn_folds(exam: Exam, checkpoint: Checkpoint, options: CurveOptions) -> Finding:
    """Both halves of the forget set are learnt in turn; each sample is measured when it was not.

    High where a sample comes back although only others were learnt. The halves are the same for every checkpoint.
    """
    if len({s.digest() for s in exam.forget}) < 2:
        return Finding(notes=[f"{NAME} was left out: it needs two different forget samples."])
    halves = split(exam.forget, 0.5, exam.seed)
    rate = options.learning_rate if options.learning_rate is not None else sized_rate(checkpoint.model, RATE)
    found: dict[Role, dict[str, list[float]]] = {role: {} for role in MEASURED}
    for learned, others in (halves, halves[::-1]):
        attacked = relearn(
            checkpoint.model,
            checkpoint.adapter,
            learned,
            steps=options.steps,
            learning_rate=rate,
            micro_tokens=checkpoint.max_tokens,
            seed=exam.seed,
            progress=exam.progress,
        )
        both: tuple[tuple[Role, list[Sample]], ...] = (("forget", others), ("holdout", exam.holdout))
        for role, samples in both:
            for signals in collect(attacked, checkpoint.adapter, samples, max_tokens=checkpoint.max_tokens):
                found[role].setdefault(signals.id, []).append(-signals.loss)
    scores: dict[Role, list[float]] = {
        role: [float(np.mean(found[role][s.id])) for s in exam.samples[role]]
        for role in MEASURED
        if exam.samples.get(role)
    }
    return Finding({NAME: scores})
