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

BLOCK_ELEMENTS = 1 << 17  # logits worked on at once on a CPU: 512 KiB, so that all passes over them stay in the cache


def token_numbers(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """(log-probability, arg-max hit, mean and standard deviation of log p under p, rank) of each target: (C, 5).

    float32 whatever the dtype of the logits, which are left as they are. The deviation is summed around the mean;
    E[x^2] - E[x]^2 would cancel in float32. A logit of -inf has probability 0 and counts for nothing. Of several
    equal largest logits the first one is the arg-max. Ranks below 2^24 are exact in float32.
    """
    # On a CPU every pass over V is bound by memory, so a block of rows stays in the cache through all of them.
    step = logits_CV.shape[0] if logits_CV.device.type != "cpu" else max(1, BLOCK_ELEMENTS // logits_CV.shape[1])
    rows = zip(logits_CV.split(max(1, step)), targets_C.split(max(1, step)), strict=True)
    return torch.cat([_block_numbers(logits.float(), targets[:, None]) for logits, targets in rows])


def _block_numbers(logits_CV: Tensor, target_C1: Tensor) -> Tensor:
    own_C1, top_C1 = logits_CV.gather(1, target_C1), logits_CV.amax(1, keepdim=True)
    p_CV = logits_CV.softmax(1)
    log_sum_C1 = -p_CV.amax(1, keepdim=True).log()  # of exp(logit - top): the largest term is 1
    work_CV = torch.empty_like(p_CV)
    rank_C1 = torch.gt(logits_CV, own_C1, out=work_CV).sum(1, keepdim=True)
    hit_C1 = rank_C1 == 0
    tied_C = (hit_C1 & (torch.eq(logits_CV, own_C1, out=work_CV).sum(1, keepdim=True) > 1))[:, 0]
    if tied_C.any():
        hit_C1[tied_C] = logits_CV[tied_C].argmax(1, keepdim=True) == target_C1[tied_C]
    # log p = x - log_sum with x = logit - top; x is cut where p is 0 anyway, since 0 * -inf is no number.
    x_CV = torch.sub(logits_CV, top_C1).clamp_(min=-1e4)
    mean_C1 = torch.mul(p_CV, x_CV, out=work_CV).sum(1, keepdim=True)
    variance_C1 = x_CV.sub_(mean_C1).square_().mul_(p_CV).sum(1, keepdim=True)
    log_prob_C1 = own_C1 - top_C1 - log_sum_C1
    return torch.cat([log_prob_C1, hit_C1.float(), mean_C1 - log_sum_C1, variance_C1.sqrt(), rank_C1], dim=1)


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
            order_N = np.argsort(sample_N, kind="stable")  # positions need not be grouped by sample
            ends_B = np.cumsum(np.bincount(sample_N, minlength=len(group)))[:-1]
            ids_N = positions.targets_N.cpu().numpy().astype(np.int32)
            columns = (np.split(a[order_N], ends_B) for a in (numbers_NK, ids_N))
            for index, numbers_LK, ids_L in zip(group, *columns, strict=True):
                found[index] = _record(samples[index], numbers_LK, ids_L, adapter)
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
        ids_L=ids_L.copy(),
    )
