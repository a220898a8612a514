"""Sophia: momentum divided by a diagonal Gauss-Newton estimate, every entry of the step clipped.

Liu et al. 2023, arXiv:2305.14342, algorithms 2 and 3; as the optimizer of unlearning: SOUL, Jia et al. 2024,
arXiv:2404.18239. The curvature is that of −log p on the step's own samples with labels drawn from the model, so it is
positive whatever the objective is, and any objective can be trained with it.

Shape suffixes: N target positions, C of them in a chunk, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.models.adapter import target_log_prob
from expunge.training.terms import Term, View

if TYPE_CHECKING:
    from expunge.training.loop import Trainer

EVERY = 10  # steps between two estimates: Sophia §2.3, k = 10
BETAS = (0.9, 0.95)  # momentum, curvature: SOUL's; short trainings see few estimates, so Sophia's .99 is too slow
RHO = 0.04  # share of the curvature that divides: SOUL's; Sophia §3.1: .05
EPS = 1e-12  # Sophia, algorithm 3


class Sophia(torch.optim.Optimizer):
    """θ ← θ − lr·wd·θ − lr · clip(m / max(ρ·h, ε), ±1) with m, h moving averages of gradient and curvature.

    ``observe`` takes an estimate of the curvature; before the first one every entry moves by lr, like sign descent.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        *,
        betas: tuple[float, float] = BETAS,
        rho: float = RHO,
        weight_decay: float = 0.0,
        every: int = EVERY,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay})
        self.every = every

    @torch.no_grad()
    def observe(self, units: float) -> None:
        """Take h ← β₂h + (1−β₂)·units·g² from ``.grad``, the gradient of a mean over ``units`` drawn labels.

        Draws are independent with scores of mean 0, so E[units·g²] is the diagonal of the mean Gauss-Newton matrix.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self._state(p)
                    state["curvature"].lerp_(p.grad.square() * units, 1 - group["betas"][1])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self._state(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["betas"][0])
                p.mul_(1 - rate * decay)
                p.sub_((momentum / (group["rho"] * state["curvature"]).clamp_min(EPS)).clamp(-1, 1), alpha=rate)

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["momentum"], state["curvature"] = torch.zeros_like(p), torch.zeros_like(p)
        return state


def observe_curvature(trainer: Trainer, picks: Mapping[str, Sequence[int]], seed: int) -> None:
    """Let every :class:`Sophia` of the trainer that is due look at the curvature on the picked samples of all roles.

    The passes have the trainer's own micro-batches. Batch statistics and dropout rest meanwhile, so that buffers do
    not see the samples twice. ``.grad`` is empty afterwards.
    """
    due = [o for o in trainer.optimizers if isinstance(o, Sophia) and trainer.step % o.every == 0]
    if not due:
        return
    label_seed = [seed, trainer.step]

    def drawn_loss_N(view: View) -> Tensor:
        uniform_N = torch.from_numpy(np.concatenate([uniforms(view, i, label_seed) for i in range(len(view.samples))]))
        uniform_N = uniform_N.to(view.positions.hidden_ND.device, torch.float32)
        with torch.no_grad():  # the pass with gradients may be computed twice and must meet equal labels
            drawn_N = view.positions.per_token(draw, uniform_N).long()
        return -view.positions.per_token(lambda logits_CV, _, drawn_C: target_log_prob(logits_CV, drawn_C), drawn_N)

    roles = [role for role in picks if picks[role]]
    units = {role: trainer.units(Term("curvature", role, "token", drawn_loss_N), picks[role]) for role in roles}
    total = sum(units.values())
    terms = [Term(f"curvature/{r}", r, "token", drawn_loss_N, units[r] / total) for r in roles]
    was_training = trainer.model.training
    trainer.model.eval()
    try:
        trainer.gradients({r: picks[r] for r in roles}, terms)
        for sophia in due:
            sophia.observe(total)
    finally:
        trainer.model.train(was_training)
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)


def uniforms(view: View, row: int, seed: Sequence[int]) -> np.ndarray[Any, Any]:
    """Numbers in [0, 1) for the targets of one sample: the same in every micro-batch that it may stand in."""
    count = int((view.positions.sample_N == row).sum())
    return np.random.default_rng([*seed, zlib.crc32(view.samples[row].id.encode())]).random(count)


def draw(logits_CV: Tensor, _: Tensor, uniform_C: Tensor) -> Tensor:
    """A token from softmax(logits) by inversion of the distribution function, (C,)."""
    reached_CV = logits_CV.softmax(1).cumsum(1)
    below_C = (reached_CV <= uniform_C[:, None] * reached_CV[:, -1:]).sum(1)
    return below_C.clamp_max(logits_CV.shape[1] - 1)
