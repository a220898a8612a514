"""ScoreUI: how much of a sample is left when the truth is between never seen and trained on?

Two truths. *Trajectory*: a model that never saw the private samples is trained on them, and after b of B equal steps
its truth is b / B (arXiv 2506.06112). *Interpolation*: the weights start + a (end - start) on the same path have truth
a. Unlike the published protocol, the starting model is none of the measuring shadows, and b = 0 never saw a sample.
"""

from __future__ import annotations

import numpy as np

from expunge.attacks.exam import Checkpoint
from expunge.completeness.protocols.binui import form_of
from expunge.completeness.protocols.scores import ROWS, Case, scores_of
from expunge.completeness.protocols.store import between, start_at
from expunge.completeness.protocols.tables import GRADED, Cell, Line, Outcome, lines
from expunge.completeness.protocols.world import Group, Halves, Target, World

DRAWS = 60  # bootstrap draws at most: a cell has all steps of all samples, and ranking them is slow


def scoreui(world: World) -> Outcome:
    """Does a score rise with what is left? Rank correlation and squared error against both truths."""
    outcome, options = Outcome(), world.options
    groups, halves = world.groups(), world.halves()
    cells: dict[str, list[Cell]] = {"trajectory": [], "interpolation": []}
    last = options.groups * options.shadows  # after the last one that measures
    starts = [world.shadow(last + number) for number in range(options.targets)]
    originals = [world.train(world.private, f"original {number}") for number in range(options.targets)]
    for number, (start, original) in enumerate(zip(starts, originals, strict=True)):
        seed = world.seed_of("trajectory", number)
        path = world.store.trajectory(start_at(start), world.private, seed, f"trajectory {number}", options.points)
        at = np.linspace(0, 1, options.points + 1)
        served = {
            # The published anchor is another model; on the interpolated path its own end is the original.
            "trajectory": [_target(world, m, original, a) for m, a in zip(path, at, strict=True)],
            "interpolation": [_target(world, between(path[0], path[-1], a), path[-1], a) for a in at],
        }
        for truth, targets in served.items():
            for g, group in enumerate(groups):
                cells[truth].append(_cell(outcome, world, number, g, targets, group, halves))
        world.progress.say(f"trajectory {number}: {len(at)} steps under {len(groups)} groups")
    notes = {row.name: row.note for row in ROWS}
    tables = [
        lines(
            "both", found, GRADED, notes, resamples=min(DRAWS, options.resamples), seed=world.seed, suffix=f".{truth}"
        )
        for truth, found in cells.items()
    ]
    second = {line.score: line for line in tables[1]}
    outcome.lines = [
        Line("ScoreUI", line.score, {**line.metrics, **second[line.score].metrics}, line.note)
        for line in tables[0]
        if line.score in second
    ]
    outcome.facts["mean score by step"] = {truth: _curves(found, options.points) for truth, found in cells.items()}
    return outcome


def _target(world: World, served: Checkpoint, original: Checkpoint, left: float) -> Target:
    samples = world.private
    return Target(f"{left:.2f}", served, original, samples, np.full(len(samples), left))


def _cell(
    outcome: Outcome,
    world: World,
    number: int,
    g: int,
    targets: list[Target],
    group: Group,
    halves: Halves | None,
) -> Cell:
    found = []
    for target in targets:
        scores, left_out = scores_of(Case(target, group, halves, form_of(world)))
        outcome.left_out |= left_out
        found.append(scores)
    names = [name for name in found[0] if all(name in scores for scores in found)]
    joined = {name: np.concatenate([scores[name] for scores in found]) for name in names}
    truth_N = np.concatenate([target.truth_N for target in targets])
    return Cell(number, g, [s.subject for target in targets for s in target.samples], truth_N, joined)


def _curves(cells: list[Cell], points: int) -> dict[str, list[float]]:
    """Mean over cells and samples of each score at each step, as it is."""
    return {
        name: np.nanmean([cell.scores[name].reshape(points + 1, -1) for cell in cells], axis=(0, 2)).tolist()
        for name in cells[0].scores
        if all(name in cell.scores for cell in cells)
    }
