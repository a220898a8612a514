"""Several runs as one: their rows side by side, means and intervals over all of their seeds.

A run that measured the very models of an earlier one (another set of methods, the same originals) adds its own rows
alone, and a method that it ran with other settings is named after the run. Any other run is a repetition: its seeds are
counted on, so that nothing is averaged with its namesake by chance.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.errors import UserError
from expunge.files import write_json, write_jsonl
from expunge.record import now
from expunge.report.samples import load_samples
from expunge.report.schema import SCHEMA, load_results

Row = dict[str, Any]
Key = tuple[Any, ...]
RUN_FILES = ("run.yaml", "run.json")


def merge_runs(folders: Sequence[Path], out: Path) -> Path:
    """Write results.json and samples.jsonl of all the runs together into ``out``; returns ``out``.

    Raises:
        UserError: fewer than two runs, the same one twice, runs of different data sets or modalities, an ``out`` that
            is a run of its own, or one original beside differing references.
    """
    from expunge.bench.results import summaries

    contents = _read(folders, out)
    rows, lines, notes = _joined(folders, contents)
    notes += [f"{w}" for content in contents for w in content.get("warnings", ())]
    rows, dropped = _comparable(rows)
    notes += [f"{name} was measured under several definitions ({', '.join(said)}): left out" for name, said in dropped]
    if len({content["dataset"].get("digest") for content in contents}) > 1:
        notes.append("The runs hold different samples of one data set: the intervals are over both, samples and seeds.")
    by_model: dict[str, list[Row]] = {}
    for line in lines:
        by_model.setdefault(str(line.get("model")), []).append(line)
    measured = [{**row, "samples": by_model.get(row["model"], [])} for row in rows]
    first = contents[0]
    named = ", ".join(folder.resolve().name for folder in folders)
    whole = {
        **first,
        "schema": SCHEMA,
        "title": f"{first.get('title', '')}: {len(folders)} runs together",
        "created": now().isoformat(),
        "command": f"report of {named}",
        "seeds": sorted({row["seed"] for row in rows if row["kind"] == "original" and row["seed"] is not None}),
        "references": sum(row["kind"] == "reference" and row["study"] == "main" for row in rows),
        "rows": rows,
        "summary": list(summaries(measured)),
        "curves": [curve for content in contents for curve in content.get("curves", ())],
        "warnings": list(dict.fromkeys(notes)),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", whole)
    write_jsonl(out / "samples.jsonl", lines)
    return out


def _read(folders: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < 2 or len(set(places)) < len(places):
        raise UserError("--out puts several runs together: name two or more run folders, each of them once.")
    if out.resolve() in places or any((out / name).exists() for name in RUN_FILES):
        raise UserError(f"'{out}' is a run of its own, which would be overwritten: give --out a new folder.")
    contents = []
    for folder in folders:
        load_results(folder)  # refuses what is no results.json of this version
        contents.append(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    for what in ("name", "modality"):
        found = {
            str(content["dataset"].get(what, "")): folder for content, folder in zip(contents, folders, strict=True)
        }
        if len(found) > 1:
            said = " and ".join(f"'{value}' ({folder})" for value, folder in found.items())
            raise UserError(f"the runs have different data sets, {what} {said}: put runs of one data set together.")
    return contents


def _key(row: Row) -> Key:
    return row["study"], row["kind"], row["method"], row.get("position"), row.get("seed")


def _joined(folders: Sequence[Path], contents: Sequence[dict[str, Any]]) -> tuple[list[Row], list[Row], list[str]]:
    """(rows, sample lines, notes): what a later run measured otherwise is renamed, in the curves too.

    Raises:
        UserError: an original is the same, and a model beside it that no method made is not.
    """
    rows: list[Row] = []
    lines: list[Row] = []
    notes: list[str] = []
    taken: dict[Key, Row] = {}
    short = Counter(folder.resolve().name for folder in folders)
    names = {f: f.resolve().name if short[f.resolve().name] == 1 else str(f) for f in folders}
    for folder, content in zip(folders, contents, strict=True):
        own: list[Row] = content["rows"]
        again = [row for row in own if _key(row) in taken]
        differ = [row for row in again if row["metrics"] != taken[_key(row)]["metrics"]]
        same = any(row["kind"] == "original" and row not in differ for row in again)
        if same and (lost := [row for row in differ if row["kind"] != "method"]):
            raise UserError(
                f"{lost[0]['model']} was measured twice beside one original, differently in '{folder}': leave one of "
                "the runs out."
            )
        clash = bool(differ) and not same
        step = 1 + max((key[-1] for key in taken if key[-1] is not None), default=-1) if clash else 0
        fresh: dict[str, Row] = {}
        for row in own:
            moved = {**row, "seed": None if row.get("seed") is None else row["seed"] + step}
            if clash or row in differ:
                moved["model"] = f"{row['model']} of {names[folder]}"
            if row in differ and same:  # other settings, from the same original: a row of its own
                moved["method"] = f"{row['method']} of {names[folder]}"
            if _key(moved) not in taken:
                fresh[row["model"]] = taken[_key(moved)] = moved
        rows += fresh.values()
        content["curves"] = list(_renamed(content.get("curves", ()), {old: r["model"] for old, r in fresh.items()}))
        record = load_samples(folder)
        for line in record.rows:
            if (new := fresh.get(str(line.get("model")))) is not None:
                lines.append({**line, **{key: new[key] for key in ("model", "method", "seed")}})
        if clash:
            notes.append(f"{names[folder]} is a repetition: its seeds are counted from {step} on.")
    return rows, lines, notes


def _renamed(curves: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    for curve in curves:
        if curve["model"] in names:
            yield {**curve, "model": names[curve["model"]]}


def _comparable(rows: Sequence[Row]) -> tuple[list[Row], list[tuple[str, list[str]]]]:
    """The rows without what one method was measured by under several definitions, and those definitions by metric."""
    found: dict[tuple[Key, str], set[str]] = {}
    for row in rows:
        for name, measure in row["metrics"].items():
            found.setdefault((_key(row)[:-1], name), set()).add(str((measure or {}).get("definition", "")))
    mixed = {place: said for place, said in found.items() if len(said) > 1}
    kept = [
        {**row, "metrics": {n: m for n, m in row["metrics"].items() if (_key(row)[:-1], n) not in mixed}}
        for row in rows
    ]
    names: dict[str, set[str]] = {}
    for (_, name), said in mixed.items():
        names.setdefault(name, set()).update(said)
    return kept, [(name, sorted(said)) for name, said in sorted(names.items())]
