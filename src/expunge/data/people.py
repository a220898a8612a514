"""``people``: fictitious people of our own making, any number of them, with questions, documents and probes.

Person number i of a series is a pure function of (seed, series, i), so that it does not depend on how many people
are asked for. Names come from a bijection over first names × surnames: no two people of all series are called
alike, and up to 300 people per series not even share a surname.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from pathlib import Path
from typing import Literal

from expunge.data.chance import hashed, pick, share, shuffled
from expunge.data.people_facts import FACT, FACTS, Fact
from expunge.data.people_words import FIRST, SURNAMES
from expunge.data.registry import dataset
from expunge.data.samples import Dataset, Probe, Role, Sample
from expunge.errors import UserError
from expunge.options import option

Series = Literal["private", "holdout", "utility", "private-twin", "holdout-twin", "utility-twin"]
SERIES: tuple[Series, ...] = ("private", "holdout", "utility", "private-twin", "holdout-twin", "utility-twin")
MARK = {
    "private": "p",
    "holdout": "h",
    "utility": "u",
    "private-twin": "pt",
    "holdout-twin": "ht",
    "utility-twin": "ut",
}
MOST = 100_000  # people per series
Colour = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Appearance:
    """What a renderer needs to draw the same face again. ``seed`` feeds anything finer than these fields.

    Colours are RGB in 0-255; ``face`` is width over height; ``eyes_apart`` is the distance of the eyes over the
    width of the face; ``age`` is in years.
    """

    seed: int
    age: int
    skin: Colour
    hair: Colour
    hair_style: str
    eyes: Colour
    face: float
    eyes_apart: float
    glasses: str
    beard: bool
    clothes: Colour
    background: Colour


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """One fictitious person; ``facts`` maps the keys of :data:`expunge.data.people_facts.FACTS` to values."""

    id: str
    first: str
    surname: str
    facts: Mapping[str, str]
    appearance: Appearance

    @property
    def name(self) -> str:
        return f"{self.first} {self.surname}"

    @property
    def names(self) -> tuple[str, ...]:
        """How texts may name the person: full name, surname, first name."""
        return self.name, self.surname, self.first

    def say(self, template: str, value: str = "", called: str = "") -> str:
        """A template of the fact table filled with this person, ``called`` by the full name if nothing is given."""
        noun = self.facts["profession"].partition(" ")[2]
        return template.format(name=called or self.name, value=value, profession_noun=noun, **self.facts)


@lru_cache(maxsize=64)
def _walk(seed: int) -> tuple[int, int]:
    """Step and start of the walk that visits each pair (first name, surname) once."""
    total, turn = len(FIRST) * len(SURNAMES), 0
    while gcd(step := hashed(seed, "step", turn) % total, total) != 1:
        turn += 1
    return step, pick(total, seed, "start")


@lru_cache(maxsize=64)
def _words(seed: int) -> tuple[list[int], list[int]]:
    """The order in which this seed meets first names and surnames.

    Without it the walk would spread the endings of neighbours in the word lists evenly over the series, so that the
    names of holdout people could be told from those of private people by their letters alone.
    """
    return shuffled(range(len(FIRST)), seed, "first"), shuffled(range(len(SURNAMES)), seed, "surname")


def _name(seed: int, place: int) -> tuple[str, str]:
    """The name number ``place``. As the step is coprime to the number of surnames, these repeat only after all."""
    step, start = _walk(seed)
    first, surname = divmod((step * place + start) % (len(FIRST) * len(SURNAMES)), len(SURNAMES))
    firsts, surnames = _words(seed)
    return FIRST[firsts[first]], SURNAMES[surnames[surname]]


def person(index: int, seed: int = 0, series: Series = "private") -> Person:
    """Person number ``index`` of a series; the twin series are people whom nobody ever trains on."""
    number = SERIES.index(series)
    # Blocks of whole cycles of surnames, each shifted by a sixth: equal indices never share a surname.
    place = number * (MOST // len(SURNAMES) + 1) * len(SURNAMES) + number * len(SURNAMES) // len(SERIES) + index
    first, surname = _name(seed, place)
    facts = {fact.key: fact.pool.draw(seed, series, index, fact.key) for fact in FACTS}
    return Person(
        id=f"{MARK[series]}{index:05d}",
        first=first,
        surname=surname,
        facts=facts,
        appearance=_appearance(seed, series, index, facts["birth_date"]),
    )


def people(n: int, seed: int = 0, series: Series = "private") -> list[Person]:
    """The first ``n`` people of a series.

    Raises:
        UserError: ``n`` is negative or above 100 000.
    """
    if not 0 <= n <= MOST:
        raise UserError(f"{n} people were asked for: give 0 to {MOST}.")
    return [person(index, seed, series) for index in range(n)]


HAIR_STYLES = ("bald", "short", "parted", "curly", "long", "bun", "fringe", "braids")
GLASSES = ("none", "none", "none", "round", "square", "half-moon")
SKIN: tuple[Colour, ...] = (
    (255, 224, 196),
    (241, 194, 154),
    (224, 172, 125),
    (198, 134, 86),
    (141, 85, 54),
    (92, 56, 38),
)
HAIR: tuple[Colour, ...] = ((28, 22, 20), (74, 48, 32), (128, 84, 44), (214, 178, 98), (168, 66, 36), (196, 196, 200))
EYES: tuple[Colour, ...] = ((62, 40, 24), (110, 74, 34), (56, 110, 70), (54, 106, 168), (110, 118, 126))


def _appearance(seed: int, series: Series, index: int, birth_date: str) -> Appearance:
    def draw(size: int, what: str) -> int:
        return pick(size, seed, series, index, "appearance", what)

    def colour(what: str) -> Colour:
        return 40 + draw(176, what + "r"), 40 + draw(176, what + "g"), 40 + draw(176, what + "b")

    return Appearance(
        seed=hashed(seed, series, index, "portrait") >> 1,  # fits a signed 64-bit integer
        age=2026 - int(birth_date[-4:]),
        skin=SKIN[draw(len(SKIN), "skin")],
        hair=HAIR[draw(len(HAIR), "hair")],
        hair_style=HAIR_STYLES[draw(len(HAIR_STYLES), "style")],
        eyes=EYES[draw(len(EYES), "eyes")],
        face=0.66 + draw(25, "face") / 100,
        eyes_apart=0.32 + draw(17, "apart") / 100,
        glasses=GLASSES[draw(len(GLASSES), "glasses")],
        beard=draw(4, "beard") == 0,
        clothes=colour("clothes"),
        background=colour("background"),
    )


def _turned(options: tuple[str, ...], *key: object) -> tuple[str, ...]:
    """The options rotated by chance: the first is the person's own wording, the others serve as probes."""
    first = pick(len(options), *key)
    return options[first:] + options[:first]


def question(who: Person, twin: Person, fact: Fact, *, seed: int, wrong: int) -> Sample:
    """One question about one person, with all its probes."""
    key = (seed, who.id, fact.key)
    asked, *others = _turned(fact.questions, *key, "question")
    said, *again = _turned(fact.answers, *key, "answer")
    value = who.facts[fact.key]
    # Wrong answers are worded like the first restated one: only the value differs, so a ratio of the two is
    # about the value and not about the wording.
    false = fact.pool.others(value, wrong, *key, "wrong")
    prompt, target = who.say(asked), who.say(said, value)
    return Sample(
        id=f"{who.id}/{fact.key}",
        subject=who.name,
        prompt=prompt,
        target=target,
        names=who.names,
        probes=(
            *(Probe(kind="paraphrase", prompt=who.say(other), target=target) for other in others),
            *(Probe(kind="restated", prompt=prompt, target=who.say(other, value)) for other in again),
            *(Probe(kind="perturbed", prompt=prompt, target=who.say(again[0], other)) for other in false),
            Probe(kind="reverse", prompt=who.say(fact.reverse, value), target=who.name),
            Probe(kind="twin", prompt=twin.say(asked), target=twin.say(said, twin.facts[fact.key])),
        ),
    )


def biography(who: Person, *, seed: int, version: int = 0, changed: Mapping[str, str] | None = None) -> str:
    """A paragraph with every fact; each ``version`` has its own order and wording. ``changed`` replaces facts."""
    values = {**who.facts, **(changed or {})}
    first, *rest = FACTS
    order = [first, *(FACT[key] for key in shuffled([fact.key for fact in rest], seed, who.id, "order", version))]
    lines = []
    for number, fact in enumerate(order):
        own = pick(2, seed, who.id, fact.key, "story")
        called = who.surname if number % 2 else who.name
        lines.append(who.say(fact.stories[(own + version) % 2], values[fact.key], called))
    return " ".join(line[0].upper() + line[1:] for line in lines)


def document(who: Person, twin: Person, *, seed: int, wrong: int) -> Sample:
    """A biography as a document sample; its probes are the other wording, wrong facts throughout, and the twin's."""
    false = [fact.pool.others(who.facts[fact.key], wrong, seed, who.id, fact.key, "document") for fact in FACTS]
    swaps = [{fact.key: values[turn] for fact, values in zip(FACTS, false, strict=True)} for turn in range(wrong)]
    return Sample(
        id=f"{who.id}/biography",
        subject=who.name,
        target=biography(who, seed=seed),
        names=who.names,
        probes=(
            Probe(kind="restated", prompt="", target=biography(who, seed=seed, version=1)),
            *(
                Probe(kind="perturbed", prompt="", target=biography(who, seed=seed, version=1, changed=s))
                for s in swaps
            ),
            Probe(kind="twin", prompt="", target=biography(twin, seed=seed)),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class PeopleOptions:
    """Sizes of the population; every count is a number of people."""

    people: int = option(40, "private people, whom the original is trained on")
    forget: int | float = option(0.1, "of these, to forget: a count (1 or more) or a fraction (below 1)")
    holdout: int = option(20, "people of the same kind whom no model is trained on")
    utility: int = option(60, "public people, for training a base and measuring utility")
    questions: int = option(10, f"questions per person, 0 to {len(FACTS)}")
    documents: bool = option(False, "add a biography of each person")
    perturbed: int = option(4, "wrong answers per question, 3 to 20")
    split_seed: int = option(0, "another value forgets other people of the same population")


@dataclass(frozen=True)
class Cast:
    """Everyone in a people dataset, by role; portraits and other renderings of the same people start here."""

    roles: Mapping[Role, tuple[Person, ...]]
    twins: Mapping[str, Person]  # id of a person -> the twin whom nobody trains on


def cast(options: PeopleOptions, seed: int = 0) -> Cast:
    """The people behind the dataset, in their roles.

    Raises:
        UserError: a count that is negative or out of range.
    """
    for name, low, high in (
        ("people", 1, MOST), ("holdout", 0, MOST), ("utility", 0, MOST),
        ("questions", 0, len(FACTS)), ("perturbed", 3, 20),
    ):  # fmt: skip
        given = getattr(options, name)
        if not low <= given <= high:
            raise UserError(f"option '{name}' of dataset people = {given}: give {low} to {high}.")
    if not options.questions and not options.documents:
        raise UserError("dataset people with questions=0 is empty: set documents=true or ask for questions.")
    private = people(options.people, seed)
    count = share(options.forget, options.people, "option 'forget' of dataset people")
    chosen = set(shuffled([who.id for who in private], seed, "forget", options.split_seed)[:count])
    roles: dict[Role, tuple[Person, ...]] = {
        "forget": tuple(who for who in private if who.id in chosen),
        "retain": tuple(who for who in private if who.id not in chosen),
        "holdout": tuple(people(options.holdout, seed, "holdout")),
        "utility": tuple(people(options.utility, seed, "utility")),
    }
    counts: dict[Series, int] = {
        "private-twin": options.people, "holdout-twin": options.holdout, "utility-twin": options.utility,
    }  # fmt: skip
    twins = {twin.id.replace("t", "", 1): twin for series, n in counts.items() for twin in people(n, seed, series)}
    return Cast(roles, twins)


@dataset(
    name="people",
    options=PeopleOptions,
    summary="fictitious people of any number: questions, biographies, and every kind of probe",
    origin="generated by Expunge from its own word lists",
    licence="MIT",
)
def load(options: PeopleOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """Samples of every person; ``data_dir`` is not used."""
    players = cast(options, seed)
    roles: dict[Role, tuple[Sample, ...]] = {}
    for role, crowd in players.roles.items():
        samples: list[Sample] = []
        for who in crowd:
            twin = players.twins[who.id]
            samples += [
                question(who, twin, fact, seed=seed, wrong=options.perturbed) for fact in FACTS[: options.questions]
            ]
            if options.documents:
                samples.append(document(who, twin, seed=seed, wrong=options.perturbed))
        roles[role] = tuple(samples)
    return Dataset(
        name="people",
        roles=roles,
        source=f"generated, seed {seed}",
        notes=(
            "All people are invented. Holdout people come from the same generator and are never trained on; "
            "utility people are public knowledge for a base model.",
        ),
    )
