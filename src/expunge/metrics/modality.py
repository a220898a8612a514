"""The modality matrix: what forgetting in one modality does to what the model says in the other.

A person is known from texts and from pictures. A run forgets one of them (or both); then every question is asked, with
a picture and without. Rows are what was forgotten, columns what was asked, cells the change of forget and of retain.

Shape suffixes: N samples, K columns, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.metrics.registry import metric
from expunge.stats import LEVEL, RESAMPLES, Estimate, Groups, bootstrap_mean, bootstrap_means, percentile_interval

Floats = NDArray[np.float64]
Asked = Literal["text", "image"]
ASKED: tuple[Asked, ...] = get_args(Asked)
NOTHING = 0.05  # a share of a gap smaller than this is a division by noise


def asked_modality(sample: Sample) -> Asked:
    """ "image" for a question that comes with a picture, "text" for any other."""
    return "text" if sample.image is None else "image"


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """The scores of one role's samples that are asked in one modality, before and after.

    Any score per sample does (probability, ROUGE, right or wrong); higher means that more is known.
    """

    original_N: Floats
    unlearned_N: Floats
    reference_N: Floats | None = None
    groups: Groups = None

    def __post_init__(self) -> None:
        sides = [len(self.original_N), len(self.unlearned_N)]
        sides += [] if self.reference_N is None else [len(self.reference_N)]
        if len(set(sides)) > 1:
            raise UserError(f"scores before and after are paired, and {sides} were given: measure the same samples.")


def by_modality(
    samples: Sequence[Sample], original_N: Floats, unlearned_N: Floats, reference_N: Floats | None = None
) -> dict[Asked, Change]:
    """The samples' scores cut by what is asked; a modality that nobody is asked in is left out."""
    asked = [asked_modality(s) for s in samples]
    found: dict[Asked, Change] = {}
    for kind in ASKED:
        places = [i for i, a in enumerate(asked) if a == kind]
        if places:
            own = None if reference_N is None else reference_N[places]
            groups = [samples[i].subject for i in places]
            found[kind] = Change(original_N[places], unlearned_N[places], own, groups)
    return found


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell. ``closed``: share of the way from the original to the reference; None without one.

    1 is where the retrained model stands, above 1 is beyond it, 0 is no forgetting.
    """

    forgotten: str
    asked: str
    forget: Estimate
    retain: Estimate | None
    closed: Estimate | None


def _closed(change: Change, level: float, resamples: int, seed: int) -> Estimate | None:
    if change.reference_N is None:
        return None
    name = "modality-closed/1"
    table_NK = np.stack([change.original_N, change.unlearned_N, change.reference_N], axis=1)
    kept_N = np.asarray(np.isfinite(table_NK).all(axis=1))
    table_NK = table_NK[kept_N]
    groups = (
        None if change.groups is None else [g for g, keep in zip(change.groups, kept_N.tolist(), strict=True) if keep]
    )
    if not len(table_NK):
        return Estimate(np.nan, definition=name)
    original, unlearned, reference = table_NK.mean(axis=0)
    if abs(original - reference) < NOTHING:
        note = "original and reference know the same here: there is no gap to close"
        return Estimate(np.nan, n=len(table_NK), definition=name, note=note)
    value = float((original - unlearned) / (original - reference))
    if groups is not None and len(set(groups)) < 2:
        return Estimate(value, n=len(table_NK), definition=name)
    mean_RK = bootstrap_means(table_NK, groups, resamples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws_R = (mean_RK[:, 0] - mean_RK[:, 1]) / (mean_RK[:, 0] - mean_RK[:, 2])
    return Estimate(value, *percentile_interval(draws_R, level), len(table_NK), name)


def _moved(change: Change, role: str, level: float, resamples: int, seed: int) -> Estimate:
    apart_N = change.unlearned_N - change.original_N
    found = bootstrap_mean(
        apart_N, change.groups, level=level, resamples=resamples, seed=seed, definition=f"modality-{role}/1"
    )
    # No change of any sample is that of the same model, and certain: these are no shares of successes.
    nothing = np.isfinite(found.low) and not np.nansum(np.abs(apart_N))
    return replace(found, low=0.0, high=0.0) if nothing else found


@metric(
    name="modality_matrix",
    definition="modality-forget/1, modality-retain/1, modality-closed/1",
    formula="per (forgotten, asked): mean change of forget and retain scores; share of the gap to the reference closed",
    direction="forget: two-sided, closed = 1 is best in every column; retain: 0 is best",
    source="the question of CLEAR (Dontsov et al. 2024, table 3) put per sample; the form is ours",
)
def modality_matrix(
    forget: Mapping[str, Mapping[Asked, Change]],
    retain: Mapping[str, Mapping[Asked, Change]] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Cell]:
    """What forgetting in one modality changes in the other: one cell per forgotten and asked modality, row by row.

    Keys of ``forget`` and ``retain``: what each run forgot ("text", "image", "both").
    Off the diagonal stands what crosses over: a person forgotten in text who is still named from a picture. A change
    says nothing of what a question of another kind would bring up.

    Raises:
        UserError: nothing was forgotten or asked.
    """
    if not any(forget.values()):
        raise UserError("the modality matrix needs at least one run and one asked modality: none was given.")
    kept = retain or {}
    return [
        Cell(
            forgotten,
            kind,
            _moved(changes[kind], "forget", level, resamples, seed),
            _moved(kept[forgotten][kind], "retain", level, resamples, seed)
            if kind in kept.get(forgotten, {})
            else None,
            _closed(changes[kind], level, resamples, seed),
        )
        for forgotten, changes in forget.items()
        for kind in ASKED
        if kind in changes
    ]


def as_table(cells: Sequence[Cell]) -> list[dict[str, str]]:
    """The cells as rows of text, one per cell, with intervals; "-" is what was not measured."""

    def shown(estimate: Estimate | None) -> str:
        if estimate is None or not np.isfinite(estimate.value):
            return "-"
        bounds = f" ({estimate.low:+.3f} to {estimate.high:+.3f})" if np.isfinite(estimate.low) else ""
        return f"{estimate.value:+.3f}{bounds}"

    return [
        {"forgotten": c.forgotten, "asked": c.asked, "forget": shown(c.forget), "retain": shown(c.retain)}
        | {"closed": shown(c.closed)}
        for c in cells
    ]
