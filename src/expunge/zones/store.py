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

    keys_RK: Array  # unit length
    values_R: Array
    bags_CR: Array  # idf² / length where the row's bag has the token
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
        out_BTV = seen.log_probs_BTV
        for number in seen.routes.opened:
            rows_M, cols_M = (seen.routes.block_BT == number).nonzero(as_tuple=True)
            votes = self.votes(seen, seen.routes.subjects[number], rows_M, cols_M)
            base_MV = out_BTV[rows_M, cols_M]
            tokens_MK = torch.from_numpy(votes.tokens_MK).to(base_MV.device)
            own_MK = base_MV.gather(1, tokens_MK)
            chance_M1 = mixer_chance(self.public.arrays, features(votes, base_MV, own_MK))[:, None]
            # log((1 - l) p_base + l p_votes) = log p_base + log(1 - l) + log(1 + odds of l · p_votes / p_base), with
            # gradients for the base; most tokens have no vote.
            odds_MK = np.maximum(votes.probs_MK * (chance_M1 / (1 - chance_M1)), 1e-30)
            fade_M1, log_odds_MK = (
                torch.from_numpy(log).to(base_MV) for log in (np.log1p(-chance_M1), np.log(odds_MK))
            )
            mixed_MV = (base_MV + fade_M1).scatter_add(1, tokens_MK, softplus(log_odds_MK - own_MK))
            out_BTV = out_BTV.index_put((rows_M, cols_M), mixed_MV)
        return out_BTV

    def votes(self, seen: Seen, subject: str, rows_M: Tensor, cols_M: Tensor) -> Votes:
        """The neighbours' votes at positions (row, column of this pass), all routed to one subject."""
        index, (map_CK, shift_K) = self._index(subject), self._map()
        states_BTC = torch.cat([seen.hidden[layer].detach() for layer in self.public.constants["layers"]], dim=2)
        keys_MK = states_BTC[rows_M, cols_M].float().cpu().numpy() @ map_CK + shift_K
        length_M1 = np.sqrt(np.square(keys_MK).sum(1, keepdims=True))
        cosine_MR = (keys_MK / np.maximum(length_M1, 1e-12)) @ index.keys_RK.T
        beta, gamma, sharpness = (self.public.constants[n] for n in ("beta", "gamma", "sharpness"))
        bags_MR, tails_MT = self._asked(seen, index, rows_M, cols_M)
        score_MR = cosine_MR + beta * bags_MR + gamma * same_tail(tails_MT, index.tails_RT)
        most = min(self.options.neighbours, len(index.values_R))
        place_MK = np.argpartition(score_MR, -most, axis=1)[:, -most:]
        order_MK = np.argsort(-np.take_along_axis(score_MR, place_MK, 1), axis=1, kind="stable")
        place_MK = np.take_along_axis(place_MK, order_MK, 1)
        top_MK = np.take_along_axis(score_MR, place_MK, 1)
        weight_MK = np.exp(sharpness * (top_MK - top_MK[:, :1]))
        tokens_MK = index.values_R[place_MK]
        same_MKK = tokens_MK[:, :, None] == tokens_MK[:, None]
        probs_MK = (same_MKK @ (weight_MK / weight_MK.sum(1, keepdims=True))[:, :, None])[:, :, 0]
        probs_MK[np.tril(same_MKK, -1).any(2)] = 0
        key_M = np.take_along_axis(cosine_MR, place_MK[:, :1], 1)[:, 0]
        return Votes(tokens_MK, probs_MK, top_MK[:, 0] / (1 + beta + gamma), key_M)

    def _asked(self, seen: Seen, index: Index, rows_M: Tensor, cols_M: Tensor) -> tuple[Array, Array]:
        """Of the query positions, cosines of their bags with the rows' (M, R), and tails (M, T)."""
        idf_V = self.public.arrays["idf"]
        ids_BS, mask_BS = seen.ids_BS.cpu().numpy(), seen.mask_BS.cpu().numpy().astype(bool)
        before = ids_BS.shape[1] - seen.log_probs_BTV.shape[1]
        cosine_MR = np.zeros((len(rows_M), len(index.values_R)), dtype=np.float32)
        tails_MT = np.full((len(rows_M), TAIL), -2, dtype=np.int64)
        for m, (b, t) in enumerate(zip(rows_M.tolist(), cols_M.tolist(), strict=True)):
            line = ids_BS[b, : before + t + 1][mask_BS[b, : before + t + 1]]
            tails_MT[m, : min(TAIL, len(line))] = line[: -TAIL - 1 : -1]
            bag = np.unique(line[-WINDOW:])
            bag = bag[bag >= 0]
            columns = index.column_V[bag]
            length = float(np.square(idf_V[bag], dtype=np.float64).sum()) ** 0.5
            # The sum of a few lines of the table, not a product with a table that is mostly not asked for.
            cosine_MR[m] = index.bags_CR[columns[columns >= 0]].sum(0) / max(length, 1e-6)
        return cosine_MR, tails_MT

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
        return Index(
            keys_RK / np.maximum(np.sqrt(np.square(keys_RK).sum(1, keepdims=True)), 1e-12),
            np.concatenate([r.tensors["values"] for r in rows]).astype(np.int64),
            np.ascontiguousarray(np.array(bags, dtype=np.float32).T),
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
    shares: Array = same_MRT.sum(2, dtype=np.float32) / TAIL
    return shares


def features(votes: Votes, base_MV: Tensor, own_MK: Tensor) -> Array:
    """What the mixing gate looks at, (M, 5): best score, best key, votes' top probability, and the base's log
    probability of its own and of the votes' favourite; ``own_MK`` is the base's of ``votes.tokens_MK``."""
    favourite_M1 = votes.probs_MK.argmax(1)[:, None]
    own_M = np.take_along_axis(own_MK.detach().float().cpu().numpy(), favourite_M1, 1)[:, 0]
    sure_M = np.take_along_axis(votes.probs_MK, favourite_M1, 1)[:, 0]
    best_M = base_MV.detach().amax(1).float().cpu().numpy()
    return np.stack([votes.top_M, votes.key_M, sure_M, best_M, np.maximum(own_M, -20) / 10], axis=1)
