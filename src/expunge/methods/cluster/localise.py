"""Where the edit may act: token clusters × layers, ranked by their share of the influence on the forget objective.

The clusters come from one middle block's states, so that they partition the tokens of every linear layer of the
language model alike; layers that see other tokens (convolutions of several resolutions) get clusters of their own
output states. Forget gradients then reach the weights of a layer only through tokens of its chosen clusters; retain
gradients are not restricted, and a layer without a chosen cluster is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.cluster.edit import divergence
from expunge.methods.cluster.influence import Influence, choose, cluster_shares, random_choice, token_influence
from expunge.methods.cluster.kfac import Factor, kfac_factors, refresher
from expunge.methods.cluster.layers import Layer, linear_layers, restricted_gradient
from expunge.methods.cluster.lowrank import null_space, truncated
from expunge.methods.cluster.optimizer import KFACOptimizer
from expunge.methods.cluster.options import ClusterOptions
from expunge.methods.cluster.partition import Clustering, all_in_one, kmeans_groups, random_groups
from expunge.methods.cluster.spectral import spectral_clustering
from expunge.methods.cluster.targets import Targets
from expunge.methods.cluster.tokens import Gathered, TokenTable, forward, passes, placed, token_states
from expunge.methods.registry import Context
from expunge.models.adapter import Adapter, evaluating
from expunge.training.terms import Term

FACTOR_SAMPLES = 64  # retain samples that one estimate of the curvature reads
PROJECT_EVERY = 5  # steps between projections onto the allowed rank
FEW_TOKENS = 60  # below this a clustering is not worth its name: one group


@dataclass
class Scope:
    """The layers that may change, and per layer the tokens through which forgetting may change them."""

    adapter: Adapter
    layers: dict[str, Layer]
    chosen: dict[str, list[int]] | None = None  # layer -> clusters; None: every token of every layer
    tables: Mapping[str, TokenTable] = field(default_factory=dict)
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    number: dict[str, int] = field(default_factory=dict)  # forget sample id -> row in the tables
    factors: dict[str, Factor] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def frozen(self, model: nn.Module) -> Iterator[None]:
        """Layers without a chosen cluster take no part; everything is trainable again afterwards."""
        stopped = [] if self.chosen is None else [ly.weight for n, ly in self.layers.items() if not self.chosen.get(n)]
        for weight in stopped:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in stopped:
                weight.requires_grad_(True)

    def around(self, flat: Sequence[tuple[str, Sample]]) -> AbstractContextManager[Any]:
        """For one micro-batch: restrict the weight gradients of forget samples to the chosen tokens."""
        if self.chosen is None or not any(role == "forget" for role, _ in flat):
            return nullcontext()
        active = {n: ly for n, ly in self.layers.items() if self.chosen.get(n)}
        rows = [self.number.get(s.id, -1) if role == "forget" else -1 for role, s in flat]
        others = torch.tensor([row < 0 for row in rows])
        width = max(self.adapter.num_tokens(s) for _, s in flat)
        masks: dict[str, Tensor] = {}
        made: dict[tuple[int, tuple[int, ...]], Tensor] = {}  # layers that share tokens and clusters share the mask
        for name in active:
            table, labels_N = self.tables[name], self.labels[name]
            places = self._places(table, width)
            key = (id(labels_N), tuple(self.chosen[name]))
            if key not in made:
                grid_BT = table.grid(labels_N, rows, places)
                mask_BT = torch.isin(grid_BT, torch.tensor(self.chosen[name], dtype=grid_BT.dtype))
                mask_BT[others] = True
                made[key] = mask_BT
            masks[name] = made[key]
        return restricted_gradient(active, masks)

    def _places(self, table: TokenTable, width: int) -> int:
        # A text batch is as wide as its longest sample; an image layer has as many places for every sample.
        return width if self.adapter.modality != "classifier" else int(table.col_N.max()) + 1

    def optimizers(
        self, model: nn.Module, options: ClusterOptions, context: Context
    ) -> list[torch.optim.Optimizer] | None:
        """The K-FAC optimizer where it is asked for; None lets the loop build Muon or AdamW."""
        if options.optimizer != "kfac":
            return None
        if not context.retain:
            raise UserError("optimizer 'kfac' needs retain samples, whose curvature it uses: add them, or use muon.")
        layers = {n: ly for n, ly in self.layers.items() if ly.weight.requires_grad}
        inside = {id(ly.weight) for ly in layers.values()}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]
        fresh = refresher(
            model,
            context.adapter,
            context.retain,
            layers,
            batch=FACTOR_SAMPLES,
            metric=options.kfac_metric,  # type: ignore[arg-type]
            damping=options.damping,
            seed=context.seed,
        )
        return [
            KFACOptimizer(
                layers,
                fresh,
                lr=1.0,  # the clip sets the length of a step
                momentum=0.9,
                kl_clip=options.kl_clip,
                rank=options.rank,
                damping=options.damping,
                refresh_every=options.refresh,
                others=rest,
                other_lr=options.other_learning_rate or 5e-4,
            )
        ]

    def projection(self, options: ClusterOptions) -> Callable[[int, bool], None] | None:
        """Keeps the change of each layer since now inside the allowed rank or off the retain inputs' span."""
        needs_rank = options.rank is not None  # K-FAC steps of that rank add up to more
        if not needs_rank and options.null_space is None:
            return None
        start = {n: ly.matrix(ly.weight.detach()).clone() for n, ly in self.layers.items()}
        off = {}
        if options.null_space is not None:
            off = {n: null_space(f.input_II, options.null_space) for n, f in self.factors.items()}

        @torch.no_grad()
        def project(step: int, last: bool) -> None:
            if not last and not off and step % PROJECT_EVERY:
                return
            for name, layer in self.layers.items():
                change_OI = layer.matrix(layer.weight) - start[name]
                if name in off:
                    change_OI = change_OI @ off[name].to(change_OI)
                if needs_rank:
                    assert options.rank is not None
                    change_OI = truncated(change_OI, options.rank)
                layer.weight.copy_(layer.unmatrix(start[name] + change_OI))

        return project


def choose_scope(context: Context, options: ClusterOptions, targets: Targets) -> Scope:
    """Cluster token states, rank (layer, cluster) groups by influence, take the smallest set that reaches enough."""
    model, adapter = context.model, context.adapter
    if options.null_space is not None and not context.retain:
        raise UserError("null_space needs retain samples, whose inputs it keeps off: add them, or leave it out.")
    layers, _ = linear_layers(model, editable(model, adapter, context.forget[0]))
    scope = Scope(adapter, layers)
    unrestricted = options.reach >= 1 and not options.random_choice
    if unrestricted and options.null_space is None:
        return scope
    rng = np.random.default_rng(context.seed)
    some = [context.retain[int(i)] for i in rng.permutation(len(context.retain))[:FACTOR_SAMPLES]]
    scope.factors = kfac_factors(
        model,
        adapter,
        some or context.forget,
        layers,
        metric=options.kfac_metric,  # type: ignore[arg-type]
        damping=options.damping,
        seed=context.seed,
    )
    if unrestricted:
        return scope

    term = Term("forget", "forget", "token", lambda view: targets.compare(view, divergence(options)))
    influence = token_influence(model, adapter, context.forget, layers, scope.factors, term)
    scope.number = {s.id: i for i, s in enumerate(context.forget)}
    scope.tables = influence.tables
    found = label_tokens(context, options, influence, layers, some)
    scope.labels = {name: labels for name, (labels, _) in found.items()}
    clusters = max(c.clusters for _, c in found.values())
    shares = cluster_shares(influence, scope.labels, clusters)
    groups = choose(shares, options.reach)
    if options.random_choice:
        groups = random_choice(shares, len(groups), context.seed)
    scope.chosen = {}
    for name, cluster in groups:
        scope.chosen.setdefault(name, []).append(cluster)
    first = next(iter(found.values()))[1]
    possible = sum(int((s != 0).sum()) for s in shares.values())
    kept = [float(np.isin(scope.labels[n], scope.chosen.get(n, [])).mean()) for n in scope.labels]
    scope.record = {
        "groups": options.groups,
        "clusters": first.clusters,
        "eigenvalue_residual": first.residual,
        "stability": first.stability,
        "groups_chosen": len(groups),
        "groups_possible": possible,
        "layers_chosen": len(scope.chosen),
        "layers": len(layers),
        "share_of_token_places": float(np.mean(kept)),
        "influence_by_layer": {n: float(s.sum()) for n, s in shares.items()},
        "tree": first.tree.tolist(),
    }
    scope.notes.append(
        f"edited through {len(groups)} of {possible} layer × cluster groups ({first.clusters} token clusters), "
        f"{np.mean(kept):.0%} of the forget tokens' places"
    )
    return scope


def editable(model: nn.Module, adapter: Adapter, sample: Sample) -> Callable[[str], bool]:
    """Which layers, by name, see the tokens of a batch and nothing else.

    Towers and projectors see images. The head is asked about the target positions of one role at a time.
    """
    with evaluating(model):
        head = {id(m) for m in adapter.positions(model, [sample]).head.module.modules()}
    towers = ("vision", "projector") if adapter.modality == "multimodal" else ()
    return lambda name: id(model.get_submodule(name)) not in head and not any(t in name for t in towers)


def label_tokens(
    context: Context,
    options: ClusterOptions,
    influence: Influence,
    layers: Mapping[str, Layer],
    some: Sequence[Sample],
) -> dict[str, tuple[np.ndarray, Clustering]]:
    """Per layer: the cluster of every forget token of its table, and the clustering."""
    model, adapter = context.model, context.adapter
    names = list(influence.tables)
    first = influence.tables[names[0]]
    shared = all(table.same(first) for table in influence.tables.values()) and adapter.modality != "classifier"
    middle = adapter.blocks(model)[len(adapter.blocks(model)) // 2]

    def states_of(samples: Sequence[Sample], place: str) -> tuple[TokenTable, np.ndarray]:
        if not shared:
            return layer_states(model, adapter, samples, layers[place])
        table, states = token_states(model, adapter, samples, {place: middle})
        return table, states[place]

    found: dict[str, tuple[np.ndarray, Clustering]] = {}
    for place in ["middle"] if shared else names:
        table, states_ND = states_of(context.forget, place)
        others_MD = states_of(some, place)[1] if some else None
        clustering = cluster_states(states_ND, others_MD, options, context.seed)
        labels_N = np.zeros(len(table), dtype=np.int64) if clustering.kind == "one" else clustering.assign(states_ND)
        for name in names if shared else [place]:
            if not influence.tables[name].same(table):  # positions after the last target have no influence
                labels_N = _aligned(table, labels_N, influence.tables[name])
                table = influence.tables[name]
            found[name] = (labels_N, clustering)
    return found


def layer_states(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], layer: Layer
) -> tuple[TokenTable, np.ndarray]:
    """Outputs of one layer, (N, O), at the tokens that it sees: the places of an image in a convolution."""
    seen: list[Tensor] = []
    gathered = Gathered.empty()
    handle = layer.module.register_forward_hook(lambda _module, _inputs, y: seen.append(layer.outputs(y)))
    try:
        with evaluating(model):
            for group, batch in passes(model, adapter, samples, max_tokens=4096):
                seen.clear()
                forward(model, adapter, batch)
                for states in seen:
                    row, col, real = (t.cpu().numpy() for t in placed(batch, states.shape[:-1], layer.name))
                    values = states.flatten(0, -2).float().cpu().numpy()
                    gathered.add(np.asarray(group)[row[real]], col[real], values[real])
    finally:
        handle.remove()
    return gathered.table()


def cluster_states(
    forget_ND: np.ndarray, others_MD: np.ndarray | None, options: ClusterOptions, seed: int
) -> Clustering:
    """The clustering of a sample of forget and retain states that ``options`` ask for."""
    rng = np.random.default_rng(seed)
    half = options.cluster_tokens // 2
    parts = [forget_ND[rng.permutation(len(forget_ND))[:half]]]
    if others_MD is not None:
        parts.append(others_MD[rng.permutation(len(others_MD))[:half]])
    states_ND = np.concatenate(parts)
    if options.groups == "all" or len(states_ND) < FEW_TOKENS:
        return all_in_one(len(states_ND))
    if options.groups == "spectral":
        return spectral_clustering(states_ND, clusters=options.clusters, seed=seed)
    clusters = options.clusters or spectral_clustering(states_ND, seed=seed).clusters  # as many as the method's own
    if options.groups == "kmeans":
        return kmeans_groups(states_ND, clusters, seed)
    return random_groups(len(states_ND), clusters, seed)


def _aligned(table: TokenTable, labels_N: np.ndarray, wanted: TokenTable) -> np.ndarray:
    """Labels of the tokens of ``wanted``, all of which stand in ``table``."""
    keys = table.sample_N.astype(np.int64) << 32 | table.col_N
    asked = wanted.sample_N.astype(np.int64) << 32 | wanted.col_N
    return np.asarray(labels_N[np.searchsorted(keys, asked)])
