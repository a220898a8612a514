"""Quantization: does rounding the weights bring the forgotten back?

Unlearning that moves the weights less than a rounding step is undone by rounding (Zhang et al. 2025, "Catastrophic
Failure of LLM Unlearning via Quantization", arXiv:2410.16454). The rounding itself is
:mod:`expunge.models.rounding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from expunge.attacks.copies import attackers_copy
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role
from expunge.errors import UserError
from expunge.models.rounding import BITS, GROUP, encode, matrices
from expunge.options import option
from expunge.signals.forward import collect
from expunge.stats import Estimate, bootstrap_mean

MEASURED: tuple[Role, ...] = ("forget", "holdout", "retain")


@dataclass(frozen=True, kw_only=True)
class QuantizationOptions:
    """How coarsely the weights are rounded."""

    bits: str = option("8,4,3", "bits per weight, separated by commas, each from 2 to 8")
    group: int = option(GROUP, "weights of one row that share a scale", "GGML Q4_1")

    def __post_init__(self) -> None:
        """Raises UserError for bits that are no list of numbers from 2 to 8."""
        if not self.widths:
            raise UserError("no bits were given to quantize to: give for example 8,4,3.")

    @property
    def widths(self) -> list[int]:
        """The bits as numbers, each once, in the order given."""
        parts = [part.strip() for part in self.bits.split(",") if part.strip()]
        for part in parts:
            if not part.isdecimal() or int(part) not in BITS:
                raise UserError(f"quantization bits '{self.bits}': '{part}' is not a number from 2 to 8; give 8,4,3.")
        return list(dict.fromkeys(map(int, parts)))


@attack(
    name="quantization",
    family="recovery",
    tier="quick",
    access="weights",
    paper="Zhang et al. 2025, arXiv:2410.16454",
    options=QuantizationOptions,
    formula="mean_t log p(x_t | x_<t) under weights rounded to the nearest of 2^bits values per group",
    passes=6.0,  # three roundings, on forget, holdout and retain
    modalities={"text", "multimodal", "classifier"},
)
def quantization(exam: Exam, checkpoint: Checkpoint, options: QuantizationOptions) -> Finding:
    """The weights are rounded to 8, 4 and 3 bits; what was moved by less than a step returns.

    Scores ``quantization.<bits>`` are the mean log-probability of each sample under the rounded model. Figures: the
    mean over the retain samples, which says whether the rounded model still works, and the share of the weights
    whose code is the one that the original has. Near 1, rounding hides the whole edit.
    """
    scores: dict[str, dict[Role, list[float]]] = {}
    figures: dict[str, Estimate] = {}
    notes: list[str] = []
    limits: dict[str, Any] = {"level": exam.level, "resamples": exam.resamples, "seed": exam.seed}
    for bits in options.widths:
        name = f"quantization.{bits}"
        rounded = quantized(checkpoint.model, bits, group=options.group)
        found: dict[Role, list[float]] = {}
        for role in MEASURED:
            samples = exam.samples.get(role, [])
            if samples:
                signals = collect(rounded, checkpoint.adapter, samples, max_tokens=checkpoint.max_tokens)
                found[role] = [-s.loss for s in signals]
        del rounded
        groups = [s.subject for s in exam.samples.get("retain", [])]
        if groups:
            label = f"quantized-{bits}bit-log_prob-retain/1"
            figures[f"{name}.retain"] = bootstrap_mean(found["retain"], groups, **limits, definition=label)
        scores[name] = found
        if exam.original is not None and checkpoint is not exam.original:
            try:
                same, count = equal_codes(exam.original.model, checkpoint.model, bits, group=options.group)
            except UserError:
                note = f"{checkpoint.name} has other weight matrices than the original: their codes are not compared."
                notes = [note]
            else:
                label = f"unchanged_codes-{bits}bit/1"
                figures[f"{name}.unchanged_codes"] = Estimate(same / count, n=count, definition=label)
    return Finding(scores, figures, notes=notes)


@torch.no_grad()
def quantized(model: nn.Module, bits: int, *, group: int = GROUP) -> nn.Module:
    """A copy of the model with rounded weights; the given model is not touched.

    LoRA adapters are merged before rounding, since a quantized deployment holds one matrix.

    Raises:
        UserError: bits are not 2 to 8, the group is smaller than 2, or the model has no matrix to round.
    """
    rounded = attackers_copy(model)
    found = matrices(rounded)
    if not found:
        raise UserError("the model has no weight matrix to quantize: leave the quantization attack out.")
    for matrix in found.values():
        matrix.write(encode(matrix.weight_OI(), bits, group).weights_OI())
    return rounded


def unchanged_codes(first: nn.Module, second: nn.Module, bits: int, *, group: int = GROUP) -> float:
    """Share of the weights whose code is the same in both models, in [0, 1]; 1 = rounding hides the whole edit.

    Raises:
        UserError: the two models do not have the same matrices.
    """
    same, total = equal_codes(first, second, bits, group=group)
    return same / total if total else 1.0


@torch.no_grad()
def equal_codes(first: nn.Module, second: nn.Module, bits: int, *, group: int = GROUP) -> tuple[int, int]:
    """(weights whose code is the same in both models, all weights that are rounded).

    Raises:
        UserError: the two models do not have the same matrices.
    """
    sides = [{n: m.weight_OI() for n, m in matrices(attackers_copy(model)).items()} for model in (first, second)]
    if {n: w.shape for n, w in sides[0].items()} != {n: w.shape for n, w in sides[1].items()}:
        raise UserError("the two models have different weight matrices: compare a model with one made from it.")
    same = total = 0
    for name, weight_OI in sides[0].items():
        pair = [encode(w, bits, group).codes_OI for w in (weight_OI, sides[1][name])]
        same += int((pair[0] == pair[1].to(pair[0].device)).sum())
        total += weight_OI.numel()
    return same, total
