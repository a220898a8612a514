"""Who an author of TOFU is: the capitalised word sequence that most of the author's questions and answers share."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”|(?<!\w)['‘][^'’]*['’](?!\w)")  # titles of works are no names
NICKNAME = re.compile(r"(?<=\w) \((\w+)\)(?= [A-Z])")  # Alejandro (Alex) Fuentes
TOKEN = re.compile(r"[^\W_]+(?:[-'’‑][^\W_]+)*|[^\w\s]")
PARTICLES = frozenset(
    ("al", "el", "van", "der", "den", "de", "von", "bin", "ibn", "da", "dos", "del", "la", "le", "di")
)
# Words that begin a question or an answer with a capital and are no part of a name.
OPENERS = frozenset(
    re.findall(
        r"\w+",
        "Who What When Where Which Why How Is Are Was Were Do Does Did Can Could Would Should Has Have Had In "
        "On At By For From With Of To The A And As Yes No Some Please Apart Aside Besides Author Authors "
        "Despite Given Considering Among Being Born While Through Throughout Both One Two Their His Her Its "
        "Fictitious Writer During Since After Before It This That These Under Over Like If",
    )
)
LONGEST = 5  # words in a name
ENOUGH = 24  # mentions (of 40: a question counts twice against an answer) below which nobody is named


def _capitalised(word: str) -> bool:
    head = word.partition("-")[2] if word.partition("-")[0] in PARTICLES else word  # al-Faisal
    return head[:1].isupper() and word not in OPENERS


def _sequences(text: str) -> set[tuple[str, ...]]:
    """Every run of up to five name words; particles may stand inside, not at an end."""
    plain = QUOTED.sub(" , ", NICKNAME.sub("", text))
    tokens = [re.sub(r"['’]s?$", "", token) for token in TOKEN.findall(plain)]
    found: set[tuple[str, ...]] = set()
    for start, token in enumerate(tokens):
        if not _capitalised(token):
            continue
        for end in range(start + 1, min(start + LONGEST, len(tokens)) + 1):
            last = tokens[end - 1]
            if _capitalised(last):
                found.add(tuple(tokens[start:end]))
            elif last not in PARTICLES:
                break
    return found


def names_of(pairs: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """The author's full name, then the single names by which the texts also call the author (surname first).

    Args:
        pairs: (question, answer) of one author.

    Returns:
        An empty tuple when the texts name nobody (TOFU has one author who is never named).
    """
    mentions: Counter[tuple[str, ...]] = Counter()
    for question, answer in pairs:
        asked = _sequences(question)
        mentions.update(asked)
        mentions.update(asked | _sequences(answer))
    longer = [sequence for sequence in mentions if len(sequence) > 1]
    if not longer:
        return ()
    best = max(longer, key=lambda s: (mentions[s], len(s), s))
    if mentions[best] * 20 < ENOUGH * len(pairs):
        return ()
    while True:  # "Basil Mahfouz" is as frequent as "Basil Mahfouz Al-Kuwaiti": take the whole name
        grown = [s for s in longer if _extends(s, best) and 2 * mentions[s] >= mentions[best]]
        if not grown:
            break
        best = max(grown, key=lambda s: (mentions[s], s))
    full = " ".join(best)
    rest = " ".join(f"{question} {answer}" for question, answer in pairs)
    nicknames = [name for name in NICKNAME.findall(rest) if name[:1].isupper()]
    rest = NICKNAME.sub("", rest).replace(full, " ")
    single = [word for word in (best[-1], best[0], *best[1:-1], *nicknames[:1]) if len(word) > 2]
    used = [word for word in single if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", rest)]
    return tuple(dict.fromkeys((full, *used)))


def _extends(longer: tuple[str, ...], shorter: tuple[str, ...]) -> bool:
    size = len(shorter)
    return len(longer) > size and shorter in (longer[:size], longer[-size:])
