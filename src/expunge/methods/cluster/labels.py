"""Which cluster every token of the forget samples belongs to, in each layer.

Layers that see the same tokens share a clustering: of one middle block's states in a language model, of the middle
layer's own output states where tokens are the places of an image (convolutions of one resolution, a vision tower).
In a language model that reads images, the tokens of images and those of texts are clustered apart: they stand far
from each other whatever they are about, and a clustering of both finds this and little else.

Shape suffixes: N tokens of the forget samples, M tokens of other samples, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.methods.cluster.influence import Influence
from expunge.methods.cluster.layers import Layer
from expunge.methods.cluster.options import ClusterOptions
from expunge.methods.cluster.partition import Clustering, all_in_one, kmeans_groups, random_groups
from expunge.methods.cluster.spectral import spectral_clustering
from expunge.methods.cluster.tokens import Gathered, TokenTable, forward, passes, pictured, placed, token_states
from expunge.methods.registry import Context
from expunge.models.adapter import Adapter, evaluating

FEW_TOKENS = 60  # below this a clustering is not worth its name: one group
Kind = Literal["language", "visual"]


@dataclass(frozen=True)
class Part:
    """Tokens of one kind in layers that see the same tokens: clusters ``first`` to ``first + count - 1`` there."""

    tower: str  # one of TOWERS
    tokens: Kind
    layers: Sequence[str]
    clustering: Clustering
    first: int

    @property
    def count(self) -> int:
        return self.clustering.clusters

    @property
    def name(self) -> str:
        return f"{self.tokens} tokens of the {self.tower} tower"


def label_tokens(
    context: Context,
    options: ClusterOptions,
    influence: Influence,
    layers: Mapping[str, Layer],
    some: Sequence[Sample],
) -> tuple[dict[str, np.ndarray], list[Part]]:
    """(cluster of every forget token of each layer's table, the clusterings behind them).

    ``some``: retain samples whose states are clustered with those of the forget samples.
    """
    model, adapter = context.model, context.adapter
    groups = alike(influence)
    images = adapter.modality == "classifier"
    # One group of layers that see tokens is a whole language model: its blocks have the states.
    spoken = [] if images else [names for names in groups if not layers[names[0]].images]
    blocks = adapter.blocks(model)

    def states_of(samples: Sequence[Sample], names: Sequence[str]) -> tuple[TokenTable, np.ndarray]:
        if [names] != spoken:
            return layer_states(model, adapter, samples, layers[names[len(names) // 2]])
        table, states = token_states(model, adapter, samples, {"middle": blocks[len(blocks) // 2]})
        return table, states["middle"]

    labels: dict[str, np.ndarray] = {}
    parts: list[Part] = []
    for names in groups:
        sees = images or layers[names[0]].images
        table, states_ND = states_of(context.forget, names)
        visual_N = np.ones(len(table), dtype=bool) if sees else visual(table, adapter, context.forget)
        others_MD, visual_M = None, np.zeros(0, dtype=bool)
        shown = [s for s in some if s.image is not None] if sees else some
        if shown:
            seen, others_MD = states_of(shown, names)
            visual_M = np.ones(len(seen), dtype=bool) if sees else visual(seen, adapter, shown)
        labels_N = np.zeros(len(table), dtype=np.int64)
        first = 0
        for visually in (False, True):
            mine_N = visual_N == visually
            if not mine_N.any():
                continue
            beside = None if others_MD is None else others_MD[visual_M == visually]
            clustering = cluster_states(states_ND[mine_N], beside, options, context.seed)
            labels_N[mine_N] = first + (0 if clustering.kind == "one" else clustering.assign(states_ND[mine_N]))
            tower = "vision" if sees else "language"
            parts.append(Part(tower, "visual" if visually else "language", names, clustering, first))
            first += clustering.clusters
        own = influence.tables[names[0]]
        labels |= dict.fromkeys(names, labels_N if own.same(table) else _aligned(table, labels_N, own))
    return labels, parts


def alike(influence: Influence) -> list[list[str]]:
    """The layers, by name, in groups that see the same tokens."""
    groups: list[list[str]] = []
    for name, table in influence.tables.items():
        known = next((g for g in groups if table.same(influence.tables[g[0]])), None)
        if known is None:
            groups.append([name])
        else:
            known.append(name)
    return groups


def visual(table: TokenTable, adapter: Adapter, samples: Sequence[Sample]) -> np.ndarray:
    """Which tokens of a language model stand for a piece of an image, (N,) bool."""
    token = getattr(adapter, "image_token_id", None)
    if token is None:
        return np.zeros(len(table), dtype=bool)
    ids = [np.asarray(adapter.cached(s).ids) for s in samples]
    return np.array([ids[i][col] == token for i, col in zip(table.sample_N, table.col_N, strict=True)], dtype=bool)


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
                images_I = pictured([samples[i] for i in group]) if layer.images else None
                for states in seen:
                    row, col, real = (t.cpu().numpy() for t in placed(batch, states.shape[:-1], layer.name, images_I))
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
