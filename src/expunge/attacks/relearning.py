"""Relearning: how fast does the rest come back when a few of the forgotten samples are learnt again?

A model that only hides what it knew gives it back after a few steps on a small part of the forget set; a model
that never knew learns the part it is shown and no more (Hu et al. 2025, arXiv:2406.13356; Lynch et al. 2024,
arXiv:2402.16835). So only samples that were *not* shown are measured, and the result is compared with that of a
retrained model under the same attack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from expunge.attacks.copies import attackers_copy
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter
from expunge.progress import Progress
from expunge.training.loop import Feed, TrainOptions, train
from expunge.training.terms import training_term

SHARE = 0.2


@dataclass(frozen=True)
class Whole:
    """Every sample in every step."""

    count: int
    steps: int

    def batch(self, step: int) -> dict[str, list[int]]:
        return {"train": list(range(self.count))}


def split(samples: Sequence[Sample], share: float = SHARE, seed: int = 0) -> tuple[list[Sample], list[Sample]]:
    """(samples to learn, samples to measure): by default a fifth and the other four fifths.

    The choice depends on ids, contents and seed alone, not on the order. Samples of equal content stay on one side,
    so that nothing measured was learnt under another id.

    Raises:
        UserError: the share is not between 0 and 1, or fewer than two different samples were given.
    """
    if not 0 < share < 1:
        raise UserError(f"relearning share {share} is not between 0 and 1: give for example 0.2.")
    digests = [s.digest() for s in samples]
    names: dict[str, str] = {}  # content -> its smallest id: what the content is drawn by
    for sample, digest in zip(samples, digests, strict=True):
        names[digest] = min(sample.id, names.get(digest, sample.id))
    if len(names) < 2:
        raise UserError("relearning needs two different forget samples, one to learn and one to measure: give more.")
    order = sorted(names, key=lambda d: hashlib.sha256(f"{seed}/{names[d]}".encode()).digest())
    chosen = set(order[: min(len(order) - 1, max(1, round(share * len(order))))])
    learned = [s for s, d in zip(samples, digests, strict=True) if d in chosen]
    measured = [s for s, d in zip(samples, digests, strict=True) if d not in chosen]
    return learned, measured


def relearn(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    *,
    steps: int = 50,
    learning_rate: float = 5e-4,
    micro_tokens: int = 4096,
    seed: int = 0,
    progress: Progress | None = None,
    on_step: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """A copy of the model after ``steps`` AdamW steps on all of ``samples`` at once, at a constant rate.

    All weights are trained, LoRA adapters merged first; no clipping, no weight decay. The given model is not touched.
    ``on_step`` is called with the number of the step and the copy after each step, to measure on the way.

    Raises:
        UserError: no sample, fewer than one step, or the training diverged.
    """
    if not samples:
        raise UserError("relearning needs at least one sample to learn: give some of the forget samples.")
    if steps < 1:
        raise UserError(f"relearning for {steps} steps is not possible: give at least 1, or leave the attack out.")
    copied = attackers_copy(model)
    options = TrainOptions(
        learning_rate=learning_rate, schedule="constant", warmup=0.0, clip=0.0, micro_tokens=micro_tokens
    )
    train(
        copied,
        adapter,
        {"train": Feed(samples)},
        [training_term()],
        Whole(len(samples), steps),
        options,
        seed=seed,
        progress=progress,
        name="relearning",
        on_step=None if on_step is None else lambda trainer: on_step(trainer.step, copied),
    )
    return copied
