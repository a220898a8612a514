"""MMUnlearner: ascent on the weights that matter more for the forget samples than for anything that is to stay.

Shape suffixes: none; everything is a tensor of a weight's own shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.curvature import score_gradients, trainable
from expunge.methods.families import FAMILIES, run_family
from expunge.methods.family_options import FamilyOptions
from expunge.methods.registry import Context, Outcome, method
from expunge.methods.scope import Masks, selector
from expunge.models.adapter import evaluating
from expunge.models.towers import TOWERS, parameters_of
from expunge.options import Ranges, check_ranges, option
from expunge.training.loop import Trainer

PAPER = "Huo et al. 2025, arXiv:2502.11051"
THRESHOLD = (1.0, "least ratio of forget saliency to retain saliency of a weight that the ascent may move", "paper: 1")
TOWER = (
    "both",
    "of a vision-language model, where the ascent may go: language, vision (with the projector), or both",
    "paper's code: one mask for each of the three",
    ("both", *TOWERS),
)
RANGES: Ranges = ((("threshold",), "0 or more", lambda v: 0 <= v < math.inf),)


@dataclass(frozen=True, kw_only=True)
class SalientOptions:
    """The selector."""

    threshold: float = option(*THRESHOLD)
    tower: str = option(*TOWER)

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)


@dataclass(frozen=True, kw_only=True)
class MmunlearnerOptions(FamilyOptions):
    """The method: gradient difference, with its ascent masked."""

    threshold: float = option(*THRESHOLD)
    tower: str = option(*TOWER)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, RANGES)
        if self.retain == "none":
            raise UserError("retain = none cannot be: MMUnlearner goes on learning what stays; give nll or kl.")


def saliency(context: Context, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Mean over samples of the squared gradient of a sample's mean NLL per token, by weight."""
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trainable(context.model).items()}
    asked = [s for s in samples if context.adapter.num_targets(s)]
    rows = score_gradients(context.model, context.adapter, asked, progress=context.progress)
    for sample, row in zip(asked, rows, strict=True):
        for name, gradient in row.items():
            total[name] += (gradient / context.adapter.num_targets(sample)).square() / len(asked)
    return total


def linear_weights(context: Context) -> set[str]:
    """Names of the weights and biases of linear layers other than the output head, updates of LoRA among them."""
    model = context.model
    with evaluating(model):
        head = {id(m) for m in context.adapter.positions(model, context.forget[:1]).head.module.modules()}
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    own = {id(p) for m in layers if id(m) not in head for p in m.parameters(recurse=False)}
    return {name for name, p in model.named_parameters() if id(p) in own}


def salient_masks(context: Context, threshold: float, tower: str) -> Masks:
    """True where S(f) ≥ threshold · S(stays) and S(f) > 0, in the linear layers of the tower.

    S(stays) is the larger one of the saliencies of retain samples with a picture and of those of text alone, so that
    many of one kind do not outvote few of the other.

    Raises:
        UserError: no retain samples to compare with, or a tower of a model that has none.
    """
    if not context.retain:
        raise UserError("mmunlearner compares saliencies of forget and retain samples: give --retain FILE.")
    names = linear_weights(context)
    if tower != "both":
        names &= parameters_of(context.model, tower)
    forget = saliency(context, context.forget)
    kinds = [[s for s in context.retain if (s.image is None) == text] for text in (True, False)]
    stays = [saliency(context, kind) for kind in kinds if kind]
    found = {}
    for name, own in forget.items():
        if name in names:
            least = threshold * torch.stack([other[name] for other in stays]).amax(0)
            found[name] = (own >= least) & (own > 0)
    return found


@selector(name="mmunlearner", options=SalientOptions, paper=f"{PAPER}, weight saliency map")
def select(context: Context, options: SalientOptions) -> Masks:
    """Single weights of linear layers whose squared gradient is larger on forget than on all that is to stay."""
    return salient_masks(context, options.threshold, options.tower)


@method(
    name="mmunlearner",
    options=MmunlearnerOptions,
    paper=PAPER,
    formula="m ∘ ∇(−NLL(f)) + α·∇NLL(r), m = 1 where S(f) ≥ threshold · max(S(r with picture), S(r of text))",
    needs=frozenset({"retain"}),
    modalities=frozenset({"text", "multimodal"}),
)
def mmunlearner(context: Context, options: MmunlearnerOptions) -> Outcome:
    """Ascend on forget with the weights that retain pictures and retain texts need less, descend on retain with all.

    Made to take a person's looks from a model that goes on knowing their facts: give pictures as forget samples and the
    texts about the same people as retain samples (``--delete only=image``).
    """
    masks = salient_masks(context, options.threshold, options.tower)
    if not any(bool(m.any()) for m in masks.values()):
        raise UserError(
            f"no weight matters {options.threshold} times as much for forget as for retain: lower threshold, or choose "
            "another tower."
        )

    def compute(trainer: Trainer, picks: Mapping[str, Sequence[int]]) -> dict[str, float]:
        values = trainer.gradients(picks, [t for t in trainer.terms if t.role == "forget"])
        for name, p in trainer.model.named_parameters():
            if p.grad is not None:
                mask = masks.get(name)
                p.grad.mul_(0.0 if mask is None else mask)
        return values | trainer.gradients(picks, [t for t in trainer.terms if t.role != "forget"])

    row = next(row for row in FAMILIES if row.name == "graddiff")
    outcome = run_family(row, context, options, compute=compute)
    free = sum(int(m.sum()) for m in masks.values())
    outcome.notes.append(f"the ascent could move {free} of {sum(m.numel() for m in masks.values())} salient candidates")
    outcome.record["weights_free"] = free
    return outcome
