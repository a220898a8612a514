"""``tofu``: 200 fictitious authors with 20 questions each (Maini et al. 2024, arXiv:2401.06121).

The published splits are tails of one list: forgetNN is the last NN % of ``full``, in whole authors, and retain the
rest. They leave no author whom the original never saw, so a membership attack has nothing to compare with. The
default here is a slice of the same list with private, holdout and base authors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expunge.data.chance import shuffled
from expunge.data.hub import Row, hub_rows
from expunge.data.registry import dataset
from expunge.data.samples import Dataset, Probe, Role, Sample
from expunge.data.tofu_names import names_of
from expunge.errors import UserError
from expunge.options import option

HUB = "locuslab/TOFU"
PER_AUTHOR = 20  # consecutive questions about one author
PROBE_FILES = ("forget10_perturbed", "retain_perturbed")
PART_PROBE_FILES = ("forget05_perturbed", "forget01_perturbed")  # parts of forget10's, for a copy without it
PUBLIC_FILES = {"real": "real_authors", "world": "world_facts"}
SPLIT = re.compile(r"forget(0[1-9]|[1-9][0-9])")


@dataclass(frozen=True, kw_only=True)
class TofuOptions:
    """``split=slice`` uses the four sizes; a published split uses all authors."""

    split: str = option("slice", "slice, or forget01, forget05, forget10, … forget99")
    authors: int = option(40, "slice: private authors, whom the original is trained on")
    forget_authors: int = option(4, "slice: of these, to forget")
    holdout_authors: int = option(20, "slice: authors who are never trained on")
    base_authors: int = option(60, "slice: authors who count as public knowledge, in role utility")
    public: bool = option(True, "add real_authors and world_facts to role utility")
    split_seed: int = option(0, "0 keeps the published order; another value chooses other authors")


@dataclass(frozen=True)
class Folder:
    """Where the rows come from: a local folder, or the hub."""

    path: Path | None

    def rows(self, name: str) -> list[Row]:
        """All rows of one file or hub configuration.

        Raises:
            UserError: not there, or not JSON lines.
        """
        if self.path is None:
            return hub_rows(HUB, name, "train")
        path = self.path / f"{name}.json"
        if not path.is_file():
            raise UserError(f"dataset 'tofu' needs {name}.json in '{self.path}', and it is not there.")
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                assert isinstance(row["question"], str) and isinstance(row["answer"], str)
            except (json.JSONDecodeError, KeyError, TypeError, AssertionError):
                raise UserError(
                    f"'{path}' line {number}: expected one JSON object a line with question and answer as strings."
                ) from None
            rows.append(row)
        return rows

    def has(self, name: str) -> bool:
        return self.path is None or (self.path / f"{name}.json").is_file()

    def full(self) -> list[Row]:
        """All authors in published order; put together from one retain and forget file when full is not there."""
        if not self.has("full"):
            for percent in (1, 5, 10, 20, 30, 50, 90):
                parts = f"retain{100 - percent:02d}", f"forget{percent:02d}"
                if all(map(self.has, parts)):
                    return self.rows(parts[0]) + self.rows(parts[1])
        return self.rows("full")

    def probes(self) -> dict[tuple[str, str], tuple[Probe, ...]]:
        """Published probes by (question, answer); the question alone is not unique."""
        found: dict[tuple[str, str], tuple[Probe, ...]] = {}
        names = PROBE_FILES if self.has(PROBE_FILES[0]) else PROBE_FILES[1:] + PART_PROBE_FILES
        for name in names:
            if self.has(name):
                for row in self.rows(name):
                    found.setdefault((row["question"], row["answer"]), read_probes(row))
        return found


def read_probes(row: Row) -> tuple[Probe, ...]:
    """The probes of one row of a ``*_perturbed`` file."""
    question, answer = row["question"], row["answer"]
    wrong = row.get("perturbed_answer") or []
    wrong = [wrong] if isinstance(wrong, str) else list(wrong)
    probes = []
    if row.get("paraphrased_question"):
        probes.append(Probe(kind="paraphrase", prompt=row["paraphrased_question"], target=answer))
    if row.get("paraphrased_answer"):
        probes.append(Probe(kind="restated", prompt=question, target=row["paraphrased_answer"]))
    probes += [Probe(kind="perturbed", prompt=question, target=text) for text in wrong]
    return tuple(probes)


def read_authors(folder: Folder) -> list[tuple[Sample, ...]]:
    """The samples of every author, in published order.

    Raises:
        UserError: a file is missing, or the rows are no multiple of 20.
    """
    rows = folder.full()
    if not rows or len(rows) % PER_AUTHOR:
        raise UserError(
            f"TOFU's full list has {len(rows)} rows, which is no multiple of {PER_AUTHOR}: the copy is incomplete."
        )
    probes = folder.probes()
    authors = []
    for number in range(len(rows) // PER_AUTHOR):
        own = rows[number * PER_AUTHOR : (number + 1) * PER_AUTHOR]
        names = names_of([(row["question"], row["answer"]) for row in own])
        authors.append(
            tuple(
                Sample(
                    id=f"a{number:03d}-q{place:02d}",
                    subject=names[0] if names else f"unnamed author {number:03d}",
                    prompt=row["question"],
                    target=row["answer"],
                    names=names,
                    probes=probes.get((row["question"], row["answer"]), ()),
                )
                for place, row in enumerate(own)
            )
        )
    return authors


def read_public(folder: Folder) -> list[Sample]:
    """Real authors and world facts, with their wrong options as perturbed answers."""
    samples = []
    for short, name in PUBLIC_FILES.items():
        # The perturbed file holds everything; the plain one has the same wrong answers as option1 to option4.
        rows = folder.rows(f"{name}_perturbed" if folder.has(f"{name}_perturbed") else name)
        for number, row in enumerate(rows):
            options = [row[key] for key in ("option1", "option2", "option3", "option4") if key in row]
            wrong = {
                **row,
                "perturbed_answer": row.get("perturbed_answer") or [o for o in options if o != row["answer"]],
            }
            samples.append(
                Sample(
                    id=f"{short}-{number:03d}",
                    subject=row["answer"] if short == "real" else "world facts",
                    prompt=row["question"],
                    target=row["answer"],
                    names=(row["answer"],) if short == "real" else (),
                    probes=read_probes(wrong),
                )
            )
    return samples


def _slice(authors: Sequence[Sequence[Sample]], options: TofuOptions) -> dict[Role, list[int]]:
    """Author numbers by role. Probes are published for 40 authors only, so the private ones are taken from these."""
    everyone = range(len(authors))
    probed = [n for n in everyone if all(sample.probes for sample in authors[n])]
    # In published order the last authors are the ones to forget, so that 2 of them are forget01 and 10 forget05.
    probed = [n for n in reversed(probed) if n >= len(authors) // 2] + [n for n in probed if n < len(authors) // 2]
    rest = sorted(set(everyone) - set(probed))
    if options.split_seed:
        probed, rest = shuffled(probed, "tofu", options.split_seed), shuffled(rest, "tofu", options.split_seed)
    private = probed[: options.authors]
    extra = options.authors - len(private)
    taken = options.base_authors + options.holdout_authors + extra
    if taken > len(rest):
        raise UserError(
            f"dataset tofu: authors={options.authors}, holdout_authors={options.holdout_authors} and "
            f"base_authors={options.base_authors} need {taken} authors beside the {len(probed)} with probes, and there "
            f"are {len(rest)}: lower one of them."
        )
    base, free = rest[: options.base_authors], rest[options.base_authors :]
    holdout = free[len(free) - options.holdout_authors :]
    private += free[:extra]
    return {
        "forget": sorted(private[: options.forget_authors]),
        "retain": sorted(private[options.forget_authors :]),
        "holdout": sorted(holdout),
        "utility": sorted(base),
    }


def _published(total: int, percent: int, split_seed: int) -> dict[Role, list[int]]:
    order = list(range(total))
    if split_seed:
        order = shuffled(order, "tofu", split_seed)
    keep = total - max(1, round(total * percent / 100))
    return {"forget": sorted(order[keep:]), "retain": sorted(order[:keep]), "holdout": [], "utility": []}


@dataset(
    name="tofu",
    options=TofuOptions,
    summary="200 fictitious authors with 20 questions each, and the published probes",
    origin=f"hub: {HUB}; Maini et al. 2024, arXiv:2401.06121",
    licence="MIT",
)
def load(options: TofuOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """From the JSON-lines files of the hub dataset in ``data_dir``, or from the hub. ``seed`` is not used.

    Raises:
        UserError: a file or the hub is missing, a size does not fit, or the split is unknown.
    """
    number = SPLIT.fullmatch(options.split)
    if options.split != "slice" and number is None:
        raise UserError(f"TOFU split '{options.split}' is unknown: give slice or forget01, forget05, forget10, …")
    for name, low in (("authors", 1), ("forget_authors", 1), ("holdout_authors", 0), ("base_authors", 0)):
        if getattr(options, name) < low:
            raise UserError(f"option '{name}' of dataset tofu = {getattr(options, name)}: give {low} or more.")
    if options.forget_authors > options.authors:
        raise UserError(
            f"dataset tofu: forget_authors={options.forget_authors} is more than authors={options.authors}: lower it."
        )
    folder = Folder(data_dir)
    authors = read_authors(folder)
    notes = ["Authors are recognised by the name that their questions share; the data have no field for it."]
    if number is None:
        chosen = _slice(authors, options)
        notes.append(
            "A slice of TOFU: the published splits leave no author who was never trained on, so membership would "
            "have no holdout."
        )
    else:
        chosen = _published(len(authors), int(number[1]), options.split_seed)
        notes.append("A published split has no holdout: every author was trained on, so membership cannot be judged.")
    if options.split_seed:
        notes.append(f"Authors were chosen with split_seed {options.split_seed}, not as published.")
    roles: dict[Role, tuple[Sample, ...]] = {
        role: tuple(sample for n in numbers for sample in authors[n]) for role, numbers in chosen.items()
    }
    if options.public:
        roles["utility"] += tuple(read_public(folder))
    private: tuple[Role, ...] = ("forget", "retain")
    bare = [role for role in private if not all(sample.probes for sample in roles[role])]
    if bare:
        notes.append(f"Some samples of role {' and '.join(bare)} have no published probes.")
    return Dataset(name="tofu", roles=roles, source=str(data_dir) if data_dir else f"hub: {HUB}", notes=tuple(notes))
