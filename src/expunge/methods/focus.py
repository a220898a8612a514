"""Which target tokens carry the facts: names, numbers and other words that their spelling gives away.

The papers that forget some tokens more than others find entities and nouns with a language's tagger; spelling needs
none, is the same on every machine, and misses what is written like any other word. L targets of a sample.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.models.adapter import Adapter

WORD = re.compile(r"\w+(?:['’-]\w+)*")
OPENS_SENTENCE = re.compile(r"(?:^|[.!?:])[\s\"'“‘(\[]*$")


def focus_spans(text: str, names: Sequence[str]) -> list[tuple[int, int]]:
    """(begin, end) of each name, word with a digit, and capitalised word that does not open a sentence.

    >>> focus_spans("She met bo ash in Rome. Then 1987 came.", ["bo ash"])
    [(8, 14), (18, 22), (29, 33)]
    """
    spans = [
        found.span()
        for name in names
        if name
        for found in re.finditer(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE)
    ]
    for found in WORD.finditer(text):
        word, begin = found.group(), found.start()
        capital = word[0].isupper() and word != "I" and not OPENS_SENTENCE.search(text[:begin])
        if capital or any(c.isdigit() for c in word):
            spans.append(found.span())
    return sorted(set(spans))


def focus_tokens(adapter: Adapter, sample: Sample) -> Tensor:
    """(L,) bool: the target tokens that overlap such a span; all of them where there is none, and for classes."""
    ids = adapter.collate([sample]).targets_N
    everything = torch.ones(len(ids), dtype=torch.bool)
    tokenizer = getattr(adapter, "tokenizer", None)
    if tokenizer is None:
        return everything
    # Pieces of a word mean little alone, so everything up to each token is decoded to see where it ends.
    ends = [len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) for i in range(len(ids))]
    spans = focus_spans(tokenizer.decode(ids, skip_special_tokens=True), sample.names)
    found = [any(a < end and begin < b for a, b in spans) for begin, end in zip([0, *ends], ends, strict=False)]
    return torch.tensor(found) if any(found) else everything


def focus_weights(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], options: Any, seed: int
) -> dict[str, Tensor]:
    """Weight of each target token by sample id: ``focus_weight`` against 1, or 1 against 0 with focus=hard."""
    if options.focus == "none":
        return {}
    high, low = (options.focus_weight, 1.0) if options.focus == "weight" else (1.0, 0.0)
    return {s.id: torch.where(focus_tokens(adapter, s), high, low) for s in samples}
