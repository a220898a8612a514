"""Which subject a text is about, position by position, from the tokens so far alone.

A position sees only what stands before it, so that a text in one piece, in a padded batch, or token by token in
generation is routed alike. The features of a subject at a position:

0 full     the full name of the subject stands in the text (1), or not (0)
1 part     another name of it does: 1 / number of subjects so called
2 sim      cosine between the rare-token bags of the text and of the subject's nearest stored question
3 margin   sim less the best other subject's sim
4 cover    share of the text's rarity that the subject's records cover, (covered mass) / (mass + typical mass)

A logistic gate (:mod:`expunge.zones.gate`) turns them into a log-odds. A block opens when they reach a threshold, and
stays open, since what a text is about does not end with the question. Of several open blocks the one with the highest
log-odds at the position is read: before a question has ended it may look like somebody else's. Bags are sets of tokens
weighted by public idf.

Shape suffixes: B sequences, T positions, S subjects, Q stored questions, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from expunge.zones.zone import Array, Block, Record, Routes

FEATURES = ("full", "part", "sim", "margin", "cover")
WINDOW = 32  # tokens of one bag of a document, half overlapping
SHORT = 4  # a prompt of fewer tokens with any rarity is a document's beginning
NOBODY = np.zeros(0, dtype=np.int64)


@dataclass
class State:
    """What routing remembers of a text so far."""

    seen: frozenset[int]
    tail: tuple[int, ...]  # the last ids, as many as the longest name
    mass: float
    overlap_Q: Array
    cover_S: Array
    features_SF: Array
    best_S: Array  # largest log-odds so far
    open_S: Array  # log-odds at present of the blocks that are open, -inf of others


@dataclass
class Router:
    """An index over the blocks' names and questions; rebuilt whenever the blocks change."""

    idf_V: Array
    gate_F1: Array  # weights of the features, then the constant
    threshold: float  # log-odds from which a block opens
    typical: float  # mean idf² mass of a public question
    subjects: list[str] = field(default_factory=list)
    _last: dict[bytes, State] = field(default_factory=dict, repr=False)
    _shut_for: tuple[frozenset[str] | None, Array] | None = field(default=None, repr=False)

    def index(self, blocks: Mapping[str, Block]) -> Router:
        """Read the blocks; returns itself."""
        self.subjects = sorted(blocks)
        self._last, self._shut_for = {}, None
        bags: list[frozenset[int]] = []
        starts, cover, names = [], [], {}  # type: ignore[var-annotated]
        for number, subject in enumerate(self.subjects):
            records = [row.record for row in blocks[subject].sorted()]
            starts.append(len(bags))
            bags += dict.fromkeys(bag for r in records for bag in self.bags(r)) or [frozenset()]
            cover.append(frozenset().union(*(r.ids for r in records)))
            for record in records:
                if len(record.owners) > 1 and record.owners[0] != subject:
                    continue  # a shared record names its first owner; the others' own records name them
                for place, ids in enumerate(record.names):
                    kind = place < record.full_names
                    names[ids, number] = names.get((ids, number), False) or kind
        self._starts = np.array(starts, dtype=np.int64)
        self._by_token = _inverted(bags)
        self._cover_by_token = _inverted(cover)
        self._norm_Q = np.array([max(self._mass(b), 1e-9) for b in bags], dtype=np.float32) ** 0.5
        sharing: dict[tuple[int, ...], int] = {}
        for ids, _ in names:
            sharing[ids] = sharing.get(ids, 0) + 1
        self._names: dict[int, list[tuple[tuple[int, ...], int, bool, float]]] = {}
        for (ids, number), kind in names.items():
            self._names.setdefault(ids[-1], []).append((ids, number, kind, 1.0 / sharing[ids]))
        self._longest = max((len(ids) for ids, _ in names), default=1)
        return self

    def bags(self, record: Record) -> list[frozenset[int]]:
        """The question as a bag; of a document, a bag of each window."""
        asked = frozenset(record.ids[: record.first])
        if sum(self.idf_V[list(asked)] > 0.5) >= SHORT:
            return [asked]
        step = WINDOW // 2
        return [frozenset(record.ids[i : i + WINDOW]) for i in range(0, max(1, len(record.ids) - step), step)]

    def _mass(self, bag: frozenset[int]) -> float:
        ids = sorted(bag)  # a sum in another order is another float
        return float(np.square(self.idf_V[ids], dtype=np.float64).sum()) if ids else 0.0

    # -- reading a text ----------------------------------------------------------------------------------------------

    def start(self) -> State:
        """Before the first token."""
        zeros_S = np.zeros(len(self.subjects), dtype=np.float32)
        nothing_S = np.full(len(self.subjects), -np.inf, dtype=np.float32)
        features_SF = np.zeros((len(self.subjects), len(FEATURES)), dtype=np.float32)
        overlap_Q = np.zeros(len(self._norm_Q), np.float32)
        return State(frozenset(), (), 0.0, overlap_Q, zeros_S, features_SF, nothing_S, nothing_S)

    def read(self, state: State, ids: Sequence[int]) -> tuple[State, Array, Array]:
        """The state after ``ids``; the features (T, S, F), and the log-odds of open blocks (T, S), at each of them."""
        seen, tail = set[int](), list(state.tail)
        named, new = [], []
        for t, token in enumerate(ids):
            tail.append(token)
            for name, number, full, share in self._names.get(token, ()):
                if tuple(tail[-len(name) :]) == name:
                    named.append((t, number, 0 if full else 1, share))
            if token >= 0 and token not in seen and token not in state.seen:
                seen.add(token)
                new.append((t, token))
        num, subjects = len(ids), len(self.subjects)
        last = tuple(tail[-self._longest :])
        if not named and not new:  # nothing has moved, most often so in generation
            sums = state.mass, state.overlap_Q, state.cover_S, state.features_SF, state.best_S, state.open_S
            return (
                State(state.seen, last, *sums),
                state.features_SF[None].repeat(num, 0),
                state.open_S[None].repeat(num, 0),
            )
        new_T = np.zeros(num)
        overlap_TQ = np.zeros((num, len(self._norm_Q)), dtype=np.float32)
        cover_TS = np.zeros((num, subjects), dtype=np.float32)
        for t, token in new:
            new_T[t] = weight = float(self.idf_V[token]) ** 2
            overlap_TQ[t, self._by_token.get(token, NOBODY)] = weight
            cover_TS[t, self._cover_by_token.get(token, NOBODY)] = weight
        mass_T = state.mass + new_T.cumsum()
        for sums_TX, before_X in ((overlap_TQ, state.overlap_Q), (cover_TS, state.cover_S)):
            sums_TX[0] += before_X
            np.cumsum(sums_TX, axis=0, out=sums_TX)
        features_TSF = np.empty((num, subjects, len(FEATURES)), dtype=np.float32)
        features_TSF[:, :, :2] = state.features_SF[:, :2]
        for t, number, kind, share in named:
            features_TSF[t:, number, kind] = np.maximum(features_TSF[t:, number, kind], share)
        length_T1 = np.sqrt(np.maximum(mass_T, 1e-9))[:, None].astype(np.float32)
        sim_TS = np.maximum.reduceat(overlap_TQ / (self._norm_Q * length_T1), self._starts, axis=1)
        features_TSF[:, :, 2] = sim_TS
        features_TSF[:, :, 3] = sim_TS - _best_other(sim_TS)
        features_TSF[:, :, 4] = cover_TS / (mass_T + self.typical)[:, None]
        odds_TS = self.log_odds(features_TSF)
        best_TS = np.maximum.accumulate(np.maximum(odds_TS, state.best_S), axis=0)
        open_TS = np.where(best_TS >= self.threshold, odds_TS, -np.inf)
        sums = float(mass_T[-1]), overlap_TQ[-1], cover_TS[-1], features_TSF[-1], best_TS[-1], open_TS[-1]
        return State(state.seen | seen, last, *sums), features_TSF, open_TS

    def log_odds(self, features: Array) -> Array:
        """The gate on (..., F) features."""
        odds: Array = features @ self.gate_F1[:-1] + self.gate_F1[-1]
        return odds

    def best(self, ids: Sequence[int]) -> Array:
        """Largest log-odds of each subject at any position of a whole text: (S,)."""
        return self.read(self.start(), ids)[0].best_S

    def route(
        self,
        ids_BS: Tensor,
        mask_BS: Tensor,
        last: int,
        *,
        allowed: frozenset[str] | None = None,
        about: Sequence[str | None] | None = None,
    ) -> Routes:
        """The block of each of the ``last`` positions of every sequence.

        ``allowed``: subjects that may be opened at all. ``about``: the subject of each sequence, where it is known
        from a field of the request; its block is then opened from the first position on, and no other.
        """
        rows, cols = ids_BS.shape
        block_BT = np.array([[-1] * last] * rows)
        kept: dict[bytes, State] = {}
        shut = self._shut(allowed)
        mask_np, ids_np = mask_BS.cpu().numpy().astype(bool), ids_BS.cpu().numpy()
        for b in range(rows) if self.subjects else ():
            if about is not None and about[b] is not None:
                where = self.subjects.index(str(about[b])) if about[b] in self.subjects else -1
                if where >= 0 and not shut[where]:
                    block_BT[b] = where
                continue
            at_T = mask_np[b, cols - last :]
            num = np.count_nonzero(at_T)
            if not num:
                continue
            text = ids_np[b][mask_np[b]]
            key = text.tobytes()
            before = key[: -num * text.itemsize]
            state = self._last.get(before) if before else self.start()
            if state is None:
                state = self.read(self.start(), text[:-num].tolist())[0]
            kept[key], _, open_TS = self.read(state, text[-num:].tolist())
            if allowed is not None:
                open_TS = np.where(shut, -np.inf, open_TS)
            who_T = open_TS.argmax(1).tolist()
            block_BT[b, at_T] = [who if open_TS[t, who] > -np.inf else -1 for t, who in enumerate(who_T)]
        self._last = kept
        return Routes.of(self.subjects, block_BT)

    def _shut(self, allowed: frozenset[str] | None) -> Array:
        """Which blocks may not be opened, (S,)."""
        if self._shut_for is None or self._shut_for[0] != allowed:
            closed_S = np.array([allowed is not None and s not in allowed for s in self.subjects], dtype=bool)
            self._shut_for = allowed, closed_S
        return self._shut_for[1]


def _inverted(bags: Sequence[frozenset[int]]) -> dict[int, Array]:
    found: dict[int, list[int]] = {}
    for number, bag in enumerate(bags):
        for token in bag:
            found.setdefault(token, []).append(number)
    return {token: np.array(numbers, dtype=np.int64) for token, numbers in found.items()}


def _best_other(sim_TS: Array) -> Array:
    """For each subject the largest similarity of all others; 0 where there is no other."""
    if sim_TS.shape[1] < 2:
        return np.zeros_like(sim_TS)
    top_T2 = np.partition(sim_TS, -2, axis=1)[:, -2:]
    # Whoever has the highest looks at the second highest; of several with the highest, both are the same.
    other: Array = np.where(sim_TS == top_T2[:, 1:], top_T2[:, :1], top_T2[:, 1:])
    return other
