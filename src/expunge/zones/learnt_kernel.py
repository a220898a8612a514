"""The kernel of closed-form zones, learnt: a map under which ridge regression answers what is asked in other words.

The kernel is exp(p⟨h, h'⟩ + q⟨b, b'⟩ - p - q) with h the states times the map, of length 1, and b the bag of rare
tokens. Map, p and q minimise what the ridge itself loses on surrogates: it is solved on a surrogate's rows, and judged
by its log-loss where that surrogate's questions are paraphrased, and on the rows themselves (a differentiable closed
form: Bertinetto et al. 2019, arXiv:1805.08136). The base has no say in the loss: what it knows about public people, and
so about surrogates, it does not know about private ones, and a map that leans on it would not do for them.

Shape suffixes: N rows of a surrogate, M positions that are asked, C concatenated states, K key width, H bag width,
V tokens that the rows' targets have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from expunge.zones.metric import plain_map
from expunge.zones.zone import Array

EPOCHS = 30
RATE = 1e-2
PULL = 1e-4  # pulls the map to where it started, so that few public texts cannot bend it far
START = 4.0  # of p and q
MOST = 512  # rows, and positions asked, of one step: of larger surrogates, records are drawn anew for each
OWN = 0.3  # weight of the rows themselves in the loss
WORST = 9.2  # nats that one position counts at most: a token that cannot be known should not bend the map


@dataclass(frozen=True)
class Positions:
    """Target positions of some records of one surrogate."""

    states_NC: Tensor  # each layer of length 1
    bags_NH: Tensor
    record_N: Tensor  # number of the record
    target_N: Tensor  # column of the token to be predicted

    def of(self, chosen: Tensor) -> Positions:
        return Positions(*(value[chosen] for value in vars(self).values()))


@dataclass(frozen=True)
class Surrogate:
    """One made-up person: the rows as a zone would hold them, and paraphrased questions with the same answers."""

    rows: Positions
    asked: Positions

    def drawn(self, generator: torch.Generator) -> Surrogate:
        """As many records as have :data:`MOST` rows, and as many of the positions that ask for them."""
        rows, asked = self.rows, self.asked
        if len(rows.record_N) > MOST:
            rows_R = torch.bincount(rows.record_N)
            order_R = torch.randperm(len(rows_R), generator=generator)
            kept_R = order_R[(rows_R[order_R].cumsum(0) <= MOST).logical_or(order_R == order_R[0])]
            rows, asked = rows.of(torch.isin(rows.record_N, kept_R)), asked.of(torch.isin(asked.record_N, kept_R))
        if len(asked.record_N) > MOST:
            asked = asked.of(torch.randperm(len(asked.record_N), generator=generator)[:MOST])
        return Surrogate(rows, asked)


def learn_kernel(
    people: Sequence[Surrogate], layers: int, alpha: float, scale: float, seed: int
) -> tuple[Array, float, float]:
    """Map (C, K) float32, p and q for a ridge of this α and scale c; deterministic for a seed."""
    start_CK = torch.from_numpy(plain_map(people[0].rows.states_NC.shape[1] // layers, layers))
    map_CK = start_CK.clone().requires_grad_(True)
    logs_2 = torch.full((2,), START).log().requires_grad_(True)
    optimizer = torch.optim.Adam([map_CK, logs_2], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    total = EPOCHS * len(people)
    with torch.enable_grad():
        for turn in range(total):
            if turn % len(people) == 0:
                queue = torch.randperm(len(people), generator=generator).tolist()
            optimizer.param_groups[0]["lr"] = RATE * (1 - turn / total)
            person = people[queue[turn % len(people)]].drawn(generator)
            loss = ridge_loss(person, map_CK, logs_2.exp(), alpha, scale) + PULL * (map_CK - start_CK).square().sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    p, q = logs_2.detach().double().exp().tolist()
    return np.ascontiguousarray(map_CK.detach().numpy()), p, q


def ridge_loss(person: Surrogate, map_CK: Tensor, weights_2: Tensor, alpha: float, scale: float) -> Tensor:
    """Mean log-loss of the paraphrased positions, and :data:`OWN` of it that of the rows, in nats."""
    rows, asked = person.rows, person.asked
    kernel_NN, kernel_MN = (kernel_of(seen, rows, map_CK, weights_2) for seen in (rows, asked))
    system_NN = kernel_NN + alpha * torch.eye(len(kernel_NN))
    solved_NV = torch.linalg.solve(system_NN, scale * one_hot(rows.target_N).float())
    own, others = (
        cross_entropy(kernel @ solved_NV, seen.target_N, reduction="none").clamp_max(WORST).mean()
        for seen, kernel in ((rows, kernel_NN), (asked, kernel_MN))
    )
    return OWN * own + (1 - OWN) * others


def kernel_of(seen: Positions, rows: Positions, map_CK: Tensor, weights_2: Tensor) -> Tensor:
    """exp(p⟨h, h'⟩ + q⟨b, b'⟩ - p - q), (M, N)."""
    keys_MK, keys_NK = (normalize(x.states_NC @ map_CK, dim=1) for x in (seen, rows))
    p, q = weights_2
    near_MN: Tensor = p * (keys_MK @ keys_NK.T - 1) + q * (seen.bags_NH @ rows.bags_NH.T - 1)
    return near_MN.exp()
