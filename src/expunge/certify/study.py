"""Evidence over many runs from a study of ``expunge bench``: equivalence (L2) and attack trials (L4) by seeds.

The margins stand in a plan that was fixed before the study began, in a file of its own::

    fixed: 2026-11-20T09:00:00Z
    margins: {prob.forget: 0.05, prob.retain: 0.05}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from expunge.certify.collect import place_of
from expunge.certify.gather import arms_of_study
from expunge.certify.refusals import is_forget
from expunge.certify.sections import Arms, Equivalence, Plan, Trials, add_section
from expunge.errors import UserError
from expunge.record import read_record


def read_plan(path: Path | str) -> Plan:
    """A plan from its YAML file.

    Raises:
        UserError: no such file, no YAML, or another field (the first is named).
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        found = Plan.model_validate(content)
    except OSError as error:
        raise UserError(f"--plan '{path}' cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"--plan '{path}' is no YAML: write 'fixed: TIME' and 'margins: {{metric: margin}}'."
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"--plan '{path}': {place} is wrong ({first['msg']}); it takes 'fixed' and 'margins'."
        ) from error
    if found.fixed.tzinfo is None:
        raise UserError(f"--plan '{path}': 'fixed' has no time zone: write for example 2026-11-20T09:00:00Z.")
    return found


def collect_study(run: Path | str, study: Path | str, plan: Plan) -> tuple[str, ...]:
    """Add ``equivalence`` and ``trials`` to ``evidence.json`` of a run; the names of the sections.

    The study must have run the method of this run, with the same settings, on the same data.

    Raises:
        UserError: no finished study, another method, setting or data, or a metric that a run of it lacks.
    """
    folder, place = Path(study), place_of(Path(run))
    record = read_record(folder)
    if record.command not in ("bench", "demo") or record.status != "done":
        raise UserError(f"'{study}' is no finished study: give the --out folder of 'expunge bench'.")
    if record.digests.get("data") != read_record(Path(run)).digests.get("data"):
        raise UserError(f"the study '{study}' is about other data than '{run}': give both the same data.")
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{folder / 'results.json'}' cannot be read: run the study again.") from error
    label = _label(results, place.method, place.settings, str(study))
    arms = arms_of_study(results, label, plan.margins)
    found: dict[str, Any] = {"equivalence": Equivalence(plan=plan, started=record.started, arms=arms)}
    if (trials := trials_of(arms)) is not None:
        found["trials"] = trials
    add_section(Path(run), **found)
    return tuple(found)


def _label(results: Mapping[str, Any], method: str, settings: Mapping[str, Any], study: str) -> str:
    """The name under which the study ran the method with these settings."""
    rows = [r for r in results.get("rows", []) if r.get("kind") == "method" and r.get("study", "main") == "main"]
    given = {key: _setting(value) for key, value in settings.items()}
    for row in rows:
        own = {key: _setting(value) for key, value in (row.get("settings") or {}).items()}
        name = str(row.get("method"))
        if method in (name, name.partition(":")[0]) and own == given:
            return name
    there = ", ".join(dict.fromkeys(str(r.get("method")) for r in rows)) or "nothing"
    raise UserError(f"the study '{study}' ran {there}, and not '{method}' with the settings of this run: run it so.")


def _setting(value: Any) -> float | str:
    """Settings are kept as texts, and 1 is 1.0."""
    try:
        return float(value)
    except ValueError:
        return str(value)


def trials_of(arms: Mapping[str, Arms]) -> Trials | None:
    """The best threshold on any planned statistic of what is forgotten, as an attack that says which world a run is of.

    Positives are unlearned runs, negatives retrained ones. Every threshold between two neighbouring values, in both
    directions and of every statistic, counts as one that was tried. None without such a statistic.
    """
    best: tuple[int, int] | None = None
    tried, sizes = 0, (0, 0)
    for name, arm in sorted(arms.items()):
        if not is_forget(name):
            continue
        values = sorted({*arm.unlearned, *arm.retrained})
        sizes = len(arm.unlearned), len(arm.retrained)
        for low, high in pairwise(values):
            cut = (low + high) / 2
            above = sum(v > cut for v in arm.unlearned), sum(v > cut for v in arm.retrained)
            below = sizes[0] - above[0], sizes[1] - above[1]
            tried += 2
            for calls in (above, below):
                if best is None or calls[0] - calls[1] > best[0] - best[1]:
                    best = calls
    if best is None:
        return None
    return Trials(
        true_positives=best[0], positives=sizes[0], false_positives=best[1], negatives=sizes[1], thresholds=tried
    )
