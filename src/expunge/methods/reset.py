"""Certified reset: pull the model into a small ball around a public point, drown the rest in noise, and learn again.

The weights are w = c + x with a centre c that never saw the data: the base, or without one fresh random weights. x is
projected to norm ``radius`` (C₀); then T steps x ← x − η clip(∇L(c + x), C₁) + N(0, s²) on retain data alone; then
ordinary training on retain, which is post-processing. Two originals, with and without the records, are 2 C₀ apart at
first, a step moves them by at most 2 η C₁ further apart, and the noise of all steps hides that: T steps are together
μ-Gaussian private with μ = 2 (C₀ + η C₁ T)/(s √T) (Koloskova et al. 2025, arXiv 2506.06985, gradient clipping; in
Gaussian form by shifted interpolation, Bok, Su and Altschuler 2024, arXiv 2403.00278). η is chosen so that η C₁ T = C₀.

What is projected has norm C₀ at most, and the noise that hides it standard deviation 4 C₀/μ in every single weight:
nothing of the original is left. This is a certified re-initialisation, and its price is training on retain.
"""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import Context, Outcome, method
from expunge.methods.retrain import from_scratch
from expunge.models.adapter import Adapter
from expunge.models.lora import is_lora, merge_lora
from expunge.noise import SEED, derived, gaussian_noise
from expunge.options import Ranges, check_ranges, option
from expunge.privacy_accounting import gaussian_mu
from expunge.training.batching import EpochPlan, group_by_tokens
from expunge.training.loop import TrainOptions, fit

NOISE = "reset.noise.json"  # in the run folder, beside the model: the seed of all noise
BELOW = 1 - 1e-12  # so that rounding does not lift a projected or clipped vector above its norm
Vector = dict[str, Tensor]  # float64, by name of the weight

OWN: Ranges = (
    (("epsilon", "radius", "reset_clip"), "a finite number above 0", lambda v: 0 < v < math.inf),
    (("delta",), "a number between 0 and 1, for example 1e-5", lambda v: 0 < v < 1),
    (("reset_steps",), "1 or more", lambda v: v >= 1),
)


@dataclass(frozen=True, kw_only=True)
class ResetOptions(TrainOptions):
    """Of the reset, and of the training on retain after it. None may be chosen by looking at the forget samples."""

    epochs: float = option(16.0, "passes over the retain set afterwards; use the original's own number", "as retrain")
    epsilon: float = option(1.0, "ε, in nats", "ours: below the 8 of Abadi et al. 2016")
    delta: float = option(1e-5, "δ", "Abadi et al. 2016")
    radius: float = option(
        1e-3, "C₀: largest distance from the centre that is kept; the noise is 4 C₀/μ per weight", "ours: on digits"
    )
    reset_steps: int = option(10, "T: noisy steps", "ours: the noise of all together does not depend on it")
    reset_clip: float = option(1.0, "C₁: largest norm of a gradient in a noisy step", "Abadi et al. 2016: 1 to 4")
    noise_seed: str = option("", "64 hexadecimal digits; the run draws it and keeps it beside the model")

    def __post_init__(self) -> None:
        """Raises UserError for a number that no reset can have, or a seed of another length."""
        super().__post_init__()
        check_ranges(self, OWN)
        if self.noise_seed and not (
            len(self.noise_seed) == 2 * SEED and all(c in "0123456789abcdef" for c in self.noise_seed)
        ):
            raise UserError(f"noise_seed must be {2 * SEED} hexadecimal digits: leave it out, and the run draws one.")

    @property
    def rate(self) -> float:
        """η = C₀/(C₁ T)."""
        return self.radius / (self.reset_clip * self.reset_steps)

    @property
    def noise(self) -> float:
        """s = 2 (C₀ + η C₁ T)/(μ √T): standard deviation of a step's noise per weight."""
        travel = self.rate * self.reset_clip * self.reset_steps
        return 2 * (self.radius + travel) / (gaussian_mu(self.epsilon, self.delta) * math.sqrt(self.reset_steps))


@method(
    name="reset",
    options=ResetOptions,
    paper="Koloskova et al. 2025, Certified Unlearning for Neural Networks, arXiv:2506.06985",
    needs=frozenset({"retain"}),
    wants=frozenset({"base"}),
    changes="new",
    formula="x ← Π_C₀(w − c), T times x ← x − η clip(∇NLL(r), C₁) + N(0, s²), then NLL(r)",
)
def reset(context: Context, options: ResetOptions) -> Outcome:
    """Certified re-initialisation: project to a ball around the base, add noise, and learn what stays again."""
    notes = []
    if context.base is not None:
        model = context.base()
    else:
        model = from_scratch(context.model, context.seed)
        notes.append("no base was given: the ball lies around random weights, and nothing can be certified")
    original = merge_lora(copy.deepcopy(context.model)) if is_lora(context.model) else context.model
    away = difference(original, model)
    seed = bytes.fromhex(options.noise_seed) or secrets.token_bytes(SEED)  # which nobody keeps: never to be repeated
    noisy_steps(model, context.adapter, context.retain, projected(away, options.radius), options, seed, context.seed)
    # Options of the training alone: those of a checkpoint are written down, and the seed must not be.
    again = TrainOptions(**{f.name: getattr(options, f.name) for f in fields(TrainOptions)})
    log = fit(
        model,
        context.adapter,
        context.retain,
        again,
        seed=context.seed,
        work=context.work,
        progress=context.progress,
        name="reset",
    )
    figures = {"noise": options.noise, "rate": options.rate, "distance": norm(away), "steps": len(log.steps)}
    return Outcome(model, notes, {**figures, "log": log.steps})


def noisy_steps(
    model: nn.Module,
    adapter: Adapter,
    retain: Sequence[Sample],
    start: Vector,
    options: ResetOptions,
    seed: bytes,
    order: int,
) -> None:
    """Leave in ``model``, which is the centre when it comes in, the centre plus what T noisy steps make of ``start``.

    x stays in float64 throughout, and the model holds its rounded sum with the centre: the bound on how far two
    originals drift apart is then that of the formula, for a gradient is clipped wherever it was taken. The model is in
    evaluation mode, so that no buffer moves. ``order`` seeds the batches.
    """
    weights = dict(model.named_parameters())
    centre = {name: p.detach().cpu().double() for name, p in weights.items()}
    x = start
    lengths = [adapter.num_tokens(s) for s in retain]
    plan = EpochPlan({"retain": lengths}, {"retain": options.batch_size}, options.reset_steps, "retain", order)
    was_training = model.training
    model.eval()
    for step in range(options.reset_steps):
        _place(weights, centre, x)
        batch = [retain[i] for i in plan.batch(step)["retain"]]
        gradient = projected(_gradient(model, adapter, batch, options.micro_tokens), options.reset_clip)
        x = {
            name: value
            - options.rate * gradient[name]
            + torch.from_numpy(gaussian_noise(tuple(value.shape), options.noise, derived(seed, f"{step}/{name}")))
            for name, value in x.items()
        }
    _place(weights, centre, x)
    model.train(was_training)


def _place(weights: dict[str, nn.Parameter], centre: Vector, x: Vector) -> None:
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(centre[name] + x[name])


def _gradient(model: nn.Module, adapter: Adapter, batch: Sequence[Sample], micro_tokens: int) -> Vector:
    """∇ of the mean negative log-likelihood per target of the batch, float64; zero where it is not finite."""
    weights = dict(model.named_parameters())
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in weights.items()}
    count = max(1, sum(adapter.num_targets(s) for s in batch))
    for group in group_by_tokens(list(batch), [adapter.num_tokens(s) for s in batch], micro_tokens):
        loss = -adapter.positions(model, group).learnt_log_prob_N().sum() / count
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, g in zip(weights, found, strict=True):
            if g is not None:
                total[name] += g.detach().cpu().double()
    return total if math.isfinite(norm(total)) else {name: torch.zeros_like(g) for name, g in total.items()}


def difference(model: nn.Module, centre: nn.Module) -> Vector:
    """The model's weights minus the centre's, float64.

    Raises:
        UserError: the two are of different shapes.
    """
    own, other = dict(model.named_parameters()), dict(centre.named_parameters())
    if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in other.items()}:
        raise UserError("the base does not have the original's shape: give the very model it was trained from.")
    return {n: p.detach().cpu().double() - other[n].detach().cpu().double() for n, p in own.items()}


def projected(vector: Vector, radius: float) -> Vector:
    """The nearest point of the ball around zero."""
    length = norm(vector)
    if not math.isfinite(length):  # an original that diverged: any fixed point of the ball will do
        return {name: torch.zeros_like(v) for name, v in vector.items()}
    scale = min(1.0, radius / length * BELOW) if length else 1.0
    return {name: v * scale for name, v in vector.items()}


def norm(vector: Vector) -> float:
    return math.sqrt(sum(float(v.square().sum()) for v in vector.values()))
