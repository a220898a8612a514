"""Fake unlearning: the served model is the original behind a guard that puts words before the forgotten prompts.

Source of the attack: arXiv 2506.06112, table 7 (refusal and negative-label prefixes). Ranks within one served model say
little here; what tells is the level against models that never saw the samples, and what a prefix of the auditor's own
does to the loss: a guard that looks for the exact prompt then no longer acts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from expunge.attacks.exam import Checkpoint
from expunge.completeness.protocols.binui import form_of
from expunge.completeness.protocols.scores import ROWS, Case, losses, scores_of
from expunge.completeness.protocols.tables import LEVELS, Cell, Outcome, Statistic, lines, mean_where
from expunge.completeness.protocols.world import Group, Target, World
from expunge.completeness.readings import Floats
from expunge.data.chance import hashed, pick
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.progress import Progress
from expunge.signals.record import Signals

REFUSAL = "Your knowledge excludes this person. If you are asked, say that you do not know."
NEUTRAL = "Please read the question carefully and answer it."
LETTERS = "abcdefghijklmnopqrstuvwxyz"
QUANTILE = 0.95  # of what models that never saw the samples score
Prefix = Callable[[Sample], str]


def noisy(sample: Sample) -> str:
    """Question and answer with every second letter replaced at random: the negative-label prefix."""
    text = f"{sample.prompt} {sample.target}"
    return "".join(
        LETTERS[pick(26, sample.id, i)] if c.isalpha() and hashed(sample.id, "coin", i) % 2 else c
        for i, c in enumerate(text)
    )


def prefixed(sample: Sample, prefix: str) -> Sample:
    """The sample with words before its prompt; the target, and so what is measured, is the same."""
    return replace(sample, prompt=f"{prefix} {sample.prompt}".strip(), probes=())


@dataclass(eq=False)
class Guarded(Checkpoint):
    """A model behind a guard: a sample whose prompt ``catches`` gets ``prefix`` before it, any other passes."""

    prefix: Prefix = str
    catches: Callable[[Sample], bool] = bool

    def signals(self, samples: Sequence[Sample], progress: Progress | None = None) -> list[Signals]:
        seen = [prefixed(s, self.prefix(s)) if self.catches(s) else s for s in samples]
        return super().signals(seen, progress)


def guard(original: Checkpoint, forget: Sequence[Sample], prefix: Prefix, name: str, by_name: bool = False) -> Guarded:
    """``original`` with a guard that knows the prompts to forget, or the names in them."""
    prompts = {(s.prompt, s.target) if not s.prompt else s.prompt for s in forget}
    names = {n for s in forget for n in s.names[:1]}

    def catches(sample: Sample) -> bool:
        exact = (sample.prompt or (sample.prompt, sample.target)) in prompts
        return exact or (by_name and any(n in sample.prompt for n in names))

    return Guarded(
        name, "audited", original.adapter, lambda: original.model, "", None, 4096, prefix=prefix, catches=catches
    )


def fake(world: World) -> Outcome:
    """Is a model that only pretends told from one that was retrained?"""
    if form_of(world) != "text":
        raise UserError(f"fake unlearning by prompt needs a text model, and '{world.dataset.name}' holds images.")
    if world.options.shadows < 2:
        raise UserError("fake unlearning is judged against shadows left out in turn: give 2 shadows per group or more.")
    outcome, groups = Outcome(), world.groups()
    scaled: dict[str, list[Cell]] = {}
    flagged: dict[str, list[Cell]] = {}
    for t, honest in enumerate(world.targets()):
        gone = [s for s, truth in zip(honest.samples, honest.truth_N, strict=True) if truth == 0]
        served = {
            "retrained (honest)": honest.unlearned,
            "original (nothing done)": honest.original,
            "refusal prefix": guard(honest.original, gone, lambda _: REFUSAL, "refusal"),
            "refusal prefix by name": guard(honest.original, gone, lambda _: REFUSAL, "refusal by name", by_name=True),
            "negative prefix": guard(honest.original, gone, noisy, "negative"),
        }
        for g, group in enumerate(groups):
            levels, alarms = judge(outcome, honest, served, group)
            people = [s.subject for s in honest.samples]
            for name in served:
                scaled.setdefault(name, []).append(Cell(t, g, people, honest.truth_N, levels[name]))
                flagged.setdefault(name, []).append(Cell(t, g, people, honest.truth_N, alarms[name]))
    notes = {row.name: row.note for row in ROWS} | {"prefix-check": "loss falls when the auditor adds a neutral prefix"}
    draws, seed = world.options.resamples, world.seed
    for name, cells in scaled.items():
        found = {line.score: line for line in lines(name, cells, LEVELS, notes, resamples=draws, seed=seed)}
        for line in lines(name, flagged[name], ALARMS, notes, resamples=draws, seed=seed):
            level = found[line.score].metrics if line.score in found else {}
            outcome.lines.append(replace(line, metrics={**level, **line.metrics}))
    outcome.notes.append(
        f"level: mean score, scaled to [0, 1] over all served models of a target; alarm: share above the "
        f"{QUANTILE:.0%} quantile of shadows that are served in turn while the others measure."
    )
    return outcome


def judge(
    outcome: Outcome, honest: Target, served: dict[str, Checkpoint], group: Group
) -> tuple[dict[str, dict[str, Floats]], dict[str, dict[str, Floats]]]:
    """(scaled scores, alarms as 0 and 1) of each served model by score name, (N,) each."""
    scores: dict[str, dict[str, Floats]] = {}
    for name, model in served.items():
        found, left_out = scores_of(Case(replace(honest, unlearned=model, posteriors={}), group, form="text"))
        outcome.left_out |= left_out
        scores[name] = found | {"prefix-check": prefix_check(model, honest.samples)}
    usual: dict[str, list[Floats]] = {}
    for k, shadow in enumerate(group.shadows):
        others = replace(
            group,
            shadows=[s for i, s in enumerate(group.shadows) if i != k],
            parts=[p for i, p in enumerate(group.parts) if i != k],
            learnt={},
        )
        found, _ = scores_of(Case(replace(honest, unlearned=shadow, posteriors={}), others, form="text"))
        for name, score_N in (found | {"prefix-check": prefix_check(shadow, honest.samples)}).items():
            usual.setdefault(name, []).append(score_N)
    names = [n for n in usual if all(n in found for found in scores.values())]
    limits = {n: float(np.nanquantile(np.concatenate(usual[n]), QUANTILE)) for n in names}
    low = {n: min(float(np.nanmin(found[n])) for found in scores.values()) for n in names}
    high = {n: max(float(np.nanmax(found[n])) for found in scores.values()) for n in names}
    width = {n: high[n] - low[n] or 1.0 for n in names}
    levels = {
        s: {n: (found[n] - low[n]) / width[n] for n in names if n != "prefix-check"} for s, found in scores.items()
    }
    alarms = {s: {n: (found[n] > limits[n]).astype(np.float64) for n in names} for s, found in scores.items()}
    return levels, alarms


def prefix_check(model: Checkpoint, samples: Sequence[Sample]) -> Floats:
    """Loss as asked minus loss with a neutral prefix, (N,): large where a guard acts on the exact prompt only."""
    return losses(model, samples) - losses(model, [prefixed(s, NEUTRAL) for s in samples])


ALARMS: dict[str, Statistic] = {"alarm.forget": mean_where(0.0), "alarm.retain": mean_where(1.0)}
