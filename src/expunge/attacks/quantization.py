"""Quantization: does rounding the weights bring the forgotten back?

Unlearning that moves the weights less than a rounding step is undone by rounding (Zhang et al. 2025, "Catastrophic
Failure of LLM Unlearning via Quantization", arXiv:2410.16454). The rounding itself is
:mod:`expunge.models.rounding`.
"""

from __future__ import annotations

import torch
from torch import nn

from expunge.attacks.copies import attackers_copy
from expunge.errors import UserError
from expunge.models.rounding import GROUP, encode, matrices


@torch.no_grad()
def quantized(model: nn.Module, bits: int, *, group: int = GROUP) -> nn.Module:
    """A copy of the model with rounded weights; the given model is not touched.

    LoRA adapters are merged before rounding, since a quantized deployment holds one matrix.

    Raises:
        UserError: bits are not 2 to 8, the group is smaller than 2, or the model has no matrix to round.
    """
    rounded = attackers_copy(model)
    found = matrices(rounded)
    if not found:
        raise UserError("the model has no weight matrix to quantize: leave the quantization attack out.")
    for matrix in found.values():
        matrix.write(encode(matrix.weight_OI(), bits, group).weights_OI())
    return rounded


@torch.no_grad()
def unchanged_codes(first: nn.Module, second: nn.Module, bits: int, *, group: int = GROUP) -> float:
    """Share of the weights whose code is the same in both models, in [0, 1]; 1 = rounding hides the whole edit.

    Raises:
        UserError: the two models do not have the same matrices.
    """
    sides = [{n: m.weight_OI() for n, m in matrices(attackers_copy(model)).items()} for model in (first, second)]
    if {n: w.shape for n, w in sides[0].items()} != {n: w.shape for n, w in sides[1].items()}:
        raise UserError("the two models have different weight matrices: compare a model with one made from it.")
    same = total = 0
    for name, weight_OI in sides[0].items():
        pair = [encode(w, bits, group).codes_OI for w in (weight_OI, sides[1][name])]
        same += int((pair[0] == pair[1].to(pair[0].device)).sum())
        total += weight_OI.numel()
    return same / total if total else 1.0
