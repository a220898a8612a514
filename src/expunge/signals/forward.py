"""One forward pass over the samples, everything that metrics and attacks need from it.

Shape suffixes: C positions in a chunk, B of them in a block, V vocabulary, K kinds of number, L target tokens.
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

BLOCK_ELEMENTS = 1 << 18  # logits worked on at once on a CPU: 1 MiB, so that the passes over them stay in the cache


@torch.no_grad()
def token_numbers(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """(log-probability, arg-max hit, mean and standard deviation of log p under p, rank) of each target: (C, 5).

    float32 whatever the dtype of the logits, which are left as they are. The deviation is summed around the mean;
    E[x^2] - E[x]^2 would cancel in float32. A logit of -inf has probability 0 and counts for nothing. Of several
    equal largest logits the first one is the arg-max. Ranks below 2^24 are exact in float32.
    """
    num, vocab = logits_CV.shape
    # On a CPU every pass over V is bound by memory, so a block of rows stays in the cache through all of them.
    step = max(1, min(num, BLOCK_ELEMENTS // vocab) if logits_CV.device.type == "cpu" else num)
    spare_SV = [torch.empty(step, vocab, device=logits_CV.device) for _ in range(3)]
    found_C5 = torch.empty(num, 5, device=logits_CV.device)
    for start in range(0, num, step):
        cut = slice(start, min(start + step, num))
        p_BV, x_BV, work_BV = (spare[: cut.stop - start] for spare in spare_SV)
        found_C5[cut] = _block_numbers(logits_CV[cut].float(), targets_C[cut, None], p_BV, x_BV, work_BV)
    return found_C5


def _block_numbers(logits_BV: Tensor, target_B1: Tensor, p_BV: Tensor, x_BV: Tensor, work_BV: Tensor) -> Tensor:
    """:func:`token_numbers` of one block; the last three are overwritten."""
    own_B1, top_B1 = logits_BV.gather(1, target_B1), logits_BV.amax(1, keepdim=True)
    rank_B1 = torch.gt(logits_BV, own_B1, out=work_BV).sum(1, keepdim=True)
    hit_B1 = rank_B1 == 0
    if hit_B1.any():
        tied_B = (hit_B1 & (torch.eq(logits_BV, own_B1, out=work_BV).sum(1, keepdim=True) > 1))[:, 0]
        hit_B1[tied_B] = logits_BV[tied_B].argmax(1, keepdim=True) == target_B1[tied_B]
    torch.softmax(logits_BV, 1, out=p_BV)
    log_sum_B1 = -p_BV.amax(1, keepdim=True).log()  # of exp(logit - top), since the largest term is 1
    torch.sub(logits_BV, top_B1, out=x_BV)  # log p = x - log_sum
    mean_B1 = torch.mul(p_BV, x_BV, out=work_BV).sum(1, keepdim=True)
    if mean_B1.isnan().any():  # 0 * -inf is no number: x is cut where p is 0 anyway
        mean_B1 = torch.mul(p_BV, x_BV.clamp_(min=-1e4), out=work_BV).sum(1, keepdim=True)
    variance_B1 = x_BV.sub_(mean_B1).square_().mul_(p_BV).sum(1, keepdim=True)
    log_prob_B1 = own_B1 - top_B1 - log_sum_B1
    return torch.cat([log_prob_B1, hit_B1.float(), mean_B1 - log_sum_B1, variance_B1.sqrt(), rank_B1], dim=1)


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
