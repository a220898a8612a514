"""Edits of whole weights in a model with a LoRA adapter: the weights stay, the edit goes into the adapter.

The gradient at a frozen weight is that at the layer's effective weight W + s·BA, so whole weights can be judged without
being moved; a change of them is written as the closest one that B and A can hold.

Shape suffixes: O layer outputs, I layer inputs (times kernel places).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from expunge.models.lora import is_lora


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that carry an adapter, by the name of their frozen weight; empty for a bare model."""
    if not is_lora(model):
        return {}
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "lora_B") and hasattr(m, "base_layer")}
    return {f"{name}.base_layer.weight": layer for name, layer in layers.items() if len(layer.lora_B)}


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Within the block the frozen weights under the adapter require gradients in its stead; their layers."""
    layers = adapted_layers(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        if layers:
            for name, p in model.named_parameters():
                p.requires_grad_(name in layers)
        yield layers
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(before[name])


def effective(layer: Any) -> Tensor:
    """W + s·BA of an adapted layer, in the shape of its weight."""
    name = layer.active_adapters[0]
    found: Tensor = layer.base_layer.weight.detach() + layer.get_delta_weight(name).detach()
    return found


def write_change(layer: Any, change: Tensor) -> tuple[float, float]:
    """Let the adapter's update become the nearest of its rank to what it is plus ``change`` (shape of the weight).

    Returns the squared norms of the whole wanted update's part that was lost, and of the change.
    """
    name = layer.active_adapters[0]
    b, a, scale = layer.lora_B[name].weight, layer.lora_A[name].weight, layer.scaling[name]
    wanted = layer.get_delta_weight(name).detach().float() + change.float()
    turned = bool(getattr(layer, "fan_in_fan_out", False))  # GPT-2 keeps its weights the other way round
    matrix_OI = (wanted.T if turned else wanted.flatten(1)) / scale
    left, values, right = torch.linalg.svd(matrix_OI, full_matrices=False)
    rank = min(b.shape[1], len(values))
    root = values[:rank].sqrt()
    with torch.no_grad():
        b.zero_()
        a.zero_()
        b.flatten(1)[:, :rank] = left[:, :rank] * root
        a.flatten(1)[:rank] = root[:, None] * right[:rank]
    return float(values[rank:].square().sum()) * scale**2, float(change.float().square().sum())
