"""Where the edit may act: token clusters × layers, ranked by their share of the influence on the forget objective.

Which tokens form a cluster is the work of ``labels.py``. Forget gradients reach the weights of a layer only through
tokens of its chosen clusters; retain gradients are not restricted, and a layer without a chosen cluster is frozen. Of
a vision-language model the smallest set of towers is edited that has enough of the influence; the other one stays bit
for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.cluster.edit import divergence
from expunge.methods.cluster.influence import choose, cluster_shares, random_choice, token_influence
from expunge.methods.cluster.kfac import Factor, kfac_factors, refresher
from expunge.methods.cluster.labels import Part, label_tokens
from expunge.methods.cluster.layers import Layer, linear_layers, restricted_gradient
from expunge.methods.cluster.lowrank import null_space, truncated
from expunge.methods.cluster.optimizer import KFACOptimizer
from expunge.methods.cluster.options import ClusterOptions
from expunge.methods.cluster.targets import Targets
from expunge.methods.cluster.tokens import TokenTable
from expunge.methods.registry import Context
from expunge.models.adapter import Adapter, evaluating
from expunge.models.towers import TOWERS, modules_of, parameters_of
from expunge.training.terms import Term

FACTOR_SAMPLES = 64  # retain samples that one estimate of the curvature reads
PROJECT_EVERY = 5  # steps between projections onto the allowed rank


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
    spared: set[str] = field(default_factory=set)  # parameters of a tower that nothing may move
    record: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def frozen(self, model: nn.Module) -> Iterator[None]:
        """Layers without a chosen cluster, and spared parameters, take no part; afterwards all is as it was."""
        stopped = [] if self.chosen is None else [ly.weight for n, ly in self.layers.items() if not self.chosen.get(n)]
        stopped += [p for n, p in model.named_parameters() if n in self.spared and p.requires_grad]
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
        width = max(self.adapter.num_tokens(s) for _, s in flat)
        masks: dict[str, Tensor] = {}
        made: dict[tuple[int, tuple[int, ...]], Tensor] = {}  # layers that share tokens and clusters share the mask
        for name, layer in active.items():
            table, labels_N = self.tables[name], self.labels[name]
            key = (id(labels_N), tuple(self.chosen[name]))
            if key not in made:
                seen = [(role, s) for role, s in flat if s.image is not None] if layer.images else flat
                rows = [self.number.get(s.id, -1) if role == "forget" else -1 for role, s in seen]
                # A text batch is as wide as its longest sample; an image has as many places in every sample.
                places = int(table.col_N.max()) + 1 if layer.images or self.adapter.modality == "classifier" else width
                grid_BT = table.grid(labels_N, rows, places)
                mask_BT = torch.isin(grid_BT, torch.tensor(self.chosen[name], dtype=grid_BT.dtype))
                mask_BT[torch.tensor([row < 0 for row in rows], dtype=torch.bool)] = True
                made[key] = mask_BT
            masks[name] = made[key]
        return restricted_gradient(active, masks)

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
    layers = editable(model, adapter, context.forget)
    scope = Scope(adapter, layers)
    if adapter.modality == "multimodal":
        spare_untrained(scope, context)
    unrestricted = options.reach >= 1 and not options.random_choice
    if unrestricted and options.null_space is None:
        return scope
    rng = np.random.default_rng(context.seed)
    some = [context.retain[int(i)] for i in rng.permutation(len(context.retain))[:FACTOR_SAMPLES]]
    scope.factors = kfac_factors(
        model,
        adapter,
        some or context.forget,
        scope.layers,
        metric=options.kfac_metric,  # type: ignore[arg-type]
        damping=options.damping,
        seed=context.seed,
    )
    if unrestricted:
        return scope

    term = Term("forget", "forget", "token", lambda view: targets.compare(view, divergence(options)))
    influence = token_influence(model, adapter, context.forget, scope.layers, scope.factors, term)
    scope.number = {s.id: i for i, s in enumerate(context.forget)}
    scope.tables = influence.tables
    scope.labels, parts = label_tokens(context, options, influence, scope.layers, some)
    shares = cluster_shares(influence, scope.labels, max(part.first + part.count for part in parts))
    within = shares
    if adapter.modality == "multimodal":
        within = in_towers(scope, context, shares, options.reach)
    groups = choose(within, options.reach)
    if options.random_choice:
        groups = random_choice(within, len(groups), context.seed)
    scope.chosen = {}
    for name, cluster in groups:
        scope.chosen.setdefault(name, []).append(cluster)
    _describe(scope, options, shares, parts)
    return scope


def editable(model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> dict[str, Layer]:
    """The layers whose tokens can be told apart: all but the head, which is asked about one role's targets at a time.

    Of a vision-language model the layers that see images are marked; without an image in ``samples`` they are left
    out, since nothing could be forgotten through them.
    """
    with evaluating(model):
        head = {id(m) for m in adapter.positions(model, samples[:1]).head.module.modules()}
    sees = modules_of(model, "vision") if adapter.modality == "multimodal" else set()
    blind = all(s.image is None for s in samples)

    def wanted(name: str) -> bool:
        place = id(model.get_submodule(name))
        return place not in head and not (blind and place in sees)

    layers, _ = linear_layers(model, wanted)
    return {n: replace(layer, images=True) if id(layer.module) in sees else layer for n, layer in layers.items()}


def spare_untrained(scope: Scope, context: Context) -> None:
    """Leave a tower alone that cannot hold the data: it is the base's to the bit, or saw no forget image."""
    model = context.model
    base = dict(context.base().named_parameters()) if context.base is not None else {}
    own = dict(model.named_parameters())
    spared: list[str] = []
    for tower in TOWERS:
        names = parameters_of(model, tower)
        if names and all(n in base and torch.equal(own[n].detach(), base[n].to(own[n])) for n in names):
            spared.append(tower)
    if len(spared) == len(TOWERS):  # the base itself: nothing can be said from its weights
        spared = []
    scope.notes += [f"the {t} tower is the base's to the bit: it holds nothing and stays as it is" for t in spared]
    if "vision" not in spared and not any(layer.images for layer in scope.layers.values()):
        spared.append("vision")  # no forget sample has an image
    _spare(scope, model, spared)


def in_towers(scope: Scope, context: Context, shares: Mapping[str, np.ndarray], reach: float) -> dict[str, np.ndarray]:
    """The shares in the smallest set of towers that has ``reach`` of the influence; the other tower is spared."""
    total = dict.fromkeys(TOWERS, 0.0)
    for name, share_K in shares.items():
        total[_tower(scope.layers[name])] += float(share_K.sum())
    largest = max(TOWERS, key=lambda tower: total[tower])
    if total[largest] < reach - 1e-9:
        return dict(shares)
    _spare(scope, context.model, [tower for tower in TOWERS if tower != largest])
    return {name: share_K for name, share_K in shares.items() if name in scope.layers}


def _spare(scope: Scope, model: nn.Module, towers: Sequence[str]) -> None:
    for tower in towers:
        scope.spared |= parameters_of(model, tower)
    scope.layers = {n: layer for n, layer in scope.layers.items() if _tower(layer) not in towers}


def _tower(layer: Layer) -> str:
    return "vision" if layer.images else "language"


def _describe(scope: Scope, options: ClusterOptions, shares: Mapping[str, np.ndarray], parts: Sequence[Part]) -> None:
    """Fill in the record and the notes: how much influence each kind of token has where, and what is edited."""
    assert scope.chosen is not None
    kept = [float(np.isin(scope.labels[n], clusters).mean()) for n, clusters in scope.chosen.items()]
    places = sum(kept) / len(scope.labels)
    possible = sum(int((s != 0).sum()) for s in shares.values())
    count = sum(len(clusters) for clusters in scope.chosen.values())
    first = parts[0].clustering
    scope.record = {
        "groups": options.groups,
        "clusters": first.clusters,
        "groups_chosen": count,
        "groups_possible": possible,
        "layers_chosen": len(scope.chosen),
        "layers": len(shares),
        "share_of_token_places": places,
        "influence_by_layer": {n: float(s.sum()) for n, s in shares.items()},
        "parts": [_part(scope, part, shares) for part in parts],
    }
    scope.notes.append(
        f"edited through {count} of {possible} layer × cluster groups ({first.clusters} token clusters), "
        f"{places:.0%} of the forget tokens' places"
    )
    if scope.adapter.modality == "multimodal":
        kinds: dict[str, float] = {}
        for entry in scope.record["parts"]:
            name = f"{entry['tokens']} tokens of the {entry['tower']} tower"
            kinds[name] = kinds.get(name, 0.0) + entry["influence"]
        edited = {_tower(scope.layers[n]) for n in scope.chosen}
        scope.record["influence_by_modality"] = kinds
        scope.record["towers"] = sorted(edited)
        said = ", ".join(f"{share:.0%} {name}" for name, share in kinds.items())
        what = "both towers" if len(edited) == len(TOWERS) else f"the {edited.pop()} tower alone"
        scope.notes.append(f"influence of the forget data: {said}; {what} edited")


def _part(scope: Scope, part: Part, shares: Mapping[str, np.ndarray]) -> dict[str, Any]:
    assert scope.chosen is not None
    cut = slice(part.first, part.first + part.count)
    share_K = np.sum([shares[n][cut] for n in part.layers], axis=0)
    mine = set(range(part.first, part.first + part.count))
    return {
        "tower": part.tower,
        "tokens": part.tokens,
        "layers": len(part.layers),
        "clusters": part.count,
        "influence": float(share_K.sum()),
        "influence_by_cluster": share_K.tolist(),
        "groups_chosen": sum(len(mine & set(scope.chosen.get(n, ()))) for n in part.layers),
        "eigenvalue_residual": part.clustering.residual,
        "stability": part.clustering.stability,
        "tree": part.clustering.tree.tolist(),
    }
