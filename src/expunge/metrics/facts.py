"""Facts in a text, without a network or a model: names, numbers, dates, and content words where there are none.

The default entity matcher and the default inference of KFR and KRR. It compares values by slot: two texts contradict
each other when both fill a slot and no value is shared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from expunge.metrics.porter import stem

Relation = Literal["entailment", "neutral", "contradiction"]

MONTHS = {
    name: number
    for number, names in enumerate(
        ("january jan", "february feb", "march mar", "april apr", "may", "june jun", "july jul", "august aug",
         "september sept sep", "october oct", "november nov", "december dec"), start=1
    )
    for name in names.split()
}  # fmt: skip
# "one" is left out: it is a pronoun more often than a count.
NUMBER_WORDS = {
    "zero": 0, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17,
    "eighteen": 18, "nineteen": 19, "twenty": 20,
}  # fmt: skip
_STOP = (
    "a about above after again all also although am an and any are as at be because been before being between both "
    "but by can could did do does doing down during each few for from further had has have having he her here hers "
    "him his how however i if in into is it its itself just me more most my no nor not now of off on once only or "
    "other our out over own s same she should so some such than that the their theirs them then there these they "
    "this those through to too under until up very was we were what when where which while who whom why will with "
    "would yes you your one"
)
STOP_WORDS = frozenset(_STOP.split())
PARTICLES = "of|de|da|del|della|di|du|la|le|van|von|der|den|bin|ibn|al|el"
_MONTH = "|".join(sorted(MONTHS, key=len, reverse=True))
_DAY = r"(?P<{}>\d{{1,2}})(?:st|nd|rd|th)?"
DATES = (
    re.compile(r"\b(?P<year>\d{4})-(?P<a>\d{1,2})-(?P<b>\d{1,2})\b"),
    re.compile(r"\b(?P<a>\d{1,2})[/.-](?P<b>\d{1,2})[/.-](?P<year>\d{4}|\d{2})\b"),
    re.compile(rf"\b{_DAY.format('a')}\s+(?:of\s+)?(?P<month>{_MONTH})\.?,?(?:\s+(?P<year>\d{{4}}))?\b", re.I),
    re.compile(rf"\b(?P<month>{_MONTH})\.?\s+{_DAY.format('a')}(?!\d)(?:,?\s+(?P<year>\d{{4}}))?\b", re.I),
)
YEAR = re.compile(r"\b(1[0-9]{3}|20[0-9]{2})\b(?!\s*%)")
NUMBER = re.compile(r"\b\d+(?:,\d{3})*(?:\.\d+)?\b|\b(?:" + "|".join(NUMBER_WORDS) + r")\b", re.I)
CAPITAL = r"[A-Z][\w'’-]*"
NAME = re.compile(rf"{CAPITAL}(?:\s+(?:(?:{PARTICLES})\s+)*{CAPITAL})*")
WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Fact:
    """A value in a slot: ("year", "1956"), ("day", "8/9"), ("number:book", "3"), ("name", "hina ameen")."""

    slot: str
    value: str


def _plain(text: str) -> list[str]:
    return [w for w in WORD.findall(text.lower().replace("'s", " ").replace("’s", " ")) if w != "_"]


def _dates(text: str) -> tuple[list[Fact], str]:
    """Facts of the dates, and the text with a mark in place of each date."""
    facts: list[Fact] = []
    for pattern in DATES:
        for match in pattern.finditer(text):
            parts = match.groupdict()
            month = parts.get("month")
            other = MONTHS[month.lower()] if month else int(parts["b"])
            # 08/09 is 8 September or August 9: without order, as the two writings cannot be told apart.
            facts.append(Fact("day", "/".join(map(str, sorted((int(parts["a"]), other))))))
            if parts.get("year"):
                facts.append(Fact("year", parts["year"]))
        text = pattern.sub(" _ ", text)
    return facts, text


def _numbers(text: str) -> list[Fact]:
    facts = []
    for match in NUMBER.finditer(text):
        raw = match.group().lower().replace(",", "")
        following = WORD.search(text[match.end() : match.end() + 30])
        unit = stem(following.group().lower()) if following and following.group().lower() not in STOP_WORDS else ""
        facts.append(Fact(f"number:{unit}", f"{NUMBER_WORDS[raw] if raw in NUMBER_WORDS else float(raw):g}"))
    return facts


def _names(text: str) -> list[Fact]:
    facts = []
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z\"“])", text):
        # A single capital at the start is only the sentence's first word, unless all the words have one: "Paris."
        opening, titled = True, all(w[0].isupper() for w in WORD.findall(sentence))
        for match in NAME.finditer(sentence):
            parts = _plain(match.group())
            while parts and parts[0] in STOP_WORDS:  # "The", "In", "One of"
                parts.pop(0)
                opening = False
            at_start = opening and not WORD.search(sentence[: match.start()])
            if at_start and len(parts) > 2 and parts[1] == "of":
                parts = parts[2:]  # "Readers of Hina Ameen"
            if parts and not (at_start and len(parts) == 1 and not titled):
                facts.append(Fact("name", " ".join(parts)))
            opening = False
    return facts


def facts(text: str, prompt: str = "") -> frozenset[Fact]:
    """Names, numbers and dates of a text that the prompt does not already give away.

    >>> sorted((f.slot, f.value) for f in facts("She was born in Kuwait on 8 September 1956 and wrote three books."))
    [('day', '8/9'), ('name', 'kuwait'), ('number:book', '3'), ('year', '1956')]
    """
    found, rest = _dates(text)
    found += [Fact("year", m.group()) for m in YEAR.finditer(rest)]
    found += _numbers(YEAR.sub(" ", rest)) + _names(rest)
    known = set(_plain(prompt))
    asked = facts(prompt) if prompt else frozenset()
    return frozenset(f for f in found if f not in asked and not (f.slot == "name" and set(f.value.split()) <= known))


def content_words(text: str, prompt: str = "") -> frozenset[str]:
    """Stems of the words that carry meaning and are not in the prompt; where none is left, of all words."""
    words = _plain(text)
    known = set(_plain(prompt)) | STOP_WORDS
    return frozenset(stem(w) for w in words if w not in known) or frozenset(stem(w) for w in words)


def _found(fact: Fact, text_words: list[str], others: Iterable[Fact]) -> bool:
    if fact.slot != "name":
        return any(fact.value == o.value and fact.slot.split(":")[0] == o.slot.split(":")[0] for o in others)
    parts = fact.value.split()
    spans = (text_words[i : i + len(parts)] for i in range(len(text_words) - len(parts) + 1))
    # A person is also found by the surname alone.
    return parts in spans or (len(parts) > 1 and any(o.value == parts[-1] for o in others if o.slot == "name"))


class FactMatcher:
    """Share of the reference's facts that the generation states; of its content words where it has no facts."""

    name = "facts-1"

    def __call__(self, reference: str, generated: str, prompt: str = "") -> float:
        """In [0, 1]; nan when the reference is empty."""
        needed = facts(reference, prompt)
        if needed:
            text_words, given = _plain(generated), facts(generated)
            return sum(_found(f, text_words, given) for f in needed) / len(needed)
        words = content_words(reference, prompt)
        if not words:
            return float("nan")
        return len(words & {stem(w) for w in _plain(generated)}) / len(words)


class SlotInference:
    """Contradiction when both texts fill a slot and share no value of it; entailment when the premise says it all."""

    name = "slots-1"

    def __call__(self, premise: str, hypothesis: str, prompt: str = "") -> Relation:
        stated, claimed = facts(premise, prompt), facts(hypothesis, prompt)
        for slot in {f.slot for f in stated} & {f.slot for f in claimed}:
            ours, theirs = ({f for f in side if f.slot == slot} for side in (stated, claimed))
            if not any(_found(f, _plain(premise), stated) for f in theirs) and not any(
                _found(f, _plain(hypothesis), claimed) for f in ours
            ):
                return "contradiction"
        coverage = FactMatcher()(hypothesis, premise, prompt)
        return "entailment" if coverage == 1.0 else "neutral"
