"""A classifier study over several seeds as two populations: the models of one method against the retrained ones.

Shape suffixes: M models of the method, K retrained models, N forget samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expunge.metrics.population import (
    BINS,
    Floats,
    klom,
    klom_floor,
    margins,
    neurips_forget,
    neurips_score,
    u_lira,
    u_mia_population,
)
from expunge.stats import Estimate

LEAST = 4  # models of each kind: two to fit on and two to judge
ENOUGH = BINS  # for histograms and error rates: with fewer, two halves of one population look like strangers
KINDS = ("original", "identity", "method")
Row = Mapping[str, Any]


def population_metrics(group: Sequence[Row], references: Sequence[Row]) -> dict[str, Any]:
    """U-LiRA and U-MIA from 4 models of each kind on; from 20 on KLOM with its floor, and the challenge's scores.

    ``group``: the rows of one method, one per seed; ``references``: those of the retrained models. Samples that any
    model has no loss of are left out. Only where each sample has one target, since the metrics are those of classes.
    """
    if min(len(group), len(references)) < LEAST or group[0]["kind"] not in KINDS:
        return {}
    own, theirs = ([_losses(row) for row in rows] for rows in (group, references))
    ids = [i for i in own[0] if all(i in losses for losses in (*own, *theirs))]
    if not ids:
        return {}
    own_MN, theirs_KN = (_margins(side, ids) for side in (own, theirs))
    subjects = {s["id"]: str(s["subject"]) for s in group[0]["samples"]}
    groups = [subjects[i] for i in ids]
    found = {
        "u_lira": u_lira(own_MN, theirs_KN, groups).estimate,
        "u_mia_population": u_mia_population(own_MN, theirs_KN, groups).estimate,
    }
    if min(len(group), len(references)) >= ENOUGH:
        found["klom"] = klom(own_MN, theirs_KN, groups).estimate
        found["klom.floor"] = klom_floor(theirs_KN, groups).estimate
        found["neurips_forget"] = neurips_forget(own_MN, theirs_KN, groups).estimate
        rates = [_accuracy(rows, role) for role in ("retain", "holdout") for rows in (group, references)]
        known = [rate for rate in rates if rate is not None]
        if len(known) == len(rates) and min(known[1::2]) > 0:
            found["neurips_score"] = neurips_score(found["neurips_forget"], *known)
    return {name: {**_noted(value, group, references).record(), "seeds": len(group)} for name, value in found.items()}


def _noted(value: Estimate, group: Sequence[Row], references: Sequence[Row]) -> Estimate:
    return value.named(value.definition, f"{len(group)} models against {len(references)} retrained ones")


def _losses(row: Row) -> dict[str, float]:
    """Loss by forget sample, of samples with one target."""
    return {
        s["id"]: s["loss"]
        for s in row["samples"]
        if s["role"] == "forget" and s["tokens"] == 1 and s["loss"] is not None
    }


def _margins(models: Sequence[Mapping[str, float]], ids: Sequence[str]) -> Floats:
    return margins(-np.array([[losses[i] for i in ids] for losses in models], dtype=np.float64))


def _accuracy(rows: Sequence[Row], role: str) -> float | None:
    """Mean accuracy of the models on a role; None where it was not measured."""
    found = [row["metrics"].get(f"accuracy.{role}", {}).get("value") for row in rows]
    return None if None in found else float(np.mean([f for f in found if f is not None]))
