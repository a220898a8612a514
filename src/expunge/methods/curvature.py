"""Curvature for the methods that edit weights directly: per-sample gradients, Fisher, and steps along a line.

Everything goes through the seam (:class:`~expunge.models.adapter.Positions`), so that it is the same for texts, classes
and pictures, and looks at the weights that require a gradient alone: with LoRA the adapter, within a scope the scope.
Every gradient is of the *sum* of log-probabilities over a sample's targets, divided by the targets of all samples, so
that F is the Gauss-Newton curvature of the training loss, which is a mean over targets.

Shape suffixes: S rows (samples × draws), P weights that may move.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError, unknown
from expunge.methods.cluster.kfac import curvature_loss
from expunge.models.adapter import Adapter, Positions
from expunge.models.losses import mean_losses
from expunge.models.memory import available_memory, size
from expunge.progress import Progress

LABELS = ("true", "model", "every")
LABELS_MEAN = (
    "true: the samples' own targets (empirical Fisher); model: targets drawn from the model (Fisher); "
    "every: all classes with their probabilities (exact, one pass per class and target)"
)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that may move at all, by name, tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def free_entries(model: nn.Module) -> dict[str, Tensor]:
    """1 where an entry of a weight may move and 0 where a scope holds it, by name.

    A scope masks gradients, so the gradient of a weight's own sum is its mask.
    """
    found = {}
    with torch.enable_grad():
        for name, p in trainable(model).items():
            found[name] = torch.autograd.grad(p.sum(), p)[0].detach()
    return found


@contextmanager
def standing(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients: no dropout, no batch statistics, so that each sample stands for itself."""
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        model.train(was_training)


def num_targets(adapter: Adapter, samples: Sequence[Sample]) -> int:
    """Target positions of all samples, at least 1."""
    return max(1, sum(adapter.num_targets(s) for s in samples))


def some(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """At most ``count`` of the samples, drawn without putting back."""
    if len(samples) <= count:
        return list(samples)
    return [samples[int(i)] for i in sorted(np.random.default_rng([seed, 17]).permutation(len(samples))[:count])]


def mean_gradient(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], *, max_tokens: int = 4096
) -> dict[str, Tensor]:
    """Gradient of the mean negative log-likelihood per target token, nats, by weight; ``.grad`` stays untouched."""
    weights = trainable(model)
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in weights.items()}
    units = num_targets(adapter, samples)
    with standing(model):
        for group in adapter.batches(samples, max_tokens):
            loss = -adapter.positions(model, [samples[i] for i in group]).learnt_log_prob_N().sum() / units
            for name, gradient in _gradient(loss, weights).items():
                total[name] += gradient
    return total


def score_gradients(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    *,
    labels: str = "true",
    draws: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Gradients g of log p(labels | sample), such that the sum of g gᵀ over the rows of a sample is its Fisher matrix.

    One sample at a time, so exact for every architecture. ``true``: one row per sample, of its own targets. ``model``:
    ``draws`` rows, targets drawn from the model, divided by √draws. ``every``: one row per target and class, times √p.
    """
    if labels not in LABELS:
        raise unknown("choice of labels", labels, LABELS)
    generator = torch.Generator().manual_seed(seed)
    weights = trainable(model)
    if progress is not None:
        progress.start("curvature", len(samples))
    with standing(model):
        for number, sample in enumerate(samples):
            rows = _scores(adapter.positions(model, [sample]), labels, draws, generator)
            for left, row in enumerate(rows, 1 - len(rows)):
                yield _gradient(row, weights, keep=left < 0)
            if progress is not None:
                progress.step(number + 1)
    if progress is not None:
        progress.stop()


def _scores(positions: Positions, labels: str, draws: int, generator: torch.Generator) -> list[Tensor]:
    """Scalars whose gradients are the rows."""
    if labels == "true":
        return [positions.learnt_log_prob_N().sum()]
    if labels == "model":
        return [curvature_loss(positions, "fisher", generator) / math.sqrt(draws) for _ in range(draws)]
    log_p_NV = positions.per_token(lambda logits_CV, _: logits_CV.log_softmax(1))
    return list((log_p_NV * (0.5 * log_p_NV.detach()).exp()).flatten())


def _gradient(value: Tensor, weights: Mapping[str, nn.Parameter], keep: bool = False) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, list(weights.values()), retain_graph=keep, allow_unused=True)
    return {
        name: torch.zeros_like(p, dtype=torch.float32) if g is None else g.float()
        for (name, p), g in zip(weights.items(), found, strict=True)
    }


def diagonal_fisher(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    *,
    labels: str = "true",
    draws: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher matrix by weight: the sum of squared score gradients over the number of targets."""
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trainable(model).items()}
    rows = score_gradients(model, adapter, samples, labels=labels, draws=draws, seed=seed, progress=progress)
    for row in rows:
        for name, gradient in row.items():
            total[name] += gradient.square()
    units = num_targets(adapter, samples)
    return {name: t / units for name, t in total.items()}


# -- the Fisher matrix in sample space ---------------------------------------------------------------------------------


def flat(values: Mapping[str, Tensor]) -> Tensor:
    """All entries one after another, (P,)."""
    return torch.cat([v.reshape(-1) for v in values.values()])


def unflat(vector_P: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`flat`."""
    parts = torch.split(vector_P, [v.numel() for v in like.values()])
    return {name: part.view(v.shape) for (name, v), part in zip(like.items(), parts, strict=True)}


@dataclass
class DualFisher:
    """F + λ with F = GᵀG / units, through the S × S matrix GGᵀ: no matrix of P × P exists.

    With GGᵀ = V diag(s) Vᵀ every power is exact: (F + λ)^k v = λ^k v + Gᵀ V diag(c) Vᵀ G v,
    c_i = ((s_i / units + λ)^k − λ^k) / s_i. For k = −1 this is the Woodbury identity.
    """

    rows_SP: Tensor
    units: float
    damping: float  # λ, absolute

    def __post_init__(self) -> None:
        gram_SS = (self.rows_SP @ self.rows_SP.T).double()
        values_S, self._vectors_SS = torch.linalg.eigh(0.5 * (gram_SS + gram_SS.T))
        self._values_S = values_S.clamp_min(0.0)
        if not self.damping > 0:
            raise UserError(f"damping {self.damping} cannot be: the curvature is singular, so give a number above 0.")

    @classmethod
    def of(
        cls,
        model: nn.Module,
        adapter: Adapter,
        samples: Sequence[Sample],
        *,
        damping: float,
        relative: bool = True,
        labels: str = "true",
        draws: int = 1,
        seed: int = 0,
        take: Callable[[dict[str, Tensor]], Tensor] = flat,
        progress: Progress | None = None,
    ) -> DualFisher:
        """Over ``samples``; ``damping`` is a share of the mean eigenvalue in their span where ``relative``.

        ``take`` picks the entries of a gradient that count, (P,).

        Raises:
            UserError: the gradients of all rows do not fit into memory, or the damping is not above 0.
        """
        rows: list[Tensor] = []
        device = next(model.parameters()).device
        for row in score_gradients(model, adapter, samples, labels=labels, draws=draws, seed=seed, progress=progress):
            rows.append(take(row).clone())
            need = 2 * len(samples) * draws * rows[0].numel() * 4  # once as rows, once as a matrix
            if len(rows) == 1 and need > available_memory(device.type):
                raise UserError(
                    f"{len(samples)} gradients of {rows[0].numel()} weights need {size(need)} of memory: give fewer "
                    "samples (--set samples=…), a narrower --scope, or --lora."
                )
        matrix = torch.stack(rows)
        units = float(num_targets(adapter, samples))
        mean = float(matrix.square().sum()) / units / len(matrix)
        return cls(matrix, units, damping * mean if relative and mean > 0 else damping)

    def power(self, vector_P: Tensor, exponent: float) -> Tensor:
        """(F + λ)^exponent · vector, (P,)."""
        curved_S = self._values_S / self.units
        # Directions of rounding alone would be divided by nothing; the vector has no part in them.
        real_S = self._values_S > 1e-12 * self._values_S.max().clamp_min(1e-300)
        gain_S = (curved_S + self.damping) ** exponent - self.damping**exponent
        gain_S = torch.where(real_S, gain_S / self._values_S.clamp_min(1e-300), torch.zeros_like(gain_S))
        inside_S = self._vectors_SS @ (gain_S * (self._vectors_SS.T @ (self.rows_SP @ vector_P).double()))
        found_P: Tensor = self.damping**exponent * vector_P + self.rows_SP.T @ inside_S.to(self.rows_SP.dtype)
        return found_P

    def quadratic(self, vector_P: Tensor) -> float:
        """vᵀFv without damping: twice the predicted rise of the loss, nats per target."""
        return float((self.rows_SP @ vector_P).double().square().sum()) / self.units


# -- steps along a line ------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """The weights θ + c · direction. A scope's held entries stay: the direction is masked."""

    model: nn.Module
    direction: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        free, weights = free_entries(self.model), trainable(self.model)
        self._parts = [
            (weights[name], weights[name].detach().clone(), d * free[name]) for name, d in self.direction.items()
        ]

    def at(self, step: float) -> None:
        """Put the weights there."""
        with torch.no_grad():
            for weight, start, direction in self._parts:
                weight.copy_(start + (step * direction).to(start.dtype))


def farthest(at: Callable[[float], None], loss: Callable[[], float], limit: float, first: float) -> float:
    """The largest c, to one part in 16, at which ``loss()`` is at most ``limit``; the weights are put there by ``at``.

    Doubling or halving from ``first``, then bisection; nothing beyond the first step that breaks the limit is tried.
    0 where no step holds it.
    """
    good, bad, step = 0.0, math.inf, first
    for _ in range(60):
        at(step)
        value = loss()
        if math.isfinite(value) and value <= limit:
            good = step
        else:
            bad = step
        if bad - good <= good / 16 or not 0 < step < 1e30:
            break
        step = (good + bad) / 2 if good and bad < math.inf else (2 * good if good else bad / 2)
    at(good)
    return good


def mean_loss(model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> Callable[[], float]:
    """The mean over samples of their mean loss, nats per token, as it is when called."""
    return lambda: float(np.mean(mean_losses(model, adapter, samples)))
