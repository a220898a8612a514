"""Fisher forgetting: noise that is small where the retain samples bend the loss, drawn in sample space."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from expunge.methods.curvature import (
    LABELS,
    LABELS_MEAN,
    DualFisher,
    Line,
    farthest,
    flat,
    free_entries,
    mean_loss,
    some,
    unflat,
)
from expunge.methods.registry import Context, Outcome, method
from expunge.options import check_ranges, option


@dataclass(frozen=True, kw_only=True)
class ForgettingOptions:
    """One draw of noise."""

    noise: float | None = option(
        None,
        "scale (λσ²)^¼ of the noise; the largest within the budget if none",
        "arXiv:2403.10557: tuned per dataset; the search is ours",
    )
    budget: float = option(
        0.1, "rise of the retain loss that the noise may cost, nats per token", "ours: no evaluation is seen"
    )
    damping: float = option(
        0.1, "added to the curvature, as a share of its mean eigenvalue in the samples' span", "ours: scale-free"
    )
    samples: int = option(128, "retain samples that the curvature is taken from", "ours: memory is samples × weights")
    labels: str = option("true", LABELS_MEAN, "arXiv:2403.10557: empirical Fisher", LABELS)
    draws: int = option(1, "draws per sample, for labels=model", "ours: one is unbiased")

    def __post_init__(self) -> None:
        above = (("noise", "budget", "damping"), "a number above 0", lambda v: 0 < v < math.inf)
        check_ranges(self, ((("samples", "draws"), "1 or more", lambda v: v >= 1), above))


@method(
    name="fisher-forgetting",
    options=ForgettingOptions,
    paper="Gu et al. 2024, arXiv:2403.10557 (Fisher Forgetting), after Golatkar et al. 2020, arXiv:1911.04933",
    needs=frozenset({"retain"}),
    formula="θ ← θ + (λσ²)^¼ (F_r + λ)^−¼ b, b ~ N(0, I)",
)
def fisher_forgetting(context: Context, options: ForgettingOptions) -> Outcome:
    """Gaussian noise on the weights, least along the directions that the retain samples need.

    The forget samples are not looked at: they are forgotten as far as they depend on directions that the retain
    samples do not. The full matrix over ``samples`` gradients takes part, not its diagonal. Within the default budget
    that is little (``people``: forget probability .99 to .91 where retain falls to .92 of what it was); chained behind
    fisher-removal it is the noise of a scrubbing step.
    """
    model, adapter = context.model, context.adapter
    few = some(context.retain, options.samples, context.seed)
    metric = DualFisher.of(
        model,
        adapter,
        few,
        damping=options.damping,
        labels=options.labels,
        draws=options.draws,
        seed=context.seed,
        progress=context.progress,
    )
    free = free_entries(model)
    drawn_P = torch.randn(metric.rows_SP.shape[1], generator=torch.Generator().manual_seed(context.seed))
    move_P = metric.power(drawn_P.to(metric.rows_SP.device) * flat(free), -0.25)
    line, loss = Line(model, unflat(move_P, free)), mean_loss(model, adapter, few)
    start = loss()
    if options.noise is None:
        first = math.sqrt(2 * options.budget / max(metric.quadratic(move_P), 1e-30))
        noise = farthest(line.at, loss, start + options.budget, first)
    else:
        noise = options.noise
        line.at(noise)
    notes = [] if noise else ["no noise kept the retain loss within its budget: nothing was changed"]
    return Outcome(model, notes, {"noise": noise, "retain_start": start, "retain": loss()})
