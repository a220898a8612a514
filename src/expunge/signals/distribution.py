"""Total variation between a model and references, of which only snapshots are kept.

Shape suffixes: L target tokens of a sample, D hidden width, C positions in a chunk, V vocabulary, R references.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter, Positions, evaluating
from expunge.models.snapshot import TokenDistributions

Floats = NDArray[np.float32]


def total_variation(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    references: Sequence[TokenDistributions],
    *,
    max_tokens: int = 4096,
) -> list[Floats]:
    """Total variation 1/2 sum_v |p(v) - q_r(v)| per target token and reference, in [0, 1]: one (L, R) per sample.

    The model runs once, whatever the number of references.

    Raises:
        UserError: no reference, a sample that a reference was not run on, other tokens, or another vocabulary.
    """
    if not references:
        raise UserError("total variation needs at least one reference model: name one with --reference.")
    device = next(model.parameters()).device
    found: list[Floats] = [np.zeros((0, len(references)), dtype=np.float32)] * len(samples)
    for store in references:
        store.head.module.to(device)
    try:
        with evaluating(model):
            for group in adapter.batches(samples, max_tokens):
                positions = adapter.positions(model, [samples[i] for i in group])
                ids = [samples[i].id for i in group]
                columns = [_against(positions, store, ids) for store in references]
                values_NR = torch.stack(columns, dim=1).float().cpu().numpy().reshape(-1, len(references))
                sample_N = positions.sample_N.cpu().numpy()
                for row, index in enumerate(group):
                    found[index] = values_NR[sample_N == row]
    finally:
        for store in references:
            store.head.module.cpu()
    return found


def class_probabilities(model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> NDArray[np.float64]:
    """What a classifier says of each sample, (N, V), in the order given."""
    found: dict[int, NDArray[np.float64]] = {}
    with evaluating(model):
        for places in adapter.batches(samples):
            seen = adapter.positions(model, [samples[i] for i in places])
            rows = seen.per_token(lambda logits_CV, _: logits_CV.float().softmax(1)).double().cpu().numpy()
            found.update(zip(places, rows, strict=True))
    return np.stack([found[i] for i in range(len(samples))])


def tv_per_token(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], store: TokenDistributions, *, max_tokens: int = 4096
) -> list[Floats]:
    """Total variation per target token to one reference: one (L,) array per sample."""
    return [values_LR[:, 0] for values_LR in total_variation(model, adapter, samples, [store], max_tokens=max_tokens)]


def _against(positions: Positions, store: TokenDistributions, ids: Sequence[str]) -> Tensor:
    """(N,) total variation between the batch at hand and one store."""
    missing = [i for i in ids if i not in store.hidden]
    if missing:
        raise UserError(f"the reference was not run on sample '{missing[0]}': take its snapshot on the same samples.")
    if store.vocab != positions.vocab:
        raise UserError(
            f"the model predicts {positions.vocab} tokens or classes and the reference {store.vocab}: "
            "total variation compares models with one vocabulary."
        )
    device = positions.hidden_ND.device
    by_sample_N = positions.sample_N.argsort(stable=True)  # adapters need not group positions by sample
    if not torch.equal(torch.cat([store.targets[i] for i in ids]).to(device), positions.targets_N[by_sample_N]):
        raise UserError("model and reference were given different tokens: use one tokenizer, template and context.")
    stored_ND = torch.cat([store.hidden[i] for i in ids]).to(device)
    hidden_ND = stored_ND[by_sample_N.argsort()]

    def distance(logits_CV: Tensor, targets_C: Tensor, hidden_CD: Tensor) -> Tensor:
        reference_CV = store.head(hidden_CD).softmax(1)
        return (0.5 * (logits_CV.float().softmax(1) - reference_CV).abs().sum(1)).clamp(0, 1)

    return positions.per_token(distance, hidden_ND)
