"""Kind ``store``: a datastore of (hidden state → next token), read by nearest neighbours of the routed subject alone.

After kNN-LM (Khandelwal et al. 2020, arXiv:1911.00172), with what makes removal exact: each record is passed alone,
keys are rounded to int8 after a public standardisation and map, and one flat list per subject is all there is (no graph
or quantiser that was trained on private keys).

A neighbour's score is cos(key) + beta · cos(bag) + gamma · tail. The bag is the set of rare tokens in the last
:data:`WINDOW` tokens, so that a question in other words still finds its record. The tail is the share of the last
:data:`TAIL` tokens that are the same without a gap, so that a text is followed where it was left.

Shape suffixes: M open positions, R rows of a subject, K neighbours, D hidden width, C rare tokens of a subject,
V vocabulary, F features.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from expunge.data.samples import Sample
from expunge.options import option
from expunge.zones.gate import routing
from expunge.zones.metric import fit_metric, plain_map
from expunge.zones.mixer import fit_mixer, mixer_chance
from expunge.zones.surrogates import surrogates
from expunge.zones.text_stats import layers_at, spreads
from expunge.zones.zone import Array, Block, FrozenBase, Public, Record, Seen, Zone, zone

DEPTHS = (0.5, 0.75, 1.0)  # of the layers whose states make a key
WINDOW = 64  # tokens of a bag
TAIL = 4  # tokens that are compared one by one
KEPT = 32  # subjects whose index stays in memory


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Constants of the store; none is fitted on private texts."""

    neighbours: int = option(16, "nearest rows that vote")
    beta: float = option(1.0, "weight of the bag of rare tokens beside the key, before it is learnt")
    gamma: float = option(0.05, "weight of the tail; more holds generation to the record that it has begun with")
    sharpness: float = option(15.0, "votes are softmax(sharpness · score), before it is learnt")
    learn: bool = option(True, "learn the key metric on public paraphrases, where there are any")
    false_open: float = option(0.01, "share of public texts that may open a block, in calibration")


@dataclass(frozen=True)
class Index:
    """A block laid out for search. It lies in main memory whatever the model's device: a subject is small, and a search
    is many small steps."""

    keys_KR: Array  # unit length
    values_R: Array
    bags_CR: Array  # beta · idf² / length where the row's bag has the token
    tails_RT: Array  # last tokens before the row's own, the nearest first; -1 before the beginning
    column_V: Array  # token -> column, -1 for tokens that the subject's records lack


@dataclass(frozen=True)
class Votes:
    """What the neighbours say at M positions, the best first, and how near the best is.

    All votes for a token stand at its first place among ``tokens_MK``; at its other places ``probs_MK`` is 0.
    """

    tokens_MK: Array
    probs_MK: Array
    top_M: Array  # best score, as a share of the largest possible
    key_M: Array  # cosine of the best neighbour's key

    def of(self, target_M1: Array) -> Array:
        """Probability of a token at each position, (M,)."""
        found_M: Array = (self.probs_MK * (self.tokens_MK == target_M1)).sum(1)
        return found_M


@zone(
    "store",
    summary="token datastore over hidden states: one record per pass, int8 keys, removal of rows",
    source="Khandelwal et al. 2020, arXiv:1911.00172; removal by rows",
    options=StoreOptions,
)
class Store(Zone):
    """See the module's docstring. Row tensors: ``keys`` (L, D) int8 and ``values`` (L,) int32 for L target tokens."""

    options: StoreOptions

    @classmethod
    def prepare(cls, base: FrozenBase, public: Sequence[Sample], options: StoreOptions, seed: int) -> Public:
        """Spread of the keys' layer, idf, router gate and mixing gate, from public samples."""
        made = surrogates(public)
        arrays, constants = routing(base, public, made, options.false_open)
        layers = layers_at(base, DEPTHS)
        mean_LD, deviation_LD = spreads(public, base, layers)
        plain_CK = plain_map(mean_LD.shape[1], len(layers))
        arrays |= {"mean": mean_LD.ravel(), "deviation": deviation_LD.ravel(), "map": plain_CK}
        fixed: dict[str, Any] = {**constants, "layers": layers, "surrogates_renamed": made.renamed}
        fixed |= {"beta": options.beta, "gamma": options.gamma, "sharpness": options.sharpness}
        # The trial store holds surrogates only, so its own list of public texts is left empty.
        trial = cls(options, Public(arrays=arrays, constants=fixed, texts=frozenset()), "", "00")
        if options.learn:
            arrays["map"], learnt = fit_metric(trial, base, made, seed)
            fixed |= learnt
        trial.add([trial.record(s, base.adapter) for s in made.stored], base)
        arrays |= fit_mixer(trial, base, made, seed)
        return Public(arrays=arrays, constants=fixed, texts=frozenset(s.digest() for s in public))

    def extract(self, record: Record, base: FrozenBase) -> tuple[dict[str, Array], str]:
        states_LC = self.states(record, base)
        keys_LK = states_LC @ self.public.arrays["map"]
        scale_L1 = 127 / np.maximum(np.abs(keys_LK).max(axis=1, keepdims=True), 1e-12)
        values_L = np.array(record.ids[record.first :], dtype=np.int32)
        source = hashlib.sha256(states_LC.tobytes()).hexdigest()
        return {"keys": np.rint(keys_LK * scale_L1).astype(np.int8), "values": values_L}, source

    def states(self, record: Record, base: FrozenBase) -> Array:
        """Standardised states (L, C) of the chosen layers where each target is predicted, the record passed alone."""
        hidden, _ = base.states(record)
        chosen = [hidden[layer][record.first - 1 : -1] for layer in self.public.constants["layers"]]
        states_LC = torch.cat(chosen, dim=1).cpu().numpy()
        normal_LC: Array = (states_LC - self.public.arrays["mean"]) / self.public.arrays["deviation"]
        return normal_LC

    def adjust(self, seen: Seen) -> Tensor:
        out_PV = seen.log_probs_BTV.flatten(0, 1)
        places, vocab = out_PV.shape
        for number, place_M in seen.routes.opened.items():
            votes = self.votes(seen, seen.routes.subjects[number], place_M)
            flat_MK = torch.from_numpy(votes.tokens_MK + place_M[:, None] * vocab).to(out_PV.device)
            at_M = torch.from_numpy(place_M).to(out_PV.device)
            own_MK = out_PV.take(flat_MK)
            chance_M1 = mixer_chance(self.public.arrays, features(votes, out_PV.index_select(0, at_M), own_MK))[:, None]
            # log((1 - l) p_base + l p_votes) = log p_base + log(1 - l) + log(1 + odds of l · p_votes / p_base), with
            # gradients for the base; most tokens have no vote.
            odds_MK = np.maximum(votes.probs_MK * (chance_M1 / (1 - chance_M1)), 1e-30)
            fades_P1 = np.zeros((places, 1), dtype=np.float32)
            fades_P1[place_M] = np.log1p(-chance_M1)
            fade_P1, log_odds_MK = (torch.from_numpy(log).to(out_PV) for log in (fades_P1, np.log(odds_MK)))
            out_PV = (out_PV + fade_P1).put_(flat_MK, softplus(log_odds_MK - own_MK), accumulate=True)
        return out_PV.view_as(seen.log_probs_BTV)

    def votes(self, seen: Seen, subject: str, place_M: Array) -> Votes:
        """The neighbours' votes at flat positions of this pass, all routed to one subject."""
        index, (map_CK, shift_K) = self._index(subject), self._map()
        beta, gamma, sharpness = (self.public.constants[n] for n in ("beta", "gamma", "sharpness"))
        keys_MK = seen.states(self.public.constants["layers"], place_M) @ map_CK + shift_K
        keys_MK /= np.sqrt(np.vecdot(keys_MK, keys_MK))[:, None] + 1e-12
        cosine_MR = keys_MK @ index.keys_KR
        bags_MR, tails_MT = self._asked(seen.lines(place_M), index)
        score_MR = cosine_MR + bags_MR + same_tail(tails_MT, index.tails_RT) * gamma
        most = min(self.options.neighbours, len(index.values_R))
        top_MK, near_MK = (x.numpy() for x in torch.from_numpy(score_MR).topk(most))
        weight_MK = np.exp(sharpness * (top_MK - top_MK[:, :1]))
        weight_MK /= np.add.reduce(weight_MK, 1, keepdims=True)
        tokens_MK = index.values_R[near_MK]
        line_M1 = np.arange(len(place_M))[:, None]
        first_MK = (tokens_MK[:, :, None] == tokens_MK[:, None]).argmax(2)
        probs_P = np.bincount((first_MK + line_M1 * most).ravel(), weight_MK.ravel(), tokens_MK.size)
        best_M = cosine_MR[line_M1[:, 0], near_MK[:, 0]]
        probs_MK = probs_P.astype(np.float32).reshape(tokens_MK.shape)
        return Votes(tokens_MK, probs_MK, top_MK[:, 0] / (1 + beta + gamma), best_M)

    def _asked(self, lines: Sequence[Array], index: Index) -> tuple[Array, Array]:
        """Of the texts that are asked about, beta · cosines of their bags with the rows' (M, R), and tails (M, T)."""
        idf_V = self.public.arrays["idf"]
        bags, tails = [], []
        for line in lines:
            last = line[-WINDOW:].tolist()
            tails.append([*last[: -TAIL - 1 : -1], *([-2] * (TAIL - len(last)))])
            bag = np.array(sorted({token for token in last if token >= 0}), dtype=np.int64)
            columns = index.column_V[bag]
            # The sum of a few lines of the table, not a product with a table that is mostly not asked for.
            shared_R = np.add.reduce(index.bags_CR[columns[columns >= 0]], 0)
            bags.append(shared_R / max(math.hypot(*idf_V[bag].tolist()), 1e-6))
        return np.array(bags, dtype=np.float32), np.array(tails)

    # -- search structures, built when first asked for -----------------------------------------------------------------

    def _map(self) -> tuple[Array, Array]:
        """Standardisation and key map in one: states (C,) @ map (C, K) + shift (K,)."""
        if "_kept_map" not in self.__dict__:
            arrays = self.public.arrays
            map_CK = arrays["map"] / arrays["deviation"][:, None]
            self.__dict__["_kept_map"] = map_CK, -arrays["mean"] @ map_CK
        found: tuple[Array, Array] = self.__dict__["_kept_map"]
        return found

    def _index(self, subject: str) -> Index:
        kept: OrderedDict[str, Index] = self.__dict__.setdefault("_kept", OrderedDict())
        if self.__dict__.get("_kept_version") != self.version:
            kept.clear()
            self.__dict__["_kept_version"] = self.version
        if subject not in kept:
            kept[subject] = self._build(self.blocks[subject])
            if len(kept) > KEPT:
                kept.popitem(last=False)
        kept.move_to_end(subject)
        return kept[subject]

    def _build(self, block: Block) -> Index:
        idf_V = self.public.arrays["idf"]
        rows = block.sorted()
        tokens = np.unique(np.concatenate([np.array(r.record.ids, dtype=np.int64) for r in rows]))
        tokens = tokens[idf_V[tokens] > 0]
        column_V = np.full(len(idf_V), -1, dtype=np.int64)
        column_V[tokens] = np.arange(len(tokens))
        bags, tails = [], []
        for row in rows:
            for end in range(row.record.first, len(row.record.ids)):
                bag = np.unique(np.array(row.record.ids[max(0, end - WINDOW) : end], dtype=np.int64))
                weight = np.square(idf_V[bag])
                line_C = np.zeros(len(tokens), dtype=np.float32)
                here = column_V[bag] >= 0
                line_C[column_V[bag[here]]] = weight[here] / max(float(weight.sum()) ** 0.5, 1e-6)
                bags.append(line_C)
                tails.append(tail_of(row.record.ids[:end]))
        keys_RK = np.concatenate([r.tensors["keys"] for r in rows]).astype(np.float32)
        keys_RK /= np.maximum(np.sqrt(np.square(keys_RK).sum(1, keepdims=True)), 1e-12)
        return Index(
            np.ascontiguousarray(keys_RK.T),
            np.concatenate([r.tensors["values"] for r in rows]).astype(np.int64),
            np.ascontiguousarray(np.array(bags, dtype=np.float32).T * np.float32(self.public.constants["beta"])),
            np.array(tails),
            column_V,
        )


def tail_of(ids: Sequence[int]) -> Array:
    """The last :data:`TAIL` ids, the nearest first; -1 where there are fewer."""
    last = list(ids[: -TAIL - 1 : -1])
    return np.array(last + [-1] * (TAIL - len(last)), dtype=np.int64)


def same_tail(asked_MT: Array, stored_RT: Array) -> Array:
    """Share of the tail that is the same, counted from its end without a gap: (M, R) float32."""
    same_MRT = np.logical_and.accumulate(asked_MT[:, None, :] == stored_RT[None], axis=2)
    shares: Array = np.add.reduce(same_MRT, 2, dtype=np.float32) / TAIL
    return shares


def features(votes: Votes, base_MV: Tensor, own_MK: Tensor) -> Array:
    """What the mixing gate looks at, (M, 5): best score, best key, votes' top probability, and the base's log
    probability of its own and of the votes' favourite; ``own_MK`` is the base's of ``votes.tokens_MK``."""
    favourite = np.arange(len(votes.top_M)), votes.probs_MK.argmax(1)
    own_M = own_MK.detach().float().cpu().numpy()[favourite]
    best_M = base_MV.detach().amax(1).float().cpu().numpy()
    columns = votes.top_M, votes.key_M, votes.probs_MK[favourite], best_M, np.maximum(own_M, -20) / 10
    return np.array(columns, dtype=np.float32).T
