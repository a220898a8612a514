"""One model on the desk, beside what it is compared with; the arithmetic that every section of the assessment uses.

Shape suffixes: N samples, K columns, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expunge.bench.measuring import EvaluateOptions, Measured
from expunge.data.samples import Role
from expunge.metrics.divergence import per_sample
from expunge.metrics.rouge import rouge_score
from expunge.metrics.tofu import ForgetQuality, TofuSet, log_truth_ratio, tofu_set
from expunge.signals.record import Signals
from expunge.stats import Estimate, bootstrap_mean, bootstrap_means, percentile_interval

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Original:
    """What is compared with the original: its loss per role and sample id, its total variation per forget sample."""

    loss: Mapping[str, Mapping[str, float | None]]
    tv: Mapping[str, float | None]

    @classmethod
    def of(cls, measured: Measured) -> Original:
        """From the original as it was measured."""
        loss: dict[str, dict[str, float | None]] = {
            role: {s.id: number(s.loss) for s in own} for role, own in measured.signals.items()
        }
        means = per_sample(measured.forget.tv)
        return cls(loss, {s.id: number(m) for s, m in zip(measured.samples["forget"], means, strict=True)})

    def losses(self, role: Role, ids: Sequence[str]) -> Floats:
        """nan where the original was not measured."""
        return numbers(self.loss.get(role, {}), ids)

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return {"loss": {role: dict(own) for role, own in self.loss.items()}, "tv": dict(self.tv)}


def numbers(by_id: Mapping[str, float | None], ids: Sequence[str]) -> Floats:
    """(N,); nan for what is missing or null."""
    return np.array([math.nan if by_id.get(i) is None else by_id[i] for i in ids], dtype=np.float64)


def number(value: float) -> float | None:
    """As JSON has it."""
    return float(value) if math.isfinite(value) else None


def where(names: Sequence[str], kept_N: NDArray[np.bool_]) -> list[str]:
    """The names that are kept."""
    return [name for name, keep in zip(names, list(kept_N), strict=True) if keep]


def losses(signals: Sequence[Signals]) -> Floats:
    """Mean negative log-likelihood per target token of each sample, nats, (N,)."""
    return np.array([s.loss for s in signals], dtype=np.float64)


def probs(signals: Sequence[Signals]) -> Floats:
    """exp(−loss) of each sample, (N,)."""
    return np.exp(-losses(signals))


def mean_over(models: Sequence[Floats]) -> Floats:
    """Mean over models of the same samples' numbers."""
    return np.asarray(np.mean(np.stack(models), axis=0), dtype=np.float64)


def items(own: Measured, role: Role, options: bool = False, only: Sequence[str] | None = None) -> TofuSet:
    """The TOFU numbers of a role (or of some of its samples), with ROUGE where there are generations."""
    wanted_ids = None if only is None else set(only)
    samples = [s for s in own.samples[role] if wanted_ids is None or s.id in wanted_ids]
    if role not in own.probes:  # without their losses the probes cannot be looked up
        samples = [replace(s, probes=()) for s in samples]
    signals = [*own.signals[role], *own.probes.get(role, [])]
    return tofu_set(samples, signals, rouge_of(own, role), options)


def rouge_of(own: Measured, role: Role) -> dict[str, float]:
    """ROUGE-L recall of each generated answer, by sample id."""
    targets = {s.id: str(s.target) for s in own.samples.get(role, [])}
    return {i: rouge_score(targets[i], text) for i, text in own.generated.get(role, {}).items()}


def quality_over(found: Sequence[ForgetQuality]) -> tuple[Estimate, Estimate, Estimate]:
    """(KS distance, its upper bound, p-value) over the references: mean distance, widest bounds, median p.

    Bounds that hold against every reference, so that the claim does not depend on which of them one picks.
    """
    distance, count = [f.ks_distance for f in found], found[0].ks_distance.n
    note = "" if len(found) == 1 else f"mean over {len(found)} references, widest bounds, median p"
    low, high = min(d.low for d in distance), max(d.high for d in distance)
    name = distance[0].definition
    return (
        Estimate(float(np.mean([d.value for d in distance])), low, high, count, name, note),
        Estimate(high, n=count, definition=name.replace("ks_distance", "ks_bound")),
        Estimate(
            float(np.median([f.p_value.value for f in found])),
            n=count,
            definition=found[0].p_value.definition,
            note=note,
        ),
    )


def log_ratios(own: Measured) -> Floats:
    """log truth ratio of each forget sample, (N,); nan without wrong answers."""
    found = items(own, "forget")
    return log_truth_ratio(found.paraphrased_N, found.perturbed)


@dataclass
class Desk:
    """One model on the desk, with what it is compared to; ``metrics`` and ``skipped`` fill up."""

    own: Measured
    references: Sequence[Measured]
    floor: Sequence[Mapping[str, float]]  # per pair of references: mean total variation by forget sample id
    original: Original | None
    options: EvaluateOptions
    seed: int = 0
    metrics: dict[str, Estimate] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> bool:
        return self.own.modality != "classifier"

    def subjects(self, role: Role) -> list[str]:
        return [s.subject for s in self.own.samples.get(role, [])]

    def mean(self, values: ArrayLike, groups: Sequence[str], definition: str) -> Estimate:
        return bootstrap_mean(
            values,
            groups,
            level=self.options.level,
            resamples=self.options.resamples,
            seed=self.seed,
            definition=definition,
        )

    def paired(
        self,
        columns: Sequence[ArrayLike],
        groups: Sequence[str],
        value: Callable[[Floats], Floats],
        definition: str,
    ) -> Estimate:
        """``value(means_RK) -> (R,)`` of column means; items that lack a number in any column are left out."""
        table_NK = np.stack([np.asarray(c, dtype=np.float64) for c in columns], axis=1)
        kept_N = np.asarray(np.isfinite(table_NK).all(axis=1))
        table_NK, names = table_NK[kept_N], where(groups, kept_N)
        if not len(table_NK):
            return Estimate(math.nan, definition=definition)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            middle = float(value(table_NK.mean(axis=0, keepdims=True))[0])
            if len(set(names)) < 2:
                return Estimate(middle, n=len(table_NK), definition=definition)
            draws_R = value(bootstrap_means(table_NK, names, self.options.resamples, self.seed))
        low, high = percentile_interval(draws_R, self.options.level)
        return Estimate(middle, low, high, len(table_NK), definition)

    def ratio(self, above: ArrayLike, below: ArrayLike, groups: Sequence[str], definition: str) -> Estimate:
        return self.paired([above, below], groups, lambda m_RK: m_RK[:, 0] / m_RK[:, 1], definition)
