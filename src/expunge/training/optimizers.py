"""Optimizers by name, learning-rate schedules as functions of the step, and optimizer state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from expunge.errors import UserError, unknown
from expunge.training.sophia import Sophia

NAMES = ("adamw", "muon", "sgd", "sophia")
Schedule = Literal["cosine", "linear", "constant"]


def sized_rate(model: nn.Module, at_billion: float) -> float:
    """A learning rate that suits the model's size, from the one used at a billion parameters and more.

    Rises with P^-0.6 below that: 1e-5 becomes 3.5e-5 for 124M, 8e-4 for 0.7M parameters, where the published rates of
    7B models move nothing. A rule of thumb fitted to the tuned rates in docs/log.md, not a law.
    """
    parameters = sum(p.numel() for p in model.parameters())
    return float(at_billion * max(1.0, (1e9 / parameters) ** 0.6))


def factor(schedule: Schedule, step: int, steps: int, warmup: float) -> float:
    """Learning-rate factor of a step: linear warm-up over ``warmup``·steps, then the schedule down to 0."""
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    left = 1.0 - (step - warm) / max(1, steps - warm)
    if schedule == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * left))
    return left if schedule == "linear" else 1.0


def hidden_matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable 2-D weights inside the network: neither embeddings nor the output head, which Muon must not touch."""
    outside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            outside.add(id(module.weight))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        outside |= {id(p) for p in head.parameters()}
    classifier = getattr(model, "classifier", None)
    if isinstance(classifier, nn.Module):
        outside |= {id(p) for p in classifier.parameters()}
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and id(p) not in outside}


def build(
    model: nn.Module,
    name: str,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    other_learning_rate: float | None = None,
    only: Sequence[nn.Parameter] | None = None,
) -> list[torch.optim.Optimizer]:
    """Optimizers over the trainable parameters (or ``only`` those).

    "muon": orthogonalised momentum (Jordan et al. 2024: Nesterov .9, 5 Newton-Schulz steps, rate scaled by
    √max(1, out/in)) on the hidden matrices, AdamW at ``other_learning_rate`` on the rest. "sophia": second order, see
    :mod:`expunge.training.sophia`; rates are those of AdamW.
    """
    wanted = {id(p) for p in only} if only is not None else None
    parameters = [p for p in model.parameters() if p.requires_grad and (wanted is None or id(p) in wanted)]
    if not parameters:
        raise UserError("nothing to train: every parameter is frozen.")
    adamw: dict[str, Any] = {"weight_decay": weight_decay, "betas": (0.9, 0.999)}
    if name == "adamw":
        return [torch.optim.AdamW(parameters, lr=learning_rate, **adamw)]
    if name == "sgd":
        return [torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=weight_decay)]
    if name == "sophia":
        return [Sophia(parameters, learning_rate, weight_decay=weight_decay)]
    if name == "muon":
        inside = {id(p) for p in hidden_matrices(model).values()}
        matrices = [p for p in parameters if id(p) in inside]
        rest = [p for p in parameters if id(p) not in inside]
        chosen: list[torch.optim.Optimizer] = []
        if matrices:
            chosen.append(
                torch.optim.Muon(
                    matrices,
                    lr=learning_rate,
                    momentum=0.9,
                    nesterov=True,
                    ns_steps=5,
                    weight_decay=weight_decay,
                    adjust_lr_fn="original",
                )
            )
        if rest:
            other = other_learning_rate if other_learning_rate is not None else learning_rate / 10
            chosen.append(torch.optim.AdamW(rest, lr=other, **adamw))
        return chosen
    raise unknown("optimizer", name, NAMES)


def state_tensors(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """All optimizer state as named tensors (numbers become 0-d float64), so that no pickle is needed."""
    flat: dict[str, Tensor] = {}
    for i, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensor = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
                flat[f"{i}/{index}/{key}"] = tensor.detach().clone().contiguous()
    return flat


def load_state_tensors(optimizers: Sequence[torch.optim.Optimizer], flat: dict[str, Tensor]) -> None:
    """Undo :func:`state_tensors`."""
    states: list[dict[int, dict[str, Any]]] = [{} for _ in optimizers]
    for name, tensor in flat.items():
        i, index, key = name.split("/", 2)
        is_number = tensor.ndim == 0 and tensor.dtype == torch.float64
        states[int(i)].setdefault(int(index), {})[key] = tensor.item() if is_number else tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        whole = optimizer.state_dict()
        whole["state"] = state
        optimizer.load_state_dict(whole)
