"""Verdicts that are calibrated: is this sample's reading one that a model which never saw it would give?

Every shadow is left out once and judged by the others, as the unlearned model is judged by all of them. What the
shadows score in this way is the null distribution, so the p-values are conformal (Vovk et al. 2005): for a model that
is exchangeable with the shadows, a share of at most ``level`` of the samples has p <= ``level``. Auditable samples have
a large gap between the original and the shadows' mean, so they are the ones for which that mean came out low, and a
never-seen model seems to remember them. Each sample is therefore compared only with left-out readings whose own gap,
against the other shadows, is on its side of the same threshold (Mondrian conformal, Vovk et al. 2005). Verdicts control
the false discovery rate over the auditable samples (Benjamini and Hochberg 1995; for conformal p-values Bates et al.
2023).

Shape suffixes: N samples, K shadow models, M holdout samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from expunge.completeness.readings import Floats, Readings
from expunge.errors import UserError
from expunge.stats import discoveries

Verdict = Literal["under-unlearned", "adequate", "over-unlearned", "not-auditable"]
VERDICTS: tuple[Verdict, ...] = ("under-unlearned", "adequate", "over-unlearned", "not-auditable")
PRIOR_SHADOWS = 4.0  # weight of the variance of all samples beside a sample's own, in shadows
ANCHOR_SHARE = 0.2  # of the never-seen reading in the anchor of the score; see docs/completeness.md
LOSS_FLOOR = 0.002  # nats: differences between losses far below it count for little
PROB_FLOOR = 1e-6  # a probability of exactly 0 or 1 has no logit


@dataclass(frozen=True, eq=False)
class Completeness:
    """One answer per sample, in the order of the readings.

    ``score_N``: evidence that the sample is still a member, for ranking; higher is more. ``position_N``: 0 reads like
    the shadows' mean, 1 like the original; nan without an original or anchor gap. ``completeness_N``: 1 - position,
    shrunk where the gap is small against the shadows' spread, within [0, 1]. ``p_under_N``, ``p_over_N``: share of
    never-seen readings that look at least as remembered, or at least as forgotten; nan without a calibration.
    ``auditable_N``: the original itself would be told from a model that never saw the sample, at ``level``.
    """

    ids: Sequence[str]
    score_N: Floats
    position_N: Floats
    completeness_N: Floats
    p_under_N: Floats
    p_over_N: Floats
    auditable_N: NDArray[np.bool_]
    verdict_N: Sequence[Verdict]
    shadows: int
    level: float
    fdr: float
    calibration: Literal["shadows", "shadows and holdout", "holdout", "none"]
    smallest_p: float  # the least that a p-value can be with this calibration
    notes: Sequence[str] = field(default_factory=tuple)

    def counts(self) -> dict[Verdict, int]:
        return {name: sum(v == name for v in self.verdict_N) for name in VERDICTS}

    def called(self) -> Floats:
        """(N,) 1 where p_under <= level before correction, nan where not auditable: ``level`` is the rate by chance."""
        low_N = (self.p_under_N <= self.level).astype(np.float64)
        return np.where(self.auditable_N, low_N, np.nan)


def calibrate(
    readings: Readings, *, level: float = 0.05, fdr: float = 0.05, holdout: Readings | None = None
) -> Completeness:
    """Verdict for each sample.

    Args:
        readings: the samples that were to be forgotten.
        level: of the test that decides what is auditable, and of :meth:`Completeness.called`.
        fdr: expected share of wrong calls among those called under-unlearned (and, apart, over-unlearned).
        holdout: readings of samples that no model was trained on. They centre the unlearned model and each shadow
            for the test of under-unlearning, so that a model which is better or worse as a whole is not mistaken for
            one that remembers. With a single shadow they are needed: the unlearned model's own residuals on them are
            then the null distribution.

    Raises:
        UserError: level or fdr outside (0, 1), or a holdout with another form or number of shadows.
    """
    _check(readings, level, fdr, holdout)
    order = sorted(range(len(readings)), key=lambda i: readings.ids[i])  # sums do not depend on the order of rows
    whole_N = readings.complete()
    place_N = np.array([i for i in order if whole_N[i]], dtype=np.intp)
    kept = readings.select(place_N.tolist())
    beside = None if holdout is None else holdout.select(holdout.complete())
    if beside is not None and not len(beside):
        raise UserError("no holdout sample has a number under every model: give some, or leave the holdout out.")
    missing = len(readings) - len(kept)
    notes = [f"{missing} sample(s) without a finite reading: not auditable."] if missing else []

    null = _Null.of(kept, beside)
    residual_N, remembered_N = null.judge(kept.unlearned_N, None if beside is None else beside.unlearned_N)
    auditable_N, gap_N, near, others, said = _auditable(null, kept, beside, level)
    notes += said
    p_under_N = np.where(auditable_N, near.p_under(remembered_N), others.p_under(remembered_N))
    p_over_N = np.where(auditable_N, near.p_over(residual_N), others.p_over(residual_N))
    notes += _resolution(null, near, int(auditable_N.sum()), len(kept), fdr)
    under_N, over_N = (_discoveries(p_N, auditable_N, fdr) for p_N in (p_under_N, p_over_N))
    with np.errstate(divide="ignore", invalid="ignore"):
        position_N = np.where(auditable_N, residual_N / gap_N, np.nan)
        unit = 1.0 if kept.num_shadows > 2 else float(np.std(null.plain)) if null.size else np.nan
        completeness_N = 1 - np.clip(residual_N * gap_N / (gap_N**2 + unit**2), 0, 1)

    def spread(values: Floats) -> Floats:
        out = np.full(len(readings), np.nan)
        out[place_N] = values
        return out

    verdicts: list[Verdict] = ["not-auditable"] * len(readings)
    for place, able, under, over in zip(place_N, auditable_N, under_N, over_N, strict=True):
        if able:
            verdicts[place] = "under-unlearned" if under else "over-unlearned" if over else "adequate"
    able_all = np.zeros(len(readings), dtype=bool)
    able_all[place_N] = auditable_N
    return Completeness(
        readings.ids,
        spread(score(kept)),
        spread(position_N),
        spread(completeness_N),
        spread(p_under_N),
        spread(p_over_N),
        able_all,
        verdicts,
        readings.num_shadows,
        level,
        fdr,
        null.source,
        1 / (1 + max(near.size, others.size)),
        tuple(notes),
    )


def _check(readings: Readings, level: float, fdr: float, holdout: Readings | None) -> None:
    for name, value in (("level", level), ("fdr", fdr)):
        if not 0 < value < 1:
            raise UserError(f"{name} = {value} is not between 0 and 1: give for example 0.05.")
    if holdout is not None and (holdout.form, holdout.num_shadows) != (readings.form, readings.num_shadows):
        raise UserError(
            f"the holdout has {holdout.num_shadows} shadow(s) in form {holdout.form}, the samples have "
            f"{readings.num_shadows} in form {readings.form}: give the same models for both."
        )


def _auditable(
    null: _Null, kept: Readings, beside: Readings | None, level: float
) -> tuple[NDArray[np.bool_], Floats, _Null, _Null, list[str]]:
    """(which samples are auditable, gaps, null distribution of these, of the others, notes)."""
    if kept.original_N is None:
        note = "no original was given: which samples could have been told apart at all is not known."
        return np.full(len(kept), null.size > 0), np.full(len(kept), np.nan), null, null, [note]
    notes = []
    gap_N, clear_N = null.judge(kept.original_N, None if beside is None else beside.original_N)
    if len(kept) and float(np.mean(gap_N)) > 0 and float(np.mean(gap_N - clear_N)) > float(np.mean(gap_N)) / 2:
        notes.append("the original knows the holdout half as well as the samples or better: was it trained on it?")
    threshold = null.threshold(level)
    if np.isfinite(threshold):
        near, others = null.where(null.gap >= threshold), null.where(null.gap < threshold)
        return clear_N >= threshold, gap_N, near, others, notes
    # Too few readings to choose among: all of them are the null distribution, and the reader is told.
    auditable_N = null.p_under(clear_N) <= level if null.size else np.zeros(len(kept), dtype=bool)
    if auditable_N.any():
        notes.append(
            f"{null.size} never-seen readings are too few to correct for the choice of auditable samples, so somewhat "
            "more of them than chance may be called: give more shadows."
        )
    return auditable_N, gap_N, null, null, notes


def _resolution(null: _Null, near: _Null, num: int, total: int, fdr: float) -> list[str]:
    """What the number of never-seen readings does not allow."""
    if not null.size and total:
        return ["one shadow and no holdout: nothing to calibrate on, so no verdict; give a second shadow."]
    if not num or 1 / (1 + near.size) <= fdr / num:
        return []
    least = int(np.ceil(num / (fdr * (1 + near.size))))
    return [
        f"with {near.size} never-seen readings a verdict needs at least {least} samples of the {num} auditable "
        "ones to stand out together: more shadows make it finer."
    ]


def score(readings: Readings) -> Floats:
    """(N,) evidence that a sample is still a member: its signal above an anchor between original and never-seen.

    s_u - (1 - c) s_o - c mean_k s_k with s = -ln(loss + 0.002), the loss of a classifier being -ln p, and c = 0.2;
    offline s_u - mean_k s_k. A member reads like the original up to little noise, a forgotten sample like the shadows
    up to much: the anchor therefore lies near the original. Unlike IAM's signal this one is not flat at high losses,
    and unlike IAM's score it does not depend on the other samples.
    """

    def signal(values: Floats) -> Floats:
        loss = values if readings.form == "text" else -np.log(np.clip(values, 1e-30, 1.0))
        return np.asarray(-np.log(loss + LOSS_FLOOR))

    seen_N, unseen_N = signal(readings.unlearned_N), signal(readings.shadow_KN).mean(axis=0)
    if readings.original_N is None:
        return np.asarray(seen_N - unseen_N)
    return np.asarray(seen_N - (1 - ANCHOR_SHARE) * signal(readings.original_N) - ANCHOR_SHARE * unseen_N)


def evidence(form: str, values: Floats) -> Floats:
    """The scale of the tests, higher = more remembered: -loss for text, the logit of the probability else."""
    if form == "text":
        return -np.asarray(values, dtype=np.float64)
    prob = np.clip(values, PROB_FLOOR, 1 - PROB_FLOOR)
    return np.asarray(np.log(prob) - np.log1p(-prob))


def _discoveries(p_N: Floats, among_N: NDArray[np.bool_], fdr: float) -> NDArray[np.bool_]:
    found_N = np.zeros(len(p_N), dtype=bool)
    found_N[among_N] = discoveries(p_N[among_N], fdr)
    return found_N


def residuals(values_N: Floats, shadow_KN: Floats, own_spread: bool = True) -> Floats:
    """(N,) distance from the shadows' mean in standard deviations of such a distance.

    A sample's variance over the shadows is shrunk towards the mean variance of all samples, as if that came from
    four more shadows: a few shadows say little about one sample's spread. Without ``own_spread`` every sample counts
    as equally spread, and the unit is that of the values.
    """
    num = len(shadow_KN)
    away_N = values_N - shadow_KN.mean(axis=0)
    if not own_spread or not away_N.size:
        return np.asarray(away_N / np.sqrt(1 + 1 / num))
    own_N = shadow_KN.var(axis=0, ddof=1)
    variance_N = ((num - 1) * own_N + PRIOR_SHADOWS * own_N.mean()) / (num - 1 + PRIOR_SHADOWS)
    return np.asarray(away_N / np.sqrt(np.maximum(variance_N, 1e-12) * (1 + 1 / num)))


@dataclass(frozen=True, eq=False)
class _Null:
    """Residuals of shadows that are left out in turn: models that never saw the samples, judged like any other.

    ``plain``: as they are. ``remembered``: less their mean on the holdout. A sample counts as remembered if it is so
    for this model and as such; as over-forgotten by ``plain`` alone, since a model that is worse as a whole has
    forgotten too much. ``gap``: the lower of the two for the original, against the same shadows; nan without one.
    """

    shadow_KN: Floats  # evidence
    beside_KM: Floats | None  # of the holdout
    form: str
    remembered: Floats
    plain: Floats
    gap: Floats
    source: Literal["shadows", "shadows and holdout", "holdout", "none"]

    @classmethod
    def of(cls, kept: Readings, beside: Readings | None) -> _Null:
        shadow_KN, form = evidence(kept.form, kept.shadow_KN), kept.form
        beside_KM = None if beside is None else evidence(form, beside.shadow_KN)
        original_N = np.full(len(kept), np.nan) if kept.original_N is None else evidence(form, kept.original_N)
        if len(shadow_KN) == 1:
            if beside is None or beside_KM is None:
                none = np.zeros(0)
                return cls(shadow_KN, None, form, none, none, none, "none")
            found = residuals(evidence(form, beside.unlearned_N), beside_KM, own_spread=False)
            # The original never learnt the holdout; had it, it would read there as it usually does.
            usual = np.full(len(beside), np.median(original_N) if len(kept) else np.nan)
            gap = residuals(usual, beside_KM, own_spread=False)
            return cls(shadow_KN, None, form, found, found, gap, "holdout")
        unseen_M = None if beside is None or beside.original_N is None else evidence(form, beside.original_N)
        own = len(shadow_KN) > 2  # else one is left when the other is judged, and no spread of a sample's own is known
        parts = []
        for k in range(len(shadow_KN)):
            others_KN = np.delete(shadow_KN, k, axis=0)
            others_KM = None if beside_KM is None else np.delete(beside_KM, k, axis=0)
            left_out = _centred(shadow_KN[k], others_KN, None if beside_KM is None else beside_KM[k], others_KM, own)
            parts.append((*left_out, np.minimum(*_centred(original_N, others_KN, unseen_M, others_KM, own))))
        plain, remembered, gap = (np.concatenate(part) for part in zip(*parts, strict=True))
        source: Literal["shadows", "shadows and holdout"] = "shadows" if beside is None else "shadows and holdout"
        return cls(shadow_KN, beside_KM, form, remembered, plain, gap, source)

    @property
    def size(self) -> int:
        return len(self.plain)

    def judge(self, values_N: Floats, unseen_M: Floats | None) -> tuple[Floats, Floats]:
        """(residuals, the lower of them and the centred ones) of a model's readings, (N,) each."""
        beside_M = None if unseen_M is None else evidence(self.form, unseen_M)
        own = len(self.shadow_KN) > 2
        plain_N, centred_N = _centred(evidence(self.form, values_N), self.shadow_KN, beside_M, self.beside_KM, own)
        return plain_N, np.minimum(plain_N, centred_N)

    def where(self, chosen: NDArray[np.bool_]) -> _Null:
        """A part of the readings."""
        return replace(self, remembered=self.remembered[chosen], plain=self.plain[chosen], gap=self.gap[chosen])

    def threshold(self, level: float) -> float:
        """The smallest gap at which the original would be called, judged by readings with such a gap or more.

        Among those from t on, a share (1 + #{remembered >= t}) / (1 + number) looks at least as remembered as an
        original with gap t; t is the smallest with at most ``level`` of them, infinite where there is none.
        """
        at = np.sort(self.gap)
        left = self.size - np.searchsorted(at, at, side="left")
        high = self.size - np.searchsorted(np.sort(np.minimum(self.remembered, self.gap)), at, side="left")
        found = np.flatnonzero((1 + high) / (1 + left) <= level)
        return float(at[found[0]]) if found.size else float("inf")

    def p_under(self, remembered_N: Floats) -> Floats:
        if not self.size:
            return np.full(len(remembered_N), np.nan)
        beyond_N = self.size - np.searchsorted(np.sort(self.remembered), remembered_N, side="left")
        return np.asarray((1 + beyond_N) / (1 + self.size))

    def p_over(self, residual_N: Floats) -> Floats:
        if not self.size:
            return np.full(len(residual_N), np.nan)
        return np.asarray((1 + np.searchsorted(np.sort(self.plain), residual_N, side="right")) / (1 + self.size))


def _centred(
    values_N: Floats, shadow_KN: Floats, beside_M: Floats | None, beside_KM: Floats | None, own_spread: bool
) -> tuple[Floats, Floats]:
    """(residuals, residuals less their mean on the holdout), (N,) each; the same twice without a holdout."""
    plain_N = residuals(values_N, shadow_KN, own_spread)
    if beside_M is None or beside_KM is None:
        return plain_N, plain_N
    return plain_N, plain_N - float(residuals(beside_M, beside_KM, own_spread).mean())


@dataclass(frozen=True)
class SubjectAnswer:
    """All texts of one subject together: mean completeness of the auditable ones, p-value of their mean residual."""

    subject: str
    n: int
    completeness: float
    p_under: float


def by_subject(readings: Readings, found: Completeness, holdout: Readings | None = None) -> list[SubjectAnswer]:
    """One answer per subject, from the mean residual over its samples against those of left-out shadows.

    The null distribution has one value per shadow and subject (holdout subjects too), so it is coarse; the p-value is
    nan with fewer than two shadows or without subjects.
    """
    if readings.subjects is None:
        return []
    whole_N = readings.complete()
    kept = readings.select(whole_N)
    if not len(kept):
        return []
    names, codes_N = _codes(kept.subjects or [])
    own_G = np.full(len(names), np.nan)
    pool = np.zeros(0)
    if readings.num_shadows >= 2:
        shadow_KN = evidence(kept.form, kept.shadow_KN)
        own_spread = len(shadow_KN) > 2
        own_G = _group_means(residuals(evidence(kept.form, kept.unlearned_N), shadow_KN, own_spread), codes_N)
        parts = []
        for part in (kept, holdout.select(holdout.complete()) if holdout is not None else None):
            if part is None or part.subjects is None or not len(part):
                continue
            values_KN, labels_N = evidence(part.form, part.shadow_KN), _codes(part.subjects)[1]
            for k in range(len(values_KN)):
                left_out_N = residuals(values_KN[k], np.delete(values_KN, k, axis=0), own_spread)
                parts.append(_group_means(left_out_N, labels_N))
        pool = np.sort(np.concatenate(parts))
    beyond_G = len(pool) - np.searchsorted(pool, own_G, side="left")
    p_G = (1 + beyond_G) / (1 + len(pool)) if len(pool) else np.full(len(names), np.nan)
    able_N = found.auditable_N[whole_N]
    with np.errstate(invalid="ignore"):
        gone_G = _group_means(np.where(able_N, found.completeness_N[whole_N], 0.0), codes_N)
        gone_G = gone_G / _group_means(able_N.astype(np.float64), codes_N)
    sizes_G = np.bincount(codes_N)
    return [SubjectAnswer(n, int(sizes_G[g]), float(gone_G[g]), float(p_G[g])) for g, n in enumerate(names)]


def _codes(subjects: Sequence[str]) -> tuple[list[str], NDArray[np.intp]]:
    """Subjects in order of first appearance, and the number of each sample's."""
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(s, len(numbers)) for s in subjects]
    return list(numbers), np.array(codes, dtype=np.intp)


def _group_means(values_N: Floats, codes_N: NDArray[np.intp]) -> Floats:
    return np.asarray(np.bincount(codes_N, weights=values_N) / np.bincount(codes_N))
