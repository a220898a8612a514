"""``people-portraits``: the people of ``people`` with faces, an embedded data set of CLEAR's structure.

CLEAR (Dontsov et al. 2025, arXiv:2410.18057) gives TOFU's authors portraits with captions. Here every fictitious
person has portraits that are drawn, captions that say who and what is seen, and the questions of ``people``; with
faces that nobody trains on in role holdout, and public people with questions about what anyone can see in utility.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from expunge.data.people import Cast, PeopleOptions, Person, Series, cast, document, question
from expunge.data.people_facts import FACTS
from expunge.data.portrait_looks import view_of
from expunge.data.portrait_words import caption_sample, name_sample, strangers, visible_sample
from expunge.data.portraits import LARGEST, SMALLEST, portrait
from expunge.data.registry import dataset
from expunge.data.samples import ROLES, Dataset, Role, Sample
from expunge.errors import UserError
from expunge.options import option

MOST_PORTRAITS = 1000
# The people of the same kind whom nobody trains on.
STRANGERS: Mapping[Role, Series] = {
    "forget": "private-twin", "retain": "private-twin", "holdout": "holdout-twin", "utility": "utility-twin",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PortraitOptions(PeopleOptions):
    """Who there is, as in ``people``, and what is shown and said of each. CLEAR forgets 0.01, 0.05 or 0.1."""

    utility: int = option(40, "public people, for training a base and measuring utility")
    questions: int = option(4, f"questions without an image per person, 0 to {len(FACTS)}")
    portraits: int = option(4, f"portraits per person, 1 to {MOST_PORTRAITS}")
    size: int = option(32, f"side of a portrait in pixels, {SMALLEST} to {LARGEST}")
    modality: str = option("both", "what there is: image, text, or both", choices=("image", "text", "both"))
    captions: bool = option(True, "a sample for the caption of each portrait")
    names: bool = option(True, "a sample for the name on each portrait, beside the caption's own probe for it")
    task: str = option(
        "captions", "captions, or identity: classify portraits by person", choices=("captions", "identity")
    )
    unseen: str = option(
        "people",
        "identity: holdout are other people, or as many new views of the private ones",
        choices=("people", "views"),
    )


@dataset(
    name="people-portraits",
    options=PortraitOptions,
    summary="the fictitious people with drawn portraits, captions, names and questions: an embedded CLEAR",
    origin="drawn and written by Expunge",
    licence="MIT",
    modality="multimodal",
)
def load(options: PortraitOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """Portraits and texts of every person; ``data_dir`` is not used.

    Raises:
        UserError: a count that is out of range, or options that leave nothing.
    """
    _check(options)
    players = cast(replace(options, questions=max(1, options.questions)), seed)
    source = f"generated, seed {seed}"
    if options.task == "identity":
        roles = identities(players, options)
        note = (
            "The class is the person: private people first, then holdout, then utility."
            if options.unseen == "people"
            else "The class is the person; holdout are other portraits of the private people."
        )
        return Dataset(name="people-portraits", roles=roles, modality="classifier", source=source, notes=(note,))
    roles = {
        role: tuple(s for who in crowd for s in told(who, role, players.twins[who.id], options, seed))
        for role, crowd in players.roles.items()
    }
    return Dataset(
        name="people-portraits",
        roles=roles,
        modality="text" if options.modality == "text" else "multimodal",
        source=source,
        notes=(
            "All people are invented and their portraits drawn. Nobody trains on the faces in holdout, nor on the "
            "people whose names stand in perturbed captions.",
        ),
    )


def told(who: Person, role: Role, twin: Person, options: PortraitOptions, seed: int) -> list[Sample]:
    """Everything about one person: portraits with captions and names, then questions and a biography."""
    samples: list[Sample] = []
    if options.modality != "text":
        wrong = strangers(who, STRANGERS[role], options.perturbed, seed=seed)
        for number in range(options.portraits):
            image, view = portrait(who.appearance, number, options.size), view_of(who.appearance, number)
            if options.captions:
                samples.append(caption_sample(who, number, view, image, wrong))
            if options.names:
                samples.append(name_sample(who, number, image, wrong))
            if role == "utility":
                samples.append(visible_sample(who, number, view, image))
    if options.modality != "image":
        facts = FACTS[: options.questions]
        samples += [question(who, twin, fact, seed=seed, wrong=options.perturbed) for fact in facts]
        if options.documents:
            samples.append(document(who, twin, seed=seed, wrong=options.perturbed))
    return samples


def identities(players: Cast, options: PortraitOptions) -> dict[Role, tuple[Sample, ...]]:
    """Portraits by role with the person's number as target; the split does not change anybody's number."""
    private = sorted(players.roles["forget"] + players.roles["retain"], key=lambda who: who.id)
    views = options.unseen == "views"
    crowd = [*private, *(() if views else players.roles["holdout"]), *players.roles["utility"]]
    number = {who.id: place for place, who in enumerate(crowd)}

    def shown(people: tuple[Person, ...], first: int = 0) -> tuple[Sample, ...]:
        return tuple(
            Sample(
                id=f"{who.id}/portrait-{view}",
                subject=who.name,
                target=number[who.id],
                image=portrait(who.appearance, view, options.size),
                names=who.names,
            )
            for who in people
            for view in range(first, first + options.portraits)
        )

    roles = {role: shown(players.roles[role]) for role in ROLES if role != "holdout" or not views}
    if views:
        roles["holdout"] = shown(tuple(private), options.portraits)
    return roles


def _check(options: PortraitOptions) -> None:
    for name, low, high in (
        ("portraits", 1, MOST_PORTRAITS),
        ("size", SMALLEST, LARGEST),
        ("questions", 0, len(FACTS)),
    ):
        if not low <= getattr(options, name) <= high:
            raise UserError(
                f"option '{name}' of dataset people-portraits = {getattr(options, name)}: give {low} to {high}."
            )
    if options.task == "identity":
        if options.modality == "text":
            raise UserError("dataset people-portraits: task=identity classifies portraits; leave out modality=text.")
        return
    images = options.modality != "text" and (options.captions or options.names)
    texts = options.modality != "image" and (options.questions > 0 or options.documents)
    if not images and not texts:
        raise UserError(
            f"dataset people-portraits with modality={options.modality}, captions={options.captions}, "
            f"names={options.names} and questions={options.questions} is empty: ask for captions, names or questions."
        )
