"""Completeness under attack: the same question asked again after rounding, other prompts and relearning.

A model that hides what it knew reads like a retrained one until it is touched. Each view is a set of readings of the
same samples: as the model is served, with rounded weights, under the best of several prompts, after the other samples
were learnt again. Every model that never saw the samples is put through the same, so each view is calibrated by
itself, and the worst view counts; its p-value is multiplied by the number of views (Bonferroni).

Shape suffixes: N samples, V views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from expunge.completeness.calibration import Completeness, Verdict, calibrate
from expunge.completeness.readings import Floats, Readings
from expunge.errors import UserError
from expunge.stats import discoveries

PLAIN = "as served"
# Score of an attack (mean log-probability per token, higher = more is left) -> name of the view.
VIEWS: Mapping[str, str] = {
    "quantization.4": "4-bit weights",
    "prompting": "best prompt",
    "relearn-folds": "relearnt",
}


@dataclass(frozen=True, eq=False)
class UnderAttack:
    """The worst of all views, sample by sample. ``view_N``: where completeness is least, "" where nothing is known."""

    answer: Completeness
    view_N: Sequence[str]
    views: Mapping[str, Completeness]


def under_attack(
    views: Mapping[str, tuple[Readings, Readings | None]], *, level: float = 0.05, fdr: float = 0.05
) -> UnderAttack:
    """Calibrate each view (readings, holdout) and take the worst.

    ``p_over`` and the verdict over-unlearned are those of the view :data:`PLAIN`: an attack may make a model forget,
    which is not the unlearning's doing. ``score`` is the plain view's too. A sample is auditable where it is so as
    served; a view that lacks it does not count for it.

    Raises:
        UserError: the plain view is missing, or views of other samples.
    """
    if PLAIN not in views:
        raise UserError(f"completeness under attack needs the view '{PLAIN}'.")
    plain = views[PLAIN][0]
    for name, (readings, _) in views.items():
        if list(readings.ids) != list(plain.ids):
            raise UserError(
                f"the view '{name}' has other samples than '{PLAIN}': read the same ones under every attack."
            )
    found = {name: calibrate(r, level=level, fdr=fdr, holdout=h) for name, (r, h) in views.items()}
    first = found[PLAIN]
    names = list(found)
    p_VN = np.stack([found[name].p_under_N for name in names])
    gone_VN = np.stack([np.where(found[n].auditable_N, found[n].completeness_N, np.nan) for n in names])
    known_VN = np.isfinite(p_VN)
    p_N = np.min(np.where(known_VN, p_VN, np.inf), axis=0) * np.maximum(1, known_VN.sum(axis=0))
    p_N = np.where(known_VN.any(axis=0), np.minimum(1.0, p_N), np.nan)
    filled_VN = np.where(np.isfinite(gone_VN), gone_VN, np.inf)
    worst_N = filled_VN.argmin(axis=0)
    gone_N = np.where(np.isfinite(gone_VN).any(axis=0), filled_VN.min(axis=0), first.completeness_N)
    able_N = first.auditable_N & np.isfinite(p_N)
    under_N = np.zeros(len(p_N), dtype=bool)
    under_N[able_N] = discoveries(p_N[able_N], fdr)
    # What the plain view called stays called: the price of more views is paid by what only they find.
    verdicts: list[Verdict] = [
        "under-unlearned" if under and able else old
        for old, under, able in zip(first.verdict_N, under_N, able_N, strict=True)
    ]
    view_N = [names[int(w)] if np.isfinite(filled_VN[w, i]) else "" for i, w in enumerate(worst_N)]
    notes = [*first.notes, f"worst of {len(names)} views ({', '.join(names)}), p-values times their number."]
    answer = replace(first, completeness_N=gone_N, p_under_N=p_N, verdict_N=verdicts, notes=tuple(notes))
    return UnderAttack(answer, view_N, found)


def view_of(scores: Mapping[str, Floats | Sequence[float]], like: Readings, models: Sequence[str]) -> Readings:
    """Readings of a view from one score (mean log-probabilities by model) on the samples of ``like``.

    ``models``: the unlearned model, the models that never saw the samples, and, last, the original or "".
    """
    own, *never, original = models
    return replace(
        like,
        unlearned_N=_reading(scores[own], like),
        shadow_KN=np.stack([_reading(scores[name], like) for name in never]),
        original_N=_reading(scores[original], like) if original else None,
    )


def _reading(log_prob: Floats | Sequence[float], like: Readings) -> Floats:
    values = np.asarray(log_prob, dtype=np.float64)
    return -values if like.form == "text" else np.asarray(np.exp(values))
