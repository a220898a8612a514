"""Unlearning layers: bottlenecks after the feed-forward part of each block, and their fusion in closed form.

A layer adds gelu(h D) U to the states h that its block gives, with D (C, R) random and U (R, C) zero at first, so that
the model is what it was until U is trained. There are no biases: both maps are linear, and each is fused by itself.

Shape suffixes: C width of the block, R width of the bottleneck, I and O inputs and outputs of one map, M tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from expunge.data.samples import Sample
from expunge.methods.beside import states_of, with_states
from expunge.models.adapter import Adapter, evaluating
from expunge.models.attached import Attachment


class UnlearningLayers(Attachment):
    """One bottleneck after each of ``blocks`` (names in the Hugging Face model), whose widths are ``widths``.

    ``seed`` decides D at first: the layers of every request start from the same values, so that their units mean the
    same when they are fused. ``requests`` counts what has been fused into them. ``gram``: the Gram matrices of the
    forgotten samples stand in buffers beside the weights.
    """

    kind = "eul"

    def __init__(
        self,
        *,
        blocks: Sequence[str],
        widths: Sequence[int],
        rank: int,
        seed: int,
        requests: int = 1,
        gram: bool = False,
    ) -> None:
        super().__init__()
        self.blocks, self.widths, self.rank, self.seed = list(blocks), list(widths), rank, seed
        self.requests, self.gram = requests, False
        self.down = nn.ParameterList([torch.zeros(width, rank) for width in widths])
        self.up = nn.ParameterList([torch.zeros(rank, width) for width in widths])
        self._sums: dict[str, Tensor] | None = None  # while Gram matrices are taken
        self.reset()
        if gram:
            self.keep_grams({name: torch.zeros(len(p), len(p)) for name, p in self.maps().items()})

    def arguments(self) -> dict[str, Any]:
        names = ("blocks", "widths", "rank", "seed", "requests", "gram")
        return {name: getattr(self, name) for name in names}

    def install(self, model: Any) -> None:
        for number, name in enumerate(self.blocks):
            model.get_submodule(name).register_forward_hook(partial(self._after, number))

    def reset(self) -> None:
        """D as at first, U zero: a model with these layers computes what it does without them."""
        chance = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for down_CR, up_RC in zip(self.down, self.up, strict=True):
                down_CR.copy_(torch.randn(down_CR.shape, generator=chance) / down_CR.shape[0] ** 0.5)
                up_RC.zero_()

    def maps(self) -> dict[str, nn.Parameter]:
        """The linear maps by name, (I, O) each: inputs times weight."""
        return dict(self.named_parameters())

    def _after(self, number: int, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        states = states_of(output)
        x = states.to(self.down[number].dtype)
        inside = gelu(x @ self.down[number])
        if self._sums is not None:
            for name, inputs in ((f"down.{number}", x), (f"up.{number}", inside)):
                inputs_MI = inputs.flatten(0, -2).double()
                self._sums[name] = self._sums.get(name, 0.0) + inputs_MI.T @ inputs_MI
        return with_states(output, states + inside @ self.up[number])

    # -- fusion ------------------------------------------------------------------------------------------------------

    def grams(self, model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """XᵀX (I, I) of each map's inputs over all tokens of the samples, in float64; ``model`` carries these layers.

        One sample is in a pass, so that no padding is counted.
        """
        self._sums = {}
        try:
            with evaluating(model):
                for sample in samples:
                    adapter.positions(model, [sample])
            return self._sums
        finally:
            self._sums = None

    def keep_grams(self, grams: Mapping[str, Tensor] | None) -> None:
        """Hold these Gram matrices beside the weights, float32; None: hold none."""
        for name, weight in self.maps().items():
            key = "gram_" + name.replace(".", "_")
            if grams is not None:
                self.register_buffer(key, grams[name].float().to(weight.device))
            elif key in self._buffers:
                delattr(self, key)
        self.gram = grams is not None

    def kept_grams(self) -> dict[str, Tensor] | None:
        """What :meth:`keep_grams` holds, in float64."""
        if not self.gram:
            return None
        return {name: self.get_buffer("gram_" + name.replace(".", "_")).double() for name in self.maps()}


def fuse(weights: Sequence[Tensor], grams: Sequence[Tensor], ridge: float) -> Tensor:
    """W (I, O) that minimises Σᵢ ‖Xᵢ(W − Wᵢ)‖² + ε Σᵢ ‖W − Wᵢ‖², from the Gram matrices XᵢᵀXᵢ (I, I) alone.

    Chen & Yang 2023, equation of the fusion, W = (Σ XᵢᵀXᵢ)⁻¹ Σ XᵢᵀXᵢ Wᵢ, with ε added to every diagonal: fewer tokens
    than inputs leave the sum singular. ε is ``ridge`` times the mean diagonal entry, so directions that no request has
    used get the plain mean, and equal layers stay what they are.
    """
    total_II = torch.stack(list(grams)).sum(0).double()
    mean = float(total_II.diagonal().mean()) / len(grams)
    epsilon = ridge * mean if mean > 0 else 1.0
    ridged = [g.double() + epsilon * torch.eye(len(g), dtype=torch.float64, device=g.device) for g in grams]
    right_IO = torch.stack([g @ w.double() for g, w in zip(ridged, weights, strict=True)]).sum(0)
    fused: Tensor = torch.linalg.solve(torch.stack(ridged).sum(0), right_IO)
    return fused.to(weights[0].dtype)
