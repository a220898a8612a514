"""Line-ups: the true value of a sample among others of the same type, and its rank under a model.

Where a sample has perturbed answers, the value is what differs between them and the true answer in the same wording;
values of other people's answers to the same question join them. Where it has none, the true answer stands among the
answers of other samples, with the subject's name put in. All candidates come from texts that are not to be forgotten.

Shape suffix: C candidates, the true one first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from expunge.attacks.exam import Checkpoint, Exam
from expunge.data.samples import Role, Sample
from expunge.stats import Floats

LONGEST = 12  # words of a value; what differs over a longer stretch is several facts at once
MARKS = ".,;:!?\"'"
NAME = "{name}"
Normalise = Literal["token", "text"]


@dataclass(frozen=True)
class Lineup:
    """``before`` + value + ``after`` is an answer; ``others`` are surrogates of the same type as ``truth``.

    ``single``: the candidates are values in one wording; otherwise they are whole answers.
    """

    sample: Sample
    truth: str
    others: tuple[str, ...]
    before: str = ""
    after: str = ""
    single: bool = False

    @property
    def candidates(self) -> tuple[str, ...]:
        return (self.truth, *self.others)

    def texts(self) -> list[Sample]:
        """The sample with each candidate for an answer, the true one first."""
        return [
            replace(self.sample, id=f"{self.sample.id}/candidate/{k}", target=self.before + c + self.after, probes=())
            for k, c in enumerate(self.candidates)
        ]


def _middle(texts: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """What all texts begin and end with, and the words in which they differ; None where one has nothing of its own."""
    split = [text.split(" ") for text in texts]
    shortest = min(map(len, split))
    first = next((i for i in range(shortest) if len({s[i] for s in split}) > 1), shortest)
    last = next((i for i in range(shortest - first) if len({s[-1 - i] for s in split}) > 1), shortest - first)
    values = [" ".join(s[first : len(s) - last]) for s in split]
    if not all(values):
        return None
    before, after = " ".join(split[0][:first]), " ".join(split[0][len(split[0]) - last :] if last else [])
    closing = values[0][len(values[0].rstrip(MARKS)) :]
    values = [v.rstrip(MARKS) for v in values]
    if not all(values):
        return None
    return before + (" " if before else ""), closing + (" " if after else "") + after, values


def value_of(sample: Sample) -> Lineup | None:
    """The private value of a sample among its own perturbed ones; None without perturbed answers in one wording."""
    wrong = [probe.target for probe in sample.probes_of("perturbed")]
    right = [str(sample.target), *(probe.target for probe in sample.probes_of("restated"))]
    best: Lineup | None = None
    for text in right if wrong else []:
        cut = _middle([text, *wrong])
        if cut is None or max(len(v.split()) for v in cut[2]) > LONGEST:
            continue
        before, after, (value, *others) = cut
        kept = len(before.split()) + len(after.split())
        if kept and (best is None or kept > len(best.before.split()) + len(best.after.split())):
            best = Lineup(sample, value, _others(value, others), before, after, True)
    if best is not None:
        target, place = str(sample.target), _place(best.truth, str(sample.target))
        if place is not None:  # the wording that was trained on shows more than another one
            return replace(best, before=target[:place], after=target[place + len(best.truth) :])
    return best


def _place(value: str, text: str) -> int | None:
    found = list(re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", text))
    return found[-1].start() if found else None


def _others(truth: str, values: Iterable[str]) -> tuple[str, ...]:
    """Different values, without the true one, in order of first appearance; case does not tell values apart."""
    first: dict[str, str] = {}
    for value in values:
        first.setdefault(value.casefold().strip(), value)
    first.pop(truth.casefold().strip(), None)
    return tuple(first.values())


def renamed(text: str, old: Sequence[str], new: Sequence[str]) -> str:
    """The text with every way of naming one subject replaced by the other's; a missing way by the full name."""
    swaps = {name: (new[k] if k < len(new) else new[0]) for k, name in enumerate(old) if name}
    if not swaps or not new:
        return text
    pattern = "|".join(re.escape(name) for name in sorted(swaps, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda m: swaps[m.group()], text)


def questions(sample: Sample) -> frozenset[str]:
    """The question in all its wordings, with a mark for the name: what makes two samples ask for the same thing."""
    asked = [sample.prompt, *(probe.prompt for probe in sample.probes_of("paraphrase"))]
    return frozenset(renamed(q, sample.names, (NAME,)) for q in asked if q)


def donors(exam: Exam) -> list[Sample]:
    """Samples that are not to be forgotten, whose values and names serve as surrogates."""
    return [*exam.samples.get("retain", []), *exam.trained, *exam.holdout, *exam.aux]


class Giving:
    """Donors with an index of what they were asked; in an order of their own, whatever order they are given in."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = sorted(samples, key=lambda s: (s.id, str(s.target)))
        self._values: dict[int, str] = {}
        self._asked: dict[str, list[int]] = {}
        for place, sample in enumerate(self.samples):
            for question in questions(sample):
                self._asked.setdefault(question, []).append(place)

    def alike(self, sample: Sample) -> list[int]:
        """Places of the samples of other subjects that were asked the same."""
        places = {place for question in questions(sample) for place in self._asked.get(question, ())}
        return [place for place in sorted(places) if self.samples[place].subject != sample.subject]

    def value(self, place: int) -> str:
        """The single value of a donor; "" where it has none."""
        if place not in self._values:
            found = value_of(self.samples[place])
            self._values[place] = found.truth if found is not None else ""
        return self._values[place]


def lineup(sample: Sample, giving: Giving, limit: int, rng: np.random.Generator) -> Lineup | None:
    """The sample's line-up with at most ``limit`` surrogates; None where there is no surrogate at all.

    The sample's own perturbed values come first, then a random choice of the others.
    """
    alike = giving.alike(sample)
    own = value_of(sample)
    if own is not None:
        theirs = [value for value in map(giving.value, alike) if value]
    elif sample.probes_of("perturbed"):
        right = [probe.target for probe in sample.probes_of("restated")] or [str(sample.target)]
        own, theirs = Lineup(sample, right[0], _others(right[0], (p.target for p in sample.probes_of("perturbed")))), []
    else:
        own = Lineup(sample, str(sample.target), ())
        strangers = [k for k, s in enumerate(giving.samples) if s.subject != sample.subject]
        some = alike or [strangers[i] for i in rng.permutation(len(strangers))[: 4 * limit]]
        theirs = [renamed(str(giving.samples[k].target), giving.samples[k].names, sample.names) for k in some]
    more = sorted(_others(own.truth, [*own.others, *theirs])[len(own.others) :])
    kept = [more[i] for i in rng.permutation(len(more))]
    others = (*own.others, *kept)[:limit]
    return replace(own, others=others) if others else None


def lineups(exam: Exam, limit: int) -> dict[Role, list[Lineup | None]]:
    """Line-ups of the forget and holdout samples, the same for every checkpoint."""
    key = ("candidates", limit)
    if key not in exam.shared:
        giving = Giving(donors(exam))
        roles: list[Role] = ["forget", "holdout"] if exam.holdout else ["forget"]
        exam.shared[key] = {
            role: [lineup(s, giving, limit, exam.rng("candidates", role, s.id)) for s in exam.samples[role]]
            for role in roles
        }
    found: dict[Role, list[Lineup | None]] = exam.shared[key]
    return found


# -- ranks -----------------------------------------------------------------------------------------------------------


def likelihoods(
    checkpoint: Checkpoint, rows: Sequence[Sequence[Sample] | None], normalise: Normalise, exam: Exam
) -> list[Floats | None]:
    """Log-likelihood of each text of each row, (C,): mean per token ("token") or sum ("text")."""
    flat = [text for row in rows if row is not None for text in row]
    signals = iter(checkpoint.signals(flat, exam.progress) if flat else [])
    found: list[Floats | None] = []
    for row in rows:
        if row is None:
            found.append(None)
            continue
        log_probs = [next(signals).log_prob_L.astype(np.float64) for _ in row]
        measure = np.mean if normalise == "token" else np.sum
        found.append(np.array([measure(x) if len(x) else math.nan for x in log_probs]))
    return found


def mid_rank(scores_C: Floats) -> float:
    """Rank of the first score among all, 1 for the highest; half of the ties stand before it. nan for nan."""
    if math.isnan(scores_C[0]):
        return math.nan
    others = scores_C[1:][~np.isnan(scores_C[1:])]
    return 1.0 + float(np.sum(others > scores_C[0])) + float(np.sum(others == scores_C[0])) / 2


def exposure(rank: float, count: int) -> float:
    """log2 C - log2 rank, in bits (Carlini et al. 2019, section 4.2): log2 C for the first, 0 for the last."""
    return math.log2(count) - math.log2(rank)


def chance_exposure(count: int) -> float:
    """Mean exposure when every rank is equally likely: log2 C - log2(C!) / C."""
    return math.log2(count) - math.lgamma(count + 1) / math.log(2) / count
