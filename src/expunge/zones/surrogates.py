"""A made-up private set, so that gates can be fitted without a private text.

Public people under names that nobody has: the first name of one, the last name of another. To the base they are as
unknown as private subjects; the people as they are called in truth ask the same questions and must not be let in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from expunge.data.samples import Probe, Sample, subjects
from expunge.errors import UserError

FEWEST = 4  # public subjects from which gates can be fitted and calibrated


@dataclass(frozen=True)
class Surrogates:
    """``stored`` stands for private samples; the others are public and must stay closed.

    ``fit`` and ``calibrate`` have different subjects. ``renamed`` tells whether the stored ones have made-up names;
    where samples name nobody they are public subjects as they are.
    """

    stored: tuple[Sample, ...]
    fit: tuple[Sample, ...]
    calibrate: tuple[Sample, ...]
    renamed: bool


def surrogates(public: Sequence[Sample]) -> Surrogates:
    """Split public samples by subject, in the order of the subjects' names.

    Every second subject is stored. The true people behind the stored ones serve for fitting, and of those who were not
    stored one half for fitting, the other for calibration.

    Raises:
        UserError: fewer than :data:`FEWEST` subjects.
    """
    people = sorted(subjects(public))
    if len(people) < FEWEST:
        raise UserError(
            f"a zone fits its gate on public texts of at least {FEWEST} subjects, and {len(people)} were given: add "
            "samples in role utility (--utility FILE, or a dataset that has them)."
        )
    of = {who: [s for s in public if s.subject == who] for who in people}
    names = {who: next((s.names for s in of[who] if s.names), ()) for who in people}
    known = {n[0] for n in names.values() if n}
    called = {who: made for who in people[::2] if (made := _new_name(who, people, names, known))}
    if len(called) < FEWEST // 2:  # of people without names every second one is stored as he is
        stored = tuple(s for who in people[::2] for s in of[who])
        return Surrogates(stored, _of(people[1::4], of), _of(people[3::4], of), renamed=False)
    stored = tuple(rename(s, names[who], name) for who, name in called.items() for s in of[who])
    # The true namesakes are the hardest to keep out. A text that names nobody is the same under both names, and so
    # cannot be kept out while it is let in.
    nameless = {(s.id, _asks(s)) for s in stored}
    namesakes = {w: [s for s in of[w] if (f"surrogate/{s.id}", _asks(s)) not in nameless] for w in called}
    of |= namesakes
    return Surrogates(stored, _of([*people[::2], *people[3::4]], of), _of(people[1::4], of), renamed=True)


def _of(people: Sequence[str], of: dict[str, list[Sample]]) -> tuple[Sample, ...]:
    return tuple(s for who in people for s in of[who])


def _asks(sample: Sample) -> str:
    return sample.prompt or str(sample.target)


def _new_name(who: str, people: Sequence[str], names: dict[str, tuple[str, ...]], known: set[str]) -> str:
    """First word of one's name and last word of another's, such that nobody is called so; empty if impossible."""
    if not names[who] or len(names[who][0].split()) < 2:
        return ""
    start = people.index(who)
    for step in range(1, len(people)):
        other = names[people[(start + step) % len(people)]]
        if other and len(other[0].split()) > 1:
            first, last = names[who][0].split()[0], other[0].split()[-1]
            made = f"{first} {last}"
            # "Ada Ash" would be taken for Ada Maria Ash, and rightly so.
            if not any({first, last} <= {*name.split()} for name in known):
                known.add(made)
                return made
    return ""


def rename(sample: Sample, names: Sequence[str], name: str) -> Sample:
    """The sample about somebody called ``name``: full names, and the last word of the old name, are exchanged."""
    old, new = names[0].split(), name.split()
    swaps = {names[0]: name, old[-1]: new[-1]}
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(x)}(?!\w)" for x in sorted(swaps, key=len, reverse=True)))

    def put(text: str | int) -> str:
        return pattern.sub(lambda found: swaps[found.group()], str(text))

    return replace(
        sample,
        id=f"surrogate/{sample.id}",
        subject=name,
        prompt=put(sample.prompt),
        target=put(sample.target),
        names=(name, new[-1], new[0]),
        probes=tuple(Probe(kind=p.kind, prompt=put(p.prompt), target=put(p.target)) for p in sample.probes),
    )
