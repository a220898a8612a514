"""The key metric: a linear map under which the same fact, asked in other words, is near; learnt on surrogates.

What a language model's states have most in common is not which fact is asked for. Here the map (and the weight of the
bag, and the sharpness of the vote) maximise the votes for the right row when a surrogate's question is
paraphrased, with all of the surrogate's rows as candidates: neighbourhood component analysis
(Goldberger et al. 2004) with record and next token as the class. Where public samples have no paraphrases, the plain
states of the middle layer are the key.

Shape suffixes: M query positions, R rows of a subject, C concatenated states, K key width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from expunge.zones.surrogates import Surrogates
from expunge.zones.zone import Array, FrozenBase, Record, record_of

if TYPE_CHECKING:
    from expunge.zones.store import Store

WIDTH = 128  # of a key, at most
EPOCHS = 30
RATE = 5e-3
PULL = 1e-4  # pulls the map to where it started, so that few public texts cannot bend it far


@dataclass(frozen=True)
class Person:
    """One surrogate: rows as stored, and the paraphrased questions' positions that should find them."""

    rows_RC: Tensor
    asked_MC: Tensor
    right_MR: Tensor  # the row is of the record that is asked about, and has the token to be predicted
    bag_MR: Tensor  # cosine of the bags
    tail_MR: Tensor


def plain_map(width: int, layers: int) -> Array:
    """The middle one of ``layers`` concatenated states of ``width``, cut to :data:`WIDTH` by a fixed random map."""
    keep = min(width, WIDTH)
    generator = torch.Generator().manual_seed(0)
    narrow = torch.eye(width) if keep == width else torch.randn(width, keep, generator=generator) / keep**0.5
    whole = torch.zeros(layers, width, keep)
    whole[layers // 2] = narrow
    found: Array = whole.view(layers * width, keep).numpy()
    return found


def fit_metric(trial: Store, base: FrozenBase, made: Surrogates, seed: int) -> tuple[Array, dict[str, float]]:
    """Map (C, K) float32, beta and sharpness; the trial store's own where nothing can be learnt."""
    start_CK = torch.from_numpy(trial.public.arrays["map"])
    names = ("beta", "sharpness")
    gamma = float(trial.public.constants["gamma"])
    start_2 = [float(trial.public.constants[n]) for n in names]
    people = [p for who in sorted({s.subject for s in made.stored}) if (p := _person(trial, base, made, who))]
    if not people:
        return trial.public.arrays["map"], dict(zip(names, start_2, strict=True))
    map_CK = start_CK.clone().requires_grad_(True)
    logs_2 = torch.tensor(start_2).clamp_min(1e-3).log().requires_grad_(True)
    optimizer = torch.optim.Adam([map_CK, logs_2], lr=RATE)
    order = torch.Generator().manual_seed(seed)
    total = EPOCHS * len(people)
    with torch.enable_grad():
        for turn in range(total):
            if turn % len(people) == 0:
                queue = torch.randperm(len(people), generator=order).tolist()
            optimizer.param_groups[0]["lr"] = RATE * (1 - turn / total)
            beta_1, sharpness_1 = logs_2.exp()
            loss = _loss(people[queue[turn % len(people)]], map_CK, beta_1, sharpness_1, gamma)
            loss = loss + PULL * (map_CK - start_CK).square().sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    learnt = logs_2.detach().exp().tolist()
    return np.ascontiguousarray(map_CK.detach().numpy()), dict(zip(names, map(float, learnt), strict=True))


def _loss(person: Person, map_CK: Tensor, beta_1: Tensor, sharpness_1: Tensor, gamma: float) -> Tensor:
    """Mean of -ln of the votes for the right rows, floored."""
    keys_RK = torch.nn.functional.normalize(person.rows_RC @ map_CK, dim=1)
    asked_MK = torch.nn.functional.normalize(person.asked_MC @ map_CK, dim=1)
    score_MR = asked_MK @ keys_RK.T + beta_1 * person.bag_MR + gamma * person.tail_MR
    votes_M = ((sharpness_1 * score_MR).softmax(1) * person.right_MR).sum(1)
    return -votes_M.clamp_min(1e-4).log().mean()


def _person(trial: Store, base: FrozenBase, made: Surrogates, who: str) -> Person | None:
    from expunge.zones.store import same_tail

    samples = [s for s in made.stored if s.subject == who]
    asked = [(n, s.as_probe(p, i)) for n, s in enumerate(samples) for i, p in enumerate(s.probes_of("paraphrase"))]
    if not asked:
        return None
    rows = [(n, record_of(s, base.adapter, (), s.digest())) for n, s in enumerate(samples)]
    queries = [(n, record_of(s, base.adapter, (), s.digest())) for n, s in asked]
    row_R2, row_bags_RV = _stacked(rows, trial)
    query_M2, query_bags_MV = _stacked(queries, trial)
    return Person(
        torch.from_numpy(np.concatenate([trial.states(r, base) for _, r in rows])),
        torch.from_numpy(np.concatenate([trial.states(r, base) for _, r in queries])),
        torch.from_numpy((query_M2[:, None] == row_R2[None]).all(2)),
        torch.from_numpy(query_bags_MV @ row_bags_RV.T),
        torch.from_numpy(same_tail(_tails(queries), _tails(rows))),
    )


def _tails(records: Sequence[tuple[int, Record]]) -> Array:
    from expunge.zones.store import tail_of

    return np.array([tail_of(r.ids[:end]) for _, r in records for end in range(r.first, len(r.ids))])


def _stacked(records: Sequence[tuple[int, Record]], trial: Store) -> tuple[Array, Array]:
    """(number of the record, target id), and unit-length bags over the vocabulary, of all target positions."""
    from expunge.zones.store import WINDOW

    idf_V = trial.public.arrays["idf"]
    targets, bags = [], []
    for number, record in records:
        ids = record.ids
        for end in range(record.first, len(ids)):
            bag = np.unique(np.array(ids[max(0, end - WINDOW) : end], dtype=np.int64))
            line_V = np.zeros(len(idf_V), dtype=np.float32)
            line_V[bag] = idf_V[bag] / max(float(np.square(idf_V[bag], dtype=np.float64).sum()) ** 0.5, 1e-6)
            targets.append((number, ids[end]))
            bags.append(line_V)
    return np.array(targets, dtype=np.int64), np.array(bags)
