"""Claims: one frozen class per level, each with what it assumes, what it needs, a checker and the one sentence.

A claim holds the evidence that is necessary and sufficient to judge it, and judges itself: ``ruling`` recomputes
every number from that evidence, never from a verdict somebody wrote down. The strengths, strongest first:

======  ==============  =======================================================================================
level   name            statement
======  ==============  =======================================================================================
L0      exact           what is released is byte for byte what would have been built without the records
L1      (ε, δ)          it is (ε, δ)-indistinguishable from the same procedure run without them
L2      equivalence     populations of unlearned and of retrained runs differ by less than a margin fixed before
L3      divergence      mean divergence to the retrained model is at most u, with 95 % confidence
L4      audit           the named attacks gain at most a, with 95 % confidence
L5      robustness      under the named attempts to bring it back, no more came back than from retrained models
======  ==============  =======================================================================================

ε is never written for L2 to L5 (:meth:`Claim.record` makes sure): no audit bounds it from above. Classes and fields
never change their meaning; a new meaning is a new class.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from expunge.certify.refusals import FORMAL, Level, Refusal, Verdict
from expunge.errors import UserError
from expunge.files import plain

EPSILON = re.compile(r"ε|\bepsilon\b|\beps\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What still counts as small, fixed in the code and written into every claim that uses it."""

    advantage: float = 0.1  # of an attack's AUC over the retrained models', or over 1/2 without any
    divergence: float = 0.05  # mean total variation above what two retrained models have between them
    divergence_alone: float = 0.1  # the same where nobody measured that floor
    change: float = 0.05  # nats per token by which what stays may move
    came_back: float = 0.25  # of the way from retrained models to the original, when both are attacked alike
    logit_noise: float = 0.3  # standard deviation; beyond it the zone loses more than 0.1 % of its probabilities
    largest_epsilon: float = 10.0  # (ε, δ) beyond this promise nothing
    alpha: float = 0.05


LIMITS = Limits()


@dataclass(frozen=True)
class Ruling:
    """What a claim's own evidence gives: a verdict, the figures behind it, and why, in sentences."""

    verdict: Verdict
    figures: Mapping[str, Any] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


def lacking(*sentences: str) -> Ruling:
    return Ruling("unsupported", reasons=sentences)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What all claims on one model share.

    ``refusals`` can only lower a verdict. ``formal``: whether L0 and L1 are open at all, which they are not for a model
    that was edited, or of which nobody knows how it came about.
    """

    refusals: tuple[Refusal, ...] = ()
    formal: bool = True
    limits: Limits = LIMITS


@dataclass(frozen=True, kw_only=True)
class Claim(ABC):
    """One level's claim on a case, with the evidence for it in the fields of its class."""

    level: ClassVar[Level]
    title: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    assumes: ClassVar[tuple[str, ...]]
    never: ClassVar[tuple[str, ...]]  # what the claim must not be read as

    case: Case = Case()

    @property
    def limits(self) -> Limits:
        return self.case.limits

    @abstractmethod
    def ruling(self) -> Ruling:
        """The verdict on this evidence alone."""

    @abstractmethod
    def sentence(self, ruling: Ruling) -> str:
        """The one sentence that may be said when the verdict is "certified"."""

    def judged(self) -> Ruling:
        """The verdict with the refusals: the weakest of all, and every reason."""
        own = self.ruling()
        touching = [r for r in self.case.refusals if self.level in r.levels]
        weights = {r.weight for r in touching}
        verdict = own.verdict
        if "refuted" in weights:
            verdict = "refuted"
        elif "unsupported" in weights and verdict == "certified":
            verdict = "unsupported"
        if self.level in FORMAL and not self.case.formal:
            verdict = "unsupported"  # there is nothing here that could be refuted
        reasons = (*(r.sentence for r in touching), *own.reasons)
        return Ruling(verdict, own.figures, tuple(dict.fromkeys(reasons)))

    def said(self) -> str:
        """The sentence of the claim, or of its refusal."""
        found = self.judged()
        if found.verdict == "certified":
            return self.sentence(found)
        opening = "No claim" if found.verdict == "unsupported" else "Refuted"
        why = found.reasons[0] if found.reasons else f"needs {'; '.join(self.needs)}."
        return f"{opening} at {self.level} ({self.title}): {why}"

    def record(self) -> dict[str, Any]:
        """The claim as JSON: level, claim, verdict, assumptions, evidence, not_claimed.

        Raises:
            UserError: a name in the evidence of L2 to L5 speaks of ε, which none of them may.
        """
        found = self.judged()
        flags = [r.sentence for r in self.case.refusals if self.level in r.levels and r.weight == "flagged"]
        content = {
            "level": self.level,
            "claim": self.said(),
            "verdict": found.verdict,
            "assumptions": list(self.assumes) if found.verdict == "certified" else [],
            "evidence": plain({**found.figures, "reasons": list(found.reasons)}),
            "not_claimed": [*self.never, *flags],
        }
        if self.level not in FORMAL and _speaks_of_epsilon(content):
            raise UserError(
                f"a name in the evidence of {self.level} speaks of epsilon: rename that score or statistic."
            )
        return content


def _speaks_of_epsilon(value: Any) -> bool:
    if isinstance(value, str):
        return EPSILON.search(value.replace("_", " ")) is not None
    if isinstance(value, Mapping):
        return any(_speaks_of_epsilon(k) or _speaks_of_epsilon(v) for k, v in value.items())
    return isinstance(value, list) and any(map(_speaks_of_epsilon, value))


def number(value: float, digits: int = 3) -> str:
    """For a sentence: rounded up in size, so that no bound is said smaller than it is."""
    if not math.isfinite(value):
        return "an unknown amount"
    if value == 0:
        return "0"
    step = 10.0 ** (math.floor(math.log10(abs(value))) - digits + 1)
    return f"{math.copysign(math.ceil(abs(value) / step - 1e-9) * step, value):.{digits}g}"
