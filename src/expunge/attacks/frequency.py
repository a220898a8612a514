"""DC-PDD: probability against how common a token is anyway (Zhang et al. 2024, arXiv:2409.14781).

Shape suffixes: L target tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.membership import WORDS, read
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter
from expunge.options import option
from expunge.signals.cache import fingerprint
from expunge.signals.record import Signals

CAP = 0.01
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Frequencies:
    """How often each token id occurs in some reference texts; Laplace-smoothed over a vocabulary of ``vocab``."""

    counts: Mapping[int, int]
    vocab: int

    @cached_property
    def total(self) -> int:
        """Tokens counted."""
        return sum(self.counts.values())

    @cached_property
    def surprise_V(self) -> Floats:
        """-log of (count + 1) / (total + vocab) of each token, in nats."""
        counts_V = np.zeros(self.vocab)
        counts_V[list(self.counts.keys())] = list(self.counts.values())
        found: Floats = math.log(self.total + self.vocab) - np.log(counts_V + 1)
        return found


def dc_pdd_score(signals: Signals, frequencies: Frequencies, cap: float = CAP) -> float:
    """Mean over the first occurrence of each token of min(p(x) * -log f(x), cap); nan without a token."""
    if not len(signals):
        return math.nan
    _, first = np.unique(signals.ids_L, return_index=True)
    p = np.exp(signals.log_prob_L[first].astype(np.float64))
    return float(np.minimum(p * frequencies.surprise_V[signals.ids_L[first]], cap).mean())


def count_tokens(adapter: Adapter, samples: Iterable[Sample]) -> Frequencies:
    """Frequencies of the target tokens of the samples; no model runs."""
    counts: Counter[int] = Counter()
    for sample in samples:
        counts.update(adapter.collate([sample]).targets_N.tolist())
    return Frequencies(counts, _vocab(adapter))


def read_frequencies(path: str, adapter: Adapter) -> Frequencies:
    """A JSON object {token id: count} for this adapter's tokenizer.

    Raises:
        UserError: no such file, not such an object, a token outside of the vocabulary, or a negative count.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        counts = {int(token): int(count) for token, count in table.items()}
    except OSError:
        raise UserError(f"the token table '{path}' cannot be read: give a JSON file {{token id: count}}.") from None
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"'{path}' is no token table: give a JSON object such as {{\"17\": 4021}}.") from None
    vocab = _vocab(adapter)
    bad = next((t for t, n in counts.items() if not 0 <= t < vocab or n < 0), None)
    if bad is not None:
        raise UserError(
            f"'{path}' gives token {bad} the count {counts[bad]}: tokens are 0 to {vocab - 1} for this tokenizer, and "
            "counts are not negative."
        )
    return Frequencies(counts, vocab)


def _vocab(adapter: Adapter) -> int:
    tokenizer: Any = getattr(adapter, "tokenizer")  # noqa: B009 - text and multimodal adapters alone have one
    return int(max(tokenizer.get_vocab().values())) + 1  # not its length: ids may have gaps


@dataclass(frozen=True, kw_only=True)
class DcPddOptions:
    """Options of DC-PDD."""

    cap: float = option(CAP, "highest contribution of one token", "Zhang et al. 2024")
    table: str = option("", "JSON file {token id: count} of a large corpus; empty: count in the texts at hand")


@attack(
    name="dc_pdd",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="Zhang et al. 2024, arXiv:2409.14781",
    formula="mean over first occurrences of min(p(x_t) * -log f(x_t), cap), f = (count + 1) / (total + vocabulary)",
    options=DcPddOptions,
    needs=("aux",),
    modalities=WORDS,
)
def dc_pdd(exam: Exam, checkpoint: Checkpoint, options: DcPddOptions) -> Finding:
    """Token probabilities that are high although the tokens are rare.

    Frequencies come from ``table``, or from the unseen texts and the retained texts outside of the evaluation.
    """
    key = (__name__, options.table, fingerprint(checkpoint.adapter))
    if key not in exam.shared:
        if options.table:
            exam.shared[key] = read_frequencies(options.table, checkpoint.adapter)
        else:
            exam.shared[key] = count_tokens(checkpoint.adapter, [*exam.aux, *exam.trained])
    frequencies: Frequencies = exam.shared[key]
    found = {r: [dc_pdd_score(s, frequencies, options.cap) for s in sig] for r, sig in read(exam, checkpoint).items()}
    few = frequencies.total < frequencies.vocab
    notes = ["dc_pdd: frequencies come from fewer tokens than the vocabulary has; give a table of a large corpus"]
    return Finding({"dc_pdd": found}, notes=notes if few else [])
