"""Relearning curves: how much of the forgotten comes back at each step of learning something else.

Four data sets are learnt, one training each: a part of the forget set, its neighbours by topic and by syntax, and
unrelated text. What is measured is never what is learnt. A model that never knew improves on the measured samples
as well, since it learns their form; so the curve is read against the reference's under the same attack (Hu et al.
2025, arXiv:2406.13356; Yoon et al. 2026, arXiv:2602.03379; Lynch et al. 2024, arXiv:2402.16835).

Shape suffixes: N measured samples, S marks on the curve (step 0 first).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.neighbours import pool, syntactic, topical
from expunge.attacks.registry import Finding, attack
from expunge.attacks.relearning import SHARE, relearn, split
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.options import option
from expunge.signals.forward import collect
from expunge.stats import Estimate, bootstrap_mean
from expunge.training.optimizers import sized_rate

Floats = NDArray[np.float64]
RATE = 5e-6  # at a billion parameters and more; 4e-4 for 0.7M parameters, where more undoes in 50 steps what it learns
PAPERS = "Hu et al. 2025, arXiv:2406.13356"
FORMULA = "mean_t log p(x_t | x_<t) of the samples that were not learnt, after the last step; .area: over all steps"
# 50 steps of 3 passes over a fifth, and 6 measurements of everything.
PASSES = 50 * 3 * SHARE + 6
MEASURED: tuple[Role, ...] = ("forget", "holdout")


@dataclass(frozen=True, kw_only=True)
class CurveOptions:
    """How long and how hard the attacker trains."""

    steps: int = option(50, "last step; measured at steps 1, 2, 5, 10, 20, 50, ... up to it")
    learning_rate: float | None = option(None, "constant AdamW rate; 5e-6 scaled by the model's size if none")
    share: float = option(SHARE, "share of the forget samples that is learnt again, where they are learnt")
    samples: int = option(32, "most samples that are learnt")

    def __post_init__(self) -> None:
        """Raises UserError for numbers that no training can have."""
        if self.steps < 1 or self.samples < 1:
            raise UserError(f"relearning {self.samples} samples for {self.steps} steps cannot be: give 1 or more each.")
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UserError(f"relearning rate {self.learning_rate} cannot be: give a number above 0, such as 5e-4.")


@attack(
    name="relearn-forget",
    family="recovery",
    tier="standard",
    access="weights",
    paper=PAPERS,
    options=CurveOptions,
    formula=FORMULA,
    passes=PASSES,
    modalities={"text", "multimodal", "classifier"},
)
def relearn_forget(exam: Exam, checkpoint: Checkpoint, options: CurveOptions) -> Finding:
    """A part of the forget samples is learnt again; the others are measured.

    The choice is the same for every checkpoint. Samples that were learnt have no score (nan), nor has another
    sample of the same content.
    """

    def choose() -> list[Sample]:
        different = len({s.digest() for s in exam.forget})
        if different < 2:
            return []
        return split(exam.forget, min(options.share, options.samples / different), exam.seed)[0]

    return _attack("relearn-forget", "two different forget samples", choose, exam, checkpoint, options)


@attack(
    name="relearn-topical",
    family="recovery",
    tier="full",
    access="weights",
    paper=PAPERS,
    options=CurveOptions,
    formula=FORMULA,
    passes=PASSES,
    modalities={"text", "multimodal"},
)
def relearn_topical(exam: Exam, checkpoint: Checkpoint, options: CurveOptions) -> Finding:
    """Retain and auxiliary samples nearest in topic (TF-IDF, other subjects) are learnt; all forget is measured.

    An attacker without the forget set takes public texts on the same topic. High means that these bring the forgotten
    answers back; what the reference gains in the same training is what any model would learn from them.
    """

    def choose() -> list[Sample]:
        return topical(exam.forget, pool(exam), options.samples)

    return _attack("relearn-topical", "retain or auxiliary texts", choose, exam, checkpoint, options)


@attack(
    name="relearn-syntactic",
    family="recovery",
    tier="full",
    access="weights",
    paper="Yoon et al. 2026, arXiv:2602.03379",
    options=CurveOptions,
    formula=FORMULA,
    passes=PASSES,
    modalities={"text", "multimodal"},
)
def relearn_syntactic(exam: Exam, checkpoint: Checkpoint, options: CurveOptions) -> Finding:
    """Retain and auxiliary samples whose questions have the same frame are learnt; all forget is measured.

    A frame is the question with names and content words masked. Likeness of form, more than of topic, is what brings
    answers back in the paper. High means that they came back; compare with the reference under the same training.
    """

    def choose() -> list[Sample]:
        return syntactic(exam.forget, pool(exam), options.samples)

    return _attack("relearn-syntactic", "retain or auxiliary texts", choose, exam, checkpoint, options)


@attack(
    name="relearn-unrelated",
    family="recovery",
    tier="full",
    access="weights",
    paper=PAPERS,
    options=CurveOptions,
    formula=FORMULA,
    passes=PASSES,
    needs={"utility"},
    modalities={"text", "multimodal", "classifier"},
)
def relearn_unrelated(exam: Exam, checkpoint: Checkpoint, options: CurveOptions) -> Finding:
    """Unrelated samples (role utility) are learnt; all forget is measured.

    What comes back here was never gone: any further training undoes the unlearning.
    """

    def choose() -> list[Sample]:
        samples = exam.samples["utility"]
        order = exam.rng("curves", "unrelated").permutation(len(samples))
        return [samples[i] for i in order[: options.samples]]

    return _attack("relearn-unrelated", "utility samples", choose, exam, checkpoint, options)


def marks(last: int) -> list[int]:
    """Steps at which the curve is measured: 1, 2, 5, 10, 20, 50, 100, ... below ``last``, and ``last``.

    >>> marks(30)
    [1, 2, 5, 10, 20, 30]
    """
    series = [head * 10**power for power in range(len(str(last))) for head in (1, 2, 5)]
    return [step for step in series if step < last] + [last]


def curve(
    model: nn.Module,
    checkpoint: Checkpoint,
    learned: Sequence[Sample],
    measured: Sequence[Sample],
    options: CurveOptions,
    exam: Exam,
) -> tuple[Floats, float]:
    """(mean log-probability of each measured sample at each mark (S, N), that of the learnt samples at the end)."""
    wanted = set(marks(options.steps))
    rows = [_log_probs(checkpoint.signals(measured))]

    def on_step(step: int, attacked: nn.Module) -> None:
        if step in wanted:
            rows.append(_log_probs(collect(attacked, checkpoint.adapter, measured, max_tokens=checkpoint.max_tokens)))

    rate = options.learning_rate if options.learning_rate is not None else sized_rate(model, RATE)
    attacked = relearn(
        model,
        checkpoint.adapter,
        learned,
        steps=options.steps,
        learning_rate=rate,
        micro_tokens=checkpoint.max_tokens,
        seed=exam.seed,
        progress=exam.progress,
        on_step=on_step,
    )
    own = _log_probs(collect(attacked, checkpoint.adapter, learned, max_tokens=checkpoint.max_tokens))
    return np.stack(rows), float(np.nanmean(own))


def area(values_SN: Floats, steps_S: Sequence[int]) -> Floats:
    """Mean height of each curve over log(1 + step), by trapezoids: (N,).

    Logarithmic, since what a model only hides comes back in the first steps. It is linear in the heights, so the
    difference of two areas is the area between the two curves.
    """
    x_S = np.log1p(np.asarray(steps_S, dtype=np.float64))
    heights = (values_SN[1:] + values_SN[:-1]) / 2
    return np.asarray((heights * np.diff(x_S)[:, None]).sum(0) / (x_S[-1] - x_S[0]))


def _log_probs(signals: Sequence[Any]) -> Floats:
    return np.array([-s.loss for s in signals], dtype=np.float64)


def _attack(
    name: str,
    lacking: str,
    choose: Callable[[], list[Sample]],
    exam: Exam,
    checkpoint: Checkpoint,
    options: CurveOptions,
) -> Finding:
    key = ("curves", name, options.share, options.samples)
    if key not in exam.shared:
        exam.shared[key] = choose()
    learned: list[Sample] = exam.shared[key]
    if not learned:
        return Finding(notes=[f"{name} was left out: it needs {lacking}."])
    seen = {s.digest() for s in learned}
    measured = {role: [s for s in exam.samples.get(role, []) if s.digest() not in seen] for role in MEASURED}
    flat = [s for role in MEASURED for s in measured[role]]
    values_SN, own = curve(checkpoint.model, checkpoint, learned, flat, options, exam)
    steps = [0, *marks(options.steps)]
    end = _scores(exam, measured, values_SN[-1])
    under = _scores(exam, measured, area(values_SN, steps))
    figures = {f"{name}.learnt": Estimate(own, n=len(learned), definition=f"{name}-learnt-{options.steps}/1")}
    forget = len(measured["forget"])
    groups = [s.subject for s in measured["forget"]]
    for step, row in zip(steps, values_SN, strict=True):
        figures[f"{name}.step_{step}"] = bootstrap_mean(
            row[:forget],
            groups,
            level=exam.level,
            resamples=exam.resamples,
            seed=exam.seed,
            definition=f"{name}-log_prob-step_{step}/1",
        )
    notes = [f"{name}: {len(learned)} samples were learnt for {options.steps} steps, {forget} forget samples measured."]
    return Finding({name: end, f"{name}.area": under}, figures, notes=notes)


def _scores(exam: Exam, measured: Mapping[Role, Sequence[Sample]], values_N: Floats) -> dict[Role, list[float]]:
    """Values of the measured samples beside the samples of each role; nan for those that were learnt."""
    scores: dict[Role, list[float]] = {}
    first = 0
    for role, samples in measured.items():
        found = {s.digest(): float(values_N[first + i]) for i, s in enumerate(samples)}
        first += len(samples)
        if exam.samples.get(role):
            scores[role] = [found.get(s.digest(), math.nan) for s in exam.samples[role]]
    return scores
