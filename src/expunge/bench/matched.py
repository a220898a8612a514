"""Methods at equal utility: how much was forgotten, when each may damage the retain set equally little.

The unlearned weights are mixed with the original's, θ(s) = s·unlearned + (1 − s)·original, with the largest share s at
which the mean probability of the retain samples is still ``level`` times that of the original ("unlearning with
control": Wang et al. 2024, arXiv:2406.09179, section 4). Only samples that the method was given are looked at.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from expunge.data.samples import Sample
from expunge.models.adapter import Adapter
from expunge.signals.forward import collect

HALVINGS = 6  # the share is known to 1/64
LIMIT = 200  # retain samples that are looked at


def at_level(
    model: nn.Module, original: nn.Module, adapter: Adapter, retain: Sequence[Sample], level: float, seed: int = 0
) -> tuple[nn.Module, float]:
    """A model at the level, and the share of the edit that is in it (1: the model was above the level as it is)."""
    if len(retain) > LIMIT:
        picked = np.random.default_rng(seed).permutation(len(retain))[:LIMIT]
        retain = [retain[int(i)] for i in sorted(picked)]
    wanted = level * probability(original, adapter, retain)
    if probability(model, adapter, retain) >= wanted:
        return model, 1.0
    mixed = copy.deepcopy(model)
    low, high = 0.0, 1.0  # at 0 it is the original, which is above the level
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        mix(mixed, model, original, middle)
        low, high = (middle, high) if probability(mixed, adapter, retain) >= wanted else (low, middle)
    mix(mixed, model, original, low)
    return mixed, low


def probability(model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> float:
    """Mean over samples of the geometric mean of their target tokens' probabilities."""
    return float(np.mean([s.prob for s in collect(model, adapter, samples)]))


def mix(into: nn.Module, model: nn.Module, original: nn.Module, share: float) -> None:
    """Parameters and floating-point buffers of ``into`` become share·model + (1 − share)·original."""
    one, other = model.state_dict(), original.state_dict()
    with torch.no_grad():
        for name, tensor in into.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(share * one[name] + (1 - share) * other[name])
