"""BinUI and what varies it: an exactly retrained model is served, and each sample is forgotten or still trained on.

Source of the protocols: IAM, arXiv 2506.06112, sections on binary inference, shifted shadows, incremental training,
architectures, number of shadows and scoring functions. Here targets, groups and subjects all enter the intervals.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.completeness.protocols.scores import ROWS, SCORING_ROWS, Case, Row, losses, scores_of
from expunge.completeness.protocols.store import start_at
from expunge.completeness.protocols.tables import BINARY, Cell, Outcome, lines, margins
from expunge.completeness.protocols.world import ARCHS, Group, Halves, Target, World
from expunge.completeness.readings import Form
from expunge.data.chance import shuffled
from expunge.data.pictures import read_picture
from expunge.data.samples import Sample, subjects
from expunge.errors import UserError

SHORT = (
    "Expunge",
    "IAM-On",
    "IAM-Off",
    "IAM-frozen",
    "LiRA-On-single",
    "LiRA-Off",
    "RMIA-On-single",
    "RMIA-Off",
    "EMIA-R",
    "loss",
    "loss-difference",
    "gap-ratio",
)

# What the published table orders: with and without the original, each with the same shadows and nothing else.
MARGINS = (
    ("IAM-On", "LiRA-On-single"),
    ("IAM-On", "RMIA-On-single"),
    ("IAM-Off", "LiRA-Off"),
    ("IAM-Off", "RMIA-Off"),
    ("Expunge", "IAM-On"),
)


def form_of(world: World) -> Form:
    return "text" if world.dataset.modality == "text" else "classifier"


def measure(
    outcome: Outcome,
    world: World,
    setting: str,
    targets: Sequence[Target],
    groups: Sequence[Group],
    *,
    halves: Halves | None = None,
    rows: Sequence[Row] = ROWS,
    unit: str = "token",
) -> None:
    """Every score of every target under every group, into the outcome's lines."""
    cells = []
    for t, target in enumerate(targets):
        for g, group in enumerate(groups):
            scores, left_out = scores_of(Case(target, group, halves, form_of(world), unit), rows)
            outcome.left_out |= left_out
            cells.append(Cell(t, g, [s.subject for s in target.samples], target.truth_N, scores))
    notes = {row.name: row.note for row in rows}
    world.progress.say(f"{setting}: {len(cells)} cells of {len(cells[0].truth_N)} samples")
    draws, seed = world.options.resamples, world.seed
    outcome.lines += lines(setting, cells, BINARY, notes, resamples=draws, seed=seed)
    found = margins(cells, MARGINS, "auc", BINARY["auc"], resamples=draws, seed=seed)
    for (one, other), estimate in found.items():
        interval = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        outcome.facts[f"{setting}: AUC of {one} less that of {other}"] = interval


def short(rows: Sequence[Row] = ROWS) -> list[Row]:
    return [row for row in rows if row.name in SHORT]


def describe(outcome: Outcome, world: World, targets: Sequence[Target]) -> None:
    """What the targets are like: how much an original knows that a retrained model does not."""
    for target in targets:
        gone = [s for s, truth in zip(target.samples, target.truth_N, strict=True) if truth == 0]
        models = {"original": target.original, "retrained": target.unlearned}
        means = {name: float(losses(model, gone).mean()) for name, model in models.items()}
        outcome.facts[f"{target.name}: mean loss on its {len(gone)} forgotten samples"] = means


# -- the protocols -------------------------------------------------------------------------------------------------


def binui(world: World) -> Outcome:
    """Which samples did an exactly retrained model forget? Every score against the truth."""
    outcome, targets, groups = Outcome(), world.targets(), world.groups()
    measure(outcome, world, "retrained", targets, groups, halves=world.halves())
    describe(outcome, world, targets)
    for target in targets:
        answers = [Case(target, group, form=form_of(world)).answer for group in groups]
        gone = target.truth_N == 0
        rates = {
            "forgotten": _share([a.called()[gone] for a in answers]),
            "retained": _share([a.called()[~gone] for a in answers]),
            "forgotten, auditable or not": _share([a.p_under_N[gone] <= a.level for a in answers]),
            "auditable": _share([a.auditable_N[gone] for a in answers]),
        }
        outcome.facts[f"{target.name}: share of its auditable samples with p <= 0.05"] = rates
    return outcome


def _share(flags: Sequence[NDArray[Any]]) -> float:
    """Mean over everything that is there; nan where nothing is."""
    values = np.concatenate(flags).astype(np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else float("nan")


def scoring_functions(world: World) -> Outcome:
    """BinUI with other distributions on IAM's line, all signals on one scale."""
    outcome = Outcome()
    measure(outcome, world, "retrained", world.targets(), world.groups(), rows=SCORING_ROWS)
    return outcome


def number_of_shadows(world: World) -> Outcome:
    """BinUI with 1, 2, 4, ... shadows per group, as many groups as the same models give."""
    outcome, targets = Outcome(), world.targets()
    total = world.options.groups * world.options.shadows
    count = 1
    while count <= total:
        groups = [world.group(g, count) for g in range(total // count)]
        measure(outcome, world, f"K={count}", targets, groups, rows=short())
        count *= 2
    outcome.notes.append(f"The same {total} shadows throughout: a larger K leaves fewer groups for the interval.")
    return outcome


def shifted_shadows(world: World) -> Outcome:
    """BinUI with shadows and population of another distribution, beside shadows of the same one."""
    outcome, targets = Outcome(), world.targets()
    whole, population = ([shifted(s) for s in part] for part in world.cut)
    same, moved = world.groups(), world.groups(whole=whole, population=population, label=" shifted")
    measure(outcome, world, "same distribution", targets, same)
    measure(outcome, world, "shifted shadows", targets, moved)
    outcome.notes.append(SHIFT[form_of(world)])
    return outcome


def incremental(world: World) -> Outcome:
    """A trained model learns more samples of another distribution; some of those are forgotten by learning again."""
    outcome, targets = Outcome(), []
    for number in range(world.options.targets):
        gone = world.forget_set(number)
        late = _late(world, number, gone)
        first = [s for s in world.private if s.id not in late]
        later = [shifted(s) for s in world.private if s.id in late]
        kept = [s for s in later if s.id not in gone]
        begun = world.train(first, f"incremental {number}")
        seeds = [world.seed_of("continued", name, number) for name in ("original", "retrained")]
        pair = [
            world.store.model(start_at(begun), samples, seed, f"continued {number}")
            for samples, seed in zip((later, kept), seeds, strict=True)
        ]
        truth_N = np.array([0.0 if s.id in gone else 1.0 for s in later])
        targets.append(Target(f"target {number}", pair[1], pair[0], later, truth_N))
    measure(outcome, world, "incremental", targets, world.groups())
    outcome.notes.append(f"The later samples are measured. {SHIFT[form_of(world)]}")
    describe(outcome, world, targets)
    return outcome


def _late(world: World, number: int, gone: set[str]) -> set[str]:
    """The samples that come later: those to forget, and as many subjects again of the others, at least half of all."""
    order = [s.subject for s in world.private if s.id in gone]
    others = shuffled([s for s in subjects(world.private) if s not in set(order)], "late", world.seed, number)
    wanted = set(order) | set(others[: max(len(set(order)), len(subjects(world.private)) // 4)])
    return {s.id for s in world.private if s.subject in wanted}


def architectures(world: World) -> Outcome:
    """BinUI with every pair of target and shadow architecture."""
    if getattr(world.start, "model", None) is not None:
        raise UserError("architectures are compared between small models made anew: leave --model out.")
    outcome = Outcome()
    text = form_of(world) == "text"
    archs = ("tiny", "tiny-test") if text else ARCHS
    unit = "byte" if text else "token"  # each size has a tokenizer of its own
    targets = {arch: world.targets(arch) for arch in archs}
    shadows = {arch: world.groups(arch=arch, label=f" {arch}") for arch in archs}
    for shadow, target in itertools.product(archs, archs):
        setting = f"{target} target, {shadow} shadows"
        measure(outcome, world, setting, targets[target], shadows[shadow], rows=short(), unit=unit)
    return outcome


# -- another distribution ------------------------------------------------------------------------------------------

SHIFT: dict[Form, str] = {
    "classifier": "Shifted images are transposed (features reversed), and their contrast is halved.",
    "text": "Shifted texts ask in other words and answer in other words, where the dataset has such probes.",
}


def shifted(sample: Sample) -> Sample:
    """The sample in another distribution: an image transposed (features reversed) with half the contrast, or question
    and answer reworded.
    """
    if sample.image is not None:
        given = sample.image
        array = given if isinstance(given, np.ndarray) else read_picture(given, f"'{given}'")
        # Features are one row of pixels, and a model for them takes no other shape.
        turned = (array[:, ::-1] if len(array) == 1 else np.swapaxes(array, 0, 1)).astype(np.float64)
        return replace(sample, image=np.ascontiguousarray(np.round(turned / 2 + 64).astype(np.uint8)))
    asked, answered = sample.probes_of("paraphrase"), sample.probes_of("restated")
    if not asked and not answered:
        raise UserError(
            f"sample '{sample.id}' has no probe in other words to make shifted texts of: use people or tofu."
        )
    prompt = asked[0].prompt if asked else sample.prompt
    return replace(sample, prompt=prompt, target=answered[0].target if answered else sample.target)


Protocol = Callable[[World], Outcome]
