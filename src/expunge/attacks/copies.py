"""The attacker's copy of a model: whole, with every weight free, and the given model untouched."""

from __future__ import annotations

import copy

from torch import nn

from expunge.models.lora import merge_lora


def attackers_copy(model: nn.Module) -> nn.Module:
    """A deep copy in which LoRA adapters are merged and no floating-point weight is frozen.

    Whoever holds the weights may merge them, round them and train them all, whatever the unlearning left frozen.
    """
    own = merge_lora(copy.deepcopy(model))
    for parameter in own.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    return own
