"""From a table of readings to answers per sample: what ``expunge completeness`` does, as a Python function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from expunge.completeness import iam
from expunge.completeness.readings import Floats, Form, Readings
from expunge.completeness.table import Table, columns_of, read_table, write_table
from expunge.errors import UserError
from expunge.files import digest_file

SCHEMA = "expunge.completeness/1"
VERDICTS = ("under-unlearned", "adequate", "over-unlearned", "not-auditable")
PARITY_SCORE: Mapping[Form, str] = {
    "text": "IAM as published: membership (1 = still a member)",
    "classifier": "IAM as published: U (1 = forgotten)",
}
EVIDENCE = "evidence of still being a member (higher = more)"


@dataclass(frozen=True, eq=False)
class Answer:
    """Per-sample answers. ``columns``: what is printed and written, in that order, (N,) each.

    ``score`` is in ``columns`` as ``meaning`` says; ``member_N`` is the same with higher = more likely a member.
    ``auc``: of the score and of simple differences, by name, when both labels are there.
    """

    readings: Readings
    columns: Mapping[str, Sequence[Any] | Floats]
    member_N: Floats
    meaning: str
    settings: Mapping[str, Any]
    verdicts: Mapping[str, int] | None = None
    auc: Mapping[str, Any] = field(default_factory=dict)
    subjects: Sequence[Any] = ()  # expunge.completeness.calibration.SubjectAnswer
    notes: tuple[str, ...] = ()
    folder: Path | None = None

    def summary(self) -> dict[str, Any]:
        """The content of results.json."""
        return {
            "schema": SCHEMA,
            **self.settings,
            "samples": len(self.readings),
            "shadows": self.readings.num_shadows,
            "score": self.meaning,
            "verdicts": self.verdicts,
            "auc": {name: estimate.record() for name, estimate in self.auc.items()},
            "subjects": [asdict(s) for s in self.subjects],
            "notes": list(self.notes),
        } | ({"run": str(self.folder)} if self.folder else {})

    def record(self) -> dict[str, Any]:
        """For ``--json``: the summary, and ``rows`` with one object per sample."""
        lists = [v.tolist() if isinstance(v, np.ndarray) else list(v) for v in self.columns.values()]
        return self.summary() | {
            "rows": [dict(zip(self.columns, row, strict=True)) for row in zip(*lists, strict=True)]
        }

    def lines(self) -> list[str]:
        """The summary in words."""
        said = [f"{len(self.readings)} samples, {self.readings.num_shadows} shadow(s), form {self.readings.form}."]
        if self.verdicts is not None:
            said.append(", ".join(f"{count} {name}" for name, count in self.verdicts.items()) + ".")
        said.append(f"score: {self.meaning}.")
        for name, e in self.auc.items():
            said.append(f"auc of {name}: {e.value:.4f} [{e.low:.4f}, {e.high:.4f}], n = {e.n}.")
        return said


def completeness(
    signals: Path | str | Readings,
    form: Form,
    *,
    parity: bool = False,
    holdout: Path | str | Readings | None = None,
    anchor: float | None = None,
    level: float = 0.05,
    fdr: float = 0.05,
    batch_size: int | None = None,
    out: Path | str | None = None,
) -> Answer:
    """Say for each sample of a table whether it is gone.

    Args:
        signals: a table (see :mod:`expunge.completeness.table`), or readings. Form "text": mean negative
            log-likelihood in nats per token; form "classifier": probability of the true label.
        parity: give the published IAM score and no verdicts; see :func:`expunge.completeness.iam.parity`.
        holdout: the same columns for samples that no model was trained on; they calibrate instead of the shadows.
        anchor: a typical reading of samples that were trained on, in the place of the original's (offline).
        level: share of samples that an exact retrain forgot and that may be called under-unlearned.
        fdr: false discovery rate among the calls.
        batch_size: parity only: rows that are pooled together; 0 for all; as published when None (text 64, else all).
        out: run folder for the table, results.json, results.md and the figure.

    Raises:
        UserError: see :func:`read_table`; a level outside (0, 1); options that exclude each other.
    """
    for name, value in (("level", level), ("fdr", fdr)):
        if not 0 < value < 1:
            raise UserError(f"--{name} {value} is not between 0 and 1: give for example 0.05.")
    if parity and holdout is not None:
        raise UserError("--parity gives the published score, which has no calibration: leave --holdout away.")
    if batch_size is not None and not parity:
        raise UserError("--batch-size belongs to --parity: our own score does not depend on the other rows.")
    table, unseen = _open(signals, form, anchor), None if holdout is None else _open(holdout, form, anchor)
    notes = [*table.notes, *(f"holdout: {note}" for note in (unseen.notes if unseen else ()))]
    if unseen is not None:
        _apart(table.readings, unseen.readings)
    settings = {"form": form, "parity": parity, "anchor": anchor}
    if parity:
        settings["batch_size"] = iam.PUBLISHED_BATCH[form] if batch_size is None else batch_size or None
        answer = _published(table.readings, settings)
    else:
        settings |= {"level": level, "fdr": fdr, "holdout": None if unseen is None else len(unseen.readings)}
        answer = _calibrated(table.readings, None if unseen is None else unseen.readings, settings)
    answer = replace(answer, notes=(*notes, *answer.notes), auc=_auc(answer))
    if out is None:
        return answer
    inputs = {"signals": signals, "holdout": holdout}
    return write(answer, Path(out), {k: Path(v) for k, v in inputs.items() if isinstance(v, (str, Path))})


def _open(given: Path | str | Readings, form: Form, anchor: float | None) -> Table:
    if isinstance(given, Readings):
        if given.form != form:
            raise UserError(f"readings of form '{given.form}' were given with form '{form}': name the one they have.")
        table = Table(given)
    else:
        table = read_table(given, form, original=anchor is None)
    if anchor is None:
        iam.original_of(table.readings)
        return table
    notes = table.notes
    if table.readings.original_N is not None:
        notes = (*notes, "the column 'original' was not used, since an anchor stands in its place.")
    return Table(iam.offline(table.readings, anchor), notes)


def _apart(readings: Readings, unseen: Readings) -> None:
    """A holdout is another set of samples under the same models."""
    if readings.num_shadows != unseen.num_shadows:
        raise UserError(
            f"the table has {readings.num_shadows} shadow(s) and the holdout {unseen.num_shadows}: measure both with "
            "the same models."
        )
    own = dict(zip(readings.ids, readings.unlearned_N.tolist(), strict=True))
    both = [i for i, x in zip(unseen.ids, unseen.unlearned_N.tolist(), strict=True) if i in own and own[i] == x]
    if both:
        raise UserError(
            f"{len(both)} row(s) of the holdout are in the table too, e.g. '{both[0]}': give samples never trained on."
        )


def _published(readings: Readings, settings: Mapping[str, Any]) -> Answer:
    scores_N = iam.parity(readings, batch=settings["batch_size"])
    member_N = scores_N if readings.form == "text" else 1 - scores_N
    lost = int(np.isnan(scores_N).sum())
    notes = (f"{lost} of {len(readings)} samples lack a number and have no score.",) if lost else ()
    columns: dict[str, Sequence[Any] | Floats] = {"id": readings.ids, "score": scores_N}
    return Answer(readings, columns, member_N, PARITY_SCORE[readings.form], settings, notes=notes)


def _calibrated(readings: Readings, unseen: Readings | None, settings: Mapping[str, Any]) -> Answer:
    from expunge.completeness.calibration import by_subject, calibrate

    # Sums over samples run in the order of ids, so that the order of rows changes no bit of any answer.
    order = np.argsort(np.asarray(readings.ids, dtype=np.str_), kind="stable")
    rank = np.argsort(order)
    sorted_readings = readings.select(order.tolist())
    found = calibrate(sorted_readings, level=settings["level"], fdr=settings["fdr"], holdout=_sorted(unseen))
    verdicts = [found.verdict_N[place] for place in rank]
    columns: dict[str, Sequence[Any] | Floats] = {
        "id": readings.ids,
        "score": found.score_N[rank],
        "completeness": found.completeness_N[rank],
        "verdict": verdicts,
        "position": found.position_N[rank],
        "p_under": found.p_under_N[rank],
        "p_over": found.p_over_N[rank],
    }
    settings = {**settings, "calibration": found.calibration, "smallest_p": found.smallest_p}
    subjects = tuple(by_subject(sorted_readings, found, _sorted(unseen)))
    return Answer(
        readings,
        columns,
        found.score_N[rank],
        EVIDENCE,
        settings,
        {name: verdicts.count(name) for name in VERDICTS},
        subjects=subjects,
        notes=tuple(found.notes),
    )


def _sorted(readings: Readings | None) -> Readings | None:
    return None if readings is None else readings.select(np.argsort(np.asarray(readings.ids, dtype=np.str_)).tolist())


def _auc(answer: Answer) -> dict[str, Any]:
    """AUC of the score and of plain differences against the labels; empty when a class is missing."""
    readings = answer.readings
    if readings.label_N is None or not {0.0, 1.0} <= set(readings.label_N.tolist()):
        return {}
    from expunge.completeness.scoring import simple_scores
    from expunge.stats import auc_estimate

    members, others = readings.label_N == 1, readings.label_N == 0
    subjects = None if readings.subjects is None else np.asarray(readings.subjects)
    groups = (None, None) if subjects is None else (subjects[members].tolist(), subjects[others].tolist())
    scores = {"score": answer.member_N, **simple_scores(readings)}
    del scores["prob"]  # ranks as the loss does
    return {name: auc_estimate(score_N[members], score_N[others], *groups) for name, score_N in scores.items()}


def write(answer: Answer, out: Path, inputs: Mapping[str, Path]) -> Answer:
    """The run folder: completeness.csv (readings and answers), results.json, results.md, figures."""
    from expunge.completeness.figure import draw
    from expunge.runs import Run

    digests = {name: digest_file(path) for name, path in inputs.items()}
    options = {**answer.settings, **{name: str(path) for name, path in inputs.items()}}
    answer = replace(answer, folder=out)
    with Run.open(out, "completeness", options, digests) as run:
        write_table(run.path("completeness.csv"), {**columns_of(answer.readings), **answer.columns})
        run.write_json("results.json", answer.summary())
        text = "\n".join(f"- {line}" for line in (*answer.lines(), *answer.notes))
        run.write_text("results.md", f"# Completeness\n\n{text}\n\n![Completeness](figures/completeness.svg)\n")
        if answer.verdicts is None:
            shown_N, label, verdicts = np.asarray(answer.columns["score"]), answer.meaning, None
        else:
            shown_N, label = np.asarray(answer.columns["completeness"]), "completeness (1 = gone)"
            verdicts = list(answer.columns["verdict"])
        draw(run.folder / "figures", answer.readings, shown_N, label, verdicts)
        run.finish(notes=answer.notes)
    return answer
