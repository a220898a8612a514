"""SalUn: random labels, learnt only by the weights that the forget loss depends on most."""

from __future__ import annotations

from dataclasses import dataclass

from expunge.methods.curvature import mean_gradient
from expunge.methods.family_options import FamilyOptions
from expunge.methods.masked import SHARE, edit_within
from expunge.methods.registry import Context, Outcome, method
from expunge.methods.scope import Masks, selector, top_share
from expunge.options import check_ranges, option

PAPER = "Fan et al. 2024, arXiv:2310.12508"
SHARE_SOURCE = "paper §4: the median of the gradient is the threshold, so half of the weights"


@dataclass(frozen=True, kw_only=True)
class SaliencyOptions:
    """The selector."""

    share: float = option(0.5, "share of the weights that may move", SHARE_SOURCE)

    def __post_init__(self) -> None:
        check_ranges(self, SHARE)


@dataclass(frozen=True, kw_only=True)
class SalunOptions(FamilyOptions):
    """The method: a loss family, and the share."""

    share: float = option(0.5, "share of the weights that may move", SHARE_SOURCE)
    alpha: float = option(1.0, "weight of the retain term", "its α; released code: 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, SHARE)


def saliency_masks(context: Context, share: float) -> Masks:
    """True at the ``share`` of all trainable weights with the largest |∂NLL(f)/∂θ| at the original."""
    gradients = mean_gradient(context.model, context.adapter, context.forget)
    return top_share({name: gradient.abs() for name, gradient in gradients.items()}, share)


@selector(name="salun", options=SaliencyOptions, paper=f"{PAPER}, §4")
def select(context: Context, options: SaliencyOptions) -> Masks:
    """Single weights with the largest gradient of the forget loss."""
    return saliency_masks(context, options.share)


@method(
    name="salun",
    options=SalunOptions,
    paper=f"{PAPER}, §4",
    formula="−log p_θ(y′)(f) + α·NLL(r), y′ ≠ y drawn once; only weights with |∇NLL(f)| in the top share move",
    wants=frozenset({"retain"}),
    changes="some",
)
def salun(context: Context, options: SalunOptions) -> Outcome:
    """Learn random labels with the weights that matter most for the forget set, hold all others.

    Both signs of the gradient count alike. The mask is taken once, at the original, and holds under momentum and weight
    decay.
    """
    return edit_within(context, options, "random-labels", saliency_masks(context, options.share))
