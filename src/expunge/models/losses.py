"""What a model loses on given samples, for methods: their stopping rules stand below the room of signals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.models.adapter import Adapter, evaluating, target_log_prob


def mean_losses(model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> list[float]:
    """Mean negative log-likelihood of each sample's target, nats per token."""
    out = [math.nan] * len(samples)
    with evaluating(model):
        for group in adapter.batches(samples):
            positions = adapter.positions(model, [samples[i] for i in group])
            for i, loss in zip(group, positions.mean_per_sample(-positions.log_prob_N()).tolist(), strict=True):
                out[i] = loss
    return out


def error_and_loss(model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> tuple[float, float]:
    """Share of the target tokens (images, for a classifier) that the model gets wrong; mean loss, nats per token."""
    wrong, targets, losses = 0.0, 0, 0.0
    asked = [s for s in samples if adapter.num_targets(s)]
    with evaluating(model):
        for group in adapter.batches(asked):
            positions = adapter.positions(model, [asked[i] for i in group])
            both_N2 = positions.per_token(_loss_and_miss)
            losses += float(positions.mean_per_sample(both_N2[:, 0]).sum())
            wrong += float(both_N2[:, 1].sum())
            targets += len(both_N2)
    return wrong / max(1, targets), losses / max(1, len(asked))


def _loss_and_miss(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    miss_C = (logits_CV.argmax(1) != targets_C).to(logits_CV.dtype)
    return torch.stack([-target_log_prob(logits_CV, targets_C), miss_C], dim=1)
