"""The two yardsticks: train again without the forget data, and go on training on what stays."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from expunge.methods.registry import Context, Outcome, method
from expunge.models.text import causal_lm
from expunge.options import option
from expunge.training.loop import TrainOptions, fit


@dataclass(frozen=True, kw_only=True)
class RetrainOptions(TrainOptions):
    """The original's own schedule; ``bench`` sets it so, from the command line it must be given."""

    epochs: float = option(16.0, "passes over the retain set; use the original's own number", "ours: as studies do")


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(TrainOptions):
    """Further training on retain alone."""

    epochs: float = option(5.0, "passes over the retain set", "TOFU §4: 5")


def from_scratch(model: nn.Module, seed: int) -> nn.Module:
    """A new model of the same configuration with fresh random weights, on the same device."""
    inner = causal_lm(model)
    device = next(model.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh: nn.Module = type(inner)(copy.deepcopy(inner.config))
    fresh.eval()  # as loaded models are: no dropout outside of training
    return fresh.to(device=device, dtype=next(model.parameters()).dtype)


@method(
    name="retrain",
    options=RetrainOptions,
    paper="definition of exact unlearning: Cao & Yang 2015; Bourtoule et al. 2021, arXiv:1912.03817",
    needs=frozenset({"retain"}),
    wants=frozenset({"base"}),
    changes="new",
    formula="NLL(r) from the base",
)
def retrain(context: Context, options: RetrainOptions) -> Outcome:
    """Train the base again on the retain set alone: the reference that everything is compared with."""
    notes = []
    if context.base is not None:
        model = context.base()
    else:
        model = from_scratch(context.model, context.seed)
        notes.append("no base was given: trained from random weights")
    log = fit(
        model,
        context.adapter,
        context.retain,
        options,
        seed=context.seed,
        work=context.work,
        progress=context.progress,
        name="retrain",
    )
    return Outcome(model, notes, {"steps": len(log.steps), "log": log.steps})


@method(
    name="finetune",
    options=FinetuneOptions,
    paper="Golatkar et al. 2020, arXiv:1911.04933 (fine-tuning baseline)",
    needs=frozenset({"retain"}),
    formula="NLL(r) from the original",
)
def finetune(context: Context, options: FinetuneOptions) -> Outcome:
    """Go on training on the retain set and hope that the rest fades."""
    log = fit(
        context.model,
        context.adapter,
        context.retain,
        options,
        seed=context.seed,
        work=context.work,
        progress=context.progress,
        name="finetune",
    )
    return Outcome(context.model, [], {"steps": len(log.steps), "log": log.steps})
