"""K-FAC curvature of the retain set per linear layer, and steps in its metric.

For a layer with inputs x_t and output gradients d_t of a curvature loss, F ≈ A ⊗ S with A = Σ x xᵀ / tokens and
S = Σ d dᵀ / targets, so that ½ ΔᵀFΔ approximates the mean KL per target that a step Δ causes.
Sources: Martens and Grosse 2015; Eschenhagen et al. 2023 (weight sharing over tokens, "expand").

Shape suffixes: I layer inputs, O layer outputs, N target positions, C positions of a chunk, V classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError, unknown
from expunge.methods.cluster.layers import Layer, output_gradients, recorded
from expunge.methods.cluster.tokens import forward, passes, placed_calls
from expunge.models.adapter import Adapter, Positions

Metric = Literal["fisher", "gauss-newton", "logits"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclass(frozen=True)
class Factor:
    """A (I, I) and S (O, O) of one layer, with damping relative to their mean eigenvalues.

    The damped metric is (A + γ_A) ⊗ (S + γ_S), γ_A = damping · tr(A)/I, γ_S = damping · tr(S)/O.
    """

    input_II: Tensor
    output_OO: Tensor
    damping: float = 1e-2
    name: str = field(default="", compare=False)

    @cached_property
    def input_root(self) -> Tensor:
        """Lower Cholesky factor of the damped A."""
        return self._root(self.input_II)

    @cached_property
    def output_root(self) -> Tensor:
        """Lower Cholesky factor of the damped S."""
        return self._root(self.output_OO)

    def _root(self, matrix: Tensor) -> Tensor:
        exact = 0.5 * (matrix + matrix.T).double()
        mean = float(exact.diagonal().mean())
        # A layer that no gradient reaches has no curvature: any metric does, so take the identity.
        add = self.damping * mean if mean > 0 else 1.0
        exact.diagonal().add_(add)
        root, info = torch.linalg.cholesky_ex(exact)
        if int(info) != 0 or not bool(torch.isfinite(root).all()):
            raise UserError(
                f"the curvature of layer '{self.name}' is singular at damping {self.damping}: raise the damping or "
                "give more retain samples."
            )
        found: Tensor = root.to(matrix.dtype)
        return found

    def precondition(self, grad_OI: Tensor) -> Tensor:
        """(F + γ)⁻¹ G = S⁻¹ G A⁻¹, (O, I)."""
        left = torch.cholesky_solve(grad_OI, self.output_root)
        solved: Tensor = torch.cholesky_solve(left.T, self.input_root).T
        return solved

    def whiten(self, grad_OI: Tensor) -> Tensor:
        """L_S⁻¹ G L_A⁻ᵀ: its squared norm is <G, (F + γ)⁻¹ G>."""
        left = torch.linalg.solve_triangular(self.output_root, grad_OI, upper=False)
        white: Tensor = torch.linalg.solve_triangular(self.input_root, left.T, upper=False).T
        return white

    def unwhiten(self, white_OI: Tensor) -> Tensor:
        """L_S⁻ᵀ W L_A⁻¹: ``unwhiten(whiten(G)) == precondition(G)``."""
        left = torch.linalg.solve_triangular(self.output_root.T, white_OI, upper=True)
        solved: Tensor = torch.linalg.solve_triangular(self.input_root.T, left.T, upper=True).T
        return solved

    def quadratic(self, step_OI: Tensor, damped: bool = False) -> float:
        """ΔᵀFΔ = <S Δ A, Δ>, or Δᵀ(F + γ)Δ; half of it is the predicted KL per target, nats."""
        if damped:
            return float((self.output_root.T @ step_OI @ self.input_root).square().sum())
        return float(((self.output_OO @ step_OI @ self.input_II) * step_OI).sum())


def curvature_loss(positions: Positions, metric: Metric, generator: torch.Generator) -> Tensor:
    """A scalar whose gradient v at the logits z of each target has the second moment that defines the metric.

    ========================  ==============================================  ========================
    ``fisher``                v = p - e_y with y drawn from the model          E vvᵀ = diag(p) - ppᵀ
    ``gauss-newton``          v = (diag(√p) - p√pᵀ) r, r random signs          E vvᵀ = diag(p) - ppᵀ
    ``logits``                v = r, random signs                              E vvᵀ = I
    ========================  ==============================================  ========================

    p = softmax(z). The first two estimate one matrix, the Hessian of the cross entropy in the logits. ``generator``
    is on the CPU, so that draws are the same on every device.
    """
    device = positions.hidden_ND.device
    num = positions.targets_N.numel()
    if metric == "fisher":
        uniform_N = torch.rand(num, generator=generator, dtype=torch.float64).to(device, torch.float32)
        # Sampled before the pass that has gradients: that one may be computed twice and must see equal labels.
        with torch.no_grad():
            drawn_N = positions.per_token(_draw, uniform_N).long()
        return positions.per_token(_log_prob_of, drawn_N).sum()
    if metric not in METRICS:
        raise unknown("curvature metric", metric, METRICS)
    seeds_N = torch.randint(0, 2**62, (num,), generator=generator).to(device)

    def projected(logits_CV: Tensor, _: Tensor, seeds_C: Tensor) -> Tensor:
        own = torch.Generator(device="cpu").manual_seed(int(seeds_C[0]))
        signs_CV = (torch.randint(0, 2, logits_CV.shape, generator=own, dtype=torch.int8) * 2 - 1).to(logits_CV)
        with torch.no_grad():
            if metric == "gauss-newton":
                p_CV = logits_CV.softmax(1)
                root_CV = p_CV.sqrt()
                v_CV = root_CV * signs_CV - p_CV * (root_CV * signs_CV).sum(1, keepdim=True)
            else:
                v_CV = signs_CV
        return (v_CV * logits_CV).sum(1)

    return positions.per_token(projected, seeds_N).sum()


def _draw(logits_CV: Tensor, _: Tensor, uniform_C: Tensor) -> Tensor:
    """A class from softmax(logits) by inversion of the distribution function."""
    reached_CV = logits_CV.softmax(1).cumsum(1)
    below_C = (reached_CV < uniform_C[:, None] * reached_CV[:, -1:]).sum(1)
    return below_C.clamp_max(logits_CV.shape[1] - 1)


def _log_prob_of(logits_CV: Tensor, _: Tensor, labels_C: Tensor) -> Tensor:
    return logits_CV.log_softmax(1).gather(1, labels_C[:, None])[:, 0]


def kfac_factors(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    layers: Mapping[str, Layer],
    *,
    metric: Metric = "fisher",
    damping: float = 1e-2,
    draws: int = 1,
    seed: int = 0,
    max_tokens: int = 4096,
) -> dict[str, Factor]:
    """Factors of each layer over ``samples`` (the retain set, or a part of it). ``.grad`` stays untouched.

    ``draws``: random vectors per target; padding takes no part. Dropout is off while this runs.

    Raises:
        UserError: no samples, a negative damping, or an unknown metric.
    """
    if metric not in METRICS:
        raise unknown("curvature metric", metric, METRICS)
    if not samples:
        raise UserError("the curvature needs retain samples, and none were given.")
    if damping < 0 or draws < 1:
        raise UserError(f"damping {damping} and draws {draws} cannot be: damping is at least 0 and draws at least 1.")
    weights = {name: layer.weight for name, layer in layers.items()}
    sums_II = {n: torch.zeros(layers[n].shape[1], layers[n].shape[1], device=w.device) for n, w in weights.items()}
    sums_OO = {n: torch.zeros(layers[n].shape[0], layers[n].shape[0], device=w.device) for n, w in weights.items()}
    tokens = dict.fromkeys(layers, 0)
    targets = 0
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            for _ in range(draws):
                for group, batch in passes(model, adapter, samples, max_tokens):
                    with recorded(layers) as calls:
                        positions = forward(model, adapter, batch)
                        loss = curvature_loss(positions, metric, generator)
                    targets += batch.targets_N.numel()
                    for name, x_MI, d_MO, _, _ in placed_calls(
                        batch, [samples[i] for i in group], output_gradients(loss, calls)
                    ):
                        sums_II[name].addmm_(x_MI.T, x_MI)
                        sums_OO[name].addmm_(d_MO.T, d_MO)
                        tokens[name] += len(x_MI)
    finally:
        model.train(was_training)
    return {
        name: Factor(sums_II[name] / max(1, tokens[name]), sums_OO[name] / max(1, targets), damping, name)
        for name in layers
    }


def clip_scale(steps: Mapping[str, Tensor], factors: Mapping[str, Factor], clip: float) -> tuple[float, float]:
    """(scale ≤ 1, predicted KL after scaling) such that ½ Σ Δᵀ(F + γ)Δ over all layers is at most ``clip`` nats.

    The damped metric bounds ½ ΔᵀFΔ from above. The undamped one would let a step run far along directions in which
    the few samples behind the factors show no curvature at all. Layers count as independent: steps of L layers that
    pull the same way can cost up to L times this figure, so what a step really costs has to be measured.
    """
    predicted = 0.5 * sum(factors[name].quadratic(step_OI, damped=True) for name, step_OI in steps.items())
    scale = min(1.0, (clip / predicted) ** 0.5) if predicted > 0 else 1.0
    return scale, predicted * scale**2


def refresher(
    model: nn.Module,
    adapter: Adapter,
    retain: Sequence[Sample],
    layers: Mapping[str, Layer],
    *,
    batch: int = 64,
    metric: Metric = "fisher",
    damping: float = 1e-2,
    seed: int = 0,
    max_tokens: int = 4096,
) -> Callable[[int], dict[str, Factor]]:
    """``f(step)``: fresh factors from ``batch`` retain samples, which depend on seed and step alone."""

    def refresh(step: int) -> dict[str, Factor]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        picked = torch.randperm(len(retain), generator=generator)[:batch].tolist()
        chosen = [retain[i] for i in sorted(picked)]
        return kfac_factors(
            model,
            adapter,
            chosen,
            layers,
            metric=metric,
            damping=damping,
            seed=seed + step,
            max_tokens=max_tokens,
        )

    return refresh
