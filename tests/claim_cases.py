"""Evidence for the tests of claims: a clean zone, a clean edit, and ways to spoil them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np

from expunge.certify.gather import Evidence, Interval, Losses, Score, Staying, Verdicts
from expunge.certify.provenance import Clearance
from expunge.certify.sections import (
    Arms,
    Change,
    Distance,
    DuplicateSearch,
    Equivalence,
    Plan,
    Removal,
    Residual,
    Sections,
)
from expunge.privacy_accounting import gaussian_mu

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
CLEAR = Clearance(finding="never-saw", sentence="by the manifests nothing was seen", artefact=B, records=3, links=2)
SEARCH = DuplicateSearch(searched=3, kept=40, pairs=0, open=0)


def at(day: int) -> datetime:
    return datetime(2026, 1, day, tzinfo=UTC)


def removal(**changes: Any) -> Removal:
    clean: dict[str, Any] = {"requested": (A, B), "removed": (A, B), "before": A, "after": C, "rebuilt": C}
    clean |= {"base_before": D, "base_after": D, "statistics": "public", "rows": "alone"}
    return Removal(**(clean | changes))


def residual(**changes: Any) -> Residual:
    """σ for (1, 1e-5) exactly: μ = .26805."""
    clean: dict[str, Any] = {"residual": 1e-10, "reference_residual": 2e-10, "tolerance": 1e-9}
    clean |= {"reference_tolerance": 1e-9, "strong_convexity": 0.03, "noise": 2e-9 / (0.03 * gaussian_mu(1.0, 1e-5))}
    return Residual(**(clean | {"logit_noise": 1e-3, "delta": 1e-5, "artefact": C} | changes))


def equivalence(gap: float = 0.0, runs: int = 12, kept_gap: float = 0.0, fixed: int = 1) -> Equivalence:
    """Arms of normal runs with standard deviation .01 around .1 (forget) and .9 (retain); margins .03."""
    rng = np.random.default_rng(0)

    def arm(mean: float) -> tuple[float, ...]:
        return tuple(rng.normal(mean, 0.01, runs).tolist())

    return Equivalence(
        plan=Plan(fixed=at(fixed), margins={"prob.forget": 0.03, "prob.retain": 0.03}),
        started=at(2),
        arms={
            "prob.forget": Arms(unlearned=arm(0.1 + gap), retrained=arm(0.1)),
            "prob.retain": Arms(unlearned=arm(0.9 + kept_gap), retrained=arm(0.9)),
        },
    )


def score(name: str = "loss", axis: str = "privacy", gap: float = 0.0, half: float = 0.04, **changes: Any) -> Score:
    value = 0.5 + gap
    fields: dict[str, Any] = {
        "attack": name,
        "name": name,
        "axis": axis,
        "statistic": "auc",
        "audited": Interval(value, value - half, value + half, 800),
        "references": (Interval(0.5, 0.46, 0.54, 800),),
        "original": Interval(0.99, 0.97, 1.0, 800),
        "gap": Interval(gap, gap - half, gap + half, 800),
        "verdict": "like the reference",
    }
    return Score(**(fields | changes))


def attacks() -> tuple[Score, ...]:
    return (
        score("loss"),
        score("min_k"),
        score("relearn-forget", "robustness", statistic="mean"),
        score("quantization", "robustness", statistic="mean"),
    )


def staying(nats: float = -1.0) -> Staying:
    theirs = (Interval(-1.0, -1.1, -0.9, 100),)
    return Staying("kept.retain", "nats", Interval(nats, nats - 0.1, nats + 0.1, 100), theirs, None)


def edit(**changes: Any) -> Evidence:
    """An edit that did everything right: L2 to L5 stand."""
    rng = np.random.default_rng(1)
    fields: dict[str, Any] = {
        "kind": "edit",
        "method": "cluster",
        "removes_from_weights": True,
        "before": A,
        "after": B,
        "parameters_changed": 1000,
        "sections": Sections(
            equivalence=equivalence(),
            distance=Distance(subjects=tuple(rng.beta(8, 72, 200).tolist()), floor=0.1),
            change=Change(role="retain", quadratic=0.0101, direct=0.01, high=0.02, n=100),
        ),
        "scores": attacks(),
        "staying": (staying(),),
        "verdicts": Verdicts(under=0, adequate=40, over=0),
        "losses": Losses(own=2.1, original=0.1, moved=2.0, never=(2.0, 2.3)),
        "references": 2,
    }
    return Evidence(**(fields | changes))


def zone(**sections: Any) -> Evidence:
    """A zone that did everything right: L0 and L1 stand."""
    clean: dict[str, Any] = {"removal": removal(), "provenance": CLEAR, "duplicates": SEARCH, "residual": residual()}
    given = Sections(**(clean | sections))
    return Evidence(kind="zone", method="zone-store", before=A, after=B, zone_digest=C, sections=given)
