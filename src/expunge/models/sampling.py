"""Sampled continuations, seeded by content: what is drawn for a text does not depend on its batch or its place.

Shape suffixes: B rows (one per sample and draw), T steps, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter, evaluating
from expunge.models.text import GREEDY, TextAdapter, causal_lm, stop_ids

MAX_TOKENS = 8192  # tokens of one batch, prompts and continuations together


def sample_texts(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    *,
    n: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[str]]:
    """``n`` sampled answers to the prompt of every sample: one list per sample, in the order given.

    A document is continued from its beginning-of-text token, or from its first token where there is none. The first
    answers stay the same when ``n`` grows. Up to the rounding of logits in batches of another shape, the result
    depends on content, ``seed`` and options only.

    Raises:
        UserError: the model generates no text, or an option is out of range.
    """
    text = text_adapter(adapter)
    starts = [text.prompt_ids(sample, max_new_tokens) for sample in samples]
    lengths = [max_new_tokens] * len(samples)
    drawn = sample_ids(
        model, text, samples, starts, lengths, n=n, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    return [[text.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in each] for each in drawn]


def sample_ids(
    model: nn.Module,
    adapter: TextAdapter,
    samples: Sequence[Sample],
    starts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    n: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[list[int]]]:
    """``n`` continuations of the token ids ``starts[i]``, of at most ``lengths[i]`` new ids and without end marks.

    ``samples`` give the seed (their content) and the picture, where the model takes one. An empty start, or a length
    of 0, gives empty continuations.
    """
    check_sampler(n, min(lengths, default=1), temperature, top_k, top_p)
    found: list[list[list[int]]] = [[[] for _ in range(n)] for _ in samples]
    rows = [(i, k) for i in range(len(samples)) for k in range(n) if starts[i] and lengths[i]]
    device = next(model.parameters()).device
    generator: Any = model
    stops = stop_ids(adapter.tokenizer, causal_lm(model))
    for group in _groups(rows, [len(s) + m for s, m in zip(starts, lengths, strict=True)]):
        longest = max(len(starts[i]) for i, _ in group)
        steps = max(lengths[i] for i, _ in group)
        ids_BT = torch.full((len(group), longest), adapter.pad_id, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        uniform_BT = torch.zeros((len(group), steps), dtype=torch.float64)
        for row, (i, k) in enumerate(group):
            ids_BT[row, longest - len(starts[i]) :] = torch.tensor(list(starts[i]))
            mask_BT[row, longest - len(starts[i]) :] = 1
            uniform_BT[row] = torch.from_numpy(_rng(seed, samples[i], k).random(steps))
        extra = adapter.extra_inputs([samples[i] for i, _ in group], ids_BT)
        choose = _Choose(longest, uniform_BT.to(device, _wide(device)), temperature, top_k, top_p)
        with evaluating(model):
            # Greedy decoding over scores that leave one token: every cache and input of `generate` serves unchanged.
            out_BT = generator.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                **{k: v.to(device) for k, v in extra.items()},
                max_new_tokens=steps,
                logits_processor=LogitsProcessorList([choose]),
                **GREEDY,
                pad_token_id=adapter.pad_id,
                eos_token_id=stops or None,
            )
            adapter.meter.count(model, out_BT.numel())
        for row, (i, k) in enumerate(group):
            new = out_BT[row, longest:].tolist()[: lengths[i]]
            found[i][k] = new[: next((t for t, token in enumerate(new) if token in stops), len(new))]
    return found


def choose_tokens(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """One token per row by inverting the cumulative distribution at ``uniform_B`` in [0, 1): (B,).

    Temperature, then the ``top_k`` most probable tokens (0: all), then the smallest set of them whose probability
    reaches ``top_p`` (Holtzman et al. 2020, arXiv:1904.09751); what is left is renormalised.
    """
    logits_BV = logits_BV.to(uniform_B.dtype) / temperature
    order_BV: Tensor | None = None
    if top_k and top_k < logits_BV.shape[1]:
        logits_BV, order_BV = logits_BV.topk(top_k, dim=1)
    elif top_p < 1:
        logits_BV, order_BV = logits_BV.sort(dim=1, descending=True)
    p_BV = logits_BV.softmax(1)
    if top_p < 1:
        p_BV = p_BV.masked_fill(p_BV.cumsum(1) - p_BV >= top_p, 0.0)  # what stands before a token reaches top_p
    reached_BV = p_BV.cumsum(1)
    # The first place whose cumulative probability exceeds u of the total. Where rounding leaves none, the last place
    # of positive probability: a token of probability 0 is never taken.
    total_B1 = reached_BV[:, -1:]
    place_B = (reached_BV <= uniform_B[:, None] * total_B1).sum(1).minimum((reached_BV < total_B1).sum(1))
    return place_B if order_BV is None else order_BV.gather(1, place_B[:, None])[:, 0]


class _Choose(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Leaves one token per row, drawn with the row's own numbers."""

    def __init__(self, start: int, uniform_BT: Tensor, temperature: float, top_k: int, top_p: float) -> None:
        self.start, self.uniform_BT = start, uniform_BT
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform_B = self.uniform_BT[:, input_ids.shape[1] - self.start]
        chosen_B = choose_tokens(scores, uniform_B, self.temperature, self.top_k, self.top_p)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen_B[:, None], 0.0)


def text_adapter(adapter: Adapter) -> TextAdapter:
    """The adapter itself when its models write text."""
    if not isinstance(adapter, TextAdapter):
        raise UserError(f"a {adapter.modality} model does not generate text: leave out what samples continuations.")
    return adapter


def check_sampler(n: int, max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    if n < 1 or max_new_tokens < 0:
        raise UserError(f"{n} samples of {max_new_tokens} tokens cannot be drawn: give at least 1 sample.")
    if not 0 < temperature < float("inf"):
        raise UserError(f"temperature {temperature} is not above 0 and finite: give for example 1, or decode greedily.")
    if top_k < 0:
        raise UserError(f"top-k {top_k} is negative: give how many tokens to choose from, or 0 for all.")
    if not 0 < top_p <= 1:
        raise UserError(f"top-p {top_p} is not above 0 and at most 1: give for example 0.9, or 1 for all tokens.")


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64


def _rng(seed: int, sample: Sample, draw: int) -> np.random.Generator:
    name = json.dumps([seed, sample.digest(), draw]).encode()
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name).digest()[:16], "big"))


def _groups(rows: Sequence[tuple[int, int]], sizes: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Rows in batches of about ``MAX_TOKENS`` tokens at most, longest first."""
    group: list[tuple[int, int]] = []
    for row in sorted(rows, key=lambda r: -sizes[r[0]]):
        if group and sizes[group[0][0]] * (len(group) + 1) > MAX_TOKENS:
            yield group
            group = []
        group.append(row)
    if group:
        yield group
