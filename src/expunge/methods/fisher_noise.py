"""Fisher noise: each weight is disturbed as far as the retain samples do not feel it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.errors import UserError
from expunge.methods.curvature import (
    LABELS,
    LABELS_MEAN,
    diagonal_fisher,
    farthest,
    free_entries,
    mean_loss,
    some,
    trainable,
)
from expunge.methods.registry import Context, Outcome, method
from expunge.options import option


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """One draw of noise."""

    alpha: float | None = option(
        None,
        "variance of the noise is alpha · F^-exponent; the largest alpha within the budget if none",
        "arXiv:1911.04933: √(λσ²), tuned per model (released code: 1e-6 to 1e-9); the search is ours",
    )
    exponent: float = option(0.5, "power of the curvature", "arXiv:1911.04933: ½; the released code has 1")
    bound: float = option(
        1.0,
        "largest variance of a weight's noise, times the mean square of its tensor",
        "ours: the released code cuts 1/F at 1e3, which means nothing on another model's scale",
    )
    budget: float = option(
        0.1, "rise of the retain loss that the noise may cost, nats per token", "ours: no evaluation is seen"
    )
    labels: str = option("model", LABELS_MEAN, "arXiv:1911.04933: labels drawn from the model", LABELS)
    draws: int = option(1, "draws per sample, for labels=model", "ours: one is unbiased")
    samples: int = option(128, "retain samples that the retain loss of the search is measured on", "ours: cost")

    def __post_init__(self) -> None:
        for name in ("samples", "draws"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} cannot be: give 1 or more.")
        for name in ("alpha", "exponent", "bound", "budget"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} = {value} cannot be: give a number above 0.")


def deviations(
    fisher: Mapping[str, Tensor], weights: Mapping[str, Tensor], alpha: float, exponent: float, bound: float
) -> dict[str, Tensor]:
    """Standard deviation of the noise of each weight: √min(alpha · F^-exponent, bound · mean square of the tensor)."""
    found = {}
    for name, f in fisher.items():
        most = bound * float(weights[name].detach().float().square().mean())
        # A weight without curvature would have noise without end; it has the most that is allowed.
        variance = alpha * f.clamp_min(torch.finfo(torch.float32).tiny).pow(-exponent)
        found[name] = variance.clamp_max(most).sqrt()
    return found


@method(
    name="fisher-noise",
    options=NoiseOptions,
    paper="Golatkar, Achille & Soatto 2020, arXiv:1911.04933",
    needs=frozenset({"retain"}),
    formula="θ ← θ + N(0, min(α F_r^−½, bound))",
)
def fisher_noise(context: Context, options: NoiseOptions) -> Outcome:
    """Gaussian noise of each weight on its own, with bounded variance, by the diagonal of the retain Fisher matrix.

    The forget samples are not looked at. The diagonal takes weights for independent, which they are not, so that the
    noise which retain samples stand is small, and most of what was memorised stays with it (``people``: forget
    probability .99 to .78 where retain falls to .92 of what it was). More noise, a larger budget, takes both.
    """
    model, adapter = context.model, context.adapter
    fisher = diagonal_fisher(
        model,
        adapter,
        context.retain,
        labels=options.labels,
        draws=options.draws,
        seed=context.seed,
        progress=context.progress,
    )
    weights, free = trainable(model), free_entries(model)
    generator = torch.Generator().manual_seed(context.seed)
    drawn = {name: torch.randn(p.shape, generator=generator).to(p.device) * free[name] for name, p in weights.items()}
    original = {name: p.detach().clone() for name, p in weights.items()}
    loss = mean_loss(model, adapter, some(context.retain, options.samples, context.seed))
    start = loss()

    def disturb(alpha: float) -> None:
        spread = deviations(fisher, original, alpha, options.exponent, options.bound)
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(original[name] + (spread[name] * drawn[name]).to(weight.dtype))

    if options.alpha is None:
        typical = float(torch.cat([f.flatten() for f in fisher.values()]).mean()) ** options.exponent
        alpha = farthest(disturb, loss, start + options.budget, 1e-6 * max(typical, 1e-20))
    else:
        alpha = options.alpha
        disturb(alpha)
    notes = [] if alpha else ["no noise kept the retain loss within its budget: nothing was changed"]
    return Outcome(model, notes, {"alpha": alpha, "retain_start": start, "retain": loss()})
