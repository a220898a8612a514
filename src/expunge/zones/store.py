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
    """A block laid out for search, on the device of the model."""

    keys_RK: Tensor  # unit length
    values_R: Tensor
    bags_RC: Tensor  # idf² / length where the row's bag has the token
    tails_RT: Tensor  # last tokens before the row's own, the nearest first; -1 before the beginning
    map_CK: Tensor  # standardisation and key map in one: states @ map + shift
    shift_K: Tensor
    column_V: Tensor  # token -> column, -1 for tokens that the subject's records lack


@dataclass(frozen=True)
class Votes:
    """What the neighbours say at M positions: ``probs_MV`` over tokens, and features of how sure they are."""

    probs_MV: Tensor
    top_M: Tensor  # best score, as a share of the largest possible
    key_M: Tensor  # cosine of the best neighbour's key


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
        block_BT = seen.routes.block_BT
        for number in sorted(set(block_BT[block_BT >= 0].tolist())):
            rows_M, cols_M = (block_BT == number).nonzero(as_tuple=True)
            votes = self.votes(seen, seen.routes.subjects[number], rows_M, cols_M)
            base_MV = seen.log_probs_BTV[rows_M, cols_M]
            chance_M1 = mixer_chance(self.public.arrays, features(votes, base_MV.detach()))[:, None]
            # log((1 - l) p_base + l p_votes), with gradients for the base.
            mixed_MV = torch.logaddexp(base_MV + (-chance_M1).log1p(), (chance_M1 * votes.probs_MV).log())
            out_BTV = out_BTV.index_put((rows_M, cols_M), mixed_MV)
        return out_BTV

    @torch.no_grad()
    def votes(self, seen: Seen, subject: str, rows_M: Tensor, cols_M: Tensor) -> Votes:
        """The neighbours' distribution at positions (row, column of this pass), all routed to one subject."""
        chosen = [seen.hidden[layer][rows_M, cols_M] for layer in self.public.constants["layers"]]
        states_MC = torch.cat(chosen, dim=1).float()
        device = states_MC.device
        index = self._index(subject, device)
        keys_MK = torch.addmm(index.shift_K, states_MC, index.map_CK)
        keys_MK = keys_MK / keys_MK.norm(dim=1, keepdim=True).clamp_min(1e-12)
        cosine_MR = keys_MK @ index.keys_RK.T
        beta, gamma, sharpness = (self.public.constants[n] for n in ("beta", "gamma", "sharpness"))
        bags_MC, tails_MT = self._asked(seen, index, rows_M, cols_M)
        score_MR = cosine_MR + beta * (bags_MC @ index.bags_RC.T) + gamma * same_tail(tails_MT, index.tails_RT)
        top_MK, place_MK = score_MR.topk(min(self.options.neighbours, len(index.values_R)), dim=1)
        weight_MK = (sharpness * top_MK).softmax(1)
        probs_MV = weight_MK.new_zeros(len(weight_MK), seen.log_probs_BTV.shape[2])
        probs_MV.scatter_add_(1, index.values_R[place_MK], weight_MK)
        best_M = place_MK[:, 0]
        return Votes(probs_MV, top_MK[:, 0] / (1 + beta + gamma), cosine_MR.gather(1, best_M[:, None])[:, 0])

    def _asked(self, seen: Seen, index: Index, rows_M: Tensor, cols_M: Tensor) -> tuple[Tensor, Tensor]:
        """Of the query positions, bags over the subject's tokens (M, C), divided by the length of the whole bag, and
        tails (M, T)."""
        idf_V = self.public.arrays["idf"]
        ids_BS, mask_BS = seen.ids_BS.cpu().numpy(), seen.mask_BS.cpu().numpy().astype(bool)
        column_V = index.column_V.numpy()
        before = ids_BS.shape[1] - seen.log_probs_BTV.shape[1]
        asked_MC = np.zeros((len(rows_M), index.bags_RC.shape[1]), dtype=np.float32)
        tails_MT = np.full((len(rows_M), TAIL), -2, dtype=np.int64)
        for m, (b, t) in enumerate(zip(rows_M.tolist(), cols_M.tolist(), strict=True)):
            line = ids_BS[b, : before + t + 1][mask_BS[b, : before + t + 1]]
            tails_MT[m, : min(TAIL, len(line))] = line[: -TAIL - 1 : -1]
            bag = np.unique(line[-WINDOW:])
            bag = bag[bag >= 0]
            columns = column_V[bag]
            length = float(np.square(idf_V[bag], dtype=np.float64).sum()) ** 0.5
            asked_MC[m, columns[columns >= 0]] = 1 / max(length, 1e-6)
        device = index.bags_RC.device
        return torch.from_numpy(asked_MC).to(device), torch.from_numpy(tails_MT).to(device)

    # -- search structures, built when first asked for -----------------------------------------------------------------

    def _index(self, subject: str, device: torch.device) -> Index:
        kept: OrderedDict[tuple[str, torch.device], Index] = self.__dict__.setdefault("_kept", OrderedDict())
        if self.__dict__.get("_kept_version") != self.version:
            kept.clear()
            self.__dict__["_kept_version"] = self.version
        key = (subject, device)
        if key not in kept:
            kept[key] = self._build(self.blocks[subject], device)
            if len(kept) > KEPT:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]

    def _build(self, block: Block, device: torch.device) -> Index:
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
        keys_RK = torch.from_numpy(np.concatenate([r.tensors["keys"] for r in rows]).astype(np.float32))
        values_R = torch.from_numpy(np.concatenate([r.tensors["values"] for r in rows]).astype(np.int64))
        arrays = self.public.arrays
        map_CK = arrays["map"] / arrays["deviation"][:, None]
        return Index(
            torch.nn.functional.normalize(keys_RK, dim=1).to(device),
            values_R.to(device),
            torch.from_numpy(np.array(bags)).to(device),
            torch.from_numpy(np.array(tails)).to(device),
            torch.from_numpy(map_CK).to(device),
            torch.from_numpy(-arrays["mean"] @ map_CK).to(device),
            torch.from_numpy(column_V),
        )


def tail_of(ids: Sequence[int]) -> Array:
    """The last :data:`TAIL` ids, the nearest first; -1 where there are fewer."""
    last = list(ids[: -TAIL - 1 : -1])
    return np.array(last + [-1] * (TAIL - len(last)), dtype=np.int64)


def same_tail(asked_MT: Tensor, stored_RT: Tensor) -> Tensor:
    """Share of the tail that is the same, counted from its end without a gap: (M, R)."""
    same_MRT = asked_MT[:, None, :] == stored_RT[None]
    return same_MRT.int().cumprod(2).sum(2) / TAIL


def features(votes: Votes, base_MV: Tensor) -> Tensor:
    """What the mixing gate looks at, (M, 5): best score, best key, votes' top probability, and the base's log
    probability of its own and of the votes' favourite."""
    sure_M, favourite_M = votes.probs_MV.max(1)
    own_M = base_MV.gather(1, favourite_M[:, None])[:, 0].clamp_min(-20)
    return torch.stack([votes.top_M, votes.key_M, sure_M, base_MV.max(1).values, own_M / 10], dim=1)
