"""PAC and neighbourhood: a text that was learnt by heart stands out from its own altered versions.

Only the answer is altered; the prompt stays. The versions are the same for every checkpoint.
Shape suffix: L target tokens of a sample.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from expunge.attacks.cloze import Cloze, replaced, rewritten
from expunge.attacks.context import measured
from expunge.attacks.exam import Checkpoint, Exam, key_of
from expunge.attacks.membership import lowest_mean
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.options import option
from expunge.signals.record import Signals


@dataclass(frozen=True, kw_only=True)
class PacOptions:
    """Options of PAC."""

    alpha: float = option(0.3, "words to swap, as a share of all", "Ye et al. 2024")
    versions: int = option(10, "altered versions of each text", "Meeus et al. 2024 (arXiv:2406.17975)")
    top: float = option(5.0, "percent of likeliest tokens", "Ye et al. 2024")
    bottom: float = option(30.0, "percent of least likely tokens", "Ye et al. 2024")
    seed: int = option(0, "which words are swapped")


@dataclass(frozen=True, kw_only=True)
class NeighbourhoodOptions:
    """Options of the neighbourhood attack."""

    neighbours: int = option(25, "altered versions of each text, one word each", "MIMIR; Mattern et al. 2023 use 100")


@attack(
    name="pac",
    family="membership",
    tier="standard",
    access="log-probabilities",
    paper="Ye et al. 2024, Data Contamination Calibration for Black-box LLMs (arXiv:2405.11930)",
    options=PacOptions,
    formula="mean over versions of PD(version) - PD(x); PD = mean of the top 5 % of log p - mean of the bottom 30 %",
    passes=10.0,
    modalities={"text", "multimodal"},
)
def pac(exam: Exam, checkpoint: Checkpoint, options: PacOptions) -> Finding:
    """Polarized distance of the text against that of versions with some of its words swapped.

    A text known by heart has no unlikely tokens until its order is disturbed. An answer of one word has no other
    order and gets nan.
    """
    if not 0 < options.alpha <= 1 or options.versions < 1:
        raise UserError(
            f"alpha {options.alpha} with {options.versions} versions: give alpha above 0 and at most 1, and at least "
            "1 version."
        )
    scores: dict[Role, list[float]] = {}
    short = 0
    for role, samples in measured(exam).items():
        versions = [swapped_versions(exam, s, options) for s in samples]
        own = checkpoint.signals(samples)
        grouped = _signals(checkpoint, versions)
        scores[role] = [
            pac_score(x, others, options.top, options.bottom) for x, others in zip(own, grouped, strict=True)
        ]
        short += sum(not v for v in versions)
    notes = [f"{short} answer(s) of one word have no other order and no score"] if short else []
    return Finding(scores={"pac": scores}, notes=notes)


def polarized_distance(signals: Signals, top: float = 5.0, bottom: float = 30.0) -> float:
    """Mean of the highest ``top`` % of log p less the mean of the lowest ``bottom`` %, at least one token each."""
    return -lowest_mean(-signals.log_prob_L, top) - lowest_mean(signals.log_prob_L, bottom)


def pac_score(own: Signals, versions: Sequence[Signals], top: float = 5.0, bottom: float = 30.0) -> float:
    """Mean polarized distance of the versions less that of the text; nan without versions or tokens."""
    if not versions:
        return math.nan
    return statistics.fmean(polarized_distance(v, top, bottom) for v in versions) - polarized_distance(own, top, bottom)


def swapped(words: Sequence[str], alpha: float, rng: np.random.Generator) -> list[str]:
    """The words after max(1, floor(alpha * number)) swaps of two places drawn at random (Wei and Zou 2019)."""
    words = list(words)
    for _ in range(max(1, int(alpha * len(words) + 1e-9))):
        first, second = rng.choice(len(words), 2, replace=False)
        words[first], words[second] = words[second], words[first]
    return words


def swapped_versions(exam: Exam, sample: Sample, options: PacOptions) -> list[Sample]:
    """The altered versions that PAC compares a sample with; none of an answer of fewer than two words."""
    words = str(sample.target).split()
    if len(words) < 2:
        return []
    rng = exam.rng("pac", options.seed, key_of(sample))
    texts = [rewritten(str(sample.target), swapped(words, options.alpha, rng)) for _ in range(options.versions)]
    return [_version(sample, text, k) for k, text in enumerate(texts)]


@attack(
    name="neighbourhood",
    family="membership",
    tier="standard",
    access="log-probabilities",
    paper="Mattern et al. 2023, Membership Inference Attacks against Language Models via Neighbourhood Comparison "
    "(arXiv:2305.18462)",
    options=NeighbourhoodOptions,
    formula="mean over neighbours of loss(neighbour) - loss(x)",
    passes=25.0,
    needs={"aux"},
    modalities={"text", "multimodal"},
)
def neighbourhood(exam: Exam, checkpoint: Checkpoint, options: NeighbourhoodOptions) -> Finding:
    """Loss of versions with one word replaced, less the loss of the text.

    The replacements are the likeliest under a bigram model of the unmeasured texts (:mod:`expunge.attacks.cloze`),
    where the paper asks a masked language model.
    """
    if options.neighbours < 1:
        raise UserError(f"{options.neighbours} neighbours are too few: give at least 1.")
    scores: dict[Role, list[float]] = {}
    counts: list[int] = []
    for role, samples in measured(exam).items():
        versions = [word_neighbours(exam, s, options.neighbours) for s in samples]
        own, grouped = checkpoint.signals(samples), _signals(checkpoint, versions)
        scores[role] = [neighbourhood_score(x, others) for x, others in zip(own, grouped, strict=True)]
        counts += [len(v) for v in versions]
    vocabulary = len(_cloze(exam).words)
    notes = [f"neighbours from a bigram model of {vocabulary} words, at least {min(counts, default=0)} per text"]
    return Finding(scores={"neighbourhood": scores}, notes=notes)


def neighbourhood_score(own: Signals, neighbours: Sequence[Signals]) -> float:
    """Mean loss of the neighbours less the loss of the text, in nats per token; nan without neighbours."""
    return statistics.fmean(n.loss for n in neighbours) - own.loss if neighbours else math.nan


def _cloze(exam: Exam) -> Cloze:
    key = ("perturbation", "cloze")
    if key not in exam.shared:
        texts = [str(s.target) for s in (*exam.aux, *exam.trained)]
        exam.shared[key] = Cloze(sorted(texts))
    found: Cloze = exam.shared[key]
    return found


def word_neighbours(exam: Exam, sample: Sample, most: int) -> list[Sample]:
    """The sample with one word replaced, likeliest first; made once for all checkpoints."""
    key = ("perturbation", "neighbours", most, key_of(sample))
    if key not in exam.shared:
        text = str(sample.target)
        exam.shared[key] = [replaced(text, swap) for swap in _cloze(exam).swaps(text, most)]
    return [_version(sample, text, k) for k, text in enumerate(exam.shared[key])]


def _version(sample: Sample, text: str, number: int) -> Sample:
    return replace(sample, id=f"{sample.id}/version/{number}", target=text, probes=())


def _signals(checkpoint: Checkpoint, versions: Sequence[Sequence[Sample]]) -> list[list[Signals]]:
    """Signals of all versions in one go, grouped again by sample."""
    flat = iter(checkpoint.signals([v for each in versions for v in each]))
    return [[next(flat) for _ in each] for each in versions]
