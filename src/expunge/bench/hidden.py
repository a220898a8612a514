"""What an audit says of knowledge that only hides: completeness in its worst view, from what the attacks found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expunge.attacks.exam import Exam
from expunge.attacks.registry import Finding
from expunge.completeness.readings import Readings
from expunge.completeness.views import PLAIN, VIEWS, UnderAttack, under_attack, view_of
from expunge.data.samples import Role


def hidden(
    exam: Exam,
    findings: Mapping[str, Mapping[str, Finding]],
    plain: Readings | None,
    beside: Readings | None,
    *,
    level: float,
    fdr: float,
) -> UnderAttack | None:
    """The worst view of each forget sample; None where nothing but the plain view was read.

    Views come from attacks, which run on the audited model, its original and the references. So the models that never
    saw the samples must be two references or more; shadows have no findings.
    """
    if plain is None or len(exam.references) < 2:
        return None
    original = exam.original.name if exam.original else ""
    names = [exam.audited.name, *(c.name for c in exam.references), original]
    views: dict[str, tuple[Readings, Readings | None]] = {PLAIN: (plain, beside)}
    for score, view in VIEWS.items():
        found = findings.get(score.split(".", maxsplit=1)[0], {})
        by_model = {name: found[name].scores.get(score, {}) for name in names if name in found}
        roles: tuple[Role, ...] = ("forget", "holdout") if beside is not None else ("forget",)
        if not all(role in by_model.get(name, {}) for name in names if name for role in roles):
            continue
        forget = view_of({name: own["forget"] for name, own in by_model.items()}, plain, names)
        unseen = None
        if beside is not None:
            unseen = view_of({name: own["holdout"] for name, own in by_model.items()}, beside, names)
        views[view] = forget, unseen
    return under_attack(views, level=level, fdr=fdr) if len(views) > 1 else None


def record(found: UnderAttack) -> dict[str, Any]:
    """For audit.json."""
    answer = found.answer
    return {
        "views": {
            name: {"counts": own.counts(), "auditable": int(own.auditable_N.sum())} for name, own in found.views.items()
        },
        "counts": answer.counts(),
        "auditable": int(answer.auditable_N.sum()),
        "n": len(answer.ids),
        "notes": list(answer.notes),
    }
