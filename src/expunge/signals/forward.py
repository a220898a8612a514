"""One forward pass over the samples, everything that metrics and attacks need from it.

Shape suffixes: C positions in a chunk, V vocabulary, K kinds of number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.models.adapter import Adapter, evaluating
from expunge.progress import Progress
from expunge.signals.record import Signals, text_sizes


def token_numbers(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """(log-probability, arg-max hit, mean and standard deviation of log p under p, rank) of each target: (C, 5).

    The deviation is summed around the mean; E[x^2] - E[x]^2 would cancel in float32. A logit of -inf has
    probability 0 and counts for nothing. Ranks below 2^24 are exact in float32.
    """
    logits_CV = logits_CV.float()
    log_p_CV = logits_CV.log_softmax(1)
    p_CV = log_p_CV.exp()
    finite_CV = log_p_CV.masked_fill(p_CV == 0, 0.0)
    mean_C = (p_CV * finite_CV).sum(1)
    std_C = (p_CV * (finite_CV - mean_C[:, None]).square()).sum(1).sqrt()
    target_C1 = targets_C[:, None]
    rank_C = (logits_CV > logits_CV.gather(1, target_C1)).sum(1)
    hit_C = logits_CV.argmax(1) == targets_C
    log_prob_C = log_p_CV.gather(1, target_C1)[:, 0]
    return torch.stack([log_prob_C, hit_C.float(), mean_C, std_C, rank_C.float()], dim=1)


def collect(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    *,
    max_tokens: int = 4096,
    progress: Progress | None = None,
) -> list[Signals]:
    """Signals of every sample, in the order given; batches of at most ``max_tokens`` padded tokens, longest first.

    Logits exist for one chunk of positions at a time, in float32. The model's mode is left as it was.
    """
    found: list[Signals | None] = [None] * len(samples)
    done = 0
    if progress is not None:
        progress.start("signals", len(samples))
    with evaluating(model):
        for group in adapter.batches(samples, max_tokens):
            positions = adapter.positions(model, [samples[i] for i in group])
            numbers_NK = positions.per_token(token_numbers).float().cpu().numpy().reshape(-1, 5)
            sample_N = positions.sample_N.cpu().numpy()
            ids_N = positions.targets_N.cpu().numpy().astype(np.int32)
            for row, index in enumerate(group):
                found[index] = _record(samples[index], numbers_NK[sample_N == row], ids_N[sample_N == row], adapter)
            done += len(group)
            if progress is not None:
                progress.step(done)
    if progress is not None:
        progress.stop()
    return [signals for signals in found if signals is not None]


def _record(sample: Sample, numbers_LK: np.ndarray, ids_L: np.ndarray, adapter: Adapter) -> Signals:
    text_bytes, zlib_bytes = text_sizes(sample.target)
    return Signals(
        id=sample.id,
        subject=sample.subject,
        log_prob_L=numbers_LK[:, 0].copy(),
        hit_L=numbers_LK[:, 1] > 0.5,
        mean_L=numbers_LK[:, 2].copy(),
        std_L=numbers_LK[:, 3].copy(),
        rank_L=numbers_LK[:, 4].astype(np.int32),
        text_bytes=text_bytes,
        zlib_bytes=zlib_bytes,
        truncated=sample.id in adapter.truncated,
        ids_L=ids_L,
    )
