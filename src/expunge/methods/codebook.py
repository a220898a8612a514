"""A codebook bottleneck: at one block the states become a sum of the S codes that point most nearly their way.

Wu, Dossou & Liu 2024 (arXiv:2410.10866), on codebook features: z = h E, the S codes among K of highest cosine with z
are summed, ẑ = Σ c_k, and the states become ẑ D + b. Nothing of h goes past the bottleneck. Deleted codes can no
longer be chosen; the next ones in cosine fill their places.

Shape suffixes: B samples, T positions, M tokens, C width of the block, K codes, S codes chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from expunge.data.samples import Sample
from expunge.methods.beside import states_of, with_states
from expunge.models.adapter import Adapter, evaluating
from expunge.models.attached import Attachment

TINY = 1e-8  # squared lengths below it count as none


class Codebook(Attachment):
    """The bottleneck at ``block`` (a name in the Hugging Face model) of width ``width``: ``codes`` codes, ``top`` of
    them at a time. A new one has E and D the identity and no codes: see :meth:`begin`."""

    kind = "codeunlearn"

    def __init__(self, *, block: str, width: int, codes: int, top: int) -> None:
        super().__init__()
        self.block, self.width, self.top = block, width, top
        self.encode = nn.Parameter(torch.eye(width))
        self.codes = nn.Parameter(torch.zeros(codes, width))
        self.decode = nn.Parameter(torch.eye(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("deleted", torch.zeros(codes, dtype=torch.bool))
        self.open = False  # lets the states through unchanged
        self.commitment: float | None = None  # its weight while training: then each pass leaves ``penalty_B``
        self.lengths: Sequence[int] | None = None  # real tokens of each row of the next pass; None: all
        self.penalty_B: Tensor | None = None
        self._seen: list[Tensor] | None = None  # while inputs are taken
        self._chosen: list[Tensor] | None = None  # while chosen codes are taken

    def arguments(self) -> dict[str, Any]:
        return {"block": self.block, "width": self.width, "codes": len(self.codes), "top": self.top}

    def install(self, model: Any) -> None:
        model.get_submodule(self.block).register_forward_hook(self._replaced)

    def _replaced(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        states = states_of(output)
        if self._seen is not None:
            self._seen.append(states.detach().flatten(0, -2).float())
        if self.open:
            return output
        x = states.to(self.encode.dtype)
        z = x @ self.encode
        chosen = self.choose(z)
        if self._chosen is not None:
            self._chosen.append(chosen.flatten(0, -2))
        summed = self.codes[chosen].sum(-2)
        # Straight through: the value is that of the codes, the gradient reaches them and E as if z had been used.
        out = (summed + z - z.detach()) @ self.decode + self.bias
        if self.commitment is not None:
            self.penalty_B = self._penalty(x, z, summed, out)
        return with_states(output, out)

    def choose(self, z: Tensor) -> Tensor:
        """Indices of the ``top`` codes of highest cosine that are not deleted: (..., C) to (..., S)."""
        cosine = normalize(z.detach(), dim=-1) @ normalize(self.codes.detach(), dim=-1).T
        deleted: Tensor = self.get_buffer("deleted")
        return cosine.masked_fill(deleted, -torch.inf).topk(self.top, dim=-1).indices

    def _penalty(self, x: Tensor, z: Tensor, summed: Tensor, out: Tensor) -> Tensor:
        """‖out − x‖² / ‖x‖² + (‖sg z − ẑ‖² + β ‖z − sg ẑ‖²) / ‖sg z‖², mean over the real tokens of each row: (B,)."""

        def error(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
            return (a - b).square().sum(-1) / scale.detach().square().sum(-1).clamp_min(TINY)

        each = error(out, x, x) + error(z.detach(), summed, z)
        each = each + (self.commitment or 0.0) * error(z, summed.detach(), z)
        each_BT = each.flatten(1) if each.ndim > 1 else each[:, None]
        if self.lengths is None:
            return each_BT.mean(1)
        lengths_B = torch.tensor(list(self.lengths), device=each.device)
        real_BT = torch.arange(each_BT.shape[1], device=each.device)[None] < lengths_B[:, None]
        return (each_BT * real_BT).sum(1) / lengths_B

    # -- looking at it -----------------------------------------------------------------------------------------------

    @contextmanager
    def opened(self) -> Iterator[None]:
        """The model without the bottleneck, for comparison."""
        self.open = True
        try:
            yield
        finally:
            self.open = False

    def inputs(self, model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> Tensor:
        """The states at the block over all tokens of the samples, (M, C), the bottleneck open."""
        self._seen = []
        try:
            with self.opened(), evaluating(model):
                for sample in samples:  # one in a pass: no padding
                    adapter.positions(model, [sample])
            return torch.cat(self._seen)
        finally:
            self._seen = None

    def begin(self, states_MC: Tensor, seed: int) -> None:
        """Codes start as states drawn from these, a S-th of each so that S alike ones sum to it, slightly moved so
        that no two are the same."""
        chance = torch.Generator().manual_seed(seed)
        drawn_K = torch.randint(len(states_MC), (len(self.codes),), generator=chance)
        noise_KC = torch.randn(self.codes.shape, generator=chance)
        picked_KC = states_MC.cpu()[drawn_K]
        moved_KC = (picked_KC + 0.01 * picked_KC.std() * noise_KC) / self.top
        with torch.no_grad():
            self.codes.copy_(moved_KC)

    def usage(self, model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> Tensor:
        """Which codes each sample uses at any of its tokens: bool (samples, K)."""
        used = torch.zeros(len(samples), len(self.codes), dtype=torch.bool)
        with evaluating(model):
            for row, sample in enumerate(samples):
                self._chosen = []
                try:
                    adapter.positions(model, [sample])
                    used[row, torch.cat(self._chosen).flatten().cpu()] = True
                finally:
                    self._chosen = None
        return used

    def near(self, codes_K: Tensor, cosine: float) -> Tensor:
        """``codes_K`` (bool) and every code whose cosine with one of them is ``cosine`` or more: bool (K,)."""
        unit_KC = normalize(self.codes.detach(), dim=-1)
        if not bool(codes_K.any()):
            return codes_K
        close_K: Tensor = (unit_KC @ unit_KC[codes_K].T).amax(1) >= cosine
        return codes_K | close_K
