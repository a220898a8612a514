"""Statistics of public texts: how rare a token is, and how hidden states are spread.

Shape suffixes: V vocabulary, D hidden width, N positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    layers = len(base.adapter.blocks(base.model))
    return max(1, min(layers, round(depth * layers)))


def spread(samples: Sequence[Sample], base: FrozenBase, layer: int) -> tuple[Array, Array]:
    """Mean and standard deviation (D,) of a layer's output over all positions of the samples, float32.

    Sums run in float64, so that the order of the samples moves them by less than the rounding to float32.
    """
    device = next(base.model.parameters()).device
    total_D: Tensor | None = None
    square_D: Tensor | None = None
    count = 0
    model = base.model
    with evaluating(model):
        for group in base.adapter.batches(samples):
            batch = base.adapter.collate([samples[i] for i in group]).to(device)
            states_BTD = model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states[layer]
            states_ND = states_BTD[batch.inputs["attention_mask"].bool()].double()
            total_D = states_ND.sum(0) if total_D is None else total_D + states_ND.sum(0)
            square_D = states_ND.square().sum(0) if square_D is None else square_D + states_ND.square().sum(0)
            count += len(states_ND)
    assert total_D is not None and square_D is not None
    mean_D = total_D / count
    deviation_D = (square_D / count - mean_D.square()).clamp_min(1e-12).sqrt()
    return tuple(np.asarray(torch.as_tensor(x).cpu(), dtype=np.float32) for x in (mean_D, deviation_D))  # type: ignore[return-value]
