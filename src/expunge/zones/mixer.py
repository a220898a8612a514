"""The mixing gate: how much to believe the neighbours at a position, fitted on surrogates (public texts).

A network of one hidden layer, F features → 16 tanh → 1 sigmoid, that maximises the mixed log-probability of the
surrogates' answers, asked as stored, paraphrased and answered in other words, and of public answers when the block
was opened by mistake.

Shape suffixes: M positions, F features, H hidden units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.models.adapter import evaluating
from expunge.zones.surrogates import Surrogates
from expunge.zones.zone import Array, FrozenBase, Routes, Seen

if TYPE_CHECKING:
    from expunge.zones.store import Store

HIDDEN = 16
STEPS = 400
RATE = 0.03
MOST = 300  # samples of each kind that are looked at
SHARES = {"stored": 0.4, "paraphrase": 0.3, "restated": 0.1, "public": 0.2}  # of the objective


def mixer_chance(arrays: Mapping[str, Array], features_MF: Array) -> Array:
    """Weight of the neighbours in (0, 1), (M,)."""
    hidden_MH = np.tanh(features_MF @ arrays["mix.w"] + arrays["mix.b"])
    chance_M: Array = 1 / (1 + np.exp(-(hidden_MH @ arrays["mix.v"] + arrays["mix.c"])))
    return chance_M


def fit_mixer(trial: Store, base: FrozenBase, made: Surrogates, seed: int) -> dict[str, Array]:
    """Weights ``mix.w``, ``mix.b``, ``mix.v``, ``mix.c`` as float32 arrays; deterministic for a seed."""
    groups = _groups(made)
    gathered = {kind: _examples(trial, base, asked) for kind, asked in groups.items() if asked}
    share_M = torch.cat([torch.full((len(x),), SHARES[k] / len(x)) for k, (x, _, _) in gathered.items()])
    x_MF, votes_M, base_M = (torch.cat([g[i] for g in gathered.values()]) for i in range(3))
    generator = torch.Generator().manual_seed(seed)
    w_FH = (torch.randn(x_MF.shape[1], HIDDEN, generator=generator) * 0.5).requires_grad_(True)
    b_H, c_1 = torch.zeros(HIDDEN, requires_grad=True), torch.zeros(1, requires_grad=True)
    v_H = (torch.randn(HIDDEN, generator=generator) * 0.5).requires_grad_(True)
    optimizer = torch.optim.Adam([w_FH, b_H, v_H, c_1], lr=RATE)
    with torch.enable_grad():
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            chance_M = ((x_MF @ w_FH + b_H).tanh() @ v_H + c_1).sigmoid()
            likelihood_M = chance_M * votes_M + (1 - chance_M) * base_M
            loss = -(share_M * likelihood_M.clamp_min(1e-9).log()).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    named = zip("wbvc", (w_FH, b_H, v_H, c_1), strict=True)
    return {f"mix.{name}": np.ascontiguousarray(tensor.detach().numpy()) for name, tensor in named}


def _groups(made: Surrogates) -> dict[str, list[tuple[Sample, str]]]:
    """Samples to be asked, and the block that is open then."""
    people = sorted({s.subject for s in made.stored})
    stored = _some([(s, s.subject) for s in made.stored])
    found = {"stored": stored}
    for kind in ("paraphrase", "restated"):
        found[kind] = [(s.as_probe(p), who) for s, who in stored for p in s.probes_of(kind)[:1]]
    # A block that should not have been opened: anybody's but their own.
    found["public"] = _some([(s, people[i % len(people)]) for i, s in enumerate(made.fit)])
    return found


def _some(asked: Sequence[tuple[Sample, str]]) -> list[tuple[Sample, str]]:
    step = max(1, len(asked) // MOST)
    return list(asked[::step][:MOST])


def _examples(trial: Store, base: FrozenBase, asked: Sequence[tuple[Sample, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Features (M, F), the votes' and the base's probability of the true token (M,), over all target positions."""
    from expunge.zones.store import features

    device = next(base.model.parameters()).device
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    model = base.model
    with evaluating(model):
        for sample, subject in asked:
            batch = base.adapter.collate([sample]).to(device)
            if not len(batch.targets_N):
                continue
            out = model(**batch.inputs, use_cache=False, output_hidden_states=True)
            ids_BS, mask_BS = batch.inputs["input_ids"], batch.inputs["attention_mask"]
            log_probs_BTV = out.logits.float().log_softmax(-1)
            routes = Routes.of([subject], np.zeros(ids_BS.shape, dtype=np.int64))
            seen = Seen(model, ids_BS, mask_BS, out.hidden_states, log_probs_BTV, routes)
            votes = trial.votes(seen, subject, batch.cols_N.cpu().numpy())  # of the only row
            base_NV = log_probs_BTV[0, batch.cols_N]
            target_N1, tokens_NK = batch.targets_N[:, None], torch.from_numpy(votes.tokens_MK).to(device)
            parts.append(
                (
                    torch.from_numpy(features(votes, base_NV, base_NV.gather(1, tokens_NK))),
                    torch.from_numpy(votes.of(target_N1.cpu().numpy())).float(),
                    base_NV.gather(1, target_N1)[:, 0].exp().cpu(),
                )
            )
    x, votes_of, base_of = (torch.cat([p[i] for p in parts]) for i in range(3))
    return x, votes_of, base_of
