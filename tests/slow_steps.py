"""Slow references for methods that train: full logits of one text at a time, loops over tokens, SGD by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.methods.registry import Context
from expunge.models.load import Loaded
from expunge.models.tiny import init_text
from expunge.training.loop import TrainOptions, fit
from tiny_text import tiny_dataset

torch.set_num_threads(1)
DATA = tiny_dataset(people=6, forget=2, holdout=3)
FORGET, RETAIN, UNSEEN = DATA["forget"], DATA["retain"][:6], DATA["holdout"]
# Whole batches, plain steps: one step is the gradient.
PLAIN = {
    "batch_size": 99, "retain_batch": 99, "optimizer": "sgd", "clip": 0.0, "schedule": "constant", "warmup": 0.0,
}  # fmt: skip


@cache
def loaded() -> Loaded:
    """A model that half knows forget and retain, so that no gradient is next to nothing."""
    made = init_text([*DATA.private, *UNSEEN], "tiny-test")
    fit(made.model, made.adapter, [*FORGET, *RETAIN], TrainOptions(epochs=60, batch_size=5, learning_rate=1e-2))
    return made


def fresh() -> nn.Module:
    return copy.deepcopy(loaded().model)


def context(model: nn.Module, **changes: Any) -> Context:
    roles: dict[str, Any] = {"forget": FORGET, "retain": RETAIN, "seed": 3}
    return Context(model, loaded().adapter, **{**roles, **changes})


def logits(model: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    """(L, V) and the L target tokens, of a sample alone in its batch."""
    tokenizer: Any = loaded().adapter.tokenizer  # type: ignore[attr-defined]
    before = tokenizer(sample.prompt).input_ids
    ids = tokenizer(f"{sample.prompt} {sample.target}{tokenizer.eos_token}").input_ids
    assert ids[: len(before)] == before
    out = model(input_ids=torch.tensor([ids])).logits[0]
    return out[len(before) - 1 : -1], torch.tensor(ids[len(before) :])


def nll(model: nn.Module, samples: Sequence[Sample]) -> Tensor:
    """Mean over all target tokens of −log p, nats."""
    parts = []
    for sample in samples:
        z_LV, y_L = logits(model, sample)
        parts += [torch.log(torch.exp(z_V).sum()) - z_V[y] for z_V, y in zip(z_LV, y_L, strict=True)]
    return torch.stack(parts).mean()


def kl(first: nn.Module, second: nn.Module, samples: Sequence[Sample], temperature: float = 1.0) -> Tensor:
    """Mean over all target tokens of KL(first ‖ second) at a temperature, from the definition Σ p log(p/q)."""
    parts = []
    for sample in samples:
        for z_V, w_V in zip(logits(first, sample)[0], logits(second, sample)[0], strict=True):
            p_V, q_V = (torch.exp(x / temperature) / torch.exp(x / temperature).sum() for x in (z_V, w_V))
            parts.append((p_V * torch.log(p_V / q_V)).sum())
    return torch.stack(parts).mean()


def sgd(model: nn.Module, objectives: Sequence[Callable[[], Tensor]], rate: float) -> list[float]:
    """One step down each objective with momentum 0.9; their values before the step."""
    values, speed = [], dict[str, Tensor]()
    for objective in objectives:
        model.zero_grad()
        loss = objective()
        loss.backward()
        values.append(float(loss.detach()))
        with torch.no_grad():
            for n, p in model.named_parameters():
                if p.grad is None:  # no part in the objective: momentum rests too
                    continue
                speed[n] = 0.9 * speed[n] + p.grad if n in speed else p.grad.clone()
                p.sub_(rate * speed[n])
    return values


def assert_moved_alike(model: nn.Module, slow: nn.Module, start: nn.Module) -> None:
    """Both have gone the same way from ``start``, and have gone somewhere."""
    largest = 0.0
    for (n, p), q, s in zip(model.named_parameters(), slow.parameters(), start.parameters(), strict=True):
        largest = max(largest, float((q - s).detach().abs().max()))
        torch.testing.assert_close(p - s, q - s, rtol=5e-3, atol=2e-5, msg=lambda m, n=n: f"{n}: {m}")
    assert math.isfinite(largest) and largest > 1e-3
