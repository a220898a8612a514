"""Private training: gradient descent over all records at once, clipped record by record, with Gaussian noise.

One step adds up the records' gradients, each scaled down to norm ``clip`` at most, and puts N(0, (sigma clip)^2) on the
sum (Abadi et al. 2016, arXiv 1607.00133, without sampling). k records more or less move the sum by at most k clip, so T
steps are together μ-Gaussian private with μ = k √T / sigma, exactly (Dong, Roth and Su 2019, arXiv 1905.02383,
corollary 2 for the steps, theorem 3 for groups). What is then done with the noisy sums is post-processing: the division
by a published number of records, the learning rate, the precision of what is saved.

Every record goes through the model alone and in evaluation mode: dropout is off and batch statistics stay those of the
base, so that no record's gradient depends on who stands beside it. Sums are made in float64, whose rounding lies some
fourteen orders below the noise. Nothing of a step is written to disk: a training that was killed starts again, with the
noise that it had.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter
from expunge.noise import derived, gaussian_noise
from expunge.options import Ranges, check_ranges, option
from expunge.privacy_accounting import gaussian_mu
from expunge.progress import Progress

NOISE = "private.noise.json"  # in the run folder, beside the model: the seed of all noise
BELOW = 1 - 1e-12  # so that rounding does not lift a clipped gradient above its norm

RANGES: Ranges = (
    (("epsilon", "clip", "learning_rate"), "a finite number above 0", lambda v: 0 < v < math.inf),
    (("delta",), "a number between 0 and 1, for example 1e-5", lambda v: 0 < v < 1),
    (("group", "steps", "records"), "1 or more", lambda v: v >= 1),
)


@dataclass(frozen=True, kw_only=True)
class PrivateOptions:
    """``--private epsilon=8,delta=1e-5,group=1,...``. None of them may be chosen by looking at the records."""

    epsilon: float = option(8.0, "ε, in nats, for a whole group of records")
    delta: float = option(1e-5, "δ for a whole group of records; well below one over their number")
    group: int = option(1, "so many records together are hidden: as many as may ever be asked to be forgotten at once")
    clip: float = option(1.0, "largest norm of one record's gradient", "Abadi et al. 2016, section 3")
    steps: int = option(100, "T: passes over all records")
    learning_rate: float = option(2.0, "rate of plain gradient descent", "ours: measured on digits")
    records: int = option(1000, "n0: published round number that the noisy sum is divided by; never counted from data")

    def __post_init__(self) -> None:
        """Raises UserError for a number that no training can have."""
        check_ranges(self, RANGES)

    @property
    def multiplier(self) -> float:
        """sigma: standard deviation of the noise in units of ``clip``, the least that hides a group."""
        return self.group * math.sqrt(self.steps) / gaussian_mu(self.epsilon, self.delta)

    @property
    def mu(self) -> float:
        """Gaussian privacy for one record; k of them have k times as much."""
        return math.sqrt(self.steps) / self.multiplier


def train_private(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    options: PrivateOptions,
    seed: bytes,
    progress: Progress | None = None,
) -> list[float]:
    """Train ``model`` in place; mean loss of the records before each step, nats per token.

    The losses are not private: they are for whoever holds the records anyway, and never go into the model.

    Args:
        seed: 32 secret bytes. The same seed, model, records and options give the same bits on the same machine.

    Raises:
        UserError: the weights are not finite at the end.
    """
    progress = progress or Progress()
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    deviation, losses = options.multiplier * options.clip, []
    was_training = model.training
    model.eval()
    progress.start("private training", options.steps)
    try:
        for step in range(options.steps):
            sums, loss = clipped_sum(model, adapter, samples, list(weights.values()), options.clip)
            with torch.no_grad():
                for (name, p), total in zip(weights.items(), sums, strict=True):
                    noise = torch.from_numpy(gaussian_noise(tuple(p.shape), deviation, derived(seed, f"{step}/{name}")))
                    moved = p.detach().cpu().double() - options.learning_rate / options.records * (total + noise)
                    p.copy_(moved)
            losses.append(loss)
            progress.step(step + 1, f"nll {loss:.3g}")
            progress.log("step", task="private training", step=step + 1, steps=options.steps, nll=loss)
    finally:
        progress.stop()
        model.train(was_training)
    if not all(bool(p.isfinite().all()) for p in weights.values()):
        raise UserError("private training diverged: use a smaller learning_rate, or more records, in --private.")
    return losses


def clipped_sum(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], weights: Sequence[Tensor], clip: float
) -> tuple[list[Tensor], float]:
    """(Σ g · min(1, clip/‖g‖) over the records, in float64 on the CPU, per weight tensor; mean loss in nats per token).

    g is the gradient of a record's own mean loss over its targets, from a pass of this record alone. One that is not
    finite counts as zero, which keeps the bound.
    """
    sums = [torch.zeros(w.shape, dtype=torch.float64) for w in weights]
    loss_total = 0.0
    for sample in samples:
        positions = adapter.positions(model, [sample])
        loss = -positions.mean_per_sample(positions.learnt_log_prob_N()).sum()
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        gradient = [None if g is None else g.detach().cpu().double() for g in found]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient if g is not None))
        loss_total += float(loss.detach())
        if not math.isfinite(norm):
            continue
        scale = min(1.0, clip / norm * BELOW) if norm else 0.0
        for total, g in zip(sums, gradient, strict=True):
            if g is not None:
                total.add_(g * scale)
    return sums, loss_total / max(1, len(samples))
