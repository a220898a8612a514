"""``clear``: portraits and captions of TOFU's 200 authors (Dontsov et al. 2025, arXiv:2410.18057), as published.

Rows of different configurations belong together by name and caption, never by their number: forget10 has 379 rows
and forget10_perturbed 378.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.data.chance import shuffled
from expunge.data.clear_files import CONFIGURATIONS, HUB, Row, Source, picture, string, strings
from expunge.data.portrait_words import NAME_PROMPT, NAME_PROMPTS, asked
from expunge.data.registry import dataset
from expunge.data.samples import Dataset, Probe, Role, Sample, subjects
from expunge.errors import UserError
from expunge.options import option

RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
Key = tuple[str, str]  # name and caption
Wrong = Mapping[Key, Row]
UNNAMED = "unnamed author"


@dataclass(frozen=True, kw_only=True)
class ClearOptions:
    """Which of the published configurations to read, and what to make of them."""

    split: str = option("forget10", "forget01, forget05 or forget10: 2, 10 or 20 of 200 people", choices=tuple(RETAIN))
    modality: str = option(
        "image", "image; text: TOFU's questions alone; both: forgetNN+tofu", choices=("image", "text", "both")
    )
    names: bool = option(True, "a sample for the name on each image, beside the caption's own probe for it")
    public: bool = option(True, "real_faces and real_world in role utility")
    holdout: int = option(0, "people taken out of the retain set, whom no model is then trained on; published: none")
    size: int = option(336, "images in Parquet or from the hub: shorter side in pixels, at most")


@dataset(
    name="clear",
    options=ClearOptions,
    summary="CLEAR: 3,768 portraits with captions of TOFU's 200 authors, and the published probes",
    origin=f"hub: {HUB}; Dontsov et al. 2025, arXiv:2410.18057",
    licence="none given: see the hub page",
    modality="multimodal",
)
def load(options: ClearOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """From a copy of the hub dataset in ``data_dir``, or from the hub. ``seed`` is not used.

    Raises:
        UserError: a configuration, field or image is missing or broken, or probes belong to no row.
    """
    if options.size < 8 or options.holdout < 0:
        raise UserError(
            f"dataset clear: size = {options.size} and holdout = {options.holdout}: give 8 pixels or more, 0 people or "
            "more."
        )
    source, notes = Source(data_dir), []
    splits: dict[Role, str] = {"forget": options.split, "retain": RETAIN[options.split]}
    roles: dict[Role, tuple[Sample, ...]] = {}
    for role, split in splits.items():
        rows = source.rows(split)
        published = CONFIGURATIONS[split].rows
        if published is not None and len(rows) != published:
            notes.append(f"{split} has {len(rows)} rows; as published it has {published}.")
        samples: list[Sample] = []
        if options.modality != "text":
            samples += portraits(rows, wrong_of(source, split, rows, notes), options)
        if options.modality != "image":
            samples += questions(source.rows(f"{split}+tofu"), rows, split, notes)
        roles[role] = tuple(samples)
    shared = set(subjects(roles["forget"])) & set(subjects(roles["retain"]))
    if shared:
        raise UserError(
            f"{len(shared)} people stand in {splits['forget']} and in {splits['retain']} of dataset clear "
            f"({', '.join(sorted(shared)[:3])}): the copy mixes splits, fetch both again."
        )
    if options.holdout:
        roles["retain"], roles["holdout"] = hold_out(roles["retain"], options.holdout)
    else:
        notes.append("As published: every person was trained on, so membership has no holdout; holdout=20 makes one.")
    if options.public:
        roles["utility"] = tuple(real(source.rows("real_faces"), "real_faces", options.size)) + tuple(
            real(source.rows("real_world"), "real_world", options.size)
        )
    text_alone = options.modality == "text" and not options.public
    return Dataset(
        name="clear",
        roles=roles,
        modality="text" if text_alone else "multimodal",
        source=source.text(),
        notes=tuple(notes),
    )


# -- portraits -------------------------------------------------------------------------------------------------------


def key_of(row: Row) -> Key:
    """What makes two rows of different configurations the same image: its name and caption."""
    return string(row, "name"), string(row, "caption")


def wrong_of(source: Source, split: str, rows: Sequence[Row], notes: list[str]) -> Wrong:
    """The published probes of a split's rows, joined by name and caption.

    Raises:
        UserError: there are probes, and not one of them belongs to a row.
    """
    name = "retain_perturbed" if split.startswith("retain") else f"{split}_perturbed"
    if not source.has(name):
        notes.append(f"{name} is not in the copy: the captions of {split} have no published probes.")
        return {}
    found: dict[Key, Row] = {}
    for row in source.rows(name):
        found.setdefault(key_of(row), row)
    keys = {key_of(row) for row in rows}
    fit = keys & set(found)
    if not fit:
        raise UserError(
            f"no row of {name} has the name and caption of a row of {split}: the copy mixes versions, fetch both again."
        )
    bare = sum(key_of(row) not in found for row in rows)
    if bare and name != "retain_perturbed":  # which covers a part of the retained images by design
        notes.append(f"{bare} of {len(rows)} rows of {split} have no row in {name}.")
    # retain_perturbed serves all three retain sets, so only those of forgotten people are missing from one.
    if name != "retain_perturbed" and len(fit) < len(found):
        notes.append(f"{len(found) - len(fit)} rows of {name} belong to no row of {split}; they are left out.")
    return found


def portraits(rows: Sequence[Row], wrong: Wrong, options: ClearOptions) -> list[Sample]:
    """A sample for each caption and, with ``names``, for each name."""
    samples, turns = [], Counter[Key]()
    for row in rows:
        key = name, caption = key_of(row)
        turns[key] += 1
        mark = hashlib.sha256(caption.encode()).hexdigest()[:8] + (f"-{turns[key]}" if turns[key] > 1 else "")
        image, probes = picture(row, options.size), wrong.get(key)
        sample_id = f"{name}/{mark}/caption"
        prompt = asked(sample_id)
        views = [Probe(kind="reverse", prompt=NAME_PROMPT, target=name)]
        called = [Probe(kind="paraphrase", prompt=other, target=name) for other in NAME_PROMPTS]
        if probes is not None:
            views += _probes(prompt, strings(probes, "paraphrased_caption"), strings(probes, "perturbed_captions"))
            called += _probes(NAME_PROMPT, [name], strings(probes, "perturbed_names"))
        both: dict[str, Any] = {"subject": name, "image": image, "names": (name,)}
        samples.append(Sample(id=sample_id, prompt=prompt, target=caption, probes=tuple(views), **both))
        if options.names:
            own = f"{name}/{mark}/name"
            samples.append(Sample(id=own, prompt=NAME_PROMPT, target=name, probes=tuple(called), **both))
    return samples


def _probes(prompt: str, restated: Sequence[str], perturbed: Sequence[str]) -> list[Probe]:
    """Right and wrong answers to one and the same question."""
    return [
        *(Probe(kind="restated", prompt=prompt, target=text) for text in restated),
        *(Probe(kind="perturbed", prompt=prompt, target=text) for text in perturbed),
    ]


# -- TOFU's questions ------------------------------------------------------------------------------------------------


def questions(rows: Sequence[Row], pictured: Sequence[Row], split: str, notes: list[str]) -> list[Sample]:
    """The rows without an image of a ``+tofu`` configuration; its images are those of the plain one.

    Whom a question is about is read from it: the data have no field for it. Where it names nobody (or two), it is
    about the person of its neighbours on both sides, for TOFU lists the questions of an author together.

    Raises:
        UserError: there are none.
    """
    texts = [row for row in rows if row["question"]]
    if not texts:
        raise UserError(f"{split}+tofu of dataset clear has no row with a question: fetch it again.")
    captions = Counter(string(row, "caption") for row in rows if not row["question"])
    differ = captions - Counter(string(row, "caption") for row in pictured)
    if differ:
        notes.append(f"{differ.total()} captions of {split}+tofu are not those of {split}; {split} is used.")
    names = sorted({string(row, "name") for row in pictured})
    told = [_named(f"{string(row, 'question')} {string(row, 'answer')}", names) for row in texts]
    before = _carried(told)
    after = list(reversed(_carried(list(reversed(told)))))
    samples, turns = [], Counter[str]()
    for row, said, left, right in zip(texts, told, before, after, strict=True):
        who = said or (left if left == right and left else f"{UNNAMED} of {split}")
        question, answer = string(row, "question"), string(row, "answer")
        mark = hashlib.sha256(f"{question}\n{answer}".encode()).hexdigest()[:8]
        turns[mark] += 1
        known = () if who.startswith(UNNAMED) else (who,)
        number = f"-{turns[mark]}" if turns[mark] > 1 else ""
        samples.append(
            Sample(id=f"{who}/{mark}{number}/question", subject=who, prompt=question, target=answer, names=known)
        )
    unnamed = sum(sample.subject.startswith(UNNAMED) for sample in samples)
    if unnamed:
        notes.append(
            f"{unnamed} questions of {split}+tofu name nobody in the split and stand as '{UNNAMED} of {split}'."
        )
    return samples


def _named(text: str, names: Sequence[str]) -> str:
    found = [name for name in names if name in text]
    return found[0] if len(found) == 1 else ""


def _carried(told: Sequence[str]) -> list[str]:
    """For each place the last name at or before it."""
    last, out = "", []
    for name in told:
        last = name or last
        out.append(last)
    return out


# -- others ----------------------------------------------------------------------------------------------------------


def hold_out(retain: Sequence[Sample], count: int) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """(retain, holdout): ``count`` people leave the retain set; asking for more keeps those already chosen.

    Raises:
        UserError: not enough people.
    """
    people = [who for who in subjects(retain) if not who.startswith(UNNAMED)]
    if count >= len(people):
        raise UserError(
            f"dataset clear: holdout = {count}, but the retain set has {len(people)} people: ask for fewer."
        )
    out = set(shuffled(people, "clear", "holdout")[:count])
    return tuple(s for s in retain if s.subject not in out), tuple(s for s in retain if s.subject in out)


def real(rows: Sequence[Row], name: str, size: int) -> list[Sample]:
    """Real people's faces with options for the name, or pictures of other things with a question and options."""
    samples = []
    for number, row in enumerate(rows, 1):
        answer = string(row, "answer")
        prompt = NAME_PROMPT if name == "real_faces" else string(row, "question")
        wrong = [text for text in strings(row, "options") if text != answer]
        samples.append(
            Sample(
                id=f"{name}-{number:03d}",
                subject=answer if name == "real_faces" else "real world",
                prompt=prompt,
                target=answer,
                image=picture(row, size),
                names=(answer,) if name == "real_faces" else (),
                probes=tuple(_probes(prompt, [answer], wrong)),
            )
        )
    return samples
