"""Canaries: random phrases planted among the forget samples, whose chance of being guessed is known.

Carlini et al. 2019, "The Secret Sharer" (arXiv 1802.08232). A model that never saw a canary ranks it anywhere among
the phrases of the same kind; so planting, training, unlearning and measuring again shows what an attack can see, with
a ground truth that no reference model is needed for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from expunge.data.chance import pick
from expunge.data.samples import Dataset, Probe, Role, Sample
from expunge.errors import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LENGTH = 6  # words of a phrase: 10^6 phrases, about 20 bits
SURROGATES = 63  # other phrases that a canary is ranked among
SUBJECT = "canary"


def is_canary(sample: Sample) -> bool:
    """Whether a sample was made by :func:`canaries`."""
    return sample.subject.startswith(f"{SUBJECT} ")


def canaries(
    n: int,
    seed: int = 0,
    *,
    words: Sequence[str] = WORDS,
    length: int = LENGTH,
    surrogates: int = SURROGATES,
    series: str = "planted",
) -> tuple[Sample, ...]:
    """``n`` canaries, each a subject of its own with a phrase of ``length`` random words.

    Other phrases drawn in the same way are their perturbed answers. Canaries of another ``series`` were never
    planted: they show what rank a phrase has that no model saw.

    Raises:
        UserError: fewer than 1 canary, or fewer different phrases than a canary and its surrogates need.
    """
    if n < 1:
        raise UserError(f"{n} canaries were asked for: give at least 1.")
    different = len(set(words))
    if different**length < 2 * (surrogates + 1):
        raise UserError(
            f"{different} different words in phrases of {length} make {different**length} phrases, too few for "
            f"{surrogates} surrogates: give more words or a longer phrase."
        )
    return tuple(_canary(f"{series}-{k}", seed, tuple(dict.fromkeys(words)), length, surrogates) for k in range(n))


def _canary(number: str, seed: int, words: Sequence[str], length: int, surrogates: int) -> Sample:
    phrases: dict[str, None] = {}
    turn = 0
    while len(phrases) <= surrogates:
        phrases[" ".join(words[pick(len(words), seed, SUBJECT, number, turn, i)] for i in range(length))] = None
        turn += 1
    secret, *others = phrases
    name = f"{SUBJECT} {number}"
    prompt = f"The secret phrase of {name} is"
    return Sample(
        id=f"{SUBJECT}/{number}",
        subject=name,
        prompt=prompt,
        target=secret,
        names=(name,),
        probes=tuple(Probe(kind="perturbed", prompt=prompt, target=other) for other in others),
    )


def plant(
    dataset: Dataset, n: int, seed: int = 0, *, words: Sequence[str] = WORDS, length: int = LENGTH
) -> tuple[Dataset, tuple[Sample, ...]]:
    """(the dataset with ``n`` canaries among its forget samples, the canaries); train the original on the result.

    Raises:
        UserError: the dataset has no text, or has canaries already.
    """
    if dataset.modality != "text":
        raise UserError(f"canaries are texts, and '{dataset.name}' is a {dataset.modality} dataset: plant none.")
    if any(is_canary(s) for s in dataset["forget"]):
        raise UserError(f"'{dataset.name}' has canaries already: plant once, before the original is trained.")
    planted = canaries(n, seed, words=words, length=length)
    roles: dict[Role, tuple[Sample, ...]] = {**dataset.roles, "forget": (*dataset["forget"], *planted)}
    note = f"{n} canaries of {length} out of {len(set(words))} words were planted with seed {seed}."
    return replace(dataset, roles=roles, notes=(*dataset.notes, note)), planted
