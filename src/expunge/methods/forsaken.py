"""Forsaken: a sparse shift of the weights that turns what is said of forget samples into what is said of strangers.

Shape suffixes: N target positions, C of them in a chunk, V classes (tokens).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.methods.registry import Context, Outcome, method
from expunge.models.adapter import Adapter, evaluating
from expunge.options import Ranges, check_ranges, option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, Trainer, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Term, View, nll_N

RATE = 1e-5  # as the loss families: the paper's own is of its generator


@dataclass(frozen=True, kw_only=True)
class ForsakenOptions(TrainOptions):
    """How far the shift may go."""

    epochs: float = option(10.0, "passes over the forget set", "ours: as the loss families; the paper's code: 100")
    batch_size: int = option(8, "forget samples in one step", "ours: as the loss families")
    retain_batch: int = option(8, "retain samples in one step", "ours: one per forget sample")
    learning_rate: float | None = option(None, "peak learning rate; 1e-5 raised for small models if none", "ours")
    penalty: float = option(0.01, "λ: price of the shift, times the retain loss", "released code: 0.01")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, RANGES)


RANGES: Ranges = ((("penalty",), "0 or more", lambda v: 0 <= v < math.inf),)


def mean_prediction(model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> Tensor:
    """Mean over all targets of the model's probabilities, (V,) float32: the prior of these samples."""
    total_V = torch.zeros(())
    count = 0

    def add(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
        nonlocal total_V, count
        total_V = total_V.to(logits_CV.device) + logits_CV.softmax(1).sum(0)
        count += len(targets_C)
        return logits_CV.new_zeros(len(targets_C))

    with evaluating(model):
        for group in adapter.batches(samples):
            adapter.positions(model, [samples[i] for i in group]).per_token(add)
    return total_V / count


@method(
    name="forsaken",
    options=ForsakenOptions,
    paper="Liu et al. 2022, arXiv:2003.10933, neuron masking",
    formula="KL(q ‖ p_θ)(f) + λ · NLL(r) · ‖θ − θ_o‖₁, q the mean prediction on never-seen samples",
    wants=frozenset({"retain", "unseen"}),
)
def forsaken(context: Context, options: ForsakenOptions) -> Outcome:
    """Shift the weights sparsely until forget samples are answered as strangers are on average.

    The paper lets a generator propose the shift ("mask gradients"); here the shift itself is trained, which reaches the
    same objective. Every target goes to the prior q, which on text is a distribution of tokens that knows no context:
    the loss on the forget set goes above that of a model that never saw it.
    """
    model, adapter = context.model, context.adapter
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(model, RATE))
    notes = []
    if not context.unseen:
        instead = "retain" if context.retain else "forget"
        notes.append(f"no never-seen texts were given: the prior is the mean prediction on {instead} samples")
    prior_V = mean_prediction(model, adapter, context.unseen or context.retain or context.forget)
    entropy = float((prior_V * prior_V.clamp_min(torch.finfo(prior_V.dtype).tiny).log()).sum())
    original = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def prior_N(view: View) -> Tensor:
        return view.positions.per_token(lambda logits_CV, _: entropy - logits_CV.log_softmax(1) @ prior_V)

    forget = Term("forget", "forget", "token", prior_N)
    retain = Term("retain", "retain", "token", nll_N)
    feeds, sizes = {"forget": Feed(context.forget)}, {"forget": options.batch_size}
    if context.retain:
        feeds["retain"], sizes["retain"] = Feed(context.retain), options.retain_batch
    else:
        notes.append("no retain samples were given: the price of the shift does not depend on what it breaks")
    plan = EpochPlan({r: f.lengths(adapter) for r, f in feeds.items()}, sizes, options.epochs, "forget", context.seed)

    def compute(trainer: Trainer, picks: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """The product rule: λ(‖Δ‖₁ ∇NLL + NLL ∇‖Δ‖₁)."""
        values = trainer.gradients(picks, [forget])
        weights = {n: p for n, p in trainer.model.named_parameters() if n in original}
        with torch.no_grad():
            length = sum(float((p - original[n]).abs().sum()) for n, p in weights.items())
        values["shift"] = length
        price = 1.0
        if "retain" in picks:
            values |= trainer.gradients(picks, [retain], scale=options.penalty * length)
            price = values["retain"]
        with torch.no_grad():
            for n, p in weights.items():
                sign = options.penalty * price * (p - original[n]).sign()
                p.grad = sign if p.grad is None else p.grad + sign
        return values

    log = train(
        model,
        adapter,
        feeds,
        [forget, retain],
        plan,
        options,
        seed=context.seed,
        work=context.work,
        progress=context.progress,
        name="forsaken",
        compute=compute,
    )
    return Outcome(model, notes, {"steps": len(log.steps), "log": log.steps})
