"""Signals: the numbers that one forward pass of one model leaves per target token of one sample.

Shape suffix: L target tokens of the sample.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Signals:
    """One sample under one model; natural logarithms throughout.

    ``log_prob_L``: log p(target). ``hit_L``: the target is the arg-max. ``mean_L``, ``std_L``: mean and standard
    deviation of log p(v) when v is drawn from the model, mu = sum_v p(v) log p(v). ``rank_L``: how many tokens are
    strictly more probable than the target. ``ids_L``: the targets themselves, token ids or class indices.
    ``text_bytes``, ``zlib_bytes``: UTF-8 length of the target text and its zlib-compressed length. ``truncated``: the
    sample was cut to the context, so the bytes say more than the tokens.
    """

    id: str
    subject: str
    log_prob_L: Floats
    hit_L: NDArray[np.bool_]
    mean_L: Floats
    std_L: Floats
    rank_L: NDArray[np.int32]
    text_bytes: int
    zlib_bytes: int
    truncated: bool = False
    ids_L: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.log_prob_L)

    @property
    def entropy_L(self) -> Floats:
        """Entropy of the next-token distribution in nats: exactly -``mean_L``."""
        return -self.mean_L

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per target token in nats; nan without a target."""
        return -float(np.mean(self.log_prob_L, dtype=np.float64)) if len(self) else math.nan

    @property
    def prob(self) -> float:
        """exp(-loss): the geometric mean of the token probabilities, TOFU's P(a|q)^(1/|a|)."""
        return math.exp(-self.loss) if len(self) else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Code length of the target in bits per UTF-8 byte: comparable between tokenizers."""
        if not len(self) or self.text_bytes == 0:
            return math.nan
        return -float(np.sum(self.log_prob_L, dtype=np.float64)) / math.log(2) / self.text_bytes

    def summary(self) -> dict[str, Any]:
        """What samples.jsonl keeps of a sample."""
        empty = not len(self)
        return {
            "tokens": len(self),
            "loss": None if empty else self.loss,
            "prob": None if empty else self.prob,
            "hits": None if empty else float(self.hit_L.mean()),
            "entropy": None if empty else float(self.entropy_L.mean(dtype=np.float64)),
            "text_bytes": self.text_bytes,
            "zlib_bytes": self.zlib_bytes,
            "truncated": self.truncated,
        }


def text_sizes(target: str | int) -> tuple[int, int]:
    """UTF-8 length of the target text and its zlib-compressed length (level 6), in bytes."""
    raw = str(target).encode()
    return len(raw), len(zlib.compress(raw, 6))
