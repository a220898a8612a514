"""Boundary expanding: forget samples learn an extra class, which is then cut off.

Shape suffixes: N target positions, C of them in a chunk, V classes (tokens), D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from expunge.errors import UserError
from expunge.methods.registry import Context, Outcome, method
from expunge.models.adapter import Head, evaluating
from expunge.options import option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Term, View

RATE = 1.5e-6  # at a billion parameters: near 1e-5 at the 10 million of the paper's networks


@dataclass(frozen=True, kw_only=True)
class BoundaryOptions(TrainOptions):
    """The paper's fine-tuning of the widened model; it has no retain term."""

    epochs: float = option(10.0, "passes over the forget set", "paper: 10")
    batch_size: int = option(8, "forget samples in one step", "ours: as the loss families")
    learning_rate: float | None = option(
        None, "peak learning rate; 2e-5 for 10 million parameters, by the model's size if none", "paper's code: 1e-5"
    )


@contextmanager
def widened(model: nn.Module, width: int, seed: int) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """The extra row of the head (D,) and its bias, as parameters of the model inside the block alone.

    As such they are trained, and kept in checkpoints. Both begin as a new linear layer does, uniform in ±1/√D.
    """
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    drawn = (2 * torch.rand(width + 1, generator=generator) - 1) / math.sqrt(width)
    row_D, bias = (nn.Parameter(part.to(like.device, like.dtype)) for part in (drawn[:-1], drawn[-1]))
    model.register_parameter("shadow_row", row_D)
    model.register_parameter("shadow_bias", bias)
    try:
        yield row_D, bias
    finally:
        del model._parameters["shadow_row"], model._parameters["shadow_bias"]


def shadow_logit_N(hidden_ND: Tensor, head: Head, row_D: Tensor, bias: Tensor) -> Tensor:
    """The extra class' logit, scaled and capped as the head's own."""
    logit_N = (hidden_ND @ row_D + bias).float() * head.scale
    return logit_N if head.softcap is None else head.softcap * torch.tanh(logit_N / head.softcap)


@method(
    name="boundary",
    options=BoundaryOptions,
    paper="Chen et al. 2023, arXiv:2303.11570, boundary expanding",
    formula="−log p(extra class | f) over V+1 classes; the extra class is cut off afterwards",
)
def boundary(context: Context, options: BoundaryOptions) -> Outcome:
    """Teach the forget samples an extra class, then cut it off.

    Made for whole classes of images; on text the extra class is a token that no text has, learnt in place of every
    target. Nothing holds the retain samples, and without the extra class a sample falls to whatever comes next, which
    may still be its true class.

    Raises:
        UserError: the model has no linear head that could be widened.
    """
    model, adapter = context.model, context.adapter
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(model, RATE))
    with evaluating(model):
        positions = adapter.positions(model, context.forget[:1])
    if isinstance(positions.head.module, nn.Identity):
        raise UserError("method 'boundary' widens the output head, and this model has no linear one: choose another.")
    feed = Feed(context.forget)
    sizes = {"forget": options.batch_size}
    plan = EpochPlan({"forget": feed.lengths(adapter)}, sizes, options.epochs, "forget", context.seed)

    with widened(model, positions.hidden_ND.shape[1], context.seed) as (row_D, bias):

        def shadow_nll_N(view: View) -> Tensor:
            states = view.positions
            shadow_N = shadow_logit_N(states.hidden_ND, states.head, row_D, bias)
            return states.per_token(
                lambda logits_CV, _, shadow_C: softplus(logits_CV.logsumexp(1) - shadow_C), shadow_N
            )

        log = train(
            model,
            adapter,
            {"forget": feed},
            [Term("forget", "forget", "token", shadow_nll_N)],
            plan,
            options,
            seed=context.seed,
            work=context.work,
            progress=context.progress,
            name="boundary",
        )
    return Outcome(model, [], {"steps": len(log.steps), "log": log.steps})
