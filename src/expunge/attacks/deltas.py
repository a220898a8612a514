"""Membership from weight deltas: which samples does the difference between two checkpoints point at?

Whoever holds the model before and after unlearning holds the edit itself. To first order the edit changes the loss
of a sample x by the inner product of the weight difference with the gradient of its loss; the samples that the edit
was made for stand out (the white-box side of Bertran et al. 2024, "Reconstruction Attacks on Machine Unlearning:
Simple Models are Vulnerable", arXiv:2405.20272; Hu et al. 2024, arXiv:2404.03233).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.attacks.copies import attackers_copy
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter
from expunge.options import option
from expunge.stats import Estimate

ROLES: tuple[Role, ...] = ("forget", "holdout", "retain")
Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class DeltaOptions:
    """Of the weight-delta attack."""

    at: str = option(
        "middle",
        "where the gradient is taken: before the edit, after it, or at both (their mean, exact to third order)",
        "",
        ("original", "audited", "middle"),
    )
    limit: int = option(200, "most samples scored per role, drawn at random, the others are nan; 0 = all")


def weights(model: nn.Module) -> Weights:
    """Every floating-point parameter by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.is_floating_point()}


def difference(after: Weights, before: Weights) -> Weights:
    """After minus before, float32.

    Raises:
        UserError: the two models do not have the same parameters.
    """
    if {n: w.shape for n, w in after.items()} != {n: w.shape for n, w in before.items()}:
        raise UserError(
            "the two models have different weights: weight deltas compare a model with one made from it; leave the "
            "weight-delta attack out."
        )
    return {name: w.float() - before[name].float() for name, w in after.items()}


def norm_of(parts: Weights) -> float:
    """Euclidean norm over all tensors."""
    return math.sqrt(sum(float(w.double().square().sum()) for w in parts.values()))


def pull(model: nn.Module, adapter: Adapter, sample: Sample, delta: Weights) -> tuple[float, float]:
    """(<delta, g>, |g|) with g the gradient of the sample's mean loss in nats per token; nan without a target."""
    if adapter.num_targets(sample) == 0:
        return math.nan, math.nan
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        loss = -adapter.positions(model, [sample]).log_prob_N().mean()
        loss.backward()  # type: ignore[no-untyped-call]
    along = squares = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and name in delta:
            along += float((parameter.grad.double() * delta[name].double()).sum())
            squares += float(parameter.grad.double().square().sum())
    model.zero_grad(set_to_none=True)
    return along, math.sqrt(squares)


@attack(
    name="weight-delta",
    family="membership",
    tier="standard",
    access="both checkpoints",
    paper="Bertran et al. 2024, arXiv:2405.20272; Hu et al. 2024, arXiv:2404.03233",
    options=DeltaOptions,
    formula="cos(theta - theta_original, grad loss(x)); product: <theta - theta_original, grad loss(x)>",
    passes=6.0,
    needs={"original"},
    modalities={"text", "multimodal", "classifier"},
    two_sided=False,
)
def weight_delta(exam: Exam, checkpoint: Checkpoint, options: DeltaOptions) -> Finding:
    """Who was erased? Cosine and inner product of the weight difference with each sample's loss gradient.

    ``weight-delta`` is the cosine: the inner product also grows with the length of the gradient, which says how badly
    a sample is known and not what the edit was about; it is given as ``weight-delta.product``. Positive: the edit
    raised the loss of this sample. Samples that were trained on and erased stand out; retained and never-seen ones do
    not. On the original itself there is no difference, and every score is 0. A retrained model shows the erased
    samples too: like model-difference decoding this is a risk of keeping the old checkpoint.

    Raises:
        UserError: the two models have different weights.
    """
    assert exam.original is not None
    after, before = attackers_copy(checkpoint.model).eval(), attackers_copy(exam.original.model).eval()
    delta = difference(weights(after), weights(before))
    length = norm_of(delta)
    places = {"original": [before], "audited": [after], "middle": [before, after]}[options.at]
    inner: dict[Role, list[float]] = {}
    cosine: dict[Role, list[float]] = {}
    left_out = 0
    for role in [r for r in ROLES if exam.samples.get(r)]:
        samples = exam.samples[role]
        drawn = exam.rng("weight-delta", role).permutation(len(samples))[: options.limit or None]
        left_out += len(samples) - len(drawn)
        inner[role], cosine[role] = [math.nan] * len(samples), [math.nan] * len(samples)
        for i in drawn:
            found = [pull(m, checkpoint.adapter, samples[i], delta) if length else (0.0, 1.0) for m in places]
            inner[role][i] = sum(along for along, _ in found) / len(found)
            cosine[role][i] = sum(_cosine(along, norm, length) for along, norm in found) / len(found)
    notes = ["the checkpoint is the original itself: there is no difference to read"] if not length else []
    if left_out:
        notes.append(f"{left_out} samples were not scored: at most {options.limit} of each role are")
    figures = {"weight-delta.norm": Estimate(length, n=1, definition="l2-norm/1")}
    return Finding({"weight-delta": cosine, "weight-delta.product": inner}, figures, notes=notes)


def _cosine(along: float, norm: float, length: float) -> float:
    return along / (norm * length) if norm > 0 and length > 0 else (math.nan if math.isnan(norm) else 0.0)
