"""Texts cut into what an attacker gives and what the model must add: prefix and suffix, in tokens.

Shape suffix: L target tokens of a sample.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter
from expunge.models.text import Encoded, TextAdapter, cut_middle

GIVEN = 50  # tokens given of a document, and tokens asked for (Carlini et al. 2023, arXiv 2202.07646)


def closing_ids(adapter: Adapter) -> frozenset[int]:
    """Special tokens that close an answer; the mark for unknown words stands for content and is none of them."""
    tokenizer: Any = getattr(adapter, "tokenizer", None)
    if tokenizer is None:
        return frozenset()
    return frozenset(int(i) for i in tokenizer.all_special_ids) - {tokenizer.unk_token_id}


def suffix_span(
    ids_L: NDArray[np.integer], has_prompt: bool, closing: frozenset[int], prefix: int = GIVEN, suffix: int = GIVEN
) -> slice:
    """The target tokens that have to be extracted.

    After a prompt: from the first token of the answer. In a document: after ``prefix`` tokens, or after half of a
    document that is shorter than twice that. At most ``suffix`` tokens (0: all), without the closing tokens: whoever
    reads the answer has it, whether or not the model stops there.
    """
    end = len(ids_L)
    while end and int(ids_L[end - 1]) in closing:
        end -= 1
    start = 0 if has_prompt else min(prefix, end // 2)
    return slice(start, min(end, start + suffix) if suffix else end)


def check_lengths(prefix: int, suffix: int) -> None:
    """Raises UserError for negative lengths."""
    if prefix < 0 or suffix < 0:
        raise UserError(f"prefix {prefix} and suffix {suffix} count tokens: give 0 or more (suffix 0 takes the rest).")


def split_ids(adapter: TextAdapter, sample: Sample, prefix: int, suffix: int) -> tuple[list[int], list[int]]:
    """(ids that are given, ids that are wanted) of a sample, by :func:`suffix_span`."""
    coded: Encoded = adapter.cached(sample)
    target = list(coded.ids[coded.first :])
    span = suffix_span(np.array(target, dtype=np.int64), bool(sample.prompt), closing_ids(adapter), prefix, suffix)
    return [*coded.ids[: coded.first], *target[: span.start]], target[span]


def ids_up_to(adapter: TextAdapter, sample: Sample, given: object) -> list[int]:
    """Ids of the sample's template with only ``given`` of its target, ready to be continued."""
    coded: Encoded = adapter.encode(replace(sample, target=str(given).rstrip()))
    ids, closing = list(coded.ids), closing_ids(adapter)
    while len(ids) > coded.first and ids[-1] in closing:
        ids.pop()
    return ids


def fitting(adapter: TextAdapter, ids: list[int], new: int) -> list[int]:
    """``ids`` with room for ``new`` more: the beginning is cut, but for its first token."""
    return cut_middle(ids, max(2, adapter.context - new), 1)


def room_for(adapter: TextAdapter, max_new_tokens: int) -> int:
    """``max_new_tokens``, but at most half of the context: a longer answer would push its own prompt out."""
    return min(max_new_tokens, adapter.context // 2)
