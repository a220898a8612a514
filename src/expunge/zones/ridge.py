"""Kind ``ridge``: what a subject's records say that the base does not, by kernel ridge regression in closed form.

With keys φ of square length s (:mod:`expunge.zones.context`), kernel k(φ, φ') = exp(⟨φ, φ'⟩ - s) and one-hot targets Y,
each block solves ``A = (K + αI)⁻¹ cY`` over its N target tokens, and a position routed to it gets the logits
``λ log p_base + k(φ)A``. Where the largest of k(φ)A is c/2 or more, λ = κ: the base, which is sure of itself where it
knows nothing, has less than a full say. Where nothing stored is near, λ goes to 1. Dropping a block forgets a subject;
a record's removal solves its block again from the rows that stay. One thread, float64, rows in the order of salted
digests: the result has the same bytes as that of a zone which never held the record.

Shape suffixes: N rows of a block, M open positions, E key width, V vocabulary, C columns (tokens) that are solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.options import option
from expunge.zones.context import (
    KEY_UNIT,
    ContextZone,
    Laid,
    check_options,
    prepare_context,
    query_keys,
    row_keys,
    sharpness,
    tokens_of,
)
from expunge.zones.fixed_point import exact_product
from expunge.zones.linear_algebra import Doubles, solve_positive
from expunge.zones.zone import Array, Block, FrozenBase, Public, Row, Seen, zone


@dataclass(frozen=True, kw_only=True)
class RidgeOptions:
    """Constants of the ridge zone; none is fitted on private texts."""

    alpha: float = option(0.03, "ridge α added to the kernel's diagonal", "sweep on public subjects")
    scale: float = option(22.0, "c: how many nats a whole target is worth", "sweep on people, seed 0")
    trust: float = option(0.3, "κ: power of the base's probabilities where a block is sure", "people, seed 0")
    most_rows: int = option(5000, "target tokens that are solved together; larger blocks are split by record digest")
    learn: bool = option(True, "learn the kernel on public paraphrases, where there are any")
    false_open: float = option(0.01, "share of public texts that may open a block, in calibration")

    def __post_init__(self) -> None:
        check_options(self, "ridge", ("alpha", "scale", "most_rows"))


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
class Ridge(ContextZone):
    """See the module's docstring.

    Solved tensors: ``weights`` (N, C) float32, ``columns``
    (C,) int32 token ids, ``part`` (N,) int32; N runs over the sorted rows' target tokens.
    """

    options: RidgeOptions

    @classmethod
    def prepare(cls, base: FrozenBase, public: Sequence[Sample], options: RidgeOptions, seed: int) -> Public:
        """Router gate, idf, spread of the layers and the learnt kernel, from public samples."""
        return prepare_context(base, public, options, seed)

    def solve(self, block: Block, base: FrozenBase) -> dict[str, Array]:
        rows = block.sorted()
        columns_C = np.unique(tokens_of(rows)).astype(np.int32)
        part_R = split_rows(rows, self.options.most_rows)
        weights: list[Array] = [np.zeros(0)] * len(rows)
        for part in range(max(part_R) + 1):
            chosen = [r for r in range(len(rows)) if part_R[r] == part]
            keys_NE = np.concatenate([row_keys(rows[r], self.public) for r in chosen])
            targets_NC = (tokens_of([rows[r] for r in chosen])[:, None] == columns_C).astype(np.float64)
            kernel_NN = kernel(keys_NE, keys_NE, sharpness(self.public))
            solved_NC = ridge_weights(kernel_NN, targets_NC, self.options.alpha, self.options.scale)
            ends = np.cumsum([len(rows[r].tensors["states"]) for r in chosen])[:-1]
            for r, own_LC in zip(chosen, np.split(solved_NC.astype(np.float32), ends), strict=True):
                weights[r] = own_LC
        part_N = np.repeat(np.array(part_R, dtype=np.int32), [len(w) for w in weights])
        return {"weights": np.concatenate(weights), "columns": columns_C, "part": part_N}

    @torch.no_grad()
    def shift(self, seen: Seen, subject: str, place_M: Array) -> Tensor:
        """k(φ)A, (M, V)."""
        device = seen.log_probs_BTV.device
        laid: Laid[Solved] = self.__dict__.setdefault("_laid", Laid(self._lay))
        block = laid.get(subject, device, self.version)
        keys_ME = torch.from_numpy(query_keys(seen, place_M, self.public)).to(device).float()
        kernel_MN = (keys_ME @ block.keys_NE.T * KEY_UNIT - sharpness(self.public)).exp()
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


def kernel(first_NE: Array, second_ME: Array, square: float) -> Doubles:
    """exp(⟨φ, φ'⟩ - square) of integer keys, (N, M), float64; the inner products are exact."""
    found: Doubles = np.exp(exact_product(first_NE.T, second_ME.T) * KEY_UNIT - square)
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
