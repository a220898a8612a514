"""Statistics of public texts: how rare a token is, and how hidden states are spread.

Shape suffixes: V vocabulary, D hidden width, N positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.models.adapter import evaluating
from expunge.zones.zone import Array, FrozenBase


def inverse_frequency(texts: Iterable[Sequence[int]], vocab: int) -> Array:
    """idf_V = ln((1 + texts) / (1 + texts with the token)), float32; 0 for a token of all texts (Spärck Jones 1972)."""
    count_V = np.zeros(vocab, dtype=np.int64)
    total = 0
    for ids in texts:
        count_V[np.unique(np.asarray(ids, dtype=np.int64))] += 1
        total += 1
    return np.log((1 + total) / (1 + count_V)).astype(np.float32)


def public_ids(samples: Sequence[Sample], base: FrozenBase) -> list[tuple[int, ...]]:
    """Token ids of each sample, prompt and target."""
    return [base.adapter.cached(s).ids for s in samples]


def vocabulary_size(base: FrozenBase) -> int:
    """Rows of the embedding, which may be more than the tokenizer has tokens."""
    return int(base.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def layer_of(base: FrozenBase, depth: float) -> int:
    """The layer (1 = the first block's output) at this share of the depth."""
    return layers_at(base, [depth])[0]


def layers_at(base: FrozenBase, depths: Sequence[float]) -> list[int]:
    """Layers (1 = the first block's output) at these shares of the depth, each once."""
    num = len(base.adapter.blocks(base.model))
    return sorted({max(1, min(num, round(depth * num))) for depth in depths})


def spread(samples: Sequence[Sample], base: FrozenBase, layer: int) -> tuple[Array, Array]:
    """Mean and standard deviation (D,) of one layer's output; see :func:`spreads`."""
    mean_1D, deviation_1D = spreads(samples, base, [layer])
    return mean_1D[0], deviation_1D[0]


def spreads(samples: Sequence[Sample], base: FrozenBase, layers: Sequence[int]) -> tuple[Array, Array]:
    """Mean and standard deviation of the layers' outputs over all positions of the samples: (layers, D) float32 each.

    Sums run in float64, so that the order of the samples moves them by less than the rounding to float32.
    """
    device = next(base.model.parameters()).device
    totals: list[Tensor] = []
    count = 0
    model: Any = base.model
    with evaluating(model):
        for group in base.adapter.batches(samples):
            batch = base.adapter.collate([samples[i] for i in group]).to(device)
            hidden = model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states
            real_BT = batch.inputs["attention_mask"].bool()
            states_LND = torch.stack([hidden[layer][real_BT] for layer in layers]).double()
            totals.append(torch.stack([states_LND.sum(1), states_LND.square().sum(1)]))
            count += states_LND.shape[1]
    mean_LD, square_LD = torch.stack(totals).sum(0) / count
    deviation_LD = (square_LD - mean_LD.square()).clamp_min(1e-12).sqrt()
    return mean_LD.float().cpu().numpy(), deviation_LD.float().cpu().numpy()
