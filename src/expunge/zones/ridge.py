"""Kind ``ridge``: what a subject's records say that the base does not, by kernel ridge regression in closed form.

With keys φ (:mod:`expunge.zones.context`), kernel k(φ, φ') = exp(⟨φ, φ'⟩ - 2) and targets Y - p_base (one-hot less
the base's probabilities), each block solves ``A = (K + αI)⁻¹ c(Y - p_base)`` over its N target tokens, and a
position routed to it gets the logits ``log p_base + k(φ)A``. Dropping a block forgets a subject; a record's removal
solves its block again from the rows that stay. One thread, float64, rows in the order of their salted digests: the
result has the same bytes as that of a zone which never held the record.

Shape suffixes: N rows of a block, M open positions, E key width, V vocabulary, C columns (tokens) that are solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.options import option
from expunge.zones.context import KEY_UNIT, Laid, extract_states, prepare_context, query_keys, row_keys, shifted
from expunge.zones.fixed_point import exact_product
from expunge.zones.linear_algebra import Doubles, solve_positive
from expunge.zones.zone import Array, Block, FrozenBase, Public, Record, Row, Seen, Zone, zone


@dataclass(frozen=True, kw_only=True)
class RidgeOptions:
    """Constants of the ridge zone; none is fitted on private texts."""

    alpha: float = option(0.03, "ridge α added to the kernel's diagonal", "sweep on public subjects")
    scale: float = option(20.0, "c: how many nats a whole target is worth", "sweep on public subjects")
    targets: str = option(
        "residual",
        "residual: one-hot less the base's probabilities; one-hot: columns of the block's own tokens alone, smaller",
        "",
        ("residual", "one-hot"),
    )
    most_rows: int = option(5000, "target tokens that are solved together; larger blocks are split by record digest")
    false_open: float = option(0.01, "share of public texts that may open a block, in calibration")

    def __post_init__(self) -> None:
        for name in ("alpha", "scale", "most_rows"):
            if not getattr(self, name) > 0:
                raise UserError(f"ridge option {name} = {getattr(self, name)} cannot be: give a number above 0.")


@dataclass(frozen=True)
class Solved:
    """A block on the device of the model."""

    keys_NE: Tensor  # float32
    weights_NC: Tensor
    columns_C: Tensor
    part_N: Tensor  # which rows were solved together


@zone(
    "ridge",
    summary="kernel ridge regression per subject in closed form; a removal solves one block again",
    source="Saunders, Gammerman and Vovk 1998 (kernel ridge); removal by replay of a block",
    options=RidgeOptions,
)
class Ridge(Zone):
    """See the module's docstring.

    Row tensors: ``states`` (L, ·) int16 for L target tokens. Solved tensors: ``weights`` (N, C) float32, ``columns``
    (C,) int32 token ids, ``part`` (N,) int32; N runs over the sorted rows' target tokens.
    """

    options: RidgeOptions

    @classmethod
    def prepare(cls, base: FrozenBase, public: Sequence[Sample], options: RidgeOptions, seed: int) -> Public:
        """Router gate, idf and spread of three layers, from public samples."""
        return prepare_context(base, public, options.false_open)

    def extract(self, record: Record, base: FrozenBase) -> tuple[dict[str, Array], str]:
        return extract_states(record, base.states(record)[0], self.public)

    def solve(self, block: Block, base: FrozenBase) -> dict[str, Array]:
        rows = block.sorted()
        columns_C = self._columns(rows)
        part_R = split_rows(rows, self.options.most_rows)
        weights: list[Array] = [np.zeros(0)] * len(rows)
        for part in range(max(part_R) + 1):
            chosen = [r for r in range(len(rows)) if part_R[r] == part]
            keys_NE = np.concatenate([row_keys(rows[r], self.public) for r in chosen])
            targets_NC = np.concatenate([self._targets(rows[r].record, base, columns_C) for r in chosen])
            solved_NC = ridge_weights(kernel(keys_NE, keys_NE), targets_NC, self.options.alpha, self.options.scale)
            ends = np.cumsum([len(rows[r].tensors["states"]) for r in chosen])[:-1]
            for r, own_LC in zip(chosen, np.split(solved_NC.astype(np.float32), ends), strict=True):
                weights[r] = own_LC
        part_N = np.repeat(np.array(part_R, dtype=np.int32), [len(w) for w in weights])
        return {"weights": np.concatenate(weights), "columns": columns_C, "part": part_N}

    def _columns(self, rows: Sequence[Row]) -> Array:
        if self.options.targets == "residual":
            return np.arange(len(self.public.arrays["idf"]), dtype=np.int32)
        return np.array(sorted({token for r in rows for token in r.record.ids[r.record.first :]}), dtype=np.int32)

    def _targets(self, record: Record, base: FrozenBase, columns_C: Array) -> Doubles:
        tokens_L = np.array(record.ids[record.first :], dtype=np.int32)
        targets_LC: Doubles = (tokens_L[:, None] == columns_C).astype(np.float64)
        if self.options.targets == "residual":
            log_probs_TV = base.states(record)[1]
            targets_LC -= log_probs_TV[record.first - 1 : -1].cpu().double().exp().numpy()
        return targets_LC

    def adjust(self, seen: Seen) -> Tensor:
        return shifted(seen, partial(self._shift, seen))

    @torch.no_grad()
    def _shift(self, seen: Seen, subject: str, place_M: Array) -> Tensor:
        """k(φ)A at positions that are routed to one subject, (M, V)."""
        device = seen.log_probs_BTV.device
        laid: Laid[Solved] = self.__dict__.setdefault("_laid", Laid(self._lay))
        block = laid.get(subject, device, self.version)
        keys_ME = torch.from_numpy(query_keys(seen, place_M, self.public)).to(device).float()
        kernel_MN = (keys_ME @ block.keys_NE.T * KEY_UNIT - 2).exp()
        # Parts were solved apart, each to the whole of its targets: the part with the nearest row answers.
        nearest_M = block.part_N[kernel_MN.argmax(1)]
        kernel_MN = kernel_MN * (block.part_N == nearest_M[:, None])
        shift_MV = kernel_MN.new_zeros(len(kernel_MN), seen.log_probs_BTV.shape[2])
        shift_MV[:, block.columns_C] = kernel_MN @ block.weights_NC
        return shift_MV

    def _lay(self, subject: str, device: torch.device) -> Solved:
        block = self.blocks[subject]
        keys_NE = np.concatenate([row_keys(row, self.public) for row in block.sorted()]).astype(np.float32)
        arrays = (keys_NE, *(block.solved[name] for name in ("weights", "columns", "part")))
        keys, weights, columns, part = (torch.from_numpy(a).to(device) for a in arrays)
        return Solved(keys, weights, columns.long(), part)


def kernel(first_NE: Array, second_ME: Array) -> Doubles:
    """exp(⟨φ, φ'⟩ - 2) of integer keys, (N, M), float64; the inner products are exact."""
    found: Doubles = np.exp(exact_product(first_NE.T, second_ME.T) * KEY_UNIT - 2)
    return found


def ridge_weights(kernel_NN: Doubles, targets_NC: Doubles, alpha: float, scale: float) -> Doubles:
    """A = (K + αI)⁻¹ c T, (N, C), float64."""
    if not len(kernel_NN):  # a record cut to the context may have no target left
        return np.zeros(targets_NC.shape)
    return solve_positive(kernel_NN + alpha * np.eye(len(kernel_NN)), scale * targets_NC)


def split_rows(rows: Sequence[Row], most: int) -> list[int]:
    """Part of each row, by its salted digest; as many parts as ``most`` target tokens in each would take.

    The split looks at nothing but digests and the number of target tokens, never at what the records say.
    """
    tokens = sum(len(r.record.ids) - r.record.first for r in rows)
    parts = -(-tokens // most)
    drawn = [int(r.record.digest[:16], 16) % max(1, parts) for r in rows]
    used = {part: place for place, part in enumerate(sorted(set(drawn)))}
    return [used[part] for part in drawn]
