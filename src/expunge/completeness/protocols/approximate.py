"""Approximate methods: what each leaves of the forgotten samples, and of the retained ones, by every bounded score.

Source: IAM, arXiv 2506.06112, table 8 (mean membership of retained and forgotten samples per method). The exact retrain
and the original are served beside the methods: a method whose forgotten samples score above the retrain's has
under-unlearned, one whose retained samples score below has destroyed more than it was asked to.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from torch import nn

from expunge.attacks.exam import Checkpoint
from expunge.completeness.protocols.binui import form_of
from expunge.completeness.protocols.scores import ROWS, Case, scores_of
from expunge.completeness.protocols.tables import BINARY, LEVELS, Cell, Outcome, lines
from expunge.completeness.protocols.world import Target, World
from expunge.completeness.readings import Floats
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import Context, Method, get_method

# Scores from 0 to 1, so that levels compare between models.
BOUNDED = ("IAM-On", "IAM-Off", "Expunge-completeness", "RMIA-Off", "prob")
SHOWN = {"auc": BINARY["auc"], **LEVELS}
RETRAINED, ORIGINAL = "retrained (exact)", "original (nothing done)"


def approximate(world: World) -> Outcome:
    """What do approximate methods leave? Mean score of forgotten and retained samples, beside an exact retrain."""
    outcome, targets, groups = Outcome(), world.targets(), world.groups()
    rows = [row for row in ROWS if row.name in BOUNDED]
    methods = [_method(world, name) for name in world.options.methods.split(",")]
    cells: dict[str, list[Cell]] = {row.name: [] for row in rows}
    for t, target in enumerate(targets):
        served = {RETRAINED: target.unlearned, ORIGINAL: target.original}
        for method in methods:
            world.progress.say(f"{target.name}: {method.name}")
            served[method.name] = unlearned(world, target, method)
        people = [s.subject for s in target.samples]
        for g, group in enumerate(groups):
            found: dict[str, dict[str, Floats]] = {row.name: {} for row in rows}
            for name, model in served.items():
                case = Case(replace(target, unlearned=model, posteriors={}), group, form=form_of(world))
                scores, left_out = scores_of(case, rows)
                outcome.left_out |= left_out
                for score, values_N in scores.items():
                    found[score][name] = values_N
            for score, by_name in found.items():
                if by_name:
                    cells[score].append(Cell(t, g, people, target.truth_N, by_name))
    notes = {method.name: method.paper for method in methods}
    for score, own in cells.items():
        if own:
            draws, seed = world.options.resamples, world.seed
            outcome.lines += lines(score, own, SHOWN, notes, resamples=draws, seed=seed)
    outcome.notes.append(
        "level.forget and level.retain: mean score of the samples to forget and of the others. Methods have the "
        "options that `expunge show NAME` prints."
    )
    return outcome


def _method(world: World, name: str) -> Method:
    method = get_method(name.strip())
    method.check_modality(world.dataset.modality)
    lacking = method.needs & {"base", "llm"}
    if lacking:
        raise UserError(
            f"method '{method.name}' needs {' and '.join(sorted(lacking))}, which no protocol has: leave it out."
        )
    return method


def unlearned(world: World, target: Target, method: Method) -> Checkpoint:
    """The target's original after ``method`` with its own options; kept in the store like every other model."""
    gone, kept = (_where(target, truth) for truth in (0.0, 1.0))
    options = method.options()
    seed = world.seed_of("unlearned", method.name, target.name)
    content = [method.name, asdict(options), target.original.digest, [s.digest() for s in gone], seed]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]

    def make() -> nn.Module:
        context = Context(
            model=copy.deepcopy(target.original.model),
            adapter=target.original.adapter,
            forget=gone,
            retain=kept,
            unseen=world.cut[0],  # what shadows learn is never measured
            seed=seed,
            progress=world.progress,
        )
        return method(context, options).model.eval()

    return world.store.kept(key, target.original.adapter, f"{method.name} of {target.name}", make)


def _where(target: Target, truth: float) -> Sequence[Sample]:
    return [s for s, own in zip(target.samples, target.truth_N, strict=True) if own == truth]
