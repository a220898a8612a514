"""A substitute for a masked word, from counts alone: the perturbation model of the neighbourhood attack.

A bigram model over lower-case words, fitted on texts that the audit does not measure. It needs no second neural
network, runs offline, and proposes the same neighbours for every checkpoint. It knows only the word on either side,
so its neighbours are less fluent than those of a masked language model.

Shape suffix: V words of the vocabulary.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PARTS = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)  # punctuation, word, punctuation
EDGE = ""  # what stands before the first and after the last word
MIX = 0.75  # weight of the counted pair against the word's own frequency (Jelinek-Mercer)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Swap:
    """Word ``place`` of the text becomes ``word``; ``odds`` = p(word | neighbours) / (1 - p(old | neighbours))."""

    place: int
    word: str
    odds: float


class Cloze:
    """p(w | left, right) proportional to p(w | left) p(right | w), with p(b | a) = MIX c(a b) / c(a) + (1 - MIX) u(b).

    u is the frequency of a word, or of the edge, with one added to every count; a word ``a`` that was never seen gives
    p(b | a) = u(b).
    """

    def __init__(self, texts: Iterable[str]) -> None:
        counts: Counter[str] = Counter()
        pairs: Counter[tuple[str, str]] = Counter()
        for text in texts:
            bare = [EDGE, *(bare_word(w) for w in text.split()), EDGE]
            counts.update(bare[:-1])  # as the left side of a pair
            pairs.update(itertools.pairwise(bare))
        self.words = sorted(w for w in counts if w != EDGE)
        self.place = {w: i for i, w in enumerate(self.words)}
        self.counts = counts
        mass = counts.total() + len(self.words) + 1
        self.unigram_V = np.array([(counts[w] + 1) / mass for w in self.words])
        self.count_V = np.array([counts[w] for w in self.words], dtype=np.float64)
        self.unigram_edge = (counts[EDGE] + 1) / mass
        self.after: dict[str, list[tuple[int, int]]] = {}
        self.before: dict[str, list[tuple[int, int]]] = {}
        for (left, right), times in pairs.items():
            if right != EDGE:
                self.after.setdefault(left, []).append((self.place[right], times))
            if left != EDGE:
                self.before.setdefault(right, []).append((self.place[left], times))

    def probabilities(self, left: str, right: str) -> Floats:
        """p(w | left, right) for every word of the vocabulary, (V,); the arguments are bare words or the edge."""
        total = self.counts[left]
        follow_V = self.unigram_V * ((1 - MIX) if total else 1.0)
        for i, times in self.after.get(left, ()):
            follow_V[i] += MIX * times / total
        lead_V = np.ones(len(self.words))  # an unknown word on the right is as likely after any other
        if right in self.counts:
            own = self.unigram_edge if right == EDGE else self.unigram_V[self.place[right]]
            lead_V *= (1 - MIX) * own
            for i, times in self.before.get(right, ()):
                lead_V[i] += MIX * times / self.count_V[i]
        joint_V = follow_V * lead_V
        found_V: Floats = joint_V / joint_V.sum()
        return found_V

    def swaps(self, text: str, most: int) -> list[Swap]:
        """The ``most`` likeliest replacements of one word, best first (equation 3 of Mattern et al. 2023)."""
        if not self.words:
            return []
        bare = [bare_word(w) for w in text.split()]
        framed = [EDGE, *bare, EDGE]
        found: list[Swap] = []
        for t, old in enumerate(bare):
            if old == EDGE:
                continue  # punctuation alone
            p_V = self.probabilities(framed[t], framed[t + 2])
            p_old = p_V[self.place[old]] if old in self.place else 0.0
            odds_V = p_V / max(1 - p_old, 1e-12)
            best = np.argsort(-odds_V, kind="stable")[: most + 1]
            found += [Swap(t, self.words[i], float(odds_V[i])) for i in best if self.words[i] != old]
        return sorted(found, key=lambda s: (-s.odds, s.place, s.word))[:most]


def bare_word(word: str) -> str:
    """Lower case, without the punctuation around it."""
    return _parts(word)[1].lower()


def replaced(text: str, swap: Swap) -> str:
    """The text after the swap; punctuation around the word and a capital at its beginning stay."""
    words = text.split()
    before, old, after = _parts(words[swap.place])
    new = swap.word[:1].upper() + swap.word[1:] if old[:1].isupper() else swap.word
    words[swap.place] = before + new + after
    return rewritten(text, words)


def rewritten(text: str, words: Iterable[str]) -> str:
    """The text with its words replaced in their order; the white space between them stays what it was."""
    new = iter(words)
    return re.sub(r"\S+", lambda _: next(new), text)


def _parts(word: str) -> tuple[str, str, str]:
    match = PARTS.match(word)
    assert match is not None  # every part may be empty
    return match[1], match[2], match[3]
