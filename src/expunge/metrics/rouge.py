"""ROUGE-1 and ROUGE-L (Lin 2004): overlap of words, and of the longest common subsequence of words.

Tokens are lower-case runs of a-z and 0-9; with stemming, words longer than three letters are Porter-stemmed. These
are the choices of the `rouge_score` package, which TOFU, MUSE and OpenUnlearning use, and the results are equal.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from expunge.errors import UserError
from expunge.metrics.porter import stem
from expunge.metrics.registry import metric
from expunge.stats import Estimate, Groups, bootstrap_mean

Kind = Literal["rouge1_recall", "rouge1_f1", "rougeL_recall", "rougeL_f1"]
WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True, slots=True)
class Overlap:
    """Shares of the generated text (precision), of the target (recall), and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def words(text: str, stemming: bool = True) -> list[str]:
    """Lower-case words of a text, stemmed when longer than three letters."""
    found = WORD.findall(text.lower())
    return [stem(w) if len(w) > 3 else w for w in found] if stemming else found


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, bit-parallel over ``first`` (Hyyro 2004): one step per word."""
    where: dict[str, int] = {}
    for i, word in enumerate(first):
        where[word] = where.get(word, 0) | 1 << i
    full = (1 << len(first)) - 1
    open_places = full  # a 0 at i: the subsequence grows at first[i]
    for word in second:
        hit = open_places & where.get(word, 0)
        open_places = ((open_places + hit) | (open_places - hit)) & full
    return len(first) - open_places.bit_count()


def _overlap(common: int, target: int, generated: int) -> Overlap:
    precision = common / generated if generated else 0.0
    recall = common / target if target else 0.0
    total = precision + recall
    return Overlap(precision, recall, 2 * precision * recall / total if total else 0.0)


def rouge_1(target: str, generated: str, stemming: bool = True) -> Overlap:
    """Overlap of single words, each counted as often as it stands in both texts."""
    wanted, given = words(target, stemming), words(generated, stemming)
    return _overlap((Counter(wanted) & Counter(given)).total(), len(wanted), len(given))


def rouge_l(target: str, generated: str, stemming: bool = True) -> Overlap:
    """Overlap of the longest common subsequence of words."""
    wanted, given = words(target, stemming), words(generated, stemming)
    return _overlap(longest_common_subsequence(wanted, given), len(wanted), len(given))


def rouge_score(target: str, generated: str, kind: Kind = "rougeL_recall", stemming: bool = True) -> float:
    """One of the four numbers in use; TOFU takes rougeL_recall, MUSE rougeL_f1."""
    if kind not in ("rouge1_recall", "rouge1_f1", "rougeL_recall", "rougeL_f1"):
        raise UserError(f"rouge '{kind}' is not one of rouge1_recall, rouge1_f1, rougeL_recall, rougeL_f1.")
    name, _, part = kind.partition("_")
    overlap = (rouge_1 if name == "rouge1" else rouge_l)(target, generated, stemming)
    return overlap.recall if part == "recall" else overlap.f1


@metric(
    name="rouge",
    definition="rougeL_recall/1",
    formula="|LCS(target, generated)| / |target| in stemmed words; also rouge1_recall, rouge1_f1, rougeL_f1",
    direction="forget: two-sided to the reference; retain: higher is better",
    source="Lin 2004; TOFU (Maini et al. 2024) uses ROUGE-L recall, MUSE (Shi et al. 2025) ROUGE-L F1",
)
def rouge(
    targets: Sequence[str],
    generated: Sequence[str],
    groups: Groups = None,
    kind: Kind = "rougeL_recall",
    stemming: bool = True,
) -> Estimate:
    """Mean ROUGE of generations against targets, with a bootstrap interval over subjects.

    Shows how much of the wording comes back under greedy decoding. A wrong answer in the same sentence frame scores
    high, and a right answer in other words scores low.
    """
    if len(targets) != len(generated):
        raise UserError(f"{len(targets)} targets but {len(generated)} generations: give one generation per target.")
    scores = [rouge_score(t, g, kind, stemming) for t, g in zip(targets, generated, strict=True)]
    return bootstrap_mean(scores, groups, definition=f"{kind}{'' if stemming else '-unstemmed'}/1")
