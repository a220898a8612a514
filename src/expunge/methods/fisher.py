"""Selector by Fisher information: the weights that matter for the forget samples and not for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.curvature import LABELS, LABELS_MEAN, diagonal_fisher
from expunge.methods.registry import Context
from expunge.methods.scope import Masks, selector, top_share
from expunge.options import option


@dataclass(frozen=True, kw_only=True)
class FisherOptions:
    """How many, and by which importance."""

    share: float = option(0.1, "share of the weights that may move")
    labels: str = option("true", LABELS_MEAN, "arXiv:2310.05331: empirical", LABELS)
    damping: float = option(
        1e-3, "added to the retain importance, as a share of its mean", "ours: 0/0 has no rank, and is not forget's"
    )

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"share = {self.share} cannot be: give a number above 0 and at most 1.")
        if not self.damping > 0:
            raise UserError(f"damping = {self.damping} cannot be: give a number above 0.")


def importance_ratio(
    forget: Mapping[str, Tensor], retain: Mapping[str, Tensor] | None, damping: float
) -> dict[str, Tensor]:
    """F_forget / (F_retain + damping · mean F_retain) of each weight; F_forget itself where there is no retain."""
    if retain is None:
        return dict(forget)
    count = sum(r.numel() for r in retain.values())
    floor = damping * sum(float(r.sum()) for r in retain.values()) / count + torch.finfo(torch.float32).tiny
    return {name: f / (retain[name] + floor) for name, f in forget.items()}


@selector(
    name="fisher",
    options=FisherOptions,
    paper="Liu et al. 2023, Unlearning with Fisher Masking, arXiv:2310.05331",
)
def fisher(context: Context, options: FisherOptions) -> Masks:
    """Weights with the largest importance for forget relative to retain.

    Importance is the diagonal of the Fisher matrix at the original. Without retain samples the forget importance alone
    ranks the weights.
    """

    def importance(samples: Sequence[Sample]) -> dict[str, Tensor]:
        return diagonal_fisher(
            context.model,
            context.adapter,
            samples,
            labels=options.labels,
            seed=context.seed,
            progress=context.progress,
        )

    retain = importance(context.retain) if context.retain else None
    return top_share(importance_ratio(importance(context.forget), retain, options.damping), options.share)
