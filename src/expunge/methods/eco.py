"""Embedding-corrupted prompts: a classifier knows prompts that must be forgotten, noise on their embeddings does it.

Shape suffixes: B samples, T tokens, H buckets of token n-grams, W rows of noise, D corrupted dimensions.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.icu import flipped
from expunge.methods.registry import Context, Outcome, method
from expunge.models.adapter import Adapter, Batch, evaluating
from expunge.models.attached import Attachment, attach
from expunge.models.text import causal_lm
from expunge.options import option

GRAMS = 3  # tokens in the longest n-gram that the classifier looks at
PRIME, MODULUS = 1_000_003, 2**31 - 1
FOLDS = 5
GRID = range(-3, 6)  # of the search's beginning: powers of e around noise as long as an embedding


@dataclass(frozen=True, kw_only=True)
class EcoOptions:
    """The classifier's errors, and the search for the strength of the noise."""

    alpha: float = option(
        0.05, "share of other prompts that may be corrupted too", "ours: the paper's threshold is conformal"
    )
    buckets: int = option(4096, "buckets of token n-grams that the classifier weighs", "ours: offline, for RoBERTa")
    dims: int = option(
        0, "leading dimensions of the embeddings that get noise; 0 = all", "ours: the paper tries several"
    )
    steps: int = option(15, "steps of the search for the strength", "ours: the loss settles within them")
    rate: float = option(1.0, "step of the search, on the logarithm of the strength", "ours: free in the paper")
    difference: float = option(0.1, "step of the finite difference, likewise", "ours: free in the paper")
    probes: int = option(64, "forget samples that the search looks at", "ours: two passes over them are one step")

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1 or self.rate <= 0 or self.difference <= 0:
            raise UserError(
                f"alpha = {self.alpha}, rate = {self.rate}, difference = {self.difference}: alpha is above 0 and below "
                "1, the others above 0."
            )
        if min(self.buckets, self.probes) < 1 or min(self.dims, self.steps) < 0:
            raise UserError(
                f"buckets = {self.buckets}, probes = {self.probes}, dims = {self.dims}, steps = {self.steps}: the "
                "first two are 1 or more, the others 0 or more."
            )


def features_BH(ids_BT: Tensor, mask_BT: Tensor, buckets: int) -> Tensor:
    """Which n-grams of the masked tokens occur, hashed into buckets, each row of length 1 (or 0 without a token)."""
    found_BH = torch.zeros(len(ids_BT), buckets, device=ids_BT.device)
    width = ids_BT.shape[1]
    for n in range(1, min(GRAMS, width) + 1):
        code_BT = torch.full_like(ids_BT[:, : width - n + 1], n)
        whole_BT = torch.ones_like(code_BT, dtype=torch.bool)
        for k in range(n):
            cut = slice(k, width - n + 1 + k)
            code_BT = (code_BT * PRIME + ids_BT[:, cut] + 1) % MODULUS
            whole_BT &= mask_BT[:, cut]
        found_BH.scatter_add_(1, code_BT % buckets, whole_BT.float())
    found_BH.clamp_max_(1)
    return found_BH / found_BH.sum(1, keepdim=True).sqrt().clamp_min(1)


class Corruption(Attachment):
    """Adds ``sigma``·noise to the embeddings of a prompt whose score is above the threshold.

    The prompt is what a generation starts from; in a pass over samples it ends where the targets begin. What is
    generated, or given as embeddings, is never touched. ``noise_WD`` is drawn once: token t of a prompt always gets
    row t mod W, so that measuring twice gives the same.
    """

    kind = "eco"

    def __init__(self, buckets: int, rows: int, dims: int) -> None:
        super().__init__()
        self.weight_H: Tensor
        self.noise_WD: Tensor
        self.threshold: Tensor
        self.sigma: Tensor
        self.register_buffer("weight_H", torch.zeros(buckets))
        self.register_buffer("noise_WD", torch.zeros(rows, dims))
        self.register_buffer("threshold", torch.tensor(math.inf))
        self.register_buffer("sigma", torch.tensor(0.0))
        self._prompt_B: Tensor | None = None  # of the pass that comes next
        self._shift_BTD: Tensor | None = None  # of the pass that is under way

    def arguments(self) -> dict[str, Any]:
        return {"buckets": len(self.weight_H), "rows": self.noise_WD.shape[0], "dims": self.noise_WD.shape[1]}

    def install(self, model: Any) -> None:
        model.base_model.register_forward_pre_hook(self.before, with_kwargs=True)
        model.base_model.register_forward_hook(self.after)
        model.get_input_embeddings().register_forward_hook(self.corrupt)

    def see(self, batch: Batch) -> None:
        width = batch.inputs["input_ids"].shape[1]
        whole_B = torch.full((batch.num_samples,), width, dtype=torch.long, device=batch.cols_N.device)
        self._prompt_B = whole_B.scatter_reduce(0, batch.sample_N, batch.cols_N + 1, "amin")

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        ids_BT, cache = given.get("input_ids"), given.get("past_key_values")
        prompt_B, self._prompt_B, self._shift_BTD = self._prompt_B, None, None
        if ids_BT is None or (cache is not None and cache.get_seq_length() > 0):
            return  # no prompt to read, or its answer
        seen = given.get("attention_mask")
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool) if seen is None else seen.bool()
        if prompt_B is not None and len(prompt_B) == len(ids_BT):
            mask_BT = mask_BT & (torch.arange(ids_BT.shape[1], device=ids_BT.device) < prompt_B[:, None])
        flagged_B = self.scores(ids_BT, mask_BT) > self.threshold
        place_BT = (mask_BT.long().cumsum(1) - 1).clamp_min(0) % len(self.noise_WD)
        touched_BT = mask_BT & flagged_B[:, None]
        self._shift_BTD = self.sigma * self.noise_WD[place_BT] * touched_BT[:, :, None]

    def scores(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Log-odds that the masked tokens are a prompt to be forgotten, up to a constant, (B,)."""
        return features_BH(ids_BT, mask_BT, len(self.weight_H)) @ self.weight_H

    def corrupt(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        shift_BTD = self._shift_BTD
        if shift_BTD is None or output.shape[:2] != shift_BTD.shape[:2]:
            return output
        padding = (0, output.shape[2] - shift_BTD.shape[2])
        return output + torch.nn.functional.pad(shift_BTD, padding).to(output.dtype)

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self._shift_BTD = None


@method(
    name="eco",
    options=EcoOptions,
    paper="Liu et al. 2024, arXiv:2406.07933",
    formula="p_θ(· | e(x) + σξ) where C(x) > τ, p_θ(· | e(x)) elsewhere",
    needs=frozenset({"retain"}),
    wants=frozenset({"unseen"}),
    modalities=frozenset({"text", "multimodal"}),
    removes_from_weights=False,
    changes="beside",
)
def eco(context: Context, options: EcoOptions) -> Outcome:
    """Corrupt the embeddings of prompts that a classifier knows to be forgotten; a guard, weights still know it all.

    The classifier is logistic regression on token n-grams, learnt offline from the prompts of forget and retain, in
    place of the paper's RoBERTa; its threshold is conformal on prompts that it has not been fitted on. A prompt in
    other words that shares no n-gram is not known, and a document has no prompt: neither is guarded.
    """
    notes = []
    inner = causal_lm(context.model)
    width = int(inner.get_input_embeddings().weight.shape[1])
    if options.dims > width:
        raise UserError(f"dims = {options.dims}, and the model's embeddings have {width}: give at most that many.")
    guard = Corruption(options.buckets, int(context.adapter.context), options.dims or width)  # type: ignore[attr-defined]
    device = next(inner.parameters()).device
    generator = torch.Generator().manual_seed(context.seed)
    guard.noise_WD.copy_(torch.randn(guard.noise_WD.shape, generator=generator))
    guard.to(device)

    false_alarms = fit_classifier(guard, context, options)
    known = float((prompt_scores(guard, context.adapter, context.forget) > guard.threshold).float().mean())
    if not context.unseen:
        notes.append("no never-seen texts were given: retain prompts alone calibrate, and wrong answers set the level")
    if known < 1:
        notes.append(f"the classifier knows {known:.0%} of the forget prompts: the others are answered as before")
    goal = wanted_loss(context)
    attach(inner, guard)
    rows = np.random.default_rng(context.seed).permutation(len(context.forget))[: options.probes]
    some = [context.forget[i] for i in sorted(rows)]

    def miss(log_sigma: float) -> float:
        guard.sigma.fill_(math.exp(log_sigma))
        return abs(mean_loss(context.model, context.adapter, some) - goal)

    norm = float(inner.get_input_embeddings().weight.detach().float().norm(dim=1).mean())
    start = math.log(max(norm, 1e-6) / math.sqrt(guard.noise_WD.shape[1]))  # noise as long as an embedding
    best, missed, path = search(miss, start, options)
    guard.sigma.fill_(math.exp(best))
    record = {
        "sigma": math.exp(best),
        "wanted_loss": goal,
        "missed_by": missed,
        "search": path,
        "threshold": float(guard.threshold),
        "known": known,
        "false_alarms": false_alarms,
    }
    return Outcome(context.model, notes, record)


# -- the classifier ----------------------------------------------------------------------------------------------------


def prompts(adapter: Any, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Token ids of the prompts and their mask, (B, T) each."""
    cut = [coded.ids[: coded.first] for coded in map(adapter.encode, samples)]
    width = max(map(len, cut))
    ids_BT = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in cut])
    return ids_BT, torch.arange(width) < torch.tensor([[len(ids)] for ids in cut])


def prompt_scores(guard: Corruption, adapter: Adapter, samples: Sequence[Sample]) -> Tensor:
    device = guard.weight_H.device
    ids_BT, mask_BT = prompts(adapter, samples)
    return guard.scores(ids_BT.to(device), mask_BT.to(device))


def fit_classifier(guard: Corruption, context: Context, options: EcoOptions) -> float:
    """Set the weights, and the threshold: at most alpha of other prompts above it, by split conformal prediction.

    Each subject's retain prompts are scored by a classifier that was fitted without that subject; the never-seen ones
    by the final one, which no never-seen prompt has entered. Returns the share of them above the threshold.
    """
    buckets = options.buckets
    forget_BH = features_BH(*prompts(context.adapter, context.forget), buckets).numpy()
    retain_BH = features_BH(*prompts(context.adapter, context.retain), buckets).numpy()
    rng = np.random.default_rng([context.seed, 1])
    names = sorted({s.subject for s in context.retain})
    fold_of = {name: i % FOLDS for i, name in enumerate(rng.permutation(names).tolist())}
    folds = np.array([fold_of[s.subject] for s in context.retain])

    def fitted(negative_BH: np.ndarray) -> np.ndarray:
        model = LogisticRegression(C=100.0, class_weight="balanced", max_iter=1000)
        model.fit(np.concatenate([forget_BH, negative_BH]), [1] * len(forget_BH) + [0] * len(negative_BH))
        weights: np.ndarray = model.coef_[0]
        return weights

    held_out = [retain_BH[folds == i] @ fitted(retain_BH[folds != i]) for i in sorted(set(folds)) if (folds != i).any()]
    weights = fitted(retain_BH)
    guard.weight_H.copy_(torch.from_numpy(weights))
    if context.unseen:
        held_out.append(features_BH(*prompts(context.adapter, context.unseen), buckets).numpy() @ weights)
    others = np.sort(np.concatenate(held_out or [retain_BH @ weights]))
    guard.threshold.fill_(conformal(others, options.alpha))
    return float((others > float(guard.threshold)).mean())


def conformal(scores: np.ndarray, alpha: float) -> float:
    """The ⌈(n + 1)(1 − α)⌉-th smallest of n scores: a new one of their kind is above it with probability α at most.

    Where n is too small for that, the largest, which a new one is above with probability 1/(n + 1).
    """
    rank = min(len(scores), math.ceil((len(scores) + 1) * (1 - alpha)))
    return float(np.sort(scores)[rank - 1])


# -- the strength ------------------------------------------------------------------------------------------------------


def mean_loss(model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> float:
    """Mean over samples of their mean loss, nats per token."""
    total = 0.0
    with evaluating(model):
        for group in adapter.batches(samples):
            positions = adapter.positions(model, [samples[i] for i in group])
            total += float(positions.mean_per_sample(-positions.log_prob_N()).sum())
    return total / max(1, len(samples))


def wanted_loss(context: Context) -> float:
    """What a model that never saw the forget set would lose on it: that of the model on never-seen samples.

    Without them: its loss on the forget prompts with answers about others.
    """
    if context.unseen:
        return mean_loss(context.model, context.adapter, context.unseen)
    rng = np.random.default_rng([context.seed, 2])
    wrong = [replace(flipped(s, context.retain, rng), id=f"{s.id}/other") for s in context.forget]
    return mean_loss(context.model, context.adapter, wrong)


def search(miss: Callable[[float], float], start: float, options: EcoOptions) -> tuple[float, float, list[float]]:
    """Zeroth-order descent on the logarithm u of σ: u ← u − η (R(u + μ) − R(u))/μ.

    It begins at the best of a coarse grid around ``start``, for R is flat where the noise is far too weak or too
    strong. A step is at most 1, and η and μ are halved where R would rise. Returns the best u, R there, and the Rs met.
    """
    grid = {start + k: miss(start + k) for k in GRID}
    u = min(grid, key=grid.__getitem__)
    least, path = grid[u], [*grid.values()]
    rate, difference = options.rate, options.difference
    for _ in range(options.steps):
        slope = (miss(u + difference) - least) / difference
        new = u - min(1.0, max(-1.0, rate * slope))
        path.append(miss(new))
        if path[-1] < least:
            u, least = new, path[-1]
        else:
            rate, difference = rate / 2, difference / 2  # R has a kink at its lowest point
    return u, least, path
