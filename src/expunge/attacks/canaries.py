"""Exposure: how far in front does the true text stand among texts of the same kind, in bits?

Carlini et al. 2019, "The Secret Sharer" (arXiv 1802.08232), section 4. Made for canaries that were planted before
training (:mod:`expunge.data.canaries`), it works on any sample whose answer has candidates of the same type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats as scipy_stats

from expunge.attacks.candidates import chance_exposure, exposure, likelihoods, lineups, mid_rank
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.extraction import mean_over
from expunge.attacks.registry import Finding, attack
from expunge.data.canaries import is_canary
from expunge.data.samples import Role
from expunge.errors import UserError
from expunge.options import option
from expunge.stats import Estimate, Floats, bootstrap_mean

MOST_BITS = 40.0  # the fitted tail is not believed beyond 2^-40
FEWEST = 20  # candidates that a fit of three parameters needs


def skew_normal(values_C: Floats) -> tuple[float, float, float]:
    """(shape, location, scale) of the skew-normal distribution with the mean, deviation and skewness of the values.

    Method of moments (Azzalini 1985); a sample skewness that no skew-normal has is cut to 0.99.
    """
    mean, deviation = float(values_C.mean()), float(values_C.std())
    if deviation == 0:
        return 0.0, mean, 0.0
    skewness = float(np.mean(((values_C - mean) / deviation) ** 3))
    part = min(abs(skewness), 0.99) ** (2 / 3)
    delta = math.copysign(math.sqrt(math.pi / 2 * part / (part + ((4 - math.pi) / 2) ** (2 / 3))), skewness)
    shape = delta / math.sqrt(1 - delta**2)
    scale = deviation / math.sqrt(1 - 2 * delta**2 / math.pi)
    return shape, mean - scale * delta * math.sqrt(2 / math.pi), scale


def extrapolated_exposure(scores_C: Floats) -> float:
    """-log2 P(a candidate is at least as likely as the true text), by a skew-normal fit to the candidates' scores.

    For spaces too large to rank in (section 4.3 of the paper): says more than log2 C bits where the true text stands
    far in front. Between 0 and 40 bits; nan with fewer than 20 candidates or no spread.
    """
    others_C = scores_C[1:][~np.isnan(scores_C[1:])]
    shape, place, scale = skew_normal(others_C) if len(others_C) >= FEWEST else (0.0, 0.0, 0.0)
    if scale == 0 or math.isnan(scores_C[0]):
        return math.nan
    tail = float(scipy_stats.skewnorm.sf(scores_C[0], shape, place, scale))
    return MOST_BITS if tail <= 2**-MOST_BITS else -math.log2(min(tail, 1.0))


@dataclass(frozen=True, kw_only=True)
class ExposureOptions:
    """How many candidates, and whether to look beyond them."""

    candidates: int = option(64, "most surrogates of a line-up")
    extrapolate: bool = option(True, "also fit a skew-normal to the candidates", "Carlini et al. 2019, section 4.3")


@attack(
    name="exposure",
    family="extraction",
    tier="standard",
    access="log-probabilities",
    paper="Carlini et al. 2019, arXiv 1802.08232",
    options=ExposureOptions,
    modalities=("text", "multimodal"),
    formula="log2 C - log2 rank of the true text among C texts of its kind by log-likelihood; ties at mid-rank",
    passes=64.0,
)
def exposure_attack(exam: Exam, checkpoint: Checkpoint, options: ExposureOptions) -> Finding:
    """Exposure in bits of planted canaries, or of any answer among answers of the same type.

    A model that never saw the text gives it any rank, which is about 1.4 bits in the mean and says so in the note.
    ``exposure.extrapolated`` goes beyond log2 C with a tail fitted to 20 candidates or more. Figures
    count canaries on their own.
    """
    if options.candidates < 1:
        raise UserError(f"{options.candidates} candidates make no line-up: give at least 1.")
    scores: dict[Role, list[float]] = {}
    beyond: dict[Role, list[float]] = {}
    figures: dict[str, Estimate] = {}
    details: dict[str, Mapping[str, Any]] = {}
    counts: list[int] = []
    for role, rows in lineups(exam, options.candidates).items():
        texts = [row.texts() if row is not None else None for row in rows]
        found = likelihoods(checkpoint, texts, "text", exam)
        scores[role], beyond[role] = [], []
        for sample, scores_C in zip(exam.samples[role], found, strict=True):
            if scores_C is None:
                scores[role].append(math.nan)
                beyond[role].append(math.nan)
                continue
            rank, count = mid_rank(scores_C), len(scores_C)
            scores[role].append(exposure(rank, count))
            beyond[role].append(extrapolated_exposure(scores_C) if options.extrapolate else math.nan)
            if role == "forget":
                counts.append(count)
                details[sample.id] = {"rank": rank, "candidates": count}
        figures[f"exposure.{role}"] = mean_over(exam, role, scores[role], "exposure/1 bits")
        planted = [k for k, s in enumerate(exam.samples[role]) if is_canary(s)]
        if planted:
            bits = [scores[role][k] for k in planted]
            figures[f"exposure.canaries.{role}"] = bootstrap_mean(
                bits, level=exam.level, resamples=exam.resamples, seed=exam.seed, definition="exposure/1 bits"
            )
    fitted = any(not math.isnan(bits) for values in beyond.values() for bits in values)
    parts = {"exposure": scores} | ({"exposure.extrapolated": beyond} if fitted else {})
    return Finding(parts, figures, details, (line_up_note(counts, len(exam.forget)),))


def line_up_note(counts: list[int], total: int) -> str:
    """How many samples had candidates, and what pure chance gives."""
    if not counts:
        return "no forget sample has candidates of its type: give perturbed answers, or retain or holdout samples"
    chance = float(np.mean([chance_exposure(c) for c in counts]))
    return (
        f"{len(counts)} of {total} forget samples ranked among {min(counts)} to {max(counts)} candidates; a model that "
        f"never saw them has a mean exposure of {chance:.2f} bits if all candidates are equally likely"
    )
