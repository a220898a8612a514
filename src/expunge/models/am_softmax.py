"""AM-softmax (Wang et al. 2018, arXiv 1801.05599, eq. 5-6): classes by angle, further apart than they have to be.

A logit is s·cos(h, w_j), with h the embedding and w_j the centre of class j. In the loss that is learnt the target's
cosine is lowered by a margin m first, so that an embedding must be nearer to its own centre than to the others by m.
What is measured has no margin.

Shape suffixes: N samples, D width of the embedding, V classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from expunge.data.samples import Sample
from expunge.models.adapter import Adapter, evaluating

SCALE, MARGIN = 30.0, 0.4  # s and m of CLEAR's face embedder; the paper: s = 30, m = 0.35 to 0.4


class CosineHead(nn.Module):
    """s·cos between the embedding and each class centre; (N, D) to (N, V). ``margin`` is m, on the cosine.

    It is no linear layer, and is none to LoRA or to K-FAC: only the direction of a row counts.
    """

    def __init__(self, width: int, classes: int, scale: float = SCALE, margin: float = MARGIN) -> None:
        super().__init__()
        self.scale, self.margin = scale, margin
        self.weight = nn.Parameter(torch.empty(classes, width))
        nn.init.xavier_uniform_(self.weight)

    @property
    def logit_margin(self) -> float:
        """The margin on the logit, s·m."""
        return self.scale * self.margin

    def forward(self, hidden_ND: Tensor) -> Tensor:
        return self.scale * linear(normalize(hidden_ND), normalize(self.weight))


def embeddings(model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> NDArray[np.float64]:
    """Embedding of each sample in their order, (N, D): what the head of a classifier reads, not normalised."""
    rows: dict[int, NDArray[np.float64]] = {}
    with evaluating(model):
        for group in adapter.batches(samples):
            hidden_ND = adapter.positions(model, [samples[i] for i in group]).hidden_ND
            rows |= dict(zip(group, hidden_ND.double().cpu().numpy(), strict=True))
    return np.stack([rows[i] for i in range(len(samples))])
