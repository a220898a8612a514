"""Slow references for attacks: one text, one pass, no adapter, no batch; and what an attack says of three models."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from attack_cases import exam, retrain
from expunge.attacks.registry import Finding, get_attack
from expunge.stats import auc
from tiny_text import tiny_tokenizer


def log_probs(model: nn.Module, before: str, after: str, eos: bool = True) -> list[float]:
    """log p of every token of ``after`` (and the end mark) behind ``before``, both in the words of the tiny world."""
    tokenizer = tiny_tokenizer()
    first, second = tokenizer(before)["input_ids"], tokenizer(after)["input_ids"] + [2] * eos
    ids = first + second
    with torch.no_grad():
        logits: Any = model(input_ids=torch.tensor([ids])).logits[0].double()
    table = torch.log_softmax(logits, -1)
    start = max(1, len(first))  # nothing predicts the first token of all
    return [float(table[t - 1, ids[t]]) for t in range(start, len(ids))]


def loss(model: nn.Module, before: str, after: str, eos: bool = True) -> float:
    return -float(np.mean(log_probs(model, before, after, eos)))


def run(name: str, checkpoint: Any = None, **options: Any) -> Finding:
    """The attack on the original of the small exam, or on the given checkpoint."""
    entry = get_attack(name)
    return entry.run(exam(), exam().audited if checkpoint is None else checkpoint, entry.configure(options))


def assert_finds(name: str, score: str = "", members: float = 0.6, over_retrain: float = 0.9, **options: Any) -> None:
    """Members stand out in the original, not in an exact retrain; forget scores are higher in the original."""
    original, again = run(name, **options), run(name, retrain(), **options)
    ours, theirs = original.scores[score or name], again.scores[score or name]
    for role in ("forget", "holdout"):
        assert len(ours[role]) == len(exam().samples[role])
        assert np.isfinite([*ours[role], *theirs[role]]).all()
    assert auc(np.array(ours["forget"]), np.array(ours["holdout"])) >= members
    assert auc(np.array(theirs["forget"]), np.array(theirs["holdout"])) < 0.5
    assert auc(np.array(ours["forget"]), np.array(theirs["forget"])) >= over_retrain
