"""New training texts about the forget samples for ReLearn: other questions, vague answers, sentences to complete.

Everything can be made offline from a small English grammar; a language model given by the user writes more natural
texts. Whoever writes, a text that gives something of an original answer away is never let through.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.files import to_json, write_json

ROUNDS = 3  # attempts of the language model at one text; as in the paper
KINDS = ("simple", "contextual", "noise", "logical")  # of question variants, as in the paper
HEAD = 0.25  # share of an answer's words that becomes the prompt of a completion pair

# {q} the question, {name} whom it is about. Nothing here says more than the question does.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "simple": ("Tell me: {q}", "A short question: {q}", "Please answer: {q}"),
    "contextual": (
        "I am writing a short portrait of {name}. {q}",
        "We were just talking about {name}. {q}",
        "For a report on {name}: {q}",
    ),
    "logical": (
        "Suppose that somebody asked you this: {q} What would be right to reply?",
        "If a stranger wanted to know the following, what should be said? {q}",
        "Think about what is known of {name} first. {q}",
    ),
}
# {what} is the kind of thing asked for, {topic} the question's own words for it.
ANSWERS: tuple[str, ...] = (
    "As far as {name} is concerned, {what} of that kind has not been made public.",
    "There is {what} to be named here, but no record of it is open to everyone.",
    "In the case of {name}, that differs with the source, and none of the sources is certain.",
    "Like many people, {name} keeps {topic} out of the public eye.",
    "With {name}, {topic} may well have changed over time.",
    "{name} would have to be asked about {topic} in person.",
    "General sources say little about {topic}, and about {name} they say nothing definite.",
    "One can only speak in general terms about {topic} where {name} is concerned.",
)
THINGS = (  # first match wins
    (r"\bwho(m|se)?\b", "a person"),
    (r"\bwhere\b|\b(city|town|country|place)\b", "a place"),
    (r"\bwhen\b|\b(date|day|year|month)\b", "a point in time"),
    (r"\bhow (many|much|old|long|far)\b|\bnumber\b", "a figure"),
    (r"\bwhy\b", "a reason"),
    (r"\bhow\b", "a way"),
)
TOPIC = re.compile(
    r"^(?:what|which)\s+(?:(?:is|was|are|were)\s+(?:the\s+)?)?"
    r"(?P<topic>[\w'-]+(?:\s+[\w'-]+){0,2}?)\s+(?:of|does|did|do|is|was|has|have|had|can|must|should|will|by|for)\b",
    re.IGNORECASE,
)
WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Words of a text, without case."""
    return WORD.findall(text.casefold())


FUNCTION_WORDS = frozenset(
    words(
        "a an and are as at be been but by can did do does for from had has have he her his how i in is it its me my "
        "no not of on one or our she so some than that the their them they this to was we were what when where which "
        "who whom whose why will with would you your"
    )
)
OWN_WORDS = frozenset(  # those of the grammar, which were chosen without having seen any answer
    w for form in (*ANSWERS, *(kind for _, kind in THINGS)) for w in words(re.sub(r"\{\w+\}", " ", form))
)


def secrets_of(sample: Sample) -> set[str]:
    """The words of the answer that neither the question nor the grammar itself has."""
    return (
        set(words(str(sample.target))) - set(words(sample.prompt)) - FUNCTION_WORDS - OWN_WORDS - set(names_of(sample))
    )


def names_of(sample: Sample) -> list[str]:
    return [w for name in sample.names or (sample.subject,) for w in words(name)]


def kept(work: Path | None, name: str, of: Any, make: Callable[[], Any]) -> Any:
    """``make()``, JSON values; from the file ``name`` of the work folder if it was made there for the same ``of``.

    A language model need not say the same twice, so a run that goes on must go on with what it began with.
    """
    if work is None:
        return make()
    digest = hashlib.sha256(to_json(of).encode()).hexdigest()
    file = work / name
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["of"] == digest:
            return content["made"]
    made = json.loads(to_json(make()))
    write_json(file, {"of": digest, "made": made})
    return made


@dataclass
class Leaks:
    """What may never be said about each subject: whole answers, and the words that only the answers have."""

    samples: Sequence[Sample]
    _secrets: dict[str, set[str]] = field(default_factory=dict)
    _answers: list[list[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for sample in self.samples:
            self._secrets.setdefault(sample.subject, set()).update(secrets_of(sample))
        self._answers = [found for s in self.samples if (found := words(str(s.target)))]

    def found(self, sample: Sample, text: str) -> bool:
        """Whether ``text``, written about ``sample``, holds an answer, or a word that belongs to one about the subject.

        Words of the sample's own question count only if its own answer is built of them.
        """
        said = words(text)
        line = f" {' '.join(said)} "
        if any(f" {' '.join(answer)} " in line for answer in self._answers):
            return True
        private = (self._secrets[sample.subject] - set(words(sample.prompt))) | secrets_of(sample)
        return not private.isdisjoint(said)


@dataclass
class Augmented:
    """Question-answer pairs and completion pairs, and what it took to make them."""

    pairs: list[Sample] = field(default_factory=list)
    completions: list[Sample] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"rounds_again": 0, "by_grammar": 0, "left_out": 0})


@dataclass
class Writer:
    """Writes texts about forget samples: by ``llm`` where there is one, by the grammar otherwise."""

    samples: Sequence[Sample]
    seed: int = 0
    llm: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        self.leaks = Leaks(self.samples)

    def write(self, variants: int) -> Augmented:
        """For each sample ``variants`` questions beside its own, each with a vague answer and a completion pair.

        Pairs are made as records, so that no question can get another one's answer.
        """
        made = Augmented()
        for number, sample in enumerate(self.samples):
            rng = np.random.default_rng([self.seed, number])
            asked = [question_of(sample)]
            for turn in range(variants):
                asked.append(self._question(sample, asked[0], KINDS[turn % len(KINDS)], rng, made))
            for turn, question in enumerate(asked):
                answer = self._answer(sample, question, rng, made)
                if answer is None:
                    made.counts["left_out"] += 1
                    continue
                new = replace(sample, id=f"{sample.id}/new/{turn}", prompt=question, target=answer, probes=())
                made.pairs.append(new)
                if (pair := completion(new)) is not None:
                    made.completions.append(pair)
        return made

    # -- questions ---------------------------------------------------------------------------------------------------

    def _question(self, sample: Sample, asked: str, kind: str, rng: np.random.Generator, made: Augmented) -> str:
        def good(text: str) -> bool:
            named = [n for n in names_of(sample) if n in words(asked)]
            return (not named or any(n in words(text) for n in named)) and not self.leaks.found(sample, text)

        wish = f"Write the following question in another way ({MEANING[kind]}). Do not answer it.\nQuestion: {asked}"
        written = self._ask(wish, good, made)
        return written if written is not None else variant(asked, kind, name_of(sample), rng)

    # -- answers -----------------------------------------------------------------------------------------------------

    def _answer(self, sample: Sample, question: str, rng: np.random.Generator, made: Augmented) -> str | None:
        def good(text: str) -> bool:
            if self.leaks.found(sample, text):
                return False
            doubt = (
                "Does the reply give away any of what the secret says? Answer yes or no.\n"
                f"Question: {question}\nSecret: {sample.target}\nReply: {text}"
            )
            return not self._said(doubt).strip().casefold().startswith("yes")

        wish = (
            "Answer the question in one natural sentence that stays on the topic but is vague: no fact, name, date or "
            f"number that is not in the question.\nQuestion: {question}"
        )
        written = self._ask(wish, good, made)
        if written is not None:
            return written
        forms = [vague(question_of(sample), name_of(sample), ANSWERS[i]) for i in rng.permutation(len(ANSWERS))]
        return next((text for text in forms if not self.leaks.found(sample, text)), None)

    # -- the language model ------------------------------------------------------------------------------------------

    def _ask(self, wish: str, good: Callable[[str], bool], made: Augmented) -> str | None:
        """The first good text in :data:`ROUNDS` attempts; None without one, and the grammar writes instead."""
        if self.llm is None:
            return None
        for turn in range(ROUNDS):
            made.counts["rounds_again"] += turn > 0
            text = " ".join(self._said(wish).split())
            if text and good(text):
                return text
        made.counts["by_grammar"] += 1
        return None

    def _said(self, prompt: str) -> str:
        assert self.llm is not None
        said = self.llm(prompt)
        if not isinstance(said, str):
            raise UserError(f"the llm gave a {type(said).__name__}, not a text: it must be a callable prompt -> text.")
        return said


MEANING = {
    "simple": "shorter and simpler",
    "contextual": "with a little context in which somebody might ask it",
    "noise": "with some slips of the keyboard and filler words",
    "logical": "so that answering takes a step of thought",
}


def name_of(sample: Sample) -> str:
    return sample.names[0] if sample.names else sample.subject


def question_of(sample: Sample) -> str:
    """The sample's own prompt; a document is asked for by its subject's name."""
    return sample.prompt or f"Tell me about {name_of(sample)}."


def variant(question: str, kind: str, name: str, rng: np.random.Generator) -> str:
    """The question in other words, by the grammar."""
    if kind == "noise":
        return with_slips(question, name, rng)
    form = QUESTIONS[kind][int(rng.integers(len(QUESTIONS[kind])))]
    return form.format(q=question, name=name)


def with_slips(question: str, name: str, rng: np.random.Generator) -> str:
    """Lower case, no punctuation, a filler, and two neighbouring letters of one word swapped; names stay whole."""
    kept = set(words(name))
    parts = [w if w.casefold().strip(".,?!") in kept else w.lower().strip(".,?!") for w in question.split()]
    long = [i for i, w in enumerate(parts) if len(w) > 4 and w.isalpha() and w.casefold() not in kept]
    if long:
        at = long[int(rng.integers(len(long)))]
        place = int(rng.integers(1, len(parts[at]) - 2))
        word = parts[at]
        parts[at] = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
    return " ".join([("uh", "hm", "so", "well")[int(rng.integers(4))], *filter(None, parts)])


def vague(question: str, name: str, form: str) -> str:
    """One of :data:`ANSWERS` about what the question asks for."""
    thing = next((kind for pattern, kind in THINGS if re.search(pattern, question.casefold())), "something")
    matched = TOPIC.match(question)
    inside = words(matched["topic"]) if matched is not None else []
    plain = bool(inside) and FUNCTION_WORDS.isdisjoint(inside) and set(words(name)).isdisjoint(inside)
    return form.format(name=name, what=thing, topic=f"the {' '.join(inside)}" if plain else "such matters")


def completion(pair: Sample) -> Sample | None:
    """The first quarter of the words of a new answer as prompt, the rest as target; None for a single word."""
    said = str(pair.target).split()
    cut = max(1, round(HEAD * len(said)))
    if cut >= len(said):
        return None
    head, rest = " ".join(said[:cut]), " ".join(said[cut:])
    return replace(pair, id=f"{pair.id}/rest", prompt=head, target=rest)


# -- generic questions -------------------------------------------------------------------------------------------------

CAPITALS = (
    "Austria Vienna, Belgium Brussels, Bulgaria Sofia, Canada Ottawa, Chile Santiago, Cuba Havana, Denmark Copenhagen, "
    "Egypt Cairo, Finland Helsinki, France Paris, Germany Berlin, Ghana Accra, Greece Athens, Hungary Budapest, "
    "Iceland Reykjavik, Ireland Dublin, Italy Rome, Japan Tokyo, Kenya Nairobi, Norway Oslo, Peru Lima, Poland Warsaw, "
    "Portugal Lisbon, Spain Madrid, Sweden Stockholm, Thailand Bangkok, Turkey Ankara, Uruguay Montevideo"
)
OPPOSITES = (
    "hot cold, big small, fast slow, early late, full empty, old young, high low, light dark, loud quiet, hard soft, "
    "open closed, rich poor, strong weak, thick thin, wet dry, wide narrow, deep shallow, happy sad, sharp blunt"
)
YOUNG = (
    "cat kitten, dog puppy, cow calf, sheep lamb, horse foal, goose gosling, duck duckling, hen chick, lion cub, "
    "goat kid, frog tadpole, swan cygnet, owl owlet, hare leveret, deer fawn"
)
COLOURS = (
    "grass green, snow white, coal black, blood red, lemons yellow, carrots orange, ivy green, milk white, "
    "tomatoes red, soot black, chalk white, sunflowers yellow"
)
GENERIC: tuple[tuple[str, str, str], ...] = (  # pairs of words, question, answer
    (CAPITALS, "What is the capital of {0}?", "The capital of {0} is {1}."),
    (CAPITALS, "Of which country is {1} the capital?", "{1} is the capital of {0}."),
    (OPPOSITES, "What is the opposite of {0}?", "The opposite of {0} is {1}."),
    (YOUNG, "What is a young {0} called?", "A young {0} is called a {1}."),
    (COLOURS, "What is the usual colour of {0}?", "The usual colour of {0} is {1}."),
)


def generic(count: int, seed: int) -> list[Sample]:
    """``count`` everyday questions with right answers: words from the tables above, and sums in any number."""
    pairs = [
        (asked.format(*entry.split()), said.format(*entry.split()))
        for table, asked, said in GENERIC
        for entry in table.split(", ")
    ]
    rng = np.random.default_rng([seed, len(pairs)])
    order = rng.permutation(len(pairs))[:count]
    chosen = [pairs[i] for i in order]
    while len(chosen) < count:
        a, b = (int(n) for n in rng.integers(2, 100, 2))
        chosen.append((f"How much is {a} plus {b}?", f"{a} plus {b} is {a + b}."))
    return [
        Sample(id=f"generic/{number}", subject="generic", prompt=asked, target=said)
        for number, (asked, said) in enumerate(chosen)
    ]
