"""Collateral change by forward-mode Fisher: how far an edit moved the output distributions, to second order.

For Δ = θ_unlearned − θ_original, KL(p_original ‖ p_unlearned) at a position t is ½ Var_{y~p_t}[(J_t Δ)_y] + O(‖Δ‖³)
with the Jacobian J_t of the logits: the full (not diagonal) Fisher form, by one forward-mode pass per batch. The direct
KL is measured beside it, so the remainder is known and not assumed. A small number certifies a *small change*, which on
retain data is what one wants; on forget data it would mean that nothing was forgotten.

Shape suffixes: N target positions, V vocabulary or classes, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from expunge.certify.sections import Change, explains
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import CHUNK_ELEMENTS, Adapter, Batch, evaluating
from expunge.stats import Estimate, Floats, bootstrap_mean


@dataclass(frozen=True, slots=True, eq=False)
class Collateral:
    """Mean KL per target position in nats, as quadratic form and direct; (S,) per sample.

    ``small``: the quadratic form explains the direct KL, so the change is in the range where it is one.
    """

    quadratic: Estimate
    direct: Estimate
    quadratic_S: Floats
    direct_S: Floats

    @property
    def remainder(self) -> float:
        """|direct − quadratic| of the means as a share of the direct KL; 0 where nothing changed at all."""
        gap = abs(self.direct.value - self.quadratic.value)
        if self.direct.value > 0:
            return gap / self.direct.value
        return 0.0 if gap == 0 else float("inf")

    @property
    def small(self) -> bool:
        return explains(self.quadratic.value, self.direct.value)

    def section(self, role: Literal["retain", "utility"]) -> Change:
        """As evidence of a claim; one subject alone has no interval, and gives none.

        Raises:
            UserError: nothing was measured.
        """
        numbers = self.quadratic.value, self.direct.value, self.direct.high
        if not all(map(math.isfinite, numbers)):
            raise UserError("collateral change needs samples of two subjects at least: give more retain samples.")
        quadratic, direct, high = numbers
        return Change(role=role, quadratic=quadratic, direct=direct, high=high, n=self.direct.n)


class _Logits(nn.Module):
    """(N, V) logits of a batch as a function of the parameters, whatever the modality."""

    def __init__(self, model: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.model = model
        self._adapter = adapter

    def forward(self, batch: Batch) -> Tensor:
        hidden_ND, head = self._adapter.hidden_and_head(self.model, batch)
        return head(hidden_ND)


def collateral(
    original: nn.Module,
    unlearned: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    *,
    max_tokens: int = 1024,
    seed: int = 0,
) -> Collateral:
    """Change between two models of one architecture on the samples, subjects as the unit of the intervals.

    The models stay as they are. Tensors of N × V are held whole, about five of them, so batches are small.

    Raises:
        UserError: no samples, or parameters of other names or shapes.
    """
    if not samples:
        raise UserError("collateral change needs samples to look at: give retain or utility samples.")
    change = parameter_change(original, unlearned)
    before, after = _Logits(original, adapter), _Logits(unlearned, adapter)
    weights = {f"model.{name}": p.detach() for name, p in original.named_parameters()}
    device = next(original.parameters()).device
    quadratic_S, direct_S = np.full(len(samples), np.nan), np.full(len(samples), np.nan)
    # A sample with a long context may exceed the limit on its own; it is then a batch of its own.
    limit = max(1, min(max_tokens, CHUNK_ELEMENTS // max(1, _vocab(original, adapter, samples[0]))))
    with evaluating(original), evaluating(unlearned), sdpa_kernel(SDPBackend.MATH):  # the only one with forward mode
        for group in adapter.batches(samples, limit):
            batch = adapter.collate([samples[i] for i in group]).to(device)

            def logits(parameters: dict[str, Tensor], batch: Batch = batch) -> Tensor:
                out: Tensor = torch.func.functional_call(before, parameters, (batch,))
                return out

            z_NV, slope_NV = torch.func.jvp(logits, (weights,), (change,))[:2]
            quadratic_N, direct_N = _second_order(z_NV.double(), slope_NV.double(), after(batch).double())
            sample_N = batch.sample_N.cpu().numpy()
            for row, index in enumerate(group):
                at_N = sample_N == row
                if at_N.any():
                    quadratic_S[index] = quadratic_N[at_N].mean()
                    direct_S[index] = direct_N[at_N].mean()
    groups = [s.subject for s in samples]
    return Collateral(
        bootstrap_mean(quadratic_S, groups, seed=seed, definition="kl-fisher/1 nats per token"),
        bootstrap_mean(direct_S, groups, seed=seed, definition="kl/1 nats per token"),
        quadratic_S,
        direct_S,
    )


def parameter_change(original: nn.Module, unlearned: nn.Module) -> dict[str, Tensor]:
    """Δ = unlearned − original by name, with the prefix that :class:`_Logits` gives.

    Raises:
        UserError: the models do not have the same parameters.
    """
    old, new = dict(original.named_parameters()), dict(unlearned.named_parameters())
    other = sorted(n for n in old.keys() | new.keys() if n not in old or n not in new or old[n].shape != new[n].shape)
    if other:
        raise UserError(
            f"the models differ in {len(other)} parameter(s), first '{other[0]}': compare one architecture."
        )
    return {f"model.{n}": (new[n].detach().to(p.device, p.dtype) - p.detach()) for n, p in old.items()}


def _second_order(z_NV: Tensor, slope_NV: Tensor, new_NV: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(½ Var_p[slope], KL(p ‖ q)) at each position, (N,) each, in float64."""
    log_p_NV = z_NV.log_softmax(1)
    p_NV = log_p_NV.exp()
    centred_NV = slope_NV - (p_NV * slope_NV).sum(1, keepdim=True)
    quadratic_N = 0.5 * (p_NV * centred_NV.square()).sum(1)
    direct_N = (p_NV * (log_p_NV - new_NV.log_softmax(1))).sum(1).clamp_min(0)
    return quadratic_N.cpu().numpy(), direct_N.cpu().numpy()


def _vocab(model: nn.Module, adapter: Adapter, sample: Sample) -> int:
    with evaluating(model):
        return adapter.positions(model, [sample]).vocab
