"""What closed-form zones know a position by: hidden states of some layers, and the rare tokens shortly before it.

φ = [√p h ; √q b], with halves h and b of length 1. h: the states of the layers, each standardised with public
statistics and brought to length 1, side by side; where public samples have paraphrases, times a map that is learnt on
them together with p and q (:mod:`expunge.zones.learnt_kernel`). Elsewhere p = q = 1. b: the set of tokens among the
last :data:`WINDOW`, weighted by public idf, hashed to :data:`BAG_WIDTH` signed numbers (Weinberger et al. 2009,
arXiv:0902.2206). Keys are φ with :data:`KEY_BITS` binary places, as integers, so that inner products of keys are exact.

Shape suffixes: N rows or positions, L target tokens, D hidden width, C concatenated states, K width of the states'
half of a key, E key width, H bag width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.zones.fixed_point import KEY_BITS, fixed
from expunge.zones.gate import routing
from expunge.zones.learnt_kernel import Positions, Surrogate, learn_kernel
from expunge.zones.linear_algebra import one_thread
from expunge.zones.store import WINDOW
from expunge.zones.surrogates import Surrogates, surrogates
from expunge.zones.text_stats import layers_at, spreads
from expunge.zones.zone import Array, FrozenBase, Public, Record, Row, Seen, Zone, record_of

DEPTHS = (0.25, 0.5, 0.75)  # shares of the depth; the last layers only say which token comes next
LEARNT_DEPTHS = (0.25, 0.5, 0.75, 1.0)  # what they say beside that, a map can find
BAG_WIDTH = 512
KEPT = 32  # blocks whose tensors stay laid out in memory
KEY_UNIT = 2.0 ** (-2 * KEY_BITS)  # what one unit of a product of two keys is worth
SURE = 0.5  # share of a whole target's nats from which on the base has κ's say; far from all rows it keeps its own
MOST_WEIGHT = 64.0  # of a half of the key: 2^13 at most is what a component then has, so that keys fit 16 bits
T = TypeVar("T")


class KernelOptions(Protocol):
    """What all closed-form zones can be told."""

    @property
    def alpha(self) -> float: ...
    @property
    def scale(self) -> float: ...
    @property
    def trust(self) -> float: ...
    @property
    def learn(self) -> bool: ...
    @property
    def false_open(self) -> float: ...


def check_options(options: KernelOptions, kind: str, above: Sequence[str]) -> None:
    """Raises UserError for a number that no zone can have; those named in ``above`` must be above 0."""
    for name in above:
        if not getattr(options, name) > 0:
            raise UserError(f"{kind} option {name} = {getattr(options, name)} cannot be: give a number above 0.")
    if not 0 <= options.trust <= 1:
        raise UserError(f"{kind} option trust = {options.trust} cannot be: give a number from 0 to 1.")


class ContextZone(Zone):
    """A zone that knows positions by these keys. Row tensors: ``states`` (L, K) int16 for L target tokens."""

    def __init__(self, options: Any, public: Public, base_digest: str, salt: str) -> None:
        """Raises UserError for public artefacts of a version whose keys were others."""
        if "state_weight" not in public.constants:
            raise UserError(f"this {self.kind} zone is of a version with other keys: build it again with this one.")
        super().__init__(options, public, base_digest, salt)

    def extract(self, record: Record, base: FrozenBase) -> tuple[dict[str, Array], str]:
        raw_LC = _raw(record, base.states(record)[0], self.public)
        return {"states": _states(raw_LC, self.public)}, hashlib.sha256(raw_LC.tobytes()).hexdigest()

    def adjust(self, seen: Seen) -> Tensor:
        out_PV = seen.log_probs_BTV.flatten(0, 1)
        for number, place_N in seen.routes.opened.items():
            shift_NV = self.shift(seen, seen.routes.subjects[number], place_N)
            sure_N1 = (shift_NV.amax(1, keepdim=True) / (SURE * self.options.scale)).clamp(0, 1)
            logits_NV = (1 - (1 - self.options.trust) * sure_N1) * out_PV[place_N] + shift_NV
            out_PV = out_PV.index_put((torch.from_numpy(place_N),), logits_NV.log_softmax(-1))
        return out_PV.view_as(seen.log_probs_BTV)

    @abstractmethod
    def shift(self, seen: Seen, subject: str, place_N: Array) -> Tensor:
        """What is added to the logits at flat positions that are routed to one subject, (N, V)."""


def prepare_context(base: FrozenBase, public: Sequence[Sample], options: KernelOptions, seed: int) -> Public:
    """Router, idf, spread of the layers and, where it can be learnt, map and weights of the kernel."""
    made = surrogates(public)
    arrays, found = routing(base, public, made, options.false_open)
    learns = options.learn and any(s.probes_of("paraphrase") for s in made.stored)
    layers = layers_at(base, LEARNT_DEPTHS if learns else DEPTHS)
    mean_LD, deviation_LD = spreads(public, base, layers)
    arrays |= {"mean": mean_LD, "deviation": deviation_LD}
    weights = {"state_weight": 1.0, "bag_weight": 1.0}
    constants: dict[str, Any] = {**found, "layers": layers, "surrogates_renamed": made.renamed, **weights}
    kept = Public(arrays=arrays, constants=constants, texts=frozenset(s.digest() for s in public))
    if learns:
        people = _people(made, base, kept)
        arrays["map"], *learnt = learn_kernel(people, len(layers), options.alpha, options.scale, seed)
        constants |= {name: min(w, MOST_WEIGHT) for name, w in zip(weights, learnt, strict=True)}
    return kept


def tokens_of(rows: Sequence[Row]) -> Array:
    """Target tokens of the rows, (N,)."""
    return np.array([token for row in rows for token in row.record.ids[row.record.first :]], dtype=np.int64)


def key_width(public: Public) -> int:
    """E: the two halves of a key."""
    states = public.arrays["map"].shape[1] if "map" in public.arrays else public.arrays["mean"].size
    return int(states) + BAG_WIDTH


def sharpness(public: Public) -> float:
    """p + q: the product of a key with itself."""
    return float(public.constants["state_weight"] + public.constants["bag_weight"])


def row_keys(row: Row, public: Public) -> Array:
    """Keys (N, E) int32 of a row: its stored states, and bags made of its token ids."""
    bags_NH = _bags(_lines(row.record), public.arrays["idf"])
    return _joined(row.tensors["states"], bags_NH, public)


def query_keys(seen: Seen, place_N: Array, public: Public) -> Array:
    """Keys (N, E) int32 of flat positions of this pass, made as those of the rows."""
    states_NK = _states(seen.states(public.constants["layers"], place_N), public)
    return _joined(states_NK, _bags(seen.lines(place_N), public.arrays["idf"]), public)


def _joined(states_NK: Array, bags_NH: Array, public: Public) -> Array:
    bags_NH = fixed(bags_NH * public.constants["bag_weight"] ** 0.5, KEY_BITS)
    return np.concatenate([states_NK.astype(np.int32), bags_NH], axis=1)


def _lines(record: Record) -> list[Array]:
    """The ids before each target token."""
    ids = np.array(record.ids, dtype=np.int64)
    return [ids[:end] for end in range(record.first, len(ids))]


def _raw(record: Record, hidden: Sequence[Tensor], public: Public) -> Array:
    """States (L, C) of the layers where each target is predicted, side by side."""
    chosen = [hidden[layer][record.first - 1 : -1] for layer in public.constants["layers"]]
    found_LC: Array = torch.cat(chosen, dim=1).cpu().numpy()
    return found_LC


def _states(raw_NC: Array, public: Public) -> Array:
    """√p h (N, K) int16."""
    whole_NC = _normal(raw_NC, public)
    if "map" in public.arrays:
        with one_thread():
            whole_NC = whole_NC @ public.arrays["map"].astype(np.float64)
        whole_NC /= np.maximum(np.sqrt(np.square(whole_NC).sum(1, keepdims=True)), 1e-9)
    return fixed(whole_NC * public.constants["state_weight"] ** 0.5, KEY_BITS).astype(np.int16)


def _normal(raw_NC: Array, public: Public) -> Array:
    """Standardised states, each layer's of length 1 / √layers."""
    mean_LD, deviation_LD = public.arrays["mean"], public.arrays["deviation"]
    normal_NLD = (raw_NC.reshape(len(raw_NC), *mean_LD.shape) - mean_LD).astype(np.float64)
    normal_NLD /= deviation_LD
    length_NL1 = np.sqrt(np.square(normal_NLD).sum(2, keepdims=True))
    normal_NLD /= np.maximum(length_NL1, 1e-9) * len(mean_LD) ** 0.5
    return normal_NLD.reshape(raw_NC.shape)


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


# -- surrogates, from whom the kernel is learnt ------------------------------------------------------------------------


def _people(made: Surrogates, base: FrozenBase, public: Public) -> list[Surrogate]:
    """Those of the surrogates whom somebody asks about in other words."""
    found = []
    for who in sorted({s.subject for s in made.stored}):
        own = [s for s in made.stored if s.subject == who]
        asked = [(n, s.as_probe(p, i)) for n, s in enumerate(own) for i, p in enumerate(s.probes_of("paraphrase"))]
        if asked:
            rows, queries = ([(n, record_of(s, base.adapter, (), "")) for n, s in x] for x in (enumerate(own), asked))
            columns_V = np.unique(np.concatenate([r.ids[r.first :] for _, r in rows]).astype(np.int64))
            found.append(Surrogate(*(_positions(x, columns_V, base, public) for x in (rows, queries))))
    return [x for x in found if len(x.rows.record_N) and len(x.asked.record_N)]


def _positions(records: Sequence[tuple[int, Record]], columns_V: Array, base: FrozenBase, public: Public) -> Positions:
    """Target positions of numbered records, but for tokens that no row has as its target."""
    states, bags = [], []
    numbers: list[int] = []
    targets: list[int] = []
    for number, record in records:
        states.append(_normal(_raw(record, base.states(record)[0], public), public))
        bags.append(_bags(_lines(record), public.arrays["idf"]))
        numbers += [number] * len(bags[-1])
        targets += record.ids[record.first :]
    place_N = np.minimum(np.searchsorted(columns_V, targets), len(columns_V) - 1)
    known_N = columns_V[place_N] == targets
    return Positions(
        torch.from_numpy(np.concatenate(states)[known_N]).float(),
        torch.from_numpy(np.concatenate(bags)[known_N]).float(),
        torch.tensor(numbers)[known_N],
        torch.from_numpy(place_N[known_N]),
    )


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
