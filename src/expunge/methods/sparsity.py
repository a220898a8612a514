"""ℓ1-sparse unlearning: fine-tune on retain while the weights are pulled towards zero, less and less."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from expunge.methods.registry import Context, Outcome, method
from expunge.options import Ranges, check_ranges, option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, Trainer, TrainOptions, train
from expunge.training.terms import Term, nll_N


@dataclass(frozen=True, kw_only=True)
class SparsityOptions(TrainOptions):
    """Plain SGD as in the paper: Adam would move every weight alike, however weak the pull."""

    epochs: float = option(10.0, "passes over the retain set", "paper: 10")
    batch_size: int = option(16, "retain samples in one step", "ours")
    optimizer: str = option("sgd", "adamw, muon or sgd (momentum 0.9)", "paper: SGD", ("adamw", "muon", "sgd"))
    learning_rate: float | None = option(
        0.1, "peak learning rate", "ours, for SGD on small models; paper: 0.001 to 0.1"
    )
    gamma: float = option(5e-4, "weight γ of ‖θ‖₁ at the beginning", "paper: 5e-4")
    decay: str = option(
        "linear", "how γ goes on: linear to 0, constant, or growing from 0", "paper: falling is best",
        ("linear", "constant", "growing"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, RANGES)


RANGES: Ranges = ((("gamma",), "0 or more", lambda v: 0 <= v < math.inf),)


def pull(options: SparsityOptions, step: int, steps: int) -> float:
    """γ at a step, counted from 0 (the γ_t of the paper)."""
    share = {"linear": 1 - step / steps, "constant": 1.0, "growing": (step + 1) / steps}[options.decay]
    return options.gamma * share


@method(
    name="sparsity",
    options=SparsityOptions,
    paper="Jia et al. 2023, arXiv:2304.04934, ℓ1-sparse MU",
    formula="NLL(r) + γ_t ‖θ‖₁, γ_t falling to 0",
    needs=frozenset({"retain"}),
)
def sparsity(context: Context, options: SparsityOptions) -> Outcome:
    """Fine-tune on the retain set with a pull towards zero that fades.

    What the retain set does not hold up is worn away. Nothing is said about the forget samples themselves: where they
    share their weights with retain samples they stay.
    """
    feeds = {"retain": Feed(context.retain)}
    terms = [Term("retain", "retain", "token", nll_N)]
    lengths = feeds["retain"].lengths(context.adapter)
    plan = EpochPlan({"retain": lengths}, {"retain": options.batch_size}, options.epochs, "retain", context.seed)

    def compute(trainer: Trainer, picks: Mapping[str, Sequence[int]]) -> dict[str, float]:
        values = trainer.gradients(picks)
        strength, total = pull(options, trainer.step, trainer.steps), 0.0
        with torch.no_grad():
            for p in trainer.model.parameters():
                if p.requires_grad:
                    sign = strength * p.sign()
                    p.grad = sign if p.grad is None else p.grad + sign
                    total += float(p.abs().sum())
        return {**values, "l1": strength * total}

    log = train(
        context.model,
        context.adapter,
        feeds,
        terms,
        plan,
        options,
        seed=context.seed,
        work=context.work,
        progress=context.progress,
        name="sparsity",
        compute=compute,
    )
    return Outcome(context.model, [], {"steps": len(log.steps), "log": log.steps})
