"""MemFlex: forget where the gradients of forget and retain samples disagree.

Shape suffixes: N target positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.curvature import num_targets, standing, trainable
from expunge.methods.family_options import FamilyOptions
from expunge.methods.forget_terms import wrong_labels
from expunge.methods.masked import edit_within
from expunge.methods.registry import Context, Outcome, method
from expunge.methods.scope import Masks, selector
from expunge.options import Ranges, check_ranges, option

PAPER = "Tian et al. 2024 (KnowUnDo), arXiv:2407.01920"
MU = (0.92, "largest cosine between the two gradients of a region", "paper and code: 0.92")
SIGMA = (
    None,
    "smallest mean size of the forget gradient's entries in a region; the median of all regions if none",
    "ours: the paper's 6e-4 belongs to its model and LoRA",
)
COPIES = (3, "times that random labels are drawn for the gradients", "paper's code: 3")
RANGES: Ranges = (
    (("mu",), "a cosine from -1 to 1", lambda v: -1 <= v <= 1),
    (("sigma",), "0 or more", lambda v: 0 <= v < math.inf),
    (("copies",), "1 or more", lambda v: v >= 1),
)


@dataclass(frozen=True, kw_only=True)
class RegionOptions:
    """The selector."""

    mu: float = option(*MU)
    sigma: float | None = option(*SIGMA)
    copies: int = option(*COPIES)

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)


@dataclass(frozen=True, kw_only=True)
class MemflexOptions(FamilyOptions):
    """The method."""

    epochs: float = option(5.0, "passes over the forget set", "ours; paper's code: 2, at 30 times the rate on LoRA")
    mu: float = option(*MU)
    sigma: float | None = option(*SIGMA)
    copies: int = option(*COPIES)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, RANGES)


def half_wrong(context: Context, samples: Sequence[Sample], copy: int) -> dict[str, Tensor]:
    """Targets of each sample with half of them (rounded up) replaced by wrong ones, (L,) by sample id."""
    wrong = wrong_labels(context.model, context.adapter, samples, None, context.seed * 1_000_003 + copy)
    found = {}
    for number, sample in enumerate(samples):
        true_L = context.adapter.collate([sample]).targets_N
        order_L = np.random.default_rng([context.seed, copy, number]).permutation(len(true_L))
        replaced_L = torch.zeros(len(true_L), dtype=torch.bool)
        replaced_L[order_L[: math.ceil(len(true_L) / 2)]] = True
        found[sample.id] = torch.where(replaced_L, wrong[sample.id], true_L)
    return found


def perturbed_gradient(context: Context, samples: Sequence[Sample], copies: int) -> dict[str, Tensor]:
    """Gradient of the mean NLL per token of :func:`half_wrong` labels, mean over copies; the text before stays true.

    What is well learnt has next to no gradient; with wrong labels it shows where it is kept.
    """
    model, adapter = context.model, context.adapter
    weights = trainable(model)
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in weights.items()}
    units = copies * num_targets(adapter, samples)

    def nll_C(logits_CV: Tensor, targets_C: Tensor, labels_C: Tensor) -> Tensor:
        return logits_CV.logsumexp(1) - logits_CV.gather(1, labels_C[:, None])[:, 0]

    with standing(model):
        for copy in range(copies):
            labels = half_wrong(context, samples, copy)
            for group in adapter.batches(samples):
                own = [samples[i] for i in group]
                positions = adapter.positions(model, own)
                labels_N = torch.cat([labels[s.id] for s in own]).to(positions.targets_N.device)
                loss = positions.per_token(nll_C, labels_N).sum() / units
                gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
                for name, gradient in zip(weights, gradients, strict=True):
                    if gradient is not None:
                        total[name] += gradient
    return total


def chosen_regions(
    forget: dict[str, Tensor], retain: dict[str, Tensor], mu: float, sigma: float | None
) -> dict[str, float]:
    """Cosine of each region whose cosine is below ``mu`` and whose mean |forget gradient| is ``sigma`` or more.

    A region is a matrix (or the kernel of a convolution); vectors, which the paper's LoRA does not have, stay.
    """
    matrices = {name: g for name, g in forget.items() if g.ndim >= 2}
    size = {name: float(g.abs().mean()) for name, g in matrices.items()}
    least = float(np.median(list(size.values()))) if sigma is None else sigma
    cosine = {
        name: float(torch.nn.functional.cosine_similarity(g.flatten(), retain[name].flatten(), dim=0))
        for name, g in matrices.items()
    }
    return {name: cosine[name] for name in matrices if cosine[name] < mu and 0 < size[name] >= least}


def region_masks(context: Context, mu: float, sigma: float | None, copies: int) -> Masks:
    """True in the chosen regions.

    Raises:
        UserError: no retain samples to compare with, or no region passes both thresholds.
    """
    if not context.retain:
        raise UserError("memflex compares gradients of forget and retain samples: give --retain FILE.")
    forget = perturbed_gradient(context, context.forget, copies)
    retain = perturbed_gradient(context, context.retain, copies)
    regions = chosen_regions(forget, retain, mu, sigma)
    if not regions:
        raise UserError(f"no region has a cosine below mu = {mu} and a gradient above sigma: raise mu, or lower sigma.")
    return {n: torch.ones_like(g, dtype=torch.bool) for n, g in forget.items() if n in regions}


@selector(name="memflex", options=RegionOptions, paper=f"{PAPER}")
def select(context: Context, options: RegionOptions) -> Masks:
    """Whole matrices where the forget gradient is large and points elsewhere than the retain gradient."""
    return region_masks(context, options.mu, options.sigma, options.copies)


@method(
    name="memflex",
    options=MemflexOptions,
    paper=f"{PAPER}",
    formula="−NLL(f) + α·NLL(r); only matrices with cos(∇f, ∇r) < μ and mean |∇f| ≥ σ move",
    needs=frozenset({"retain"}),
    changes="some",
)
def memflex(context: Context, options: MemflexOptions) -> Outcome:
    """Gradient difference in the matrices where forget and retain gradients disagree.

    Both gradients are of answers of which half the tokens are random, as in the paper.
    """
    return edit_within(context, options, "graddiff", region_masks(context, options.mu, options.sigma, options.copies))
