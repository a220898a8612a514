"""Guards for objectives without a bound: when a sample has had enough, when to stop, when to go slower.

They look at forget, retain and never-seen samples alone, never at what the model is measured on afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import WORDS, Context
from expunge.models.losses import mean_losses
from expunge.training.loop import Trainer
from expunge.training.terms import View

LOOKED_AT = 64  # samples of a role that one look reads
WINDOW = 5  # steps over which the retain term is averaged


def answer_nll_B(view: View) -> Tensor:
    """Mean loss of each sample's target, nats per token, without a gradient; remembered for the curves."""
    with torch.no_grad():  # a log-probability that a term has computed is used again
        return view.positions.mean_per_sample(-view.log_prob_N())


def counted(values: Tensor, view: View, unit: str, bound: float) -> Tensor:
    """Term values (N,) or (B,) with 0 for the samples whose loss is above ``bound`` nats per token."""
    counts_B = (answer_nll_B(view) <= bound).to(values.dtype)
    return values * (counts_B if unit == "sample" else counts_B[view.positions.sample_N])


def spread(samples: Sequence[Sample]) -> list[Sample]:
    """At most :data:`LOOKED_AT` of them, evenly spaced."""
    chosen = np.linspace(0, len(samples) - 1, min(LOOKED_AT, len(samples))).round().astype(int)
    return [samples[i] for i in chosen]


@dataclass
class Watch:
    """What is looked at after every step; ``reason`` says why the training was stopped.

    ``level``: the original's loss on never-seen texts, nats per token, where stop=unseen.
    """

    context: Context
    options: Any
    look_every: int
    level: float = math.nan
    reason: str = ""

    @classmethod
    def of(cls, context: Context, options: Any, per_pass: int) -> Watch:
        """Measure the level on the model as it is now.

        Raises:
            UserError: stop=unseen without never-seen texts, or ease without a retain term.
        """
        watch = cls(context, options, options.look_every or per_pass)
        if options.stop == "unseen":
            if not context.unseen:
                raise UserError(f"stop=unseen needs {WORDS['unseen']}.")
            watch.level = watch.measured(context.unseen)
        if options.ease is not None and (options.retain == "none" or not context.retain):
            raise UserError("ease looks at the retain term: give retain data and retain=nll or kl, or leave ease out.")
        return watch

    def measured(self, samples: Sequence[Sample]) -> float:
        """Mean loss of (a spread of) the samples, nats per token."""
        return float(np.mean(mean_losses(self.context.model, self.context.adapter, spread(samples))))

    def __call__(self, trainer: Trainer) -> None:
        options = self.options
        if options.stop_loss is not None and trainer.log.last("forget_nll", 3) > options.stop_loss:
            self.reason = f"forget loss above {options.stop_loss}"
        if options.stop == "unseen" and trainer.step % self.look_every == 0:
            now = self.measured(self.context.forget)
            trainer.log.steps[-1]["forget_measured"] = now
            if now >= self.level:
                self.reason = f"forget loss {now:.3g} has reached that of never-seen texts, {self.level:.3g}"
        if options.ease is not None:
            self._ease(trainer)
        trainer.stop = self.reason

    def _ease(self, trainer: Trainer) -> None:
        """Halve the rate when the retain term of the last steps is above that of the first ones by ``ease``."""
        values = [step["retain"] for step in trainer.log.steps if "retain" in step]
        since = int(trainer.memory.get("eased_at", WINDOW))
        if len(values) < since + WINDOW:  # the last steps have to be of the present rate
            return
        if np.mean(values[-WINDOW:]) > np.mean(values[:WINDOW]) + self.options.ease:
            trainer.rate *= 0.5
            trainer.memory["eased_at"] = len(values)
            trainer.log.steps[-1]["rate_factor"] = trainer.rate
