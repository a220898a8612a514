"""What a certificate may take from a run folder: digests, counts and figures, and never a free text.

Titles, notes, sentences, paths and configurations of a run can name a person; they stay in the run. Names of
metrics, methods and versions pass only if they look like such names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.certify.commitments import Keys
from expunge.errors import UserError
from expunge.files import digest_file, digest_folder
from expunge.record import RunRecord, read_record
from expunge.runs import read_config

COMMANDS = ("unlearn", "audit")
FILES = ("run.json", "run.yaml", "results.json", "audit.json", "evidence.json", "samples.jsonl", "drill.jsonl",
         "duplicates.jsonl")  # fmt: skip
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+/=-]{0,99}")


@dataclass(frozen=True)
class Made:
    """How the model came about, from the record of the run that made it."""

    record: RunRecord
    config: Mapping[str, Any]
    results: Mapping[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """A finished run, the model it is about, and the run that made this model if that can be told."""

    folder: Path
    record: RunRecord
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    audit: Mapping[str, Any]
    model: Path
    made: Made | None

    @property
    def recorded(self) -> str:
        """Digest of the model according to the run."""
        return self.record.digests["output.model" if self.record.command == "unlearn" else "model"]

    @property
    def private(self) -> bool:
        """Whether the model came out of a private training, and was not touched since."""
        return self.made is not None and self.made.record.command == "train"

    @property
    def original(self) -> str | None:
        """Digest of the model before unlearning."""
        if self.record.command == "audit" and "original" in self.record.digests:
            return self.record.digests["original"]
        if self.private:
            return self.recorded
        return None if self.made is None else self.made.record.digests.get("model")


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Every line that a run keeps of a sample, whatever its model or role.

    Raises:
        UserError: a line is no JSON object.
    """
    for name in ("samples.jsonl", "drill.jsonl"):
        path = folder / name
        if path.is_file():
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    yield _row(line, number, path)


def forgotten(folder: Path) -> dict[str, str]:
    """Subject by id of a run's forget samples.

    Raises:
        UserError: the run kept none: it measured nothing.
    """
    found = {str(r["id"]): str(r["subject"]) for r in rows(folder) if r.get("role") == "forget"}
    if not found:
        raise UserError(f"'{folder}' keeps no forget sample: run its command again with a --suite that measures.")
    return found


def _row(line: str, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"line {number} of '{path}' is no JSON object: run the command of this run again.")
    return row


def read_run(folder: Path | str, model: Path | str | None = None) -> RunFacts:
    """The facts of a finished ``unlearn`` or ``audit`` run.

    Raises:
        UserError: no such run, not finished, of another command, without measurement, or the model is not the one
            that was measured.
    """
    folder = Path(folder)
    record = read_record(folder)
    if record.command not in COMMANDS:
        raise UserError(f"'{folder}' is a run of '{record.command}': certify takes runs of {' and '.join(COMMANDS)}.")
    if record.status != "done":
        raise UserError(f"the run in '{folder}' is {record.status}, not done: run its command again to finish it.")
    config = read_config(folder)
    results = _results(folder)
    audit = _audit(folder)
    given = Path(model) if model is not None else folder / "model"
    if model is None and record.command == "audit":
        given = Path(str(config["model"]))
    if not given.is_dir():
        raise UserError(f"the model '{given}' is not there: give its folder with --model.")
    own = RunFacts(folder, record, config, results, audit, given, None)
    try:
        found = digest_folder(given)
    except FileNotFoundError as error:
        raise UserError(f"'{given}' holds no model: give its folder with --model.") from error
    if found != own.recorded:
        raise UserError(f"'{given}' is not the model that '{folder}' measured: its files have changed since.")
    made = Made(record, config, results) if record.command == "unlearn" else _made(given, own.recorded)
    return RunFacts(folder, record, config, results, audit, given, made)


def _made(model: Path, digest: str) -> Made | None:
    """The unlearning or private training around an audited model, if that run says that it wrote these very files."""
    folder = model.resolve().parent
    try:
        record = read_record(folder)
        if record.digests.get("output.model") == digest:
            config = read_config(folder)
            if record.command == "unlearn":
                return Made(record, config, _results(folder) if (folder / "results.json").is_file() else {})
            if record.command == "train" and config.get("private"):
                return Made(record, config, {})
    except UserError:  # a model from elsewhere
        pass
    return None


def _results(folder: Path) -> dict[str, Any]:
    return _read(folder / "results.json", "expunge.results/1")


def _audit(folder: Path) -> dict[str, Any]:
    path = folder / "audit.json"
    return _read(path, "expunge.audit/1") if path.is_file() else {}


def _read(path: Path, schema: str) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"'{path.parent}' has no {path.name}: run its command again with a --suite that measures.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["schema"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"'{path}' cannot be read: run the command of this run again.") from None
    if known != schema:
        raise UserError(f"'{path}' has schema {known!r}, and this version reads '{schema}': measure again.")
    return dict(content)


# -- what goes into the statement --------------------------------------------------------------------------------


def named(text: Any) -> str | None:
    """``text`` if it looks like the name of a metric, method or version; else None."""
    return text if isinstance(text, str) and NAME.fullmatch(text) else None


def method(facts: RunFacts, keys: Keys) -> dict[str, Any]:
    """What was done to the original, under the names of the predicate."""
    made = facts.made
    if made is None:
        name, kind, helpers, record = None, "unknown", None, facts.record
    else:
        record = made.record
        full = "private" if facts.private else str(made.config.get("method", ""))
        name = named(full.rpartition(".py:")[2] if ".py:" in full else full)  # of a method in a file, not its path
        row: Mapping[str, Any] = next((r for r in made.results.get("rows", []) if r.get("kind") == "method"), {})
        helpers = row.get("properties", {}).get("helpers_hold_data")
        alone = ("retrain", "reset", "private")  # methods that are a kind of their own
        kind = "zone" if (name or "").startswith("zone") else str(name) if name in alone else "edit"
    return {
        "name": name,
        "kind": kind,
        "version": record.expunge,
        "config_commitment": keys.commit("record", "config", record.digests["config"]),
        "code": record.digests["code"],
        "seeds": record.seeds,
        "parameters_changed": record.parameters_changed,
        "helpers_held_data": helpers if isinstance(helpers, bool) else None,
    }


def evidence(facts: RunFacts, keys: Keys) -> dict[str, Any]:
    """Figures with n and intervals, verdicts per axis, and commitments to the files in which they stand."""
    audit = facts.audit
    completeness = audit.get("completeness") or {}
    files = [facts.folder / name for name in FILES if (facts.folder / name).is_file()]
    return {
        "command": facts.record.command,
        "data_commitment": keys.commit("record", "data", facts.record.digests["data"]),
        "record_commitments": {f.name: keys.commit("record", f.name, digest_file(f)) for f in files},
        "references": int(facts.results.get("references") or 0),
        "measures": list(_measures(facts.results, audit)),
        "axes": [
            {"axis": str(named(v["axis"])), "verdict": str(v["verdict"]), "tests": int(v["tests"])}
            for v in audit.get("vector", [])
            if v["verdict"] in ("passed", "failed", "not shown")
        ],
        "completeness": {
            key: completeness[key]
            for key in ("form", "level", "fdr", "shadows", "counts", "n", "auditable")
            if key in completeness
        },
    }


def figures(folder: Path) -> list[dict[str, Any]]:
    """The figures that a certificate of this run holds."""
    return list(_measures(_results(folder), _audit(folder)))


def _measures(results: Mapping[str, Any], audit: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    main = [r for r in results.get("rows", []) if r.get("kind") == "method" and r.get("study", "main") == "main"]
    for row in main[:1]:
        for name, value in sorted(row.get("metrics", {}).items()):
            if named(name) and value is not None:
                yield _measure(name, value)
    for score in audit.get("scores", []):
        name = f"audit.{score['score']}"
        if named(name):
            yield _measure(f"{name}.{score['statistic']}", score["models"].get("audited"))
            if score.get("gap") is not None:
                yield _measure(f"{name}.gap", score["gap"])


def _measure(name: str, given: Any) -> dict[str, Any]:
    value = given if isinstance(given, Mapping) else {"value": given}
    numbers = {key: _number(value.get(key)) for key in ("value", "low", "high")}
    n = value.get("n")
    count = n if isinstance(n, int) and n >= 0 else None
    return {"name": name, **numbers, "n": count, "definition": named(value.get("definition"))}


def _number(value: Any) -> float | int | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if number and math.isfinite(value) else None
