"""Gradient norm: at a sample that was learnt, the loss is flat.

One backward pass per sample, so the norms are exact for every architecture; nothing is written to the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.attacks.context import measured
from expunge.attacks.copies import attackers_copy
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.errors import unknown
from expunge.models.adapter import Adapter
from expunge.options import option

OVER = ("all", "tensors")
ORDER = {"1": 1.0, "2": 2.0, "inf": math.inf}


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """Options of the gradient norm."""

    norm: str = option("2", "p of the p-norm", choices=tuple(ORDER))
    over: str = option(
        "all",
        "all: one norm over all weights; tensors: mean of the norms of the weight tensors",
        "tensors is the rule of the MIMIR benchmark, with p = inf",
        choices=OVER,
    )


@attack(
    name="gradient_norm",
    family="membership",
    tier="standard",
    access="weights",
    paper="Nasr et al. 2019, Comprehensive Privacy Analysis of Deep Learning (arXiv:1812.00910); "
    "Wang et al. 2024, Pandora's White-Box (arXiv:2402.17012)",
    options=GradientOptions,
    formula="-||d loss(x) / d weights||_p",
    passes=6.0,  # 3 by arithmetic; samples that run alone cost about twice what they cost in a batch
    modalities={"text", "multimodal", "classifier"},
)
def gradient_norm(exam: Exam, checkpoint: Checkpoint, options: GradientOptions) -> Finding:
    """Norm of the gradient of the sample's mean loss, with a minus: a small gradient speaks for a member.

    Measured on a copy in which adapters are merged, so that models trained in different ways are compared over the
    same weights.
    """
    model = attackers_copy(checkpoint.model).eval()
    scores: dict[Role, list[float]] = {}
    for role, samples in measured(exam).items():
        norms = gradient_norms(model, checkpoint.adapter, samples, options.norm, options.over)
        scores[role] = [-norm for norm in norms]
    return Finding(scores={"gradient_norm": scores})


def gradient_norms(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], norm: str = "2", over: str = "all"
) -> list[float]:
    """Norm of the gradient of the mean negative log-likelihood, one per sample; nan for one without a target token.

    Over the weights that require a gradient, tied ones once; a weight that the sample does not reach counts as 0 in
    "all" and is left out of the mean of "tensors". The model's mode is the caller's; gradients are not kept.

    Raises:
        UserError: unknown norm or choice of weights.
    """
    if norm not in ORDER:
        raise unknown("norm", norm, ORDER)
    if over not in OVER:
        raise unknown("choice of weights", over, OVER)
    weights = [p for p in model.parameters() if p.requires_grad]
    found = []
    for sample in samples:
        if adapter.num_targets(sample) == 0:
            found.append(math.nan)
            continue
        with torch.enable_grad():
            loss = -adapter.positions(model, [sample]).log_prob_N().mean()
            reached = [g for g in torch.autograd.grad(loss, weights, allow_unused=True) if g is not None]
        norms_T = torch.stack([_norm(g, ORDER[norm]) for g in reached])
        found.append(float(norms_T.mean() if over == "tensors" else torch.linalg.vector_norm(norms_T, ORDER[norm])))
    return found


def _norm(gradient: Tensor, order: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient.float(), order)
    return norm.cpu().double()
