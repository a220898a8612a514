"""Conditional dependence without a model of the data: the coefficient CODEC and the selection FOCI.

Azadkia and Chatterjee 2021 (arXiv:1910.12327), as used by L-CODEC (Mehta et al. 2022): ranks and nearest neighbours
alone, with a little noise that breaks ties, so that discrete data are allowed too.

Shape suffixes: M observations, K candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 24  # distances held at once
JITTER = 1e-5  # of a deviation: breaks ties, also in float32, and changes nothing else


def ranks(values_M: Tensor) -> Tensor:
    """Number of observations that are at most as large, from 1 to M."""
    return torch.searchsorted(values_M.sort().values, values_M.contiguous(), right=True)


def standard(values_MK: Tensor, generator: torch.Generator) -> Tensor:
    """Columns with mean 0 and deviation 1, ties broken; a constant column becomes 0."""
    centred_MK = (values_MK - values_MK.mean(0)).double()
    deviation_K = centred_MK.std(0)
    # What varies by rounding alone is constant.
    varies_K = deviation_K > 1e-7 * values_MK.double().abs().amax(0)
    found_MK = torch.where(varies_K, centred_MK / deviation_K.clamp_min(1e-300), 0.0)
    noise_MK = torch.randn(found_MK.shape, generator=generator, dtype=torch.float64).to(found_MK.device)
    return torch.where(varies_K, found_MK + JITTER * noise_MK, 0.0).float()


def dependence(y_M: Tensor, z_MK: Tensor, given_MM: Tensor | None = None) -> Tensor:
    """T(y, z_k | x) of each candidate, (K,): 0 for conditional independence, 1 where z_k and x determine y.

    ``given_MM``: squared distances of the observations in x; None for T(y, z_k). Constant candidates have −inf.
    """
    number = len(y_M)
    rank_M = ranks(y_M).double()
    itself = torch.diag(torch.full((number,), torch.inf, dtype=z_MK.dtype, device=y_M.device))
    near_MM = itself if given_MM is None else given_MM + itself
    found = []
    for z_Mk in torch.split(z_MK, max(1, CHUNK // number**2), dim=1):
        apart_kMM = (z_Mk.T[:, :, None] - z_Mk.T[:, None, :]).square_().add_(near_MM)
        both_kM = torch.minimum(rank_M, rank_M[apart_kMM.argmin(2)])
        if given_MM is None:
            above_M = number + 1 - rank_M
            top_k = (number * both_kM - above_M.square()).sum(1)
            bottom = (above_M * (number - above_M)).sum()
        else:
            alone_M = torch.minimum(rank_M, rank_M[near_MM.argmin(1)])
            top_k = (both_kM - alone_M).sum(1)
            bottom = (rank_M - alone_M).sum()
        value_k = top_k / bottom if float(bottom) > 0 else torch.zeros_like(top_k)
        found.append(torch.where((z_Mk != 0).any(0), value_k, -torch.inf))
    return torch.cat(found)


def foci(y_M: Tensor, z_MK: Tensor, most: int, generator: torch.Generator) -> list[int]:
    """Candidates that y depends on given those chosen before, greedily, until none adds anything; at least one.

    Empty only where no candidate varies at all.
    """
    z_MK = standard(z_MK, generator)
    y_M = standard(y_M[:, None], generator)[:, 0]
    chosen: list[int] = []
    given_MM: Tensor | None = None
    while len(chosen) < min(most, z_MK.shape[1]):
        value_K = dependence(y_M, z_MK, given_MM)
        value_K[chosen] = -torch.inf
        best = int(value_K.argmax())
        if not bool(value_K[best].isfinite()) or (chosen and float(value_K[best]) <= 0):
            break
        chosen.append(best)
        own = (z_MK[:, best, None] - z_MK[None, :, best]).square()
        given_MM = own if given_MM is None else given_MM + own
    return chosen
