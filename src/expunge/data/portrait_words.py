"""What is asked and said about a portrait: captions, names, and questions about what anyone can see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from expunge.data.chance import pick, shuffled
from expunge.data.people import MOST, Person, Series, person
from expunge.data.portrait_looks import MOODS, PLACES, VIVID, View
from expunge.data.samples import Probe, Sample

CAPTION_PROMPTS = (
    "What does this picture show?",
    "Write a caption for the picture.",
    "Who is in the picture, and what can be seen?",
    "Describe this portrait.",
    "Tell me about the person in this photo.",
    "What is there to see here?",
    "Give a short description of the image.",
    "Say in one sentence what the photo shows.",
    "How would you caption this portrait?",
)
NAME_PROMPT = "The name of the person on the image is"
NAME_PROMPTS = ("The person in this portrait is called", "This face belongs to", "The one who is shown here is")
CAPTIONS = (
    "{name}, {profession}, {mood}, in {clothes} before {place}.",
    "Before {place} stands {name}, {profession}, {mood} and dressed in {clothes}.",
    "A portrait of {name}, {profession}: {mood}, clothes in {clothes}, and behind it {place}.",
)
MOOD_WORDS = {"calm": "calm", "smiling": "smiling", "laughing": "laughing", "serious": "looking serious"}
Picture = NDArray[np.uint8]


def asked(sample_id: str) -> str:
    """The caption prompt of a sample: one for all of its probes and epochs, so that losses can be compared."""
    return CAPTION_PROMPTS[pick(len(CAPTION_PROMPTS), "caption prompt", sample_id)]


def strangers(who: Person, series: Series, count: int, *, seed: int) -> list[Person]:
    """``count`` people of a series that nobody trains on, of another name and profession than ``who``.

    A model that never met ``who`` knows them as little as ``who``, so that a ratio of the two is 1 for it.
    """
    found: list[Person] = []
    taken, turn = {who.name}, 0
    while len(found) < count:
        other = person(pick(MOST, seed, who.id, "stranger", turn), seed, series)
        turn += 1
        if other.name not in taken and other.facts["profession"] != who.facts["profession"]:
            taken.add(other.name)
            found.append(other)
    return found


def caption(template: str, who: Person, view: View) -> str:
    """The caption of a view of ``who``; of a stranger's name and profession it is wrong in these two alone."""
    text = template.format(
        name=who.name,
        profession=who.facts["profession"],
        mood=MOOD_WORDS[view.mood],
        clothes=view.clothes,
        place=view.place,
    )
    return text[0].upper() + text[1:]


def caption_sample(who: Person, number: int, view: View, image: Picture, wrong: Sequence[Person]) -> Sample:
    """A portrait with its caption; the reverse probe asks for the name."""
    sample_id = f"{who.id}/portrait-{number}/caption"
    first = pick(len(CAPTIONS), sample_id)
    said, *again = CAPTIONS[first:] + CAPTIONS[:first]
    prompt, target = asked(sample_id), caption(said, who, view)
    others = shuffled((p for p in CAPTION_PROMPTS if p != prompt), sample_id)[:3]
    return Sample(
        id=sample_id,
        subject=who.name,
        prompt=prompt,
        target=target,
        image=image,
        names=who.names,
        probes=(
            *(Probe(kind="paraphrase", prompt=other, target=target) for other in others),
            *(Probe(kind="restated", prompt=prompt, target=caption(other, who, view)) for other in again),
            *(Probe(kind="perturbed", prompt=prompt, target=caption(again[0], other, view)) for other in wrong),
            Probe(kind="reverse", prompt=NAME_PROMPT, target=who.name),
        ),
    )


def name_sample(who: Person, number: int, image: Picture, wrong: Sequence[Person]) -> Sample:
    """Face recognition. A name has no other wording, so it restates itself, as in CLEAR."""
    return Sample(
        id=f"{who.id}/portrait-{number}/name",
        subject=who.name,
        prompt=NAME_PROMPT,
        target=who.name,
        image=image,
        names=who.names,
        probes=(
            *(Probe(kind="paraphrase", prompt=other, target=who.name) for other in NAME_PROMPTS),
            Probe(kind="restated", prompt=NAME_PROMPT, target=who.name),
            *(Probe(kind="perturbed", prompt=NAME_PROMPT, target=other.name) for other in wrong),
        ),
    )


def visible_sample(who: Person, number: int, view: View, image: Picture) -> Sample:
    """A question whose answer is in the picture, with the other options as wrong answers."""
    prompt, answer, options = (
        ("Which colour do the clothes have?", view.clothes, list(VIVID)),
        ("What is behind the person?", view.place, list(PLACES)),
        ("How does the person look?", MOOD_WORDS[view.mood], [MOOD_WORDS[mood] for mood in MOODS]),
    )[number % 3]
    sample_id = f"{who.id}/portrait-{number}/visible"
    wrong = shuffled((option for option in options if option != answer), sample_id)[:3]
    return Sample(
        id=sample_id,
        subject=who.name,
        prompt=prompt,
        target=answer,
        image=image,
        names=who.names,
        probes=(
            Probe(kind="restated", prompt=prompt, target=answer),
            *(Probe(kind="perturbed", prompt=prompt, target=option) for option in wrong),
        ),
    )
