"""RMIA: is the model's probability of a sample, against what other models give it, higher than for random others?

Zarifzadeh, Liu, Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024 (arXiv 2312.03262). Scores are
shares in [0, 1], higher = more likely a member. Shape suffixes: N samples, Z population samples, M reference models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expunge.completeness.readings import Floats
from expunge.errors import UserError
from expunge.stats import auc

TINY = 1e-12  # probabilities below this are taken for it: ratios stay finite
OFFSETS = tuple(round(0.1 * step, 1) for step in range(11))


def ratios(target_N: Floats, reference_N: Floats) -> Floats:
    """p(x | target) / p(x), (N,)."""
    return np.maximum(target_N, TINY) / np.maximum(reference_N, TINY)


def offline_reference(out_MN: Floats, offset: float) -> Floats:
    """((1 + a) mean p_out + 1 - a) / 2, (N,): p(x) guessed from OUT models alone (paper appendix B.2.2).

    Raises:
        UserError: an offset outside [0, 1].
    """
    if not 0 <= offset <= 1:
        raise UserError(f"RMIA's offset a = {offset}: give a number from 0 to 1.")
    return np.asarray(((1 + offset) * out_MN.mean(axis=0) + 1 - offset) / 2)


def online_reference(in_MN: Floats, out_MN: Floats) -> Floats:
    """(mean p_in + mean p_out) / 2, (N,): p(x) from models of both kinds (paper section 3); nan is left out."""
    return np.asarray((np.nanmean(in_MN, axis=0) + np.nanmean(out_MN, axis=0)) / 2)


def share_dominated(ratio_N: Floats, ratio_Z: Floats, gamma: float = 1.0) -> Floats:
    """Share of the population that each sample dominates, ratio_x / ratio_z > gamma: (N,).

    Sorting the population once gives all N x Z comparisons in (N + Z) log Z steps.

    Raises:
        UserError: an empty population, or a gamma that is not above 0.
    """
    if not ratio_Z.size or not gamma > 0:
        raise UserError(f"RMIA needs a population and gamma above 0: {ratio_Z.size} samples and {gamma} were given.")
    return np.searchsorted(np.sort(gamma * ratio_Z), ratio_N, side="left") / ratio_Z.size


def rmia_offline(
    target_N: Floats,
    out_MN: Floats,
    population_Z: Floats,
    out_MZ: Floats,
    *,
    offset: float = 0.3,
    gamma: float = 1.0,
) -> Floats:
    """Offline RMIA from true-label probabilities, (N,); the population is OUT for every model."""
    ratio_Z = ratios(population_Z, offline_reference(out_MZ, offset))
    return share_dominated(ratios(target_N, offline_reference(out_MN, offset)), ratio_Z, gamma)


def rmia_online(
    target_N: Floats,
    in_MN: Floats,
    out_MN: Floats,
    population_Z: Floats,
    reference_MZ: Floats,
    *,
    gamma: float = 1.0,
) -> Floats:
    """Online RMIA, (N,): IN and OUT models for the samples, the mean of all ``reference_MZ`` for the population."""
    ratio_Z = ratios(population_Z, reference_MZ.mean(axis=0))
    return share_dominated(ratios(target_N, online_reference(in_MN, out_MN)), ratio_Z, gamma)


def tuned_offset(
    member_N: Floats,
    out_MN: Floats,
    outsider_Z: Floats,
    out_MZ: Floats,
    *,
    gamma: float = 1.0,
    offsets: Sequence[float] = OFFSETS,
) -> float:
    """The offset with the best AUC on a shadow model whose members are known (nothing of the target is used).

    Half of the outsiders are the population and the other half the negatives. The smallest of equal offsets wins.
    """
    best, value = offsets[0], -1.0
    for offset in offsets:
        ratio_Z = ratios(outsider_Z, offline_reference(out_MZ, offset))
        inside = share_dominated(ratios(member_N, offline_reference(out_MN, offset)), ratio_Z[::2], gamma)
        found = auc(inside, share_dominated(ratio_Z[1::2], ratio_Z[::2], gamma))
        if found > value + 1e-12:
            best, value = offset, found
    return best
