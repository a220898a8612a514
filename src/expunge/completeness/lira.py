"""LiRA: is a sample's confidence more likely under models that saw it or under models that did not?

Carlini et al., "Membership Inference Attacks From First Principles", IEEE S&P 2022 (arXiv 2112.03570). Every score is
higher the more likely the sample is still a member. Shape suffixes: N samples, I models that saw a sample (IN), K that
did not (OUT), M models of both kinds.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from expunge.completeness.readings import Floats
from expunge.errors import UserError

Variance = Literal["sample", "fixed"]
EDGE = 1e-7  # probabilities are kept this far from 0 and 1: float32 log-probabilities say no more
FLOOR = 1e-6  # smallest deviation; a constant signal has none, and a density needs one


def confidence(prob: Floats) -> Floats:
    """ln p - ln(1 - p): the logit-scaled confidence of paper equation 6, finite for every probability."""
    inside = np.clip(np.asarray(prob, dtype=np.float64), EDGE, 1 - EDGE)
    return np.asarray(np.log(inside) - np.log1p(-inside))


def split_models(values_MN: Floats, saw_MN: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """(IN, OUT) values of models of which each saw some of the samples, nan where a model is of the other kind.

    Raises:
        UserError: a sample that all models saw, or that none saw.
    """
    seen_N = saw_MN.sum(axis=0)
    if (seen_N == 0).any() or (seen_N == len(saw_MN)).any():
        raise UserError(
            "online LiRA needs for each sample a model that saw it and one that did not: train more halves."
        )
    return np.where(saw_MN, values_MN, np.nan), np.where(saw_MN, np.nan, values_MN)


def random_halves(models: int, samples: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """(M, N) which model sees which sample: every sample is seen by exactly half of the models, drawn by itself.

    Raises:
        UserError: an odd number of models, or none.
    """
    if models < 2 or models % 2:
        raise UserError(f"{models} models cannot see each sample by halves: give an even number from 2 on.")
    order_MN = np.argsort(np.argsort(rng.random((models, samples)), axis=0), axis=0)
    return np.asarray(order_MN < models // 2)


def moments(values_MN: Floats, variance: Variance) -> tuple[Floats, Floats]:
    """(median over models, deviation) per sample, (N,) each; nan is left out.

    "fixed" is one deviation over all models and samples, the better choice for few models (paper section IV-D). A
    deviation per sample needs two models; where a sample has one, the fixed deviation stands in.
    """
    centre_N = np.nanmedian(values_MN, axis=0)
    fixed = float(np.nanstd(values_MN))
    if variance == "fixed":
        return centre_N, np.full(len(centre_N), max(fixed, FLOOR))
    count_N = np.isfinite(values_MN).sum(axis=0)
    deviation_N = np.where(count_N > 1, np.nanstd(values_MN, axis=0), fixed)
    return centre_N, np.maximum(deviation_N, FLOOR)


def lira_online(target_N: Floats, in_IN: Floats, out_KN: Floats, variance: Variance = "fixed") -> Floats:
    """ln N(target; IN) - ln N(target; OUT), (N,): paper algorithm 1 on confidences.

    Medians stand for means, as in the authors' code; unlike there, the fixed deviation of OUT is taken from OUT.
    """
    mid_in_N, dev_in_N = moments(in_IN, variance)
    mid_out_N, dev_out_N = moments(out_KN, variance)
    return np.asarray(norm.logpdf(target_N, mid_in_N, dev_in_N) - norm.logpdf(target_N, mid_out_N, dev_out_N))


def lira_offline(
    target_N: Floats, out_KN: Floats, variance: Variance = "fixed", sides: Literal["upper", "both"] = "upper"
) -> Floats:
    """How far the target lies above what OUT models give, in deviations, (N,).

    "upper" is (target - median) / deviation, which orders as the one-sided probability of paper equation 4 without
    its saturation; "both" is -ln N(target; OUT), as in the authors' code, which also takes unusually low confidence for
    membership.
    """
    mid_N, dev_N = moments(out_KN, variance)
    return (target_N - mid_N) / dev_N if sides == "upper" else np.asarray(-norm.logpdf(target_N, mid_N, dev_N))
