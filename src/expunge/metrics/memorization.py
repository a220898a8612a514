"""Exact memorization, extraction strength and PrivLeak, from signals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expunge.errors import UserError
from expunge.metrics.registry import metric
from expunge.signals.record import Signals
from expunge.stats import (
    LEVEL,
    RESAMPLES,
    Estimate,
    Groups,
    auc,
    bootstrap_auc,
    bootstrap_mean,
    percentile_interval,
)

FAR_FROM_CHANCE = 0.2  # a reference AUC further from 0.5 than this is unlikely to come from a retrained model


def hit_share(hits_L: NDArray[np.bool_], drop_last: bool = False) -> float:
    """Share of the tokens that greedy teacher-forced decoding gets right; nan without tokens."""
    hits_L = hits_L[:-1] if drop_last else hits_L
    return float(hits_L.mean()) if len(hits_L) else math.nan


def matching_suffix(hits_L: NDArray[np.bool_], drop_last: bool = False) -> float:
    """Length of the longest suffix in which every token is right, as a share; nan without tokens. O(L)."""
    hits_L = hits_L[:-1] if drop_last else hits_L
    if not len(hits_L):
        return math.nan
    misses = np.flatnonzero(~hits_L)
    return (len(hits_L) - 1 - int(misses[-1])) / len(hits_L) if len(misses) else 1.0


def _subjects(signals: Sequence[Signals]) -> list[str]:
    return [s.subject for s in signals]


@metric(
    name="exact_memorization",
    definition="em/1",
    formula="share of target tokens that are the arg-max given the true tokens before them",
    direction="forget: two-sided to the reference",
    source="Tirumala et al. 2022; OpenUnlearning (there without the last token: drop_last)",
)
def exact_memorization(signals: Sequence[Signals], drop_last: bool = False) -> Estimate:
    """Mean share of target tokens that greedy decoding gets right under teacher forcing.

    Common words are right in every model, so the reference is far from 0. ``drop_last`` leaves out the last token
    (definition em-drop_last), which is the end-of-sequence mark for most templates.
    """
    shares = [hit_share(s.hit_L, drop_last) for s in signals]
    return bootstrap_mean(shares, _subjects(signals), definition=f"em{'-drop_last' if drop_last else ''}/1")


@metric(
    name="extraction_strength",
    definition="es/1",
    formula="1 - k/L with the smallest k such that all target tokens after the first k are the arg-max",
    direction="forget: two-sided to the reference",
    source="Carlini et al. 2021; OpenUnlearning (there at least 1/L, here 0 when the last token is wrong)",
)
def extraction_strength(signals: Sequence[Signals], drop_last: bool = False) -> Estimate:
    """How little of the target must be given for the rest to come out word for word.

    One wrong token near the end sets it to almost 0, whatever stands before. With the end-of-sequence mark included,
    a model that knows where an answer ends scores at least 1/L; ``drop_last`` leaves that token out.
    """
    shares = [matching_suffix(s.hit_L, drop_last) for s in signals]
    return bootstrap_mean(shares, _subjects(signals), definition=f"es{'-drop_last' if drop_last else ''}/1")


@metric(
    name="privleak",
    definition="privleak/1",
    formula="100 ((1 - AUC) - (1 - AUC_ref)) / (1 - AUC_ref), AUC of forget above holdout by Min-K%",
    direction="0 is best; negative: still remembered, positive: over-forgotten",
    source="MUSE (Shi et al. 2025), there with AUC of holdout above forget",
)
def privleak(
    forget: ArrayLike,
    holdout: ArrayLike,
    reference_forget: ArrayLike | None = None,
    reference_holdout: ArrayLike | None = None,
    forget_groups: Groups = None,
    holdout_groups: Groups = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Relative distance of a membership AUC from the one of the retrained model, in percent.

    Takes membership scores (higher = more likely a member) of the same samples under both models; without a
    reference its AUC is taken as 0.5 (definition privleak-chance). Grows without bound as AUC_ref nears 1, and a
    reference that itself tells forget from holdout points to a wrong reference or to shifted data; the note says so.
    """
    pairs: list[tuple[ArrayLike, ArrayLike]] = [(forget, holdout)]
    if (reference_forget is None) != (reference_holdout is None):
        raise UserError("PrivLeak needs the reference's scores on forget and on holdout: give both or neither.")
    if reference_forget is not None and reference_holdout is not None:
        pairs.append((reference_forget, reference_holdout))
        if any(np.size(ours) != np.size(theirs) for ours, theirs in zip(*pairs, strict=True)):
            raise UserError("model and reference were scored on different samples: use the same forget and holdout.")
    definition = "privleak/1" if len(pairs) == 2 else "privleak-chance/1"
    num = int(np.size(forget) + np.size(holdout))
    ours, theirs = auc(*pairs[0]), auc(*pairs[1]) if len(pairs) == 2 else 0.5
    if math.isnan(ours) or math.isnan(theirs):
        return Estimate(math.nan, n=num, definition=definition)
    if theirs == 1.0:
        note = "undefined: the reference tells forget from holdout perfectly, so it is no retrained model"
        return Estimate(math.nan, n=num, definition=definition, note=note)
    far = abs(theirs - 0.5) > FAR_FROM_CHANCE
    note = f"the reference's own AUC is {theirs:.2f}: is it retrained, and is the holdout alike?" if far else ""
    draws = bootstrap_auc(pairs, forget_groups, holdout_groups, resamples=resamples, seed=seed)
    chance_R = draws[1] if len(pairs) == 2 else np.full(resamples, 0.5)
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = percentile_interval(100 * (chance_R - draws[0]) / (1 - chance_R), level)
    if any(g is not None and len(set(g)) < 2 for g in (forget_groups, holdout_groups)):
        low = high = math.nan  # one subject says nothing about other subjects
    return Estimate(100 * (theirs - ours) / (1 - theirs), low, high, num, definition, note)
