"""Exact additive influence of token clusters on what must be forgotten.

Per layer, with G = Σ_t d_t x_tᵀ the gradient of the forget objective and F the retain curvature: the influence of
token t is <d_t x_tᵀ, P> = d_tᵀ P x_t with P = (F + γ)⁻¹ G. It sums over any cluster to I_k = <G_k, P>, and over all
tokens to <G, P> > 0, so the shares I_k / Σ are an exact split. Two passes: the first leaves P per layer, the second
one number per token, so neither inputs nor gradients of all tokens are ever held.

Shape suffixes: N tokens, K clusters, M tokens of a call, I layer inputs, O layer outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.cluster.kfac import Factor, clip_scale
from expunge.methods.cluster.layers import Layer, output_gradients, recorded
from expunge.methods.cluster.tokens import Gathered, TokenTable, forward, passes, placed_calls
from expunge.models.adapter import Adapter
from expunge.training.terms import Term, View

Group = tuple[str, int]  # layer, cluster


@dataclass(frozen=True)
class Influence:
    """``values[layer]`` (N,) float64 over the tokens of ``tables[layer]``; they sum to ``totals[layer]`` = <G, P>."""

    tables: dict[str, TokenTable]
    values: dict[str, np.ndarray]
    totals: dict[str, float]

    @property
    def table(self) -> TokenTable:
        """The one table that all layers share, as in a text model.

        Raises:
            UserError: layers see different tokens (convolutions of different resolution, an output head).
        """
        first = next(iter(self.tables.values()))
        for name, table in self.tables.items():
            if not table.same(first):
                raise UserError(f"layer '{name}' sees other tokens than the first: give labels per layer.")
        return first


def objective_units(term: Term, adapter: Adapter, samples: Sequence[Sample]) -> float:
    """The denominator of the term's mean over all of ``samples``."""
    if term.unit == "sample":
        return float(max(1, len(samples)))
    return float(max(1, sum(adapter.num_targets(s) for s in samples)))


def _token_passes(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    layers: Mapping[str, Layer],
    term: Term,
    max_tokens: int,
) -> Iterator[tuple[list[int], str, Tensor, Tensor, Tensor, Tensor]]:
    """(sample numbers of the batch, layer, x_MI, d_MO, row_M, col_M) of the term's mean over all samples."""
    units = objective_units(term, adapter, samples)
    was_training = model.training
    model.eval()
    try:
        for group, batch in passes(model, adapter, samples, max_tokens):
            own = [samples[i] for i in group]
            with torch.enable_grad(), recorded(layers) as calls:
                positions = forward(model, adapter, batch)
                loss = term.weight * term.values(View(positions, own)).sum() / units
            for found in placed_calls(batch, own, output_gradients(loss, calls)):
                yield group, *found
    finally:
        model.train(was_training)


def layer_gradients(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    layers: Mapping[str, Layer],
    term: Term,
    *,
    max_tokens: int = 4096,
) -> dict[str, Tensor]:
    """G of each layer, (O, I) float32: the gradient of the term's mean over ``samples``. ``.grad`` stays untouched."""
    total = {n: torch.zeros(layer.shape, device=layer.weight.device) for n, layer in layers.items()}
    for _, name, x_MI, d_MO, _, _ in _token_passes(model, adapter, samples, layers, term, max_tokens):
        total[name].addmm_(d_MO.T, x_MI)
    return total


def token_influence(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    layers: Mapping[str, Layer],
    factors: Mapping[str, Factor],
    term: Term,
    *,
    max_tokens: int = 4096,
) -> Influence:
    """Influence of every token position of ``samples`` (the forget set) in every layer.

    ``term`` is the forget objective; influence is quadratic in it, so its sign does not matter. Positions after the
    last target, and padding, have none.

    Raises:
        UserError: no samples, or the objective has no gradient in any layer.
    """
    if not samples:
        raise UserError("token influence needs forget samples, and none were given.")
    gradients = layer_gradients(model, adapter, samples, layers, term, max_tokens=max_tokens)
    directions = {name: factors[name].precondition(grad_OI) for name, grad_OI in gradients.items()}
    totals = {n: float((gradients[n].double() * directions[n].double()).sum()) for n in layers}
    if not sum(totals.values()) > 0:
        raise UserError("the forget objective has no gradient in the chosen layers: nothing there is to be edited.")
    del gradients
    gathered = {name: Gathered.empty() for name in layers}
    for group, name, x_MI, d_MO, row_M, col_M in _token_passes(model, adapter, samples, layers, term, max_tokens):
        value_M = ((d_MO @ directions[name]).double() * x_MI.double()).sum(1)
        numbers = np.asarray(group)
        gathered[name].add(numbers[row_M.cpu().numpy()], col_M.cpu().numpy(), value_M.cpu().numpy())
    # A layer that the objective never reaches has no tokens and no share.
    found = {name: part.table() for name, part in gathered.items() if part.values}
    return Influence(
        {n: table for n, (table, _) in found.items()},
        {n: v for n, (_, v) in found.items()},
        {n: totals[n] for n in found},
    )


def cluster_shares(
    influence: Influence, labels: np.ndarray | Mapping[str, np.ndarray], clusters: int
) -> dict[str, np.ndarray]:
    """Share of each (layer, cluster) in the whole influence: (K,) per layer; all of them sum to 1.

    ``labels`` (N,) over the shared table, or per layer; a label below 0 belongs to no cluster and keeps its share.
    """
    whole = sum(float(v.sum()) for v in influence.values.values())
    shares: dict[str, np.ndarray] = {}
    for name, value_N in influence.values.items():
        label_N = labels if isinstance(labels, np.ndarray) else labels[name]
        if len(label_N) != len(value_N):
            raise UserError(f"{len(label_N)} labels for the {len(value_N)} tokens of layer '{name}': give one each.")
        inside = label_N >= 0
        shares[name] = np.bincount(label_N[inside], weights=value_N[inside], minlength=clusters) / whole
    return shares


def choose(shares: Mapping[str, np.ndarray], reach: float = 0.9) -> list[Group]:
    """The smallest set of (layer, cluster) groups whose shares sum to at least ``reach``, largest first.

    Raises:
        UserError: ``reach`` is not in (0, 1], or the groups do not reach it (tokens without a cluster).
    """
    if not 0 < reach <= 1:
        raise UserError(f"reach {reach} is not a share: give a number above 0 and up to 1.")
    groups = sorted(((-float(s), n, k) for n, share_K in shares.items() for k, s in enumerate(share_K)))
    chosen: list[Group] = []
    total = 0.0
    for negative, name, cluster in groups:
        chosen.append((name, cluster))
        total -= negative
        if total >= reach - 1e-9:
            return chosen
    raise UserError(f"all groups together reach {total:.3f} of the influence, not {reach}: lower the reach.")


def random_choice(shares: Mapping[str, np.ndarray], count: int, seed: int) -> list[Group]:
    """Control arm: ``count`` groups at random among those that have tokens of influence."""
    groups = [(name, k) for name, share_K in shares.items() for k, s in enumerate(share_K) if s != 0]
    if count > len(groups):
        raise UserError(f"{count} groups were asked for and there are {len(groups)}: ask for fewer.")
    picked = np.random.default_rng(seed).permutation(len(groups))[:count]
    return [groups[i] for i in sorted(picked)]


def group_masks(chosen: Sequence[Group], layers: Mapping[str, Layer], labels_BT: Tensor) -> dict[str, Tensor]:
    """Per layer the tokens of a batch that lie in a chosen group: (B, T) bool, for ``restricted_gradient``."""
    held: dict[str, list[int]] = {name: [] for name in layers}
    for name, cluster in chosen:
        held[name].append(cluster)
    return {name: torch.isin(labels_BT, torch.tensor(ks, dtype=labels_BT.dtype)) for name, ks in held.items()}


@dataclass(frozen=True)
class LeaveOut:
    """Predicted and true rise of the objective when a cluster's gradient is left out of one step, (K,) each."""

    predicted_K: np.ndarray
    true_K: np.ndarray
    rank_correlation: float


def leave_cluster_out(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    layers: Mapping[str, Layer],
    factors: Mapping[str, Factor],
    term: Term,
    labels: np.ndarray,
    clusters: int,
    *,
    clip: float = 1e-4,
    max_tokens: int = 4096,
) -> LeaveOut:
    """Validity check: does I_k rank the clusters by what leaving each out of one step θ - s·P really does?

    s is at most 1 and keeps the predicted KL on the retain set at ``clip`` nats. Predicted: s · Σ_layers I_k. True:
    the objective after the step without the cluster minus that after the whole step. The weights are put back.
    Costs K+1 passes and holds one gradient per layer and cluster: small models only.
    """
    from scipy.stats import spearmanr

    influence = token_influence(model, adapter, samples, layers, factors, term, max_tokens=max_tokens)
    table = influence.table
    shares = cluster_shares(influence, labels, clusters)
    parts = {n: torch.zeros(clusters, *layer.shape, device=layer.weight.device) for n, layer in layers.items()}
    for group, name, x_MI, d_MO, row_M, col_M in _token_passes(model, adapter, samples, layers, term, max_tokens):
        grid = table.grid(labels, group, int(col_M.max()) + 1)
        label_M = grid[row_M.cpu(), col_M.cpu()].to(x_MI.device)
        for cluster in sorted({int(k) for k in label_M.tolist() if k >= 0}):
            mine = label_M == cluster
            parts[name][cluster].addmm_(d_MO[mine].T, x_MI[mine])
    moves = {n: torch.stack([factors[n].precondition(g) for g in part_KOI]) for n, part_KOI in parts.items()}
    before = {n: layer.weight.detach().clone() for n, layer in layers.items()}
    step, _ = clip_scale({n: move_KOI.sum(0) for n, move_KOI in moves.items()}, factors, clip)
    predicted_K = step * sum(influence.totals.values()) * np.sum(list(shares.values()), axis=0)

    def after(left_out: int | None) -> float:
        with torch.no_grad():
            for n, layer in layers.items():
                whole_OI = moves[n].sum(0) if left_out is None else moves[n].sum(0) - moves[n][left_out]
                layer.weight.copy_(before[n] - layer.unmatrix(step * whole_OI).to(before[n].dtype))
        return objective(model, adapter, samples, term, max_tokens=max_tokens)

    try:
        base = after(None)
        true_K = np.array([after(k) - base for k in range(clusters)])
    finally:
        with torch.no_grad():
            for n, layer in layers.items():
                layer.weight.copy_(before[n])
    return LeaveOut(predicted_K, true_K, float(spearmanr(predicted_K, true_K).statistic))


def objective(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], term: Term, *, max_tokens: int = 4096
) -> float:
    """The term's weighted mean over ``samples``, without gradients and without dropout."""
    total = 0.0
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for group, batch in passes(model, adapter, samples, max_tokens):
                positions = forward(model, adapter, batch)
                total += float(term.values(View(positions, [samples[i] for i in group])).double().sum())
    finally:
        model.train(was_training)
    return term.weight * total / objective_units(term, adapter, samples)
