"""A text model that half knows its samples, and the slow side of every loss: full logits of one sample at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.models.tiny import init_text
from expunge.training.loop import TrainOptions, fit
from tiny_text import tiny_dataset

torch.set_num_threads(1)
DATA = tiny_dataset()
FORGET, RETAIN = DATA["forget"][:4], DATA["retain"][:6]
LOADED = init_text([*DATA.private], "tiny-test")
fit(LOADED.model, LOADED.adapter, [*FORGET, *RETAIN], TrainOptions(epochs=70, batch_size=5, learning_rate=1e-2))


def fresh() -> nn.Module:
    """A model that half knows the samples, so that no gradient is next to nothing."""
    return copy.deepcopy(LOADED.model)


def logits(model: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    """(n, V) and the n target tokens."""
    tokenizer: Any = LOADED.adapter.tokenizer  # type: ignore[attr-defined]
    before = tokenizer(sample.prompt).input_ids
    ids = tokenizer(f"{sample.prompt} {sample.target}{tokenizer.eos_token}").input_ids
    assert ids[: len(before)] == before
    out = model(input_ids=torch.tensor([ids])).logits[0]
    return out[len(before) - 1 : -1], torch.tensor(ids[len(before) :])


def token_log_probs(model: nn.Module, sample: Sample) -> Tensor:
    z, y = logits(model, sample)
    return torch.stack([z[t, y[t]] - torch.log(torch.exp(z[t]).sum()) for t in range(len(y))])


def mean_over_tokens(values: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(values)).mean()
