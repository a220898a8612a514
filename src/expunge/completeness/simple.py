"""Membership scores of one line: percentiles of the loss, the change of a confidence, and plain differences.

Every score is higher the more likely the sample is still a member. Shape suffixes: N samples, Z population samples, K
models that never saw the samples.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from expunge.completeness.lira import Variance, moments
from expunge.completeness.readings import Floats
from expunge.errors import UserError

CEILING = 1000.0  # the loss at which the curve of EMIA-R ends
TINY = 1e-12


def emia_population(loss_N: Floats, population_Z: Floats) -> Floats:
    """Attack P of Ye et al. (CCS 2022, arXiv 2111.09679): share of the population with a higher loss, (N,).

    Ties count half, so that a constant loss gives 1/2.

    Raises:
        UserError: no population.
    """
    if not population_Z.size:
        raise UserError("EMIA-P needs a population: give samples that the model was not trained on.")
    ordered_Z = np.sort(population_Z)
    below_N = np.searchsorted(ordered_Z, loss_N, side="left")
    upto_N = np.searchsorted(ordered_Z, loss_N, side="right")
    return 1 - (below_N + upto_N) / (2 * population_Z.size)


def emia_reference(loss_N: Floats, out_KN: Floats, ceiling: float = CEILING) -> Floats:
    """Attack R of Ye et al.: 1 - the level of the loss on the quantile curve of the sample's OUT losses, (N,).

    The curve is linear between 0, the K sorted losses and ``ceiling``, at levels 0, 1/(K+1), ..., 1; a loss that
    stands on several knots takes the middle of their levels.
    """
    shape = (1, len(loss_N))
    knots_QN = np.concatenate([np.zeros(shape), np.sort(np.minimum(out_KN, ceiling), axis=0), np.full(shape, ceiling)])
    at_N = np.clip(loss_N, 0, ceiling)
    lower_N = (knots_QN < at_N).sum(axis=0)  # knots strictly below
    upto_N = (knots_QN <= at_N).sum(axis=0)
    left_N = np.take_along_axis(knots_QN, np.maximum(lower_N - 1, 0)[None], axis=0)[0]
    right_N = np.take_along_axis(knots_QN, np.minimum(upto_N, len(knots_QN) - 1)[None], axis=0)[0]
    gap_N = np.where(right_N > left_N, right_N - left_N, 1.0)
    between_N = lower_N - 1 + (at_N - left_N) / gap_N
    level_N = np.where(upto_N > lower_N, (lower_N + upto_N - 1) / 2, between_N)
    return np.asarray(1 - level_N / (len(knots_QN) - 1))


def update_attack(unlearned_N: Floats, original_N: Floats, out_KN: Floats, variance: Variance = "fixed") -> Floats:
    """Phi((c_u - m) / s) - Phi((c_o - m) / s), (N,): how far the LiRA probability fell with the update, negative or 0.

    Jagielski et al., "How to Combine Membership-Inference Attacks on Multiple Updated Models", PETS 2023
    (arXiv 2205.06369), score difference, on confidences.
    """
    centre_N, deviation_N = moments(out_KN, variance)
    return np.asarray(
        norm.cdf((unlearned_N - centre_N) / deviation_N) - norm.cdf((original_N - centre_N) / deviation_N)
    )


def gap_ratio(loss_N: Floats, original_N: Floats, out_KN: Floats, floor: float = 1e-3) -> Floats:
    """(l_out - l_u) / (l_out - l_o), (N,): 0 at the level of models that never saw the sample, 1 at the original's.

    A gap below ``floor`` (nats) is taken for it: there the ratio says nothing.
    """
    out_N = out_KN.mean(axis=0)
    return np.asarray((out_N - loss_N) / np.maximum(out_N - original_N, floor))


def probability_ratio(prob_N: Floats, original_N: Floats, out_KN: Floats) -> Floats:
    """p_u / mean(p_o, p_out), (N,): RMIA's ratio before any population."""
    return np.asarray(prob_N / np.maximum((original_N + out_KN.mean(axis=0)) / 2, TINY))
