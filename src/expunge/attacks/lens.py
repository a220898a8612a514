"""Logit lens: is the answer still written in the inner layers when the last one no longer says it?

Every block's output at the answer's positions goes through the model's final norm and its output head, as if the
model ended there (nostalgebraist 2020). A method that silences an answer in its last layers leaves it readable
further down (Lynch et al. 2024, arXiv:2402.16835; Łucki et al. 2024, arXiv:2409.18025). Without the final norm the
inner states have another scale and the readings mean nothing.

Shape suffixes: N target positions, M of them, D hidden width, V vocabulary, K blocks, L target tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter, Positions, evaluating
from expunge.models.text import causal_lm
from expunge.options import option
from expunge.signals.forward import token_numbers
from expunge.stats import Estimate, bootstrap_mean

ROLES: tuple[Role, ...] = ("forget", "retain", "holdout")


@contextmanager
def block_outputs(model: nn.Module, adapter: Adapter) -> Iterator[list[Tensor]]:
    """Inside, every pass fills the list with the blocks' outputs, input side first, (B, T, D) each."""
    blocks = adapter.blocks(model)
    seen: list[Tensor] = [torch.empty(0)] * len(blocks)

    def keep(place: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[place] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(blocks)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Inside:
    """One batch seen from inside: the blocks' outputs at its target positions, and what the model ends in."""

    positions: Positions
    states: list[Tensor]  # (N, D) per block
    rows: list[int]  # place of each sample of the batch in what was asked for


def inside(checkpoint: Checkpoint, samples: Sequence[Sample]) -> Iterator[Inside]:
    """Batches of one pass each, longest samples first, without gradients."""
    model, adapter = checkpoint.model, checkpoint.adapter
    with evaluating(model), block_outputs(model, adapter) as seen:
        for group in adapter.batches(samples, checkpoint.max_tokens):
            own = [samples[i] for i in group]
            cols_N = adapter.collate(own).cols_N
            positions = adapter.positions(model, own)
            rows_N = positions.sample_N
            yield Inside(positions, [s[rows_N, cols_N.to(rows_N.device)] for s in seen], group)


def final_norm(checkpoint: Checkpoint, sample: Sample) -> nn.Module:
    """The module between the last block and the output head, found by what it does and not by its name.

    Raises:
        UserError: no single module of the model turns the last block's output into the states before the head.
    """
    with torch.no_grad():
        first = next(inside(checkpoint, [sample]))
        last_ND, wanted_ND = first.states[-1], first.positions.hidden_ND
        if torch.equal(last_ND, wanted_ND):
            return nn.Identity()  # the last block ends in its norm
        width = last_ND.shape[-1]
        inner: nn.Module = causal_lm(checkpoint.model)
        for module in inner.modules():
            own = list(module.parameters(recurse=False))
            vectors = bool(own) and all(p.shape == (width,) for p in own) and not list(module.children())
            if vectors or (not own and "norm" in type(module).__name__.lower()):
                try:
                    found_ND = module(last_ND)
                except (RuntimeError, TypeError):
                    continue
                if found_ND.shape == wanted_ND.shape and _near(found_ND, wanted_ND):
                    return module
    raise UserError(
        f"the final norm of {type(causal_lm(checkpoint.model)).__name__} was not found: leave the logit-lens attack "
        "out, its inner layers cannot be read with the output head."
    )


def _near(found: Tensor, wanted: Tensor) -> bool:
    room = 1e-4 if wanted.dtype == torch.float32 else 2e-2
    return bool((found - wanted).float().abs().max() <= room * wanted.float().abs().max().clamp_min(1e-6))


@dataclass(frozen=True)
class Reading:
    """One sample through the lens: log-probability in nats and rank (0 = first) of each answer token, per block."""

    log_prob_KL: NDArray[np.float64]
    rank_KL: NDArray[np.int64]
    fact_L: NDArray[np.bool_]  # which tokens carry the fact, see :func:`fact_tokens`


def read(checkpoint: Checkpoint, samples: Sequence[Sample]) -> list[Reading]:
    """All samples through the lens, in the order given; logits exist for one chunk and block at a time."""
    found: list[Reading | None] = [None] * len(samples)
    if not samples:
        return []
    norm = final_norm(checkpoint, samples[0])
    for batch in inside(checkpoint, samples):
        spots = batch.positions
        layers = []
        for states_ND in batch.states:
            through = Positions(norm(states_ND), spots.targets_N, spots.sample_N, spots.num_samples, spots.head)
            layers.append(through.per_token(token_numbers).reshape(-1, 5).double().cpu().numpy())
        numbers_KN = np.stack(layers)
        sample_N, ids_N = spots.sample_N.cpu().numpy(), spots.targets_N.cpu().numpy()
        for row, index in enumerate(batch.rows):
            mine_KL = numbers_KN[:, sample_N == row]
            fact_L = fact_tokens(checkpoint.adapter, samples[index], ids_N[sample_N == row])
            found[index] = Reading(mine_KL[..., 0], mine_KL[..., 4].astype(np.int64), fact_L)
    return [r for r in found if r is not None]


def fact_tokens(adapter: Adapter, sample: Sample, ids_L: NDArray[Any]) -> NDArray[np.bool_]:
    """Which target tokens carry the fact: not special, not in the prompt, and, where the sample has such probes, in
    the restated answer and in no wrong one. A rule that would leave none is not applied.
    """
    prompt = getattr(adapter.cached(sample), "prompt", ())
    special = getattr(getattr(adapter, "tokenizer", None), "all_special_ids", ())
    fact_L = np.ones(len(ids_L), dtype=bool)
    rules = [~np.isin(ids_L, list(special)), ~np.isin(ids_L, list(prompt))]
    for kind in ("restated", "perturbed"):
        views = [adapter.cached(sample.as_probe(p)) for p in sample.probes if p.kind == kind]
        if views:
            said_L = np.isin(ids_L, [i for view in views for i in view.ids[view.first :]])
            rules.append(said_L if kind == "restated" else ~said_L)
    for rule_L in rules:
        if (fact_L & rule_L).any():
            fact_L &= rule_L
    return fact_L


@dataclass(frozen=True, kw_only=True)
class LensOptions:
    """Of the logit-lens attack."""

    budget: int = option(20, "guesses per answer token that the candidate attack may make", "Patil et al. 2024, B")


def best_layer(reading: Reading) -> tuple[float, int]:
    """(largest mean log-probability of the answer over the blocks, that block); nan without a target token."""
    if reading.log_prob_KL.shape[1] == 0:
        return float("nan"), -1
    means_K = reading.log_prob_KL.mean(axis=1)
    layer = int(means_K.argmax())
    return float(means_K[layer]), layer


def in_candidates(reading: Reading, budget: int) -> NDArray[np.bool_]:
    """Which fact tokens stand in the candidate set: the top ``budget // K`` tokens of each of the K blocks, joined.

    With fewer guesses than blocks, one guess in each of the last ``budget`` blocks.
    """
    each = max(1, budget // len(reading.rank_KL))
    used = reading.rank_KL[-(budget // each) :]
    return np.asarray((used[:, reading.fact_L] < each).any(axis=0))


@attack(
    name="logit-lens",
    family="recovery",
    tier="standard",
    access="weights",
    paper="nostalgebraist 2020; Patil et al. 2024, arXiv:2309.17410 (candidate sets); arXiv:2402.16835",
    options=LensOptions,
    formula="max over blocks k of mean_t log p_k(y_t), p_k = softmax(head(norm(h_k))); candidates: share of y_t in "
    "the union of the top B/K tokens of the K blocks",
    passes=2.0,
    modalities={"text", "multimodal"},
)
def logit_lens(exam: Exam, checkpoint: Checkpoint, options: LensOptions) -> Finding:
    """Reads the answer from every block with the final norm and the output head.

    ``logit-lens`` is the best block's mean log-probability of the answer in nats; ``logit-lens.candidates`` the share
    of the answer's fact tokens (see :func:`fact_tokens`) that ``budget`` guesses per token contain. Figures: the
    same as means over forget for each block, and the share of forget samples whose every fact token is found.

    Raises:
        UserError: the budget is below 1, or the model's final norm cannot be found.
    """
    if options.budget < 1:
        raise UserError(f"a budget of {options.budget} guesses is too small: give at least 1, usually 20.")
    best: dict[Role, list[float]] = {}
    shares: dict[Role, list[float]] = {}
    figures: dict[str, Estimate] = {}
    details: dict[str, dict[str, Any]] = {}
    for role in [r for r in ROLES if exam.samples.get(r)]:
        samples = exam.samples[role]
        readings = read(checkpoint, samples)
        best[role] = [best_layer(r)[0] for r in readings]
        hits = [in_candidates(r, options.budget) for r in readings]
        shares[role] = [float(h.mean()) if h.size else float("nan") for h in hits]
        if role != "forget":
            continue
        groups = [s.subject for s in samples]
        settings: dict[str, Any] = {"level": exam.level, "resamples": exam.resamples, "seed": exam.seed}
        whole = [float(h.all()) if h.size else float("nan") for h in hits]
        figures["logit-lens.answers"] = bootstrap_mean(
            whole, groups, **settings, definition=f"lens-answers@{options.budget}/1"
        )
        for k in range(len(readings[0].log_prob_KL)):
            means = [float(r.log_prob_KL[k].mean()) if r.log_prob_KL.size else float("nan") for r in readings]
            figures[f"logit-lens.block_{k + 1}"] = bootstrap_mean(
                means, groups, **settings, definition="lens-log-prob/1"
            )
        for sample, reading in zip(samples, readings, strict=True):
            value, layer = best_layer(reading)
            details[sample.id] = {"best_block": layer + 1, "log_prob": value, "ranks": reading.rank_KL.min(0).tolist()}
    notes = [f"candidates: {options.budget} guesses per token, over all blocks together"]
    return Finding({"logit-lens": best, "logit-lens.candidates": shares}, figures, details, notes)
