"""Porter's stemmer (1980) with the departures of NLTK's default mode, which the ROUGE of the literature uses.

Departures: short words ending in -ies/-ied keep an e, -y after a consonant becomes -i only in stems longer than
one letter, -alli is undone before the other endings of step 2, -fulli and -logi are endings, a vowel-consonant
stem of two letters counts as short, words of one or two letters stay, and a few irregular words are listed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "innings": "inning", "inning": "inning", "outings": "outing", "outing": "outing",
    "cannings": "canning", "canning": "canning",
    "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed",
}  # fmt: skip

# Tried in order; the first ending that fits decides, whether or not its condition then holds.
STEP_2 = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("bli", "ble"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
    ("iviti", "ive"), ("biliti", "ble"), ("fulli", "ful"), ("logi", "log"),
)  # fmt: skip
STEP_3 = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""),
)  # fmt: skip
STEP_4 = (
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate",
    "iti", "ous", "ive", "ize",
)  # fmt: skip


def shape(word: str) -> str:
    """The word in letters c and v; y is a vowel after a consonant.

    >>> shape("syzygy")
    'cvcvcv'
    """
    letters = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and letters.endswith("c"))
        letters += "v" if vowel else "c"
    return letters


def measure(word: str) -> int:
    """How often a vowel is followed by a consonant: Porter's m."""
    return shape(word).count("vc")


def is_short(word: str) -> bool:
    """Ends consonant-vowel-consonant without a last w, x or y (or is vowel-consonant): Porter's *o."""
    letters = shape(word)
    return letters == "vc" or (letters.endswith("cvc") and word[-1] not in "wxy")


def _swap(word: str, rules: tuple[tuple[str, str], ...], holds: Callable[[str, str], bool]) -> str:
    for ending, new in rules:
        if word.endswith(ending):
            rest = word[: len(word) - len(ending)]
            return rest + new if holds(rest, ending) else word
    return word


def _plural(word: str) -> str:
    if word.endswith("ies"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if measure(word[:-3]) > 0 else word
    for ending in ("ed", "ing"):
        rest = word[: len(word) - len(ending)]
        if word.endswith(ending) and "v" in shape(rest):
            break
    else:
        return word
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if len(rest) >= 2 and rest[-1] == rest[-2] and shape(rest).endswith("c"):
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if measure(rest) == 1 and is_short(rest) else rest


def _step_2(word: str) -> str:
    if word.endswith("alli") and measure(word[:-4]) > 0:
        return _step_2(word[:-2])
    # The l of -logi belongs to what is measured, so that "geologi" is treated as "archaeologi" is.
    return _swap(word, STEP_2, lambda rest, ending: measure(rest + "l" if ending == "logi" else rest) > 0)


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """Stem of a lower-case word.

    >>> stem("relational"), stem("flies"), stem("dies")
    ('relat', 'fli', 'die')
    """
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    word = _past(_plural(word))
    if word.endswith("y") and len(word) > 2 and shape(word)[-2] == "c":
        word = word[:-1] + "i"
    word = _swap(_step_2(word), STEP_3, lambda rest, _: measure(rest) > 0)
    word = _swap(
        word,
        tuple((ending, "") for ending in STEP_4),
        lambda rest, ending: measure(rest) > 1 and (ending != "ion" or rest[-1] in "st"),
    )
    if word.endswith("e"):
        rest = word[:-1]
        if measure(rest) > 1 or (measure(rest) == 1 and not is_short(rest)):
            word = rest
    return word[:-1] if word.endswith("ll") and measure(word[:-1]) > 1 else word
