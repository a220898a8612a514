"""Deletion sets: which of a dataset's private samples are to be forgotten, by subject, by sample, or by size.

Every function takes the private samples (forget and retain together), chooses anew, and returns the dataset with
these two roles re-partitioned; holdout and utility stay. Choices by count are prefixes of one order fixed by the
seed, so a larger request contains a smaller one.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace

from expunge.data.chance import shuffled
from expunge.data.samples import Dataset, Sample, subjects
from expunge.errors import UserError, unknown

WISHES = ("subject", "sample", "subjects", "samples")
ONLY = ("image", "text")


def _choose(given: Sequence[str] | int, known: Sequence[str], kind: str, *key: object) -> list[str]:
    """The names themselves, or the first ``given`` of the seed's order."""
    if isinstance(given, bool) or (isinstance(given, int) and not 1 <= given <= len(known)):
        raise UserError(f"{given} {kind}s to forget: give 1 to {len(known)}.")
    if isinstance(given, int):
        return shuffled(known, kind, *key)[:given]
    names = [given] if isinstance(given, str) else list(dict.fromkeys(given))
    if not names:
        raise UserError(f"no {kind} to forget was named: name at least one, or give a count.")
    for name in names:
        if name not in known:
            raise unknown(kind, name, known)
    return names


def _partition(dataset: Dataset, chosen: Iterable[Sample], note: str) -> Dataset:
    ids = {sample.id for sample in chosen}
    return replace(
        dataset,
        roles={
            **dataset.roles,
            "forget": tuple(sample for sample in dataset.private if sample.id in ids),
            "retain": tuple(sample for sample in dataset.private if sample.id not in ids),
        },
        notes=(*dataset.notes, note),
    ).check()


def by_subject(dataset: Dataset, which: Sequence[str] | int, seed: int = 0) -> Dataset:
    """Forget everything about some subjects: their names, or how many.

    Raises:
        UserError: a subject that has no private sample, or a count out of range.
    """
    names = set(_choose(which, subjects(dataset.private), "subject", seed))
    chosen = [sample for sample in dataset.private if sample.subject in names]
    return _partition(dataset, chosen, f"Deletion set: {len(names)} subject(s), {len(chosen)} sample(s), seed {seed}.")


def by_sample(dataset: Dataset, which: Sequence[str] | int, seed: int = 0) -> Dataset:
    """Forget single samples, whoever they are about: their ids, or how many.

    Raises:
        UserError: an id that is not among the private samples, or a count out of range.
    """
    ids = set(_choose(which, [sample.id for sample in dataset.private], "sample", seed))
    chosen = [sample for sample in dataset.private if sample.id in ids]
    return _partition(dataset, chosen, f"Deletion set: {len(chosen)} sample(s), seed {seed}.")


def by_kind(dataset: Dataset, kind: str) -> Dataset:
    """Of the forget set, forget only the samples with an image, or only those of text alone; the others stay known.

    Raises:
        UserError: neither of the two, or no forget sample is of this kind.
    """
    if kind not in ONLY:
        raise unknown("kind of sample", kind, ONLY)
    chosen = [sample for sample in dataset["forget"] if (sample.image is None) == (kind == "text")]
    if not chosen:
        shape = "comes with an image" if kind == "image" else "is text alone"
        raise UserError(f"no forget sample of '{dataset.name}' {shape}: leave out only={kind}.")
    return _partition(dataset, chosen, f"Deletion set: of the forget set only {len(chosen)} {kind} sample(s).")


def by_size(dataset: Dataset, n: int, seed: int = 0) -> Dataset:
    """Forget exactly ``n`` samples, whole subjects first: the last subject is cut when ``n`` falls inside it.

    Raises:
        UserError: ``n`` is out of range.
    """
    total = len(dataset.private)
    if not 1 <= n <= total:
        raise UserError(f"{n} samples to forget: '{dataset.name}' has {total} private ones, so give 1 to {total}.")
    chosen = _in_order(dataset, seed)[:n]
    return _partition(dataset, chosen, f"Deletion set: {n} sample(s) in order of subjects, seed {seed}.")


def _in_order(dataset: Dataset, seed: int) -> list[Sample]:
    """All private samples, subject after subject in the same order that :func:`by_subject` takes."""
    place = {subject: i for i, subject in enumerate(shuffled(subjects(dataset.private), "subject", seed))}
    return sorted(dataset.private, key=lambda sample: place[sample.subject])


def sequence(dataset: Dataset, k: int, seed: int = 0) -> list[Dataset]:
    """``k`` disjoint requests that together cover the dataset's forget set, by whole subjects, one after another.

    Request i forgets its own share; its retain role holds the samples that no request up to i has asked for, plus
    nothing of the earlier requests, which are gone by then. Samples that only later requests ask for are still
    retained.

    Raises:
        UserError: ``k`` is not between 1 and the number of subjects (or of samples, if there is one subject) to forget.
    """
    forget = dataset["forget"]
    units: list[list[Sample]] = [[s for s in forget if s.subject == name] for name in subjects(forget)]
    if len(units) == 1:
        units = [[sample] for sample in forget]
    if not 1 <= k <= len(units):
        raise UserError(
            f"{k} requests in sequence: the forget set of '{dataset.name}' can be split into 1 to {len(units)}."
        )
    order = shuffled(range(len(units)), "sequence", seed)
    requests: list[Dataset] = []
    gone: set[str] = set()
    for turn in range(k):
        # Shares differ by at most one unit.
        mine = [s for unit in order[turn * len(units) // k : (turn + 1) * len(units) // k] for s in units[unit]]
        ids = {sample.id for sample in mine}
        gone |= ids
        requests.append(
            replace(
                dataset,
                roles={
                    **dataset.roles,
                    "forget": tuple(sample for sample in forget if sample.id in ids),
                    "retain": tuple(sample for sample in dataset.private if sample.id not in gone),
                },
                notes=(*dataset.notes, f"Request {turn + 1} of {k} in sequence, seed {seed}."),
            ).check()
        )
    return requests


def by_wishes(dataset: Dataset, wishes: Sequence[str], seed: int = 0) -> Dataset:
    """The deletion set that ``--delete`` describes: ``subject=NAME`` or ``sample=ID`` (as often as needed),
    ``subjects=N`` or ``samples=N``; ``only=image`` or ``only=text`` cuts the result, or the dataset's own forget set,
    to one kind of sample. No wish leaves the dataset as it is.

    Raises:
        UserError: a wish of another form, wishes of two kinds, or a name or number that does not fit.
    """
    only = [wish.partition("=")[2].strip() for wish in wishes if wish.startswith("only=")]
    if only:
        rest = by_wishes(dataset, [wish for wish in wishes if not wish.startswith("only=")], seed)
        return functools.reduce(by_kind, only, rest)
    if not wishes:
        return dataset
    kinds = {wish.partition("=")[0].strip() for wish in wishes}
    values = [wish.partition("=")[2].strip() for wish in wishes]
    kind = kinds.pop()
    if kinds or kind not in WISHES or not all(values):
        raise UserError(
            f"--delete {' --delete '.join(wishes)}: give subject=NAME or sample=ID as often as needed, or one "
            "subjects=N or samples=N, and only one of these kinds (only=image or only=text beside it)."
        )
    if kind in ("subject", "sample"):
        return by_subject(dataset, values) if kind == "subject" else by_sample(dataset, values)
    if len(values) > 1 or not values[0].isdecimal():
        raise UserError(f"--delete {kind}={values[-1]} is not one number: write for example --delete {kind}=3.")
    choose = by_subject if kind == "subjects" else by_sample
    return choose(dataset, int(values[0]), seed)
