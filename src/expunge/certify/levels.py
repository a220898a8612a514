"""From evidence to claims: one of each level, strongest first, each certified, refuted or unsupported."""

from __future__ import annotations

from collections.abc import Sequence

from expunge.certify.claims import LIMITS, Case, Claim, Limits
from expunge.certify.formal import Exact, Indistinguishable
from expunge.certify.gather import Evidence
from expunge.certify.measured import Audited, Close, Equivalent, Robust
from expunge.certify.refusals import LEVELS, NOISY, Level, find
from expunge.errors import unknown

__all__ = ["CLAIMS", "Evidence", "Limits", "assess", "get_claim", "strongest"]

OPEN = ("zone", "retrain", *NOISY)  # kinds of model that L0 and L1 are open to

CLAIMS: dict[Level, type[Claim]] = {c.level: c for c in (Exact, Indistinguishable, Equivalent, Close, Audited, Robust)}


def assess(evidence: Evidence, limits: Limits = LIMITS) -> list[Claim]:
    """The six claims L0 to L5 on this evidence; ``claim.record()`` is the JSON that a statement carries."""
    s = evidence.sections
    removal = None if evidence.kind in NOISY else s.removal  # bytes with noise are nobody else's
    case = Case(refusals=find(evidence), formal=evidence.kind in OPEN, limits=limits)
    return [
        Exact(case=case, removal=removal, provenance=s.provenance, duplicates=s.duplicates),
        Indistinguishable(
            case=case,
            residual=s.residual,
            reset=s.reset,
            private_training=s.private_training,
            removal=removal,
            provenance=s.provenance,
            duplicates=s.duplicates,
            guesses=s.guesses,
        ),
        Equivalent(case=case, evidence=s.equivalence),
        Close(case=case, distance=s.distance, change=s.change),
        Audited(case=case, scores=evidence.scores, guesses=s.guesses, trials=s.trials),
        Robust(case=case, scores=evidence.scores),
    ]


def strongest(claims: Sequence[Claim]) -> Claim | None:
    """The first certified claim in the order of the levels; None when there is none, or when any claim is refuted."""
    judged = [(claim, claim.judged().verdict) for claim in claims]
    if any(verdict == "refuted" for _, verdict in judged):
        return None
    return next((claim for claim, verdict in judged if verdict == "certified"), None)


def get_claim(level: str) -> type[Claim]:
    """The class of a level.

    Raises:
        UserError: an unknown level, which is never guessed.
    """
    found = next((claim for known, claim in CLAIMS.items() if known == level), None)
    if found is None:
        raise unknown("level", level, LEVELS)
    return found
