"""What closed-form zones know a position by: hidden states of three layers, and the rare tokens shortly before it.

φ = [h ; b], two halves of length 1. h: the states of the layers at :data:`DEPTHS`, each standardised with public
statistics and brought to length 1, then divided by √layers. b: the set of tokens among the last :data:`WINDOW`,
weighted by public idf, hashed to :data:`BAG_WIDTH` signed numbers (Weinberger et al. 2009, arXiv:0902.2206). Keys are
φ with :data:`KEY_BITS` binary places, as integers, so that inner products of keys are exact.

Shape suffixes: N rows or positions, L layers, D hidden width, E key width, H bag width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.zones.fixed_point import KEY_BITS, fixed
from expunge.zones.gate import routing
from expunge.zones.store import WINDOW
from expunge.zones.surrogates import surrogates
from expunge.zones.text_stats import layer_of, spread
from expunge.zones.zone import Array, FrozenBase, Public, Record, Row, Seen

DEPTHS = (0.25, 0.5, 0.75)  # shares of the depth; the last layers only say which token comes next
BAG_WIDTH = 512
KEPT = 32  # blocks whose tensors stay laid out in memory
KEY_UNIT = 2.0 ** (-2 * KEY_BITS)  # what one unit of a product of two keys is worth
T = TypeVar("T")


def prepare_context(base: FrozenBase, public: Sequence[Sample], false_open: float, **constants: Any) -> Public:
    """Router, idf, and spread of the key layers, from public samples; further ``constants`` are kept beside."""
    made = surrogates(public)
    arrays, found = routing(base, public, made, false_open)
    layers = sorted({layer_of(base, depth) for depth in DEPTHS})
    for layer in layers:
        arrays[f"mean.{layer}"], arrays[f"deviation.{layer}"] = spread(public, base, layer)
    kept = {**found, "layers": layers, "surrogates_renamed": made.renamed, **constants}
    return Public(arrays=arrays, constants=kept, texts=frozenset(s.digest() for s in public))


def extract_states(record: Record, hidden: Sequence[Tensor], public: Public) -> tuple[dict[str, Array], str]:
    """Row tensor ``states`` (N, L·D) int16 of the record's N target tokens, and a fingerprint of the raw states."""
    cut = slice(record.first - 1, len(record.ids) - 1)
    raw = {layer: hidden[layer][cut].cpu().numpy() for layer in public.constants["layers"]}
    fingerprint = hashlib.sha256(b"".join(raw[layer].tobytes() for layer in raw)).hexdigest()
    return {"states": _states(raw, public)}, fingerprint


def row_keys(row: Row, public: Public) -> Array:
    """Keys (N, E) int32 of a row: its stored states, and bags made of its token ids."""
    ids = np.array(row.record.ids, dtype=np.int64)
    bags_NH = _bags([ids[:end] for end in range(row.record.first, len(ids))], public.arrays["idf"])
    return np.concatenate([row.tensors["states"].astype(np.int32), fixed(bags_NH, KEY_BITS)], axis=1)


def query_keys(seen: Seen, place_N: Array, public: Public) -> Array:
    """Keys (N, E) int32 of flat positions of this pass, made as those of the rows."""
    layers = public.constants["layers"]
    raw = dict(zip(layers, np.split(seen.states(layers, place_N), len(layers), axis=1), strict=True))
    bags_NH = _bags(seen.lines(place_N), public.arrays["idf"])
    return np.concatenate([_states(raw, public).astype(np.int32), fixed(bags_NH, KEY_BITS)], axis=1)


def _states(raw: dict[int, Array], public: Public) -> Array:
    parts = []
    for layer, states_ND in raw.items():
        normal_ND = (states_ND - public.arrays[f"mean.{layer}"]).astype(np.float64)
        normal_ND /= public.arrays[f"deviation.{layer}"]
        length_N1 = np.sqrt(np.square(normal_ND).sum(1, keepdims=True))
        parts.append(normal_ND / np.maximum(length_N1, 1e-9))
    whole = np.concatenate(parts, axis=1) / len(parts) ** 0.5
    return fixed(whole, KEY_BITS).astype(np.int16)  # at most 2^10


def _bags(lines: Sequence[Array], idf_V: Array) -> Array:
    """Hashed bags (N, H) of the last tokens of each line, length 1; 0 where no token is rare. Negative ids are none."""
    places_V, signs_V = _hashes(len(idf_V))
    bags_NH = np.zeros((len(lines), BAG_WIDTH))
    for n, line in enumerate(lines):
        tokens = np.unique(line[-WINDOW:])
        tokens = tokens[tokens >= 0]
        np.add.at(bags_NH[n], places_V[tokens], signs_V[tokens] * idf_V[tokens])
    length_N1 = np.sqrt(np.square(bags_NH).sum(1, keepdims=True))
    filled: Array = np.divide(bags_NH, length_N1, out=np.zeros_like(bags_NH), where=length_N1 > 1e-9)
    return filled


_HASHED: dict[int, tuple[Array, Array]] = {}


def _hashes(vocab: int) -> tuple[Array, Array]:
    """Place and sign of every token id: Knuth's multiplicative hash of 32 bits, top bits first."""
    if vocab not in _HASHED:
        mixed_V = (np.arange(1, vocab + 1, dtype=np.uint64) * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
        places_V = (mixed_V >> np.uint64(23)).astype(np.int64)  # 32 - 9 bits: 512 places
        signs_V = 1 - 2 * ((mixed_V >> np.uint64(22)) & np.uint64(1)).astype(np.float64)
        _HASHED[vocab] = places_V, signs_V
    return _HASHED[vocab]


def shifted(seen: Seen, shift: Callable[[str, Array], Tensor]) -> Tensor:
    """Log-probabilities (B, T, V), with ``shift(subject, place)`` (N, V) added to the logits of open positions."""
    out_PV = seen.log_probs_BTV.flatten(0, 1)
    for number, place_N in seen.routes.opened.items():
        logits_NV = out_PV[place_N] + shift(seen.routes.subjects[number], place_N)
        out_PV = out_PV.index_put((torch.from_numpy(place_N),), logits_NV.log_softmax(-1))
    return out_PV.view_as(seen.log_probs_BTV)


class Laid(Generic[T]):
    """Blocks laid out for a device when first asked for; the last few are kept until the zone changes."""

    def __init__(self, build: Callable[[str, torch.device], T]) -> None:
        self._build, self._version = build, -1
        self._kept: OrderedDict[tuple[str, torch.device], T] = OrderedDict()

    def get(self, subject: str, device: torch.device, version: int) -> T:
        if version != self._version:
            self._kept.clear()
            self._version = version
        key = (subject, device)
        if key not in self._kept:
            self._kept[key] = self._build(subject, device)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
