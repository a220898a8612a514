"""Steps in the retain metric: momentum, rank limit and KL clip for linear layers, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.methods.cluster.kfac import Factor, clip_scale
from expunge.methods.cluster.layers import Layer
from expunge.methods.cluster.lowrank import low_rank_direction


class KFACOptimizer(torch.optim.Optimizer):
    """Δ = -lr · scale · P_r(m): m the momentum sum of gradients, P_r the rank-limited (F + γ)⁻¹.

    ``scale`` ≤ 1 keeps the predicted KL on the retain set, ½ Σ_layers Δᵀ(F + γ)Δ, at most ``kl_clip`` nats per target.
    ``max_change`` bounds each layer's step by that share of its norm (Frobenius): where units are dead or saturated the
    curvature is next to nothing, and the quadratic model alone would allow steps larger than the weights.
    ``refresh(step)`` gives fresh retain factors before steps 0, ``refresh_every``, 2·``refresh_every``, …
    ``others`` (biases, norms, …) take AdamW steps at ``other_lr``.

    State is tensors and numbers only, factors included, so a loaded optimizer goes on with the same bits.
    ``predicted_kl`` is that of the last step.
    """

    def __init__(
        self,
        layers: Mapping[str, Layer],
        refresh: Callable[[int], Mapping[str, Factor]],
        *,
        lr: float = 1.0,
        momentum: float = 0.0,
        kl_clip: float = 1e-3,
        rank: int | None = None,
        damping: float = 1e-2,
        max_change: float = 0.1,
        refresh_every: int = 5,
        others: Sequence[nn.Parameter] = (),
        other_lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if lr <= 0 or kl_clip <= 0 or max_change <= 0 or refresh_every < 1 or not 0 <= momentum < 1:
            raise UserError(
                f"lr {lr}, kl_clip {kl_clip}, max_change {max_change}, refresh_every {refresh_every} and momentum "
                f"{momentum} cannot be: the first three are above 0, the fourth at least 1, momentum in [0, 1)."
            )
        if rank is not None and rank < 1:
            raise UserError(f"rank {rank} cannot be: give at least 1, or none for no limit.")
        self.layers = dict(layers)
        self.refresh = refresh
        self.damping = damping
        self.refresh_every = refresh_every
        self.predicted_kl = 0.0
        self._factors: dict[str, Factor] = {}
        own = {id(layer.weight) for layer in self.layers.values()}
        groups: list[dict[str, Any]] = [{"params": [layer.weight for layer in self.layers.values()], "lr": lr}]
        rest = [p for p in others if id(p) not in own]
        if rest:
            groups.append({"params": rest, "lr": other_lr})
        defaults = {
            "momentum": momentum,
            "kl_clip": kl_clip,
            "rank": rank,
            "max_change": max_change,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step from the gradients in ``.grad``; layers without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._surgery(self.param_groups[0])
        for group in self.param_groups[1:]:
            _adamw(group, self.state)
        return loss

    def _surgery(self, group: dict[str, Any]) -> None:
        count = max((int(self.state[layer.weight].get("step", 0)) for layer in self.layers.values()), default=0)
        if count % self.refresh_every == 0 or not self._restored():
            self._factors = dict(self.refresh(count))
        steps: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            state = self.state[layer.weight]
            factor = self._factors[name]
            state["input"], state["output"], state["step"] = factor.input_II, factor.output_OO, count + 1
            if layer.weight.grad is None:
                continue
            grad_OI = layer.matrix(layer.weight.grad).float()
            if group["momentum"]:
                held = state.get("momentum")
                grad_OI = grad_OI.clone() if held is None else group["momentum"] * held + grad_OI
                state["momentum"] = grad_OI
            step_OI = group["lr"] * low_rank_direction(grad_OI, factor, group["rank"])
            limit = group["max_change"] * _size(layer)
            steps[name] = step_OI * min(1.0, limit / max(float(step_OI.norm()), 1e-30))
        scale, self.predicted_kl = clip_scale(steps, self._factors, group["kl_clip"])
        for name, step_OI in steps.items():
            layer = self.layers[name]
            layer.weight.sub_(layer.unmatrix(scale * step_OI).to(layer.weight.dtype))

    def _restored(self) -> bool:
        """Factors are at hand, taken from the loaded state where need be."""
        if len(self._factors) < len(self.layers):
            for name, layer in self.layers.items():
                state = self.state[layer.weight]
                if "input" not in state:
                    return False
                self._factors[name] = Factor(state["input"], state["output"], self.damping, name)
        return True

    def load_state_dict(self, state_dict: Any) -> None:
        """As the base class, but the state keeps its own precision where weights have less."""
        super().load_state_dict(state_dict)
        self._factors = {}
        parameters = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for parameter, index in zip(parameters, indices, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                kept = value.detach().clone().to(parameter.device) if isinstance(value, Tensor) else value
                self.state[parameter][key] = kept


def _size(layer: Layer) -> float:
    """Norm of the weight; for one that starts at 0 (as in LoRA) that of a small weight of its shape."""
    floor: float = 0.1 * min(layer.shape) ** 0.5
    return max(float(torch.linalg.vector_norm(layer.weight)), floor)


def _adamw(group: dict[str, Any], states: Any) -> None:
    """Loshchilov and Hutter 2019, algorithm 2."""
    first, second = group["betas"]
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        state = states[parameter]
        if not state:
            state["step"] = 0
            state["mean"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["square"] = torch.zeros_like(parameter, dtype=torch.float32)
        grad = parameter.grad.float()
        count = state["step"] = int(state["step"]) + 1
        state["mean"].lerp_(grad, 1 - first)
        state["square"].mul_(second).addcmul_(grad, grad, value=1 - second)
        spread = (state["square"] / (1 - second**count)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_((group["lr"] * (state["mean"] / (1 - first**count)) / spread).to(parameter.dtype))
