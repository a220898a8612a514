"""L2 to L5: what measurements support, for any model. None of them bounds a privacy loss from above."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from scipy import stats as scipy_stats

from expunge.certify.audits import loss_from_rates, one_run_unlearning_loss
from expunge.certify.claims import Claim, Ruling, lacking, number
from expunge.certify.divergence import bounded_mean
from expunge.certify.equivalence import equivalence, runs_needed
from expunge.certify.gather import Interval, Score
from expunge.certify.refusals import Level, is_forget
from expunge.certify.sections import Arms, Change, Distance, Equivalence, Guesses, Trials, explains
from expunge.stats import clopper_pearson

HONEST = "results were logged honestly by whoever ran the measurement"
LIKE, LEFT, LESS = "like the reference", "more is left", "less than the reference"
POWERLESS = -1.0  # instead of a share, for an attack that finds no more in the original than in retrained models
REQUIRED = {"relearning": ("relearn",), "quantization": ("quantization",)}


@dataclass(frozen=True, kw_only=True)
class Equivalent(Claim):
    """L2: populations of runs differ by less than margins that were fixed beforehand, for every planned statistic."""

    level: ClassVar[Level] = "L2"
    title: ClassVar[str] = "equivalence"
    needs: ClassVar[tuple[str, ...]] = (
        "unlearned and retrained runs, 7 to 88 seeds per arm",
        "margins fixed before the first run, for statistics of what is forgotten and of what stays",
    )
    assumes: ClassVar[tuple[str, ...]] = (
        HONEST,
        "runs differ by their seed alone, and none was left out",
        "the statistics are about normal over runs",
        "the retrained models are what would have been trained without the data",
    )
    never: ClassVar[tuple[str, ...]] = (
        "anything about statistics that were not planned, or about one single run",
        "that a test which found no difference shows that there is none",
    )

    evidence: Equivalence | None = None

    def ruling(self) -> Ruling:
        e = self.evidence
        if e is None:
            return lacking("no runs over several seeds of unlearned and of retrained models were brought forward.")
        gaps = []
        if e.plan.fixed.timestamp() > e.started.timestamp():
            gaps.append("the margins were fixed after the runs began.")
        if set(e.arms) != set(e.plan.margins):
            gaps.append("the statistics that were measured are not those that were planned.")
        if not any(map(is_forget, e.arms)) or all(map(is_forget, e.arms)):
            gaps.append("the plan needs a statistic of what is forgotten and one of what stays.")
        rows: dict[str, dict[str, Any]] = {}
        verdicts = []
        for name, arms in sorted(e.arms.items()):
            margin = e.plan.margins.get(name)
            if margin is None:
                continue
            if (problem := _unusable(arms)) is not None:
                gaps.append(f"{name}: {problem}")
                continue
            found = equivalence(arms.unlearned, arms.retrained, margin, alpha=self.limits.alpha)
            rows[name] = {"margin": margin, "runs": list(found.runs), "p": found.p_value, **found.difference.record()}
            verdicts.append("same" if found.equivalent else "other" if found.different else "open")
            if verdicts[-1] == "other":
                gaps.insert(0, f"{name} differs by more than its margin of {margin:g}.")
            elif verdicts[-1] == "open":
                needed = _enough(arms, margin)
                gaps.append(f"{name} is not decided by {min(found.runs)} runs per arm: about {needed} are needed.")
        figures = {"statistics": rows}
        if "other" in verdicts:
            return Ruling("refuted", figures, tuple(gaps))
        return Ruling("unsupported" if gaps else "certified", figures, tuple(gaps))

    def sentence(self, ruling: Ruling) -> str:
        rows = ruling.figures["statistics"]
        listed = ", ".join(f"{name} (margin {row['margin']:g})" for name, row in rows.items())
        runs = min(min(row["runs"]) for row in rows.values())
        return (
            f"Over at least {runs} runs per arm, unlearned and retrained models differ by less than the margins fixed "
            f"beforehand in {listed}, at {1 - self.limits.alpha:.0%} confidence each."
        )


def _unusable(arms: Arms) -> str | None:
    for side in (arms.unlearned, arms.retrained):
        if len(side) < 2:
            return "an arm has fewer than two runs."
        if not all(map(math.isfinite, side)):
            return "a run has no number."
        if len(set(side)) == 1:
            return "all runs of an arm gave one number: they are copies of one run, or the statistic is blind."
    return None


def _enough(arms: Arms, margin: float) -> str:
    spread = math.sqrt((np.var(arms.unlearned, ddof=1) + np.var(arms.retrained, ddof=1)) / 2)
    return str(runs_needed(max(margin / spread, 0.05)))


@dataclass(frozen=True, kw_only=True)
class Close(Claim):
    """L3: mean divergence to the retrained model, at most what retrained models have between them and a little more."""

    level: ClassVar[Level] = "L3"
    title: ClassVar[str] = "divergence"
    needs: ClassVar[tuple[str, ...]] = (
        "a divergence in [0, 1] to a retrained model on the forget samples, by subject",
        "how far what stays has moved",
    )
    assumes: ClassVar[tuple[str, ...]] = (
        HONEST,
        "subjects are drawn independently from the population that is spoken of",
        "the retrained model is what would have been trained without the data",
    )
    never: ClassVar[tuple[str, ...]] = (
        "anything about prompts of another kind",
        "that a small change of the original shows forgetting: it shows only that what stays has hardly moved",
        "that the change of the weights is a small one, unless the second order explains the direct divergence",
    )

    distance: Distance | None = None
    change: Change | None = None

    def ruling(self) -> Ruling:
        d = self.distance
        if d is None:
            return lacking("no divergence to a retrained model was measured.")
        found = bounded_mean(d.subjects, level=1 - self.limits.alpha, definition=f"{d.name} betting/1")
        limit = self.limits.divergence_alone if d.floor is None else min(1.0, d.floor + self.limits.divergence)
        figures: dict[str, Any] = {"divergence": found.record(), "limit": limit, "between_retrained": d.floor}
        gaps: list[str] = []
        if self.change is not None:
            agrees = explains(self.change.quadratic, self.change.direct)
            figures["collateral"] = {**self.change.model_dump(mode="json"), "second_order_explains": agrees}
            gaps += self._collateral(self.change)
        if found.low > limit:
            return Ruling("refuted", figures, (f"the divergence is above the limit of {number(limit)}.", *gaps))
        if self.change is not None and self.change.direct > self.limits.change:
            return Ruling("refuted", figures, tuple(gaps))
        if found.high > limit:
            gaps.append(f"{found.n} subject(s) show no more than {number(found.high)}: the limit is {number(limit)}.")
        return Ruling("unsupported" if gaps else "certified", figures, tuple(gaps))

    def _collateral(self, change: Change) -> list[str]:
        if change.high > self.limits.change:
            return [
                f"what stays moved by up to {number(change.high)} nats per token: the limit is {self.limits.change:g}."
            ]
        return []

    def sentence(self, ruling: Ruling) -> str:
        d = ruling.figures["divergence"]
        between = ruling.figures["between_retrained"]
        beside = "" if between is None else f" (two retrained models: {number(between)})"
        moved = (
            "" if self.change is None else f"; what stays moved by at most {number(self.change.high)} nats per token"
        )
        return (
            f"With {1 - self.limits.alpha:.0%} confidence the mean {d['definition'].split()[0]} to the retrained model "
            f"is at most {number(d['high'])}{beside}, over {d['n']} subjects{moved}."
        )


@dataclass(frozen=True, kw_only=True)
class Audited(Claim):
    """L4: no membership attack that was run gains more than the limit, and no extraction found more."""

    level: ClassVar[Level] = "L4"
    title: ClassVar[str] = "audit"
    needs: ClassVar[tuple[str, ...]] = (
        "an audit with membership attacks, on samples that cannot be told apart without a model",
        "retrained references, or a limit on the advantage itself",
    )
    assumes: ClassVar[tuple[str, ...]] = (
        HONEST,
        "forget and holdout samples come from one population",
        "the attacks are those that are named; better ones may exist",
    )
    never: ClassVar[tuple[str, ...]] = (
        "an upper bound on the privacy loss: an audit bounds it from below only",
        "anything about attacks that were not run",
    )

    scores: tuple[Score, ...] = ()
    guesses: Guesses | None = None
    trials: Trials | None = None

    def ruling(self) -> Ruling:
        rows = [s for s in self.scores if s.axis in ("effectiveness", "privacy")]
        ranked = [s for s in rows if s.statistic == "auc" and math.isfinite(s.audited.value)]
        figures: dict[str, Any] = {"attacks": len(rows), "limit": self.limits.advantage, **self._losses()}
        if not ranked:
            return Ruling("unsupported", figures, ("no membership attack was run.",))
        against = all(math.isfinite(s.gap.value) for s in ranked)
        ends = {s.name: _advantage(s, against, len(ranked)) for s in ranked}
        worst = max(ends, key=lambda name: ends[name][1])
        figures |= {
            "membership_attacks": len(ranked),
            "compared_with": "retrained models" if against else "chance",
            "strongest": worst,
            "advantage_at_most": ends[worst][1],
            "n": max(s.audited.n for s in ranked),
        }
        shown = [s for s in rows if s.verdict in (LEFT, LESS)]
        beyond = [name for name, (low, _) in ends.items() if low > self.limits.advantage]
        if shown or beyond:
            names = sorted({s.name for s in shown} | set(beyond))
            why = f"{len(names)} score(s) tell the model from one that never saw the data, first {names[0]}."
            return Ruling("refuted", figures, (why,))
        gaps = []
        if ends[worst][1] > self.limits.advantage:
            gaps.append(f"{worst} may gain up to {number(ends[worst][1])}: too few samples for the limit.")
        if self.guesses is not None:
            right = clopper_pearson(self.guesses.right, self.guesses.guesses)
            figures["canary_guesses"] = right.record()
            if not self.guesses.coins:
                gaps.append("canaries were not put in by fair coins: their guesses show nothing.")
            elif right.low > 0.5 + self.limits.advantage / 2:
                return Ruling("refuted", figures, ("guesses about deleted canaries are better than chance.",))
        return Ruling("unsupported" if gaps else "certified", figures, tuple(gaps))

    def _losses(self) -> dict[str, float]:
        """Lower bounds with their ceilings, without which a small bound misleads. Nats."""
        found: dict[str, float] = {}
        if self.guesses is not None and self.guesses.coins:
            g = self.guesses
            one = one_run_unlearning_loss(g.canaries, g.guesses, g.right, delta=g.delta)
            found |= {"canary_loss_at_least": one.low, "canary_loss_ceiling": one.ceiling}
        if self.trials is not None:
            t = self.trials
            counts = (t.true_positives, t.positives, t.false_positives, t.negatives)
            many = loss_from_rates(*counts, delta=t.delta, thresholds=t.thresholds)
            found |= {"loss_at_least": many.low, "loss_ceiling": many.ceiling}
        return found

    def sentence(self, ruling: Ruling) -> str:
        f = ruling.figures
        over = "over retrained models" if f["compared_with"] == "retrained models" else "over chance"
        text = (
            f"With {1 - self.limits.alpha:.0%} confidence none of the {f['membership_attacks']} membership attacks "
            f"that were run gains more than {number(f['advantage_at_most'])} in AUC {over}, the strongest being "
            f"{f['strongest']}"
        )
        for kind, key in (("canaries", "canary_loss"), ("runs", "loss")):
            if f"{key}_at_least" in f:
                text += (
                    f"; {kind} show a privacy loss of at least {f[f'{key}_at_least']:.2f} nats, where this audit could "
                    f"have shown at most {f[f'{key}_ceiling']:.2f}"
                )
        return f"{text}."


def _advantage(score: Score, against: bool, tests: int) -> tuple[float, float]:
    """Ends of |gain in AUC| with all ``tests`` intervals widened by Bonferroni; (0, 1) without an interval."""
    given = score.gap if against else score.audited
    centre = 0.0 if against else 0.5
    low, high = _widened(given, tests, bounded=not against)
    if not (math.isfinite(low) and math.isfinite(high)):
        return 0.0, 1.0
    ends = sorted((abs(low - centre), abs(high - centre)))
    inside = low <= centre <= high
    scale = 1.0 if against else 2.0  # AUC runs from 1/2 to 1
    return (0.0 if inside else scale * ends[0]), min(1.0, scale * ends[1])


def _widened(given: Interval, tests: int, *, bounded: bool) -> tuple[float, float]:
    """A 95 % interval at 1 − .05/tests: on the logit scale for an AUC, exactly for one of 0 or 1 (Clopper-Pearson)."""
    if tests <= 1:
        return given.low, given.high
    each = 0.025 / tests
    if bounded and given.value in (0.0, 1.0):  # the open end is .025^(1/pairs) from the closed one
        power = math.log(each) / math.log(0.025)
        return (given.low**power, 1.0) if given.value else (0.0, 1 - (1 - given.high) ** power)
    factor = float(scipy_stats.norm.ppf(1 - each) / scipy_stats.norm.ppf(0.975))
    if not bounded or not 0 < given.low <= given.high < 1:
        return given.value - factor * (given.value - given.low), given.value + factor * (given.high - given.value)
    middle, low, high = (math.log(x / (1 - x)) for x in (given.value, given.low, given.high))
    ends = (middle - factor * (middle - low), middle + factor * (high - middle))
    return 1 / (1 + math.exp(-ends[0])), 1 / (1 + math.exp(-ends[1]))


@dataclass(frozen=True, kw_only=True)
class Robust(Claim):
    """L5: a table of attempts to bring it back, each against retrained models."""

    level: ClassVar[Level] = "L5"
    title: ClassVar[str] = "robustness"
    needs: ClassVar[tuple[str, ...]] = (
        "retrained references and the original, under the same attacks",
        "at least relearning and quantization attacks",
    )
    assumes: ClassVar[tuple[str, ...]] = (
        HONEST,
        "whoever attacks has no more data, steps or prompts than these attacks had",
    )
    never: ClassVar[tuple[str, ...]] = ("a guarantee: it is a table of what was tried",)

    scores: tuple[Score, ...] = ()

    def ruling(self) -> Ruling:
        rows = [s for s in self.scores if s.axis == "robustness"]
        if not rows:
            return lacking("nobody tried to bring it back.")
        ends = {s.name: _came_back(s) for s in rows}
        table = [
            {
                "score": s.name,
                "value": s.audited.value,
                "gap": s.gap.value,
                "gap_high": s.gap.high,
                "came_back_at_most": ends[s.name],
                "verdict": s.verdict,
            }
            for s in rows
        ]
        figures = {"table": table, "attempts": len(table), "limit": self.limits.came_back}
        back = [s.name for s in rows if s.verdict == LEFT]
        if back:
            return Ruling(
                "refuted",
                figures,
                (f"{len(back)} attempt(s) bring more back than from retrained models, first {back[0]}.",),
            )
        gaps = [
            f"no {kind} attack was run that finds the data in the original."
            for kind, starts in REQUIRED.items()
            if not any(s.attack.startswith(starts) and ends[s.name] != POWERLESS for s in rows)
        ]
        if any(s.verdict not in (LIKE, LESS) for s in rows):
            gaps.append("some attempts were not compared with retrained models.")
        if None in ends.values():
            gaps.append("some attempts have no interval, or were not made on the original too: nothing bounds them.")
        worst = max(ends, key=lambda name: ends[name] or 0.0)
        if (most := max(0.0, ends[worst] or 0.0)) > self.limits.came_back:
            gaps.append(
                f"under {worst} up to {number(most)} of what was removed may have come back, and the limit is "
                f"{self.limits.came_back:g}: too few samples or references."
            )
        figures["came_back_at_most"] = most
        return Ruling("unsupported" if gaps else "certified", figures, tuple(gaps))

    def sentence(self, ruling: Ruling) -> str:
        return (
            f"Under the {ruling.figures['attempts']} attempts of the table, relearning and quantization among them, no "
            "more was seen to come back than from models retrained without the data, with 95 % confidence each at most "
            f"{number(ruling.figures['came_back_at_most'])} of the way to the original; other attempts may do better."
        )


def _came_back(score: Score) -> float | None:
    """Upper end of the gap to the references, as a share of the original's gap; None where something is lacking."""
    theirs = [r.value for r in score.references if math.isfinite(r.value)]
    if not theirs or score.original is None or not math.isfinite(score.gap.high):
        return None
    way = score.original.value - sum(theirs) / len(theirs)
    return max(0.0, score.gap.high) / way if way > 0 else POWERLESS
