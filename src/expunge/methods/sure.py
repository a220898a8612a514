"""SURE: unlearning that is to survive quantization. Few neurons move, at a large learning rate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from expunge.methods.curvature import mean_gradient
from expunge.methods.family_options import PreferenceOptions
from expunge.methods.masked import SHARE, edit_within
from expunge.methods.registry import Context, Outcome, method
from expunge.methods.scope import Masks, selector, top_share
from expunge.options import check_ranges, option

PAPER = "Zhang et al. 2025, arXiv:2410.16454"
PAPER_RATE = 5e-5  # five times the usual one
SHARE_SOURCE = "paper's code: the 90th percentile of the norms"


@dataclass(frozen=True, kw_only=True)
class NeuronOptions:
    """The selector."""

    share: float = option(0.1, "share of the neurons that may move", SHARE_SOURCE)

    def __post_init__(self) -> None:
        check_ranges(self, SHARE)


@dataclass(frozen=True, kw_only=True)
class SureOptions(PreferenceOptions):
    """The method."""

    share: float = option(0.1, "share of the neurons that may move", SHARE_SOURCE)
    objective: str = option(
        "npo", "forget term: npo, or graddiff for gradient ascent", "paper: both", ("npo", "graddiff")
    )
    learning_rate: float | None = option(
        None, "peak learning rate; 5e-5 at 7B, raised for small models, if none", "paper: 5 to 20 times the usual"
    )
    schedule: str = option(
        "constant", "shape after warm-up", "paper's code: constant", ("cosine", "linear", "constant")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, SHARE)


def rows(gradient: Tensor) -> Tensor:
    """Norm of each row along the first dimension; of a vector the size of each entry: the neurons of a tensor."""
    return gradient.abs() if gradient.ndim < 2 else gradient.flatten(1).norm(dim=1)


def neuron_masks(context: Context, share: float) -> Masks:
    """True in the ``share`` of all neurons whose gradient of the forget loss is longest, at the original.

    The gradient of NPO at the original has the direction of that of the log-likelihood, so the mask does not depend on
    the objective.
    """
    gradients = mean_gradient(context.model, context.adapter, context.forget)
    chosen = top_share({name: rows(gradient) for name, gradient in gradients.items()}, share)
    return {
        name: chosen[name].view(-1, *[1] * (gradient.ndim - 1)).expand_as(gradient)
        for name, gradient in gradients.items()
    }


@selector(name="sure", options=NeuronOptions, paper=f"{PAPER}, §6")
def select(context: Context, options: NeuronOptions) -> Masks:
    """Neurons (rows of weights) with the longest gradient of the forget loss."""
    return neuron_masks(context, options.share)


@method(
    name="sure",
    options=SureOptions,
    paper=f"{PAPER}, §6",
    formula="NPO(f) or −NLL(f), + α·retain; only neurons with ‖∇NLL(f)‖ in the top share move",
    wants=frozenset({"retain"}),
    changes="some",
)
def sure(context: Context, options: SureOptions) -> Outcome:
    """Forget with few neurons and a large learning rate, so that the change is more than rounding takes away.

    A module is a neuron, as in the released code. Its mask is taken once over the whole forget set as in the paper; the
    code takes it anew from every batch.
    """
    return edit_within(context, options, options.objective, neuron_masks(context, options.share), PAPER_RATE)
