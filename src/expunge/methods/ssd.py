"""Selective synaptic dampening: weights that matter far more to the forget samples than to the rest are shrunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.errors import UserError
from expunge.methods.adapter_edit import effective, whole_weights, write_change
from expunge.methods.curvature import diagonal_fisher, num_targets, trainable
from expunge.methods.registry import Context, Outcome, method
from expunge.options import option

ALPHA = 10.0  # the paper's
REACH = 0.8  # of the largest possible ratio: four fifths of a weight's importance is then the forget samples'


@dataclass(frozen=True, kw_only=True)
class SSDOptions:
    """No training: two passes of gradients and one multiplication."""

    alpha: float | None = option(
        None,
        "weights with F_forget > alpha · F_all are dampened; 10, or 0.8 of its largest possible value (all targets / "
        "forget targets) where that is less, if none",
        "arXiv:2308.07707: 10; the cap is ours: from a forget share of a tenth on, 10 selects nothing",
    )
    strength: float = option(
        1.0, "λ: a dampened weight is multiplied by min(1, strength · F_all / F_forget)", "arXiv:2308.07707: 1"
    )

    def __post_init__(self) -> None:
        if self.alpha is not None and not self.alpha > 0:
            raise UserError(f"alpha = {self.alpha} cannot be: give a number above 0.")
        if not self.strength >= 0:
            raise UserError(f"strength = {self.strength} cannot be: give 0 or more.")


def dampening(forget: Tensor, whole: Tensor, alpha: float, strength: float) -> Tensor:
    """The factor of each weight: 1 unless F_f > α F, else min(1, λ F / F_f)."""
    factor = (strength * whole / forget.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0)
    return torch.where(forget > alpha * whole, factor, torch.ones_like(factor))


@method(
    name="ssd",
    options=SSDOptions,
    paper="Foster, Schoepf & Brintrup 2024, arXiv:2308.07707",
    needs=frozenset({"retain"}),
    changes="some",
    formula="θ ← θ · min(1, λ F_all/F_f) where F_f > α F_all",
)
def ssd(context: Context, options: SSDOptions) -> Outcome:
    """Shrink the weights that are far more important for the forget samples than for all of them.

    F is the diagonal of the empirical Fisher matrix, from the gradient of each sample on its own, not of whole
    batches as in the released code, and in eval mode, so that no batch statistics move. A model that has memorised
    every sample spreads both importances over the same weights: there the retain samples suffer too, in image
    classifiers almost as much as the forget samples. With LoRA the weights under the adapter are judged, and their
    dampening is written into the adapter as far as its rank holds it.
    """
    model, adapter, notes = context.model, context.adapter, []
    with whole_weights(model) as layers:
        weights = trainable(model)
        forget = diagonal_fisher(model, adapter, context.forget, progress=context.progress)
        retain = diagonal_fisher(model, adapter, context.retain, progress=context.progress)
    own, rest = num_targets(adapter, context.forget), num_targets(adapter, context.retain)
    most = (own + rest) / own
    alpha = min(ALPHA, REACH * most) if options.alpha is None else options.alpha
    if alpha >= most:
        notes.append(f"alpha {alpha:g} selects nothing: F_forget is at most {most:.3g} times F_all on these samples")
    dampened, lost, changed = 0, 0.0, 0.0
    for name, weight in weights.items():
        whole = (own * forget[name] + rest * retain[name]) / (own + rest)
        factor = dampening(forget[name], whole, alpha, options.strength)
        dampened += int((factor < 1).sum())
        if name in layers:
            missed, wanted = write_change(layers[name], (factor - 1) * effective(layers[name]))
            lost, changed = lost + missed, changed + wanted
        else:
            with torch.no_grad():
                weight.mul_(factor.to(weight.dtype))
    if layers:
        notes.append(
            f"the adapter's rank holds {1 - min(1.0, lost / max(changed, 1e-30)):.0%} of the squared change of the "
            "weights under it"
        )
    return Outcome(model, notes, {"alpha": alpha, "dampened": dampened})
