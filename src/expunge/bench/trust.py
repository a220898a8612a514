"""How far a number can be trusted: faithfulness and robustness of a metric (OpenUnlearning, arXiv:2506.12618, sec. 4).

Every value m is turned so that higher means more knowledge. b is before, a is after an intervention that should not
change what a model knows of the forget set by more than it changes a retrained model.

- Faithfulness: AUC of m, models with the knowledge (P) above models without it (N).
- Relearning, eq. 2: R = min((m_ret^a - m_ret^b) / (m_unl^a - m_unl^b), 1), one epoch on the forget set. Below 1: the
  knowledge comes back faster than a retrained model learns it, so the value before was too low.
- Quantization, eq. 3: Q = min(m_unl^b / m_unl^a, 1). Below 1: rounding shows knowledge that the value before missed.
- Robustness, eq. 4: the harmonic mean of R and Q, over unlearned models that the metric itself calls unlearned
  (m_unl^b at most the threshold that tells P from N most accurately); combined: that of faithfulness and robustness.

Ratios need a scale on which 0 means nothing known, see :func:`scaled`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from expunge.stats import Estimate, auc_estimate, bootstrap_mean

Floats = NDArray[np.float64]
Scale = Literal["as is", "exp", "range"]
EQUAL = 1e-9  # changes below this are rounding


@dataclass(frozen=True)
class Trust:
    """What one metric or attack earned. nan where it could not be said; ``notes`` say why."""

    faithfulness: Estimate
    relearning: Estimate
    quantization: Estimate
    robustness: float
    combined: float
    scale: Scale
    passed: int  # unlearned models that the metric itself calls unlearned
    notes: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """As JSON for results.json; nan becomes null."""

        def plain(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "faithfulness": self.faithfulness.record(),
            "relearning": self.relearning.record(),
            "quantization": self.quantization.record(),
            "robustness": plain(self.robustness),
            "combined": plain(self.combined),
            "scale": self.scale,
            "passed": self.passed,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Values:
    """One metric on every model, higher = more knowledge. The unlearned ones in one order, the retrained in another."""

    knowing: Sequence[float]
    ignorant: Sequence[float]
    unlearned: Sequence[float] = field(default_factory=tuple)
    unlearned_relearned: Sequence[float] = field(default_factory=tuple)
    unlearned_quantized: Sequence[float] = field(default_factory=tuple)
    retrained: Sequence[float] = field(default_factory=tuple)
    retrained_relearned: Sequence[float] = field(default_factory=tuple)


def harmonic(*values: float) -> float:
    """Harmonic mean; 0 if one is 0, nan if one is nan.

    >>> harmonic(1.0, 0.5), harmonic(0.0, 1.0)
    (0.6666666666666666, 0.0)
    """
    if any(math.isnan(v) for v in values):
        return math.nan
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / v for v in values)


def scaled(values: Sequence[float], population: Sequence[float]) -> tuple[Floats, Scale]:
    """The values on a scale of 0 (nothing known) to 1, and which: chosen by the two populations alone.

    Shares, probabilities and AUCs stay as they are; numbers that are never positive are taken as log-probabilities
    (exp); anything else runs from the smallest to the largest value of the populations, and is cut there.
    """
    known = np.array([v for v in population if math.isfinite(v)])
    own = np.asarray(values, dtype=np.float64)
    if known.size == 0 or (known.min() >= 0 and known.max() <= 1):
        return np.clip(own, 0, 1), "as is"
    if known.max() <= 0:
        return np.exp(np.minimum(own, 0)), "exp"
    width = max(float(known.max() - known.min()), EQUAL)
    return np.clip((own - known.min()) / width, 0, 1), "range"


def relearning(before: float, after: float, retrained_before: float, retrained_after: float) -> float:
    """Equation 2, in [0, 1]; 1 where the unlearned model does not gain more than the retrained one.

    >>> relearning(0.2, 0.6, 0.2, 0.4)
    0.5
    """
    gain, fair = after - before, retrained_after - retrained_before
    if math.isnan(gain) or math.isnan(fair):
        return math.nan
    return 1.0 if gain <= max(fair, 0.0) + EQUAL else max(fair, 0.0) / gain


def quantization(before: float, after: float) -> float:
    """Equation 3, in [0, 1]; 1 where rounding does not raise the value.

    >>> quantization(0.2, 0.4), quantization(0.4, 0.2)
    (0.5, 1.0)
    """
    if math.isnan(before) or math.isnan(after):
        return math.nan
    return 1.0 if after <= before + EQUAL else max(before, 0.0) / after


def threshold(knowing: Sequence[float], ignorant: Sequence[float]) -> float:
    """The value that tells the two apart with the fewest errors (knowing above it); midway where several do."""
    both = sorted({v for v in (*knowing, *ignorant) if math.isfinite(v)})
    if not both:
        return math.nan
    cuts = [(low + high) / 2 for low, high in pairwise(both)] or [both[0]]
    right = [sum(v > c for v in knowing) + sum(v <= c for v in ignorant) for c in cuts]
    best = [c for c, count in zip(cuts, right, strict=True) if count == max(right)]
    return best[len(best) // 2]


def trust(values: Values, level: float = 0.95, seed: int = 0) -> Trust:
    """Faithfulness and robustness of one metric.

    The interval of the faithfulness takes every model as one item; those of R and Q are bootstraps over the unlearned
    models. A retrained model's change is the mean over the retrained ones.
    """
    faith = auc_estimate(values.knowing, values.ignorant, level=level, definition="faithfulness/1")
    population = [*values.knowing, *values.ignorant]
    cut = threshold(values.knowing, values.ignorant)
    passed = [i for i, v in enumerate(values.unlearned) if v <= cut]
    scale: Scale = scaled([], population)[1]
    notes = []
    before, relearned, rounded, fair_before, fair_after = (
        scaled(part, population)[0]
        for part in (
            values.unlearned,
            values.unlearned_relearned,
            values.unlearned_quantized,
            values.retrained,
            values.retrained_relearned,
        )
    )
    fair = [float(np.nanmean(x)) if np.isfinite(x).any() else math.nan for x in (fair_before, fair_after)]
    gains = [relearning(float(before[i]), float(relearned[i]), *fair) for i in passed if i < len(relearned)]
    shows = [quantization(float(before[i]), float(rounded[i])) for i in passed if i < len(rounded)]
    if values.unlearned and not passed:
        notes.append("calls none of the unlearned models unlearned: no robustness")
    again = bootstrap_mean(gains, level=level, seed=seed, definition="relearning-robustness/1")
    rounding = bootstrap_mean(shows, level=level, seed=seed, definition="quantization-robustness/1")
    robust = harmonic(again.value, rounding.value)
    whole = harmonic(faith.value, robust)
    return Trust(faith, again, rounding, robust, whole, scale, len(passed), tuple(notes))
