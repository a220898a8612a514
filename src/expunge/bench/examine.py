"""An audit: every attack of a suite on every checkpoint, completeness, and what may be said of it.

Writes ``audit.json`` (the vector of verdicts, one row per score, completeness, subjects) and ``drill.jsonl`` (one line
per forget sample) into the run folder. One model is in memory at a time but for attacks that read two; findings are
kept per attack and checkpoint, so an interrupted audit goes on where it stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Attack, Finding, Tier, get_attack, suite
from expunge.bench.drill import drill_rows
from expunge.bench.hidden import hidden, record
from expunge.bench.judge import AXES, Floats, Judged, Panel, judge, settle, tile
from expunge.completeness.calibration import Completeness, by_subject, calibrate
from expunge.completeness.readings import Readings
from expunge.completeness.views import UnderAttack
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.files import plain
from expunge.progress import Progress
from expunge.runs import Run
from expunge.signals.cache import fingerprint
from expunge.stats import Estimate

SCHEMA = "expunge.audit/1"
KEPT_ROLES: tuple[Role, ...] = ("retain", "utility")
BLIND = "blind"  # the attack that sees no model: it runs once
Findings = Mapping[str, Mapping[str, Finding]]  # of an attack, of a checkpoint
ERROR_LENGTH = 300  # characters of an exception that are kept


@dataclass(frozen=True)
class Plan:
    """The attacks of an audit with their options; ``skipped``: those that cannot be run, and why."""

    tier: Tier
    attacks: Sequence[tuple[Attack, Any]]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def passes(self) -> float:
        """Cost of one checkpoint, in forward passes over the attacked samples."""
        return 1 + sum(a.passes for a, _ in self.attacks)

    def estimate(self, checkpoints: int, seconds: float | None = None) -> str:
        """The cost in words; ``seconds`` is what one pass takes here, where that is known."""
        text = f"{len(self.attacks)} attacks on {checkpoints} model(s), about {self.passes * checkpoints:,.0f} passes"
        text += " over the forget and holdout samples"
        if seconds is not None:
            text += f", about {_duration(seconds * self.passes * checkpoints)}"
        return text


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan(exam: Exam | None, tier: Tier, wishes: Sequence[tuple[str, Mapping[str, Any]]] = ()) -> Plan:
    """The attacks of a suite, or those that are wished for by name with their options.

    Raises:
        UserError: an unknown suite, attack or option.
    """
    wanted = [(get_attack(name), values) for name, values in wishes] if wishes else [(a, {}) for a in suite(tier)]
    chosen, skipped = [], {}
    for entry, values in wanted:
        options = entry.configure(values)
        reason = None if exam is None else entry.missing(exam) or _lacks_other(entry, exam)
        if reason is None:
            chosen.append((entry, options))
        else:
            skipped[entry.name] = reason
    return Plan(tier, chosen, skipped)


def _lacks_other(entry: Attack, exam: Exam) -> str | None:
    if "other" in entry.needs and not all(exam.others(c) for c in exam.checkpoints):
        return "needs a second model that never saw the forget samples: the reference itself must be compared with one"
    return None


@dataclass
class Audit:
    """What was found, before it is written."""

    plan: Plan
    rows: list[Judged]
    completeness: Completeness | None
    content: dict[str, Any]
    drill: list[dict[str, Any]]


FAIL_ON = (*AXES, "under", "over", "any")


def examine(
    exam: Exam, wanted: Plan, run: Run, *, level: float = 0.05, fdr: float = 0.05, notes: Sequence[str] = ()
) -> Audit:
    """Run the attacks, judge, and write ``audit.json`` and ``drill.jsonl`` into the run folder."""
    started = time.perf_counter()
    texts = [*exam.forget, *exam.holdout]
    exam.audited.signals(texts, exam.progress)
    # What an interrupted audit has asked before is read from disk, and does not tell what a pass costs.
    one_pass = None if run.resumed else time.perf_counter() - started
    exam.progress.say(f"audit: {wanted.estimate(len(exam.checkpoints), one_pass)}")
    done, failed, cost = attacked(exam, wanted, run)
    for checkpoint in exam.shadows:
        checkpoint.signals(texts)
        checkpoint.release()
    panels = _panels(exam, wanted, done)
    rows = _judged(exam, panels)
    control = _judged(exam, [replace(p, audited=exam.original.name) for p in panels]) if exam.original else None
    readings, beside = completeness_readings(exam)
    answers = None if readings is None else calibrate(readings, level=level, fdr=fdr, holdout=beside)
    # With other tokens, means of log-probabilities cannot be compared between models.
    deeper = None if strangers(exam) else hidden(exam, done, readings, beside, level=level, fdr=fdr)
    content = _content(exam, wanted, done, rows, control, readings, beside, answers, deeper)
    content["notes"] = [*notes, *content["notes"]]
    content |= {"skipped": dict(wanted.skipped), "failed": failed, "cost": cost}
    audit = Audit(wanted, rows, answers, content, drill_rows(exam, done, rows, answers, deeper))
    run.write_json("audit.json", plain(content))
    run.write_jsonl("drill.jsonl", [plain(row) for row in audit.drill])
    return audit


def attacked(exam: Exam, wanted: Plan, run: Run) -> tuple[Findings, dict[str, str], dict[str, float]]:
    """(findings of the attacks that worked on every checkpoint, why the others did not, seconds of each)."""
    cost: dict[str, float] = {}
    failed: dict[str, str] = {}
    findings: dict[str, dict[str, Finding]] = {}
    bar, quiet = exam.progress, replace(exam, progress=Progress(event=exam.progress.event))  # one bar at a time
    jobs = [
        (checkpoint, [(a, o) for a, o in wanted.attacks if a.name != BLIND or checkpoint is exam.audited])
        for checkpoint in exam.checkpoints
    ]
    steps = 0  # in passes, so that the time left is not told by the cheap attacks, which come first
    bar.start("audit, in passes", sum(_steps(a) for _, attacks in jobs for a, _ in attacks))
    try:
        for checkpoint, attacks in jobs:
            bar.step(steps, f"asking {checkpoint.name}")
            _ask(exam, checkpoint)
            for entry, options in attacks:
                bar.step(steps, f"{entry.name} on {checkpoint.name}")
                steps += _steps(entry)
                if entry.name in failed:
                    continue
                begun = time.perf_counter()
                found = _find(quiet, checkpoint, entry, options, run)
                cost[entry.name] = cost.get(entry.name, 0.0) + time.perf_counter() - begun
                if isinstance(found, str):
                    failed[entry.name] = f"on {checkpoint.name}: {found}"
                    bar.say(f"attack {entry.name} failed on {checkpoint.name}; audit.json says why")
                else:
                    findings.setdefault(entry.name, {})[checkpoint.name] = found
            if checkpoint is not exam.audited:
                checkpoint.release()
        bar.step(steps)
    finally:
        bar.stop()
    return {name: found for name, found in findings.items() if name not in failed}, failed, cost


def _steps(entry: Attack) -> int:
    return 1 + math.ceil(entry.passes)


def _ask(exam: Exam, checkpoint: Checkpoint) -> None:
    """What every audit keeps of a checkpoint: signals of all roles, answers to the forget prompts."""
    checkpoint.signals([s for own in exam.samples.values() for s in own])
    asked = [s for s in exam.forget if s.prompt]
    if checkpoint.adapter.can_generate and asked:
        checkpoint.answers(asked)


def _find(exam: Exam, checkpoint: Checkpoint, entry: Attack, options: Any, run: Run) -> Finding | str:
    """The finding, from disk if it is there; or why it could not be had."""
    place = f"work/findings/{checkpoint.name}/{entry.name}.json"
    if (run.folder / place).exists():
        return _read(run.read_json(place))
    try:
        found = entry.run(exam, checkpoint, options)
        if (wrong := _misfit(exam, found)) is not None:
            return wrong
        run.write_json(place, plain(vars(found) | {"figures": {n: e.record() for n, e in found.figures.items()}}))
    except UserError as error:
        return str(error)
    except Exception as error:
        # One attack that breaks, in whatever way, must not cost the audit of the others; the report says which and why.
        return " ".join(f"{type(error).__name__}: {error}".split())[:ERROR_LENGTH]
    return _read(run.read_json(place))


def _misfit(exam: Exam, found: Finding) -> str | None:
    """What is wrong with the form of a finding."""
    for score, by_role in found.scores.items():
        for role, values in by_role.items():
            num = len(exam.samples.get(role, []))
            if len(values) != num:
                return f"gave {len(values)} values of {score} for {num} {role} samples"
    return None


def _read(content: Mapping[str, Any]) -> Finding:
    """From JSON, so that a resumed audit and one in a single go read the same numbers."""

    def numbers(values: Sequence[float | None]) -> list[float]:
        return [math.nan if v is None else float(v) for v in values]

    def estimate(record: Mapping[str, Any]) -> Estimate:
        ends = {k: math.nan if record[k] is None else float(record[k]) for k in ("value", "low", "high")}
        return Estimate(**ends, n=record["n"], definition=record["definition"], note=record.get("note", ""))

    return Finding(
        {name: {role: numbers(v) for role, v in by_role.items()} for name, by_role in content["scores"].items()},
        {name: estimate(record) for name, record in content["figures"].items()},
        content["details"],
        content["notes"],
    )


def _judged(exam: Exam, panels: Sequence[Panel]) -> list[Judged]:
    """One row per score, with p-values adjusted over all of them."""
    subjects = {role: [s.subject for s in own] for role, own in exam.samples.items()}
    rows = [judge(p, subjects, level=exam.level, resamples=exam.resamples, seed=exam.seed) for p in panels]
    settle(rows, exam.level)
    return rows


def _panels(exam: Exam, wanted: Plan, findings: Findings) -> list[Panel]:
    """Every score under every model, in the order of the attacks, and what is kept."""
    references = [c.name for c in exam.references]
    alike = [c.name for c in exam.references if c not in strangers(exam)]
    panels = []
    for entry, _ in wanted.attacks:
        if entry.name == BLIND or entry.name not in findings:
            continue
        own = findings[entry.name]
        shared = [name for name in own[exam.audited.name].scores if all(name in f.scores for f in own.values())]
        for name in shared:
            roles = [r for r in exam.samples if all(r in f.scores[name] for f in own.values())]
            models = {c: {r: found.scores[name][r] for r in roles} for c, found in own.items()}
            if not roles:
                continue
            panel = Panel(
                entry.name, name, entry.family, entry.tier, entry.access, models, exam.audited.name, references,
                entry.two_sided,
            )  # fmt: skip
            # Ranks within a model can be compared whatever its tokens are, means over tokens cannot.
            panels.append(panel if panel.ranks else replace(panel, references=alike))
    for role in KEPT_ROLES:
        if exam.samples.get(role):
            kept = {c.name: {role: (-_losses(exam, c, exam.samples[role])).tolist()} for c in exam.checkpoints}
            panels.append(
                Panel("kept", f"kept.{role}", "kept", "quick", "log-probabilities", kept, exam.audited.name, references)
            )
    return panels


def strangers(exam: Exam) -> list[Checkpoint]:
    """Checkpoints and shadows that read texts otherwise than the audited model: tokenizer, template or context."""
    key = (__name__, "strangers")
    if key not in exam.shared:
        own = fingerprint(exam.audited.adapter)
        exam.shared[key] = [c for c in [*exam.checkpoints, *exam.shadows] if fingerprint(c.adapter) != own]
    found: list[Checkpoint] = exam.shared[key]
    return found


def _losses(exam: Exam, checkpoint: Checkpoint, samples: Sequence[Sample]) -> Floats:
    """(N,) nats per token; bits per byte where models have other tokens, nan there for a text that was cut."""
    signals = checkpoint.signals(samples)
    if not strangers(exam):
        return np.array([s.loss for s in signals])
    return np.array([math.nan if s.truncated else s.bits_per_byte for s in signals])


# -- completeness ------------------------------------------------------------------------------------------------


def completeness_readings(exam: Exam) -> tuple[Readings | None, Readings | None]:
    """Readings of the forget samples and of the holdout; None without a model that never saw them.

    Two or more references are the best null distribution: they are what unlearning should have made. Otherwise the
    shadows are used, with a reference if there is one.
    """
    never = list(exam.references) if len(exam.references) >= 2 else [*exam.references, *exam.shadows]
    if not never:
        return None, None

    def values(checkpoint: Checkpoint, samples: Sequence[Sample]) -> Floats:
        if exam.modality == "classifier":
            return np.array([s.prob for s in checkpoint.signals(samples)])
        return _losses(exam, checkpoint, samples)

    def readings(samples: Sequence[Sample]) -> Readings:
        return Readings(
            "classifier" if exam.modality == "classifier" else "text",
            [s.id for s in samples],
            values(exam.audited, samples),
            np.stack([values(c, samples) for c in never]),
            None if exam.original is None else values(exam.original, samples),
            [s.subject for s in samples],
        )

    return readings(exam.forget), readings(exam.holdout) if exam.holdout else None


def _content(
    exam: Exam,
    wanted: Plan,
    findings: Findings,
    rows: Sequence[Judged],
    control: Sequence[Judged] | None,
    readings: Readings | None,
    beside: Readings | None,
    answers: Completeness | None,
    deeper: UnderAttack | None,
) -> dict[str, Any]:
    notes = []
    if odd := ", ".join(c.name for c in strangers(exam)):
        notes.append(
            f"other tokenizer, template or context than the audited model: {odd}; losses are compared in bits per "
            "byte, and means over tokens are not compared with these."
        )
    if answers is None:
        notes.append("completeness was not judged: give a --reference or a --shadow, which never saw the samples.")
    for name, own in findings.items():
        said = own[exam.audited.name].notes
        notes += [note if note.startswith(name) else f"{name}: {note}" for note in said]
        lost = sorted(own[exam.audited.name].scores.keys() - set.intersection(*(set(f.scores) for f in own.values())))
        if lost:
            notes.append(f"{name}: {', '.join(lost)} could not be had under every model and is left out.")
    summary: dict[str, Any] | None = None
    if answers is not None and readings is not None:
        summary = {
            "form": readings.form,
            "level": answers.level,
            "fdr": answers.fdr,
            "shadows": answers.shadows,
            "calibration": answers.calibration,
            "counts": answers.counts(),
            "n": len(readings),
            "auditable": int(answers.auditable_N.sum()),
            "smallest_p": answers.smallest_p,
            "called_at_level": float(np.nansum(answers.called())),
            "notes": list(answers.notes),
        }
    worst_view = None if deeper is None else record(deeper)
    return {
        "schema": SCHEMA,
        "suite": wanted.tier,
        "checkpoints": [
            {"name": c.name, "kind": c.kind, "path": c.path or None} for c in [*exam.checkpoints, *exam.shadows]
        ],
        "samples": {role: len(own) for role, own in exam.samples.items()} | {"aux": len(exam.aux)},
        "vector": [tile(axis, rows, summary, control, worst_view) for axis in AXES],
        "scores": [row.record() for row in rows],
        "completeness": summary,
        "under_attack": worst_view,
        "subjects": _subjects(readings, beside, answers, findings),
        "fitness": _fitness(findings.get(BLIND)),
        "figures": _figures(findings),
        "notes": notes,
    }


def _subjects(
    readings: Readings | None,
    beside: Readings | None,
    answers: Completeness | None,
    findings: Findings,
) -> list[dict[str, Any]]:
    if readings is None or answers is None:
        return []
    inferred: dict[str, Any] = {}
    for found in list(findings.get("dataset_inference", {}).values())[:1]:  # the audited model comes first
        inferred = {d["subject"]: d.get("p") for d in found.details.values() if "subject" in d}
    rows = []
    for own in by_subject(readings, answers, beside):
        verdicts = [v for v, s in zip(answers.verdict_N, readings.subjects or [], strict=True) if s == own.subject]
        verdict = next((v for v in ("under-unlearned", "over-unlearned", "adequate") if v in verdicts), "not-auditable")
        rows.append({**vars(own), "verdict": verdict, "dataset_inference_p": inferred.get(own.subject)})
    return rows


def _fitness(blind: Mapping[str, Finding] | None) -> dict[str, Any] | None:
    """The split's own weakness: what can be told apart without any model."""
    if not blind:
        return None
    found = next(iter(blind.values()))
    figure = next((e for name, e in found.figures.items() if name.endswith("auc")), None)
    unfit = any("unfit" in note for note in found.notes)
    return {
        "blind_auc": None if figure is None else figure.record(),
        "unfit": unfit,
        "sentence": " ".join(found.notes),
    }


def _figures(findings: Findings) -> dict[str, dict[str, Any]]:
    """Name -> checkpoint -> estimate."""
    out: dict[str, dict[str, Any]] = {}
    for by_checkpoint in findings.values():
        for checkpoint, found in by_checkpoint.items():
            for name, figure in found.figures.items():
                out.setdefault(name, {})[checkpoint] = figure.record()
    return out
