"""KFR, KRR and linguistic score of ReLearn (Xu et al., ACL 2025, arXiv 2502.11190), with plug-in judges.

The paper's judges are an LLM for entities, a sentence encoder to match them, and an NLI model. Any callable of the
same form does; the defaults need no network. The judges' names are part of the definition.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from expunge.errors import UserError
from expunge.metrics.facts import FactMatcher, Relation, SlotInference
from expunge.metrics.registry import metric
from expunge.stats import Estimate, Groups, bootstrap_mean

THRESHOLD = 0.3  # c1 = c2 of the paper


class EntityMatcher(Protocol):
    """Share of the reference's entities that the generation contains; nan when it has none to look for."""

    @property
    def name(self) -> str: ...

    def __call__(self, reference: str, generated: str, prompt: str = "") -> float: ...


class Inference(Protocol):
    """Whether the premise entails or contradicts the hypothesis."""

    @property
    def name(self) -> str: ...

    def __call__(self, premise: str, hypothesis: str, prompt: str = "") -> Relation: ...


@dataclass(frozen=True, slots=True)
class Judged:
    """One generation against its reference answer. ``forgotten`` and ``retained`` are None when not judgeable."""

    coverage: float
    generated_to_reference: Relation
    reference_to_generated: Relation
    forgotten: bool | None
    retained: bool | None
    fluent: bool


@dataclass(frozen=True, slots=True)
class Judgement:
    """All items, and the names of the judges."""

    items: tuple[Judged, ...]
    groups: tuple[str, ...] | None
    judges: str


def judge(
    references: Sequence[str],
    generated: Sequence[str],
    prompts: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    *,
    matcher: EntityMatcher | None = None,
    inference: Inference | None = None,
    fluent: Sequence[bool] | None = None,
    threshold: float = THRESHOLD,
) -> Judgement:
    """Judge every generation once; KFR, KRR and KFR* are then means over the result.

    With ``prompts`` the default judges leave out what the question already says. ``fluent`` defaults to
    :func:`looks_fluent`; give a perplexity bound's verdicts for more.

    Raises:
        UserError: the lists have different lengths.
    """
    asked = prompts if prompts is not None else [""] * len(references)
    sound = fluent if fluent is not None else [looks_fluent(text) for text in generated]
    lists = {"generations": generated, "prompts": asked, "fluency verdicts": sound}
    for what, given in (lists | ({"groups": groups} if groups is not None else {})).items():
        if len(given) != len(references):
            raise UserError(f"{len(references)} reference answers but {len(given)} {what}: give one per answer.")
    match, infer = matcher or FactMatcher(), inference or SlotInference()
    items = []
    for reference, text, prompt, is_fluent in zip(references, generated, asked, sound, strict=True):
        coverage = match(reference, text, prompt)
        to_reference, to_generated = infer(text, reference, prompt), infer(reference, text, prompt)
        known = not math.isnan(coverage)
        forgotten = coverage < threshold or to_reference == "contradiction" if known else None
        retained = coverage > threshold and to_generated != "contradiction" if known else None
        items.append(Judged(coverage, to_reference, to_generated, forgotten, retained, is_fluent))
    return Judgement(tuple(items), None if groups is None else tuple(groups), f"{match.name}+{infer.name}")


def _share(flags: Sequence[bool | None], groups: Groups, definition: str) -> Estimate:
    return bootstrap_mean([math.nan if f is None else float(f) for f in flags], groups, definition=definition)


@metric(
    name="kfr",
    definition="kfr+facts-1+slots-1/1",
    formula="mean [coverage < 0.3 or NLI(generated -> reference) = contradiction]",
    direction="forget: two-sided to the reference",
    source="ReLearn (Xu et al. 2025), Knowledge Forgetting Ratio",
)
def kfr(judged: Judgement) -> Estimate:
    """Share of answers whose key facts are gone or contradicted.

    Gibberish and empty answers count as forgotten: read it beside KFR* and the linguistic score. The judges decide
    what a fact is; the default ones see names, numbers, dates and words, not paraphrase.
    """
    return _share([i.forgotten for i in judged.items], judged.groups, f"kfr+{judged.judges}/1")


@metric(
    name="kfr_star",
    definition="kfr_star+facts-1+slots-1/1",
    formula="KFR among the outputs that are fluent",
    direction="forget: two-sided to the reference; not measurable when no output is fluent",
    source="this project; fluency by looks_fluent or by the caller",
)
def kfr_star(judged: Judgement) -> Estimate:
    """KFR among fluent outputs: a broken model earns nothing here.

    ``n`` counts the fluent outputs, and the note says out of how many; with few of them the model is broken.
    """
    flags = [i.forgotten if i.fluent else None for i in judged.items]
    found = _share(flags, judged.groups, f"kfr_star+{judged.judges}/1")
    return found.named(found.definition, f"{sum(i.fluent for i in judged.items)} of {len(judged.items)} fluent")


@metric(
    name="krr",
    definition="krr+facts-1+slots-1/1",
    formula="mean [coverage > 0.3 and NLI(reference -> generated) is not contradiction]",
    direction="retain: higher is better",
    source="ReLearn (Xu et al. 2025), Knowledge Retention Ratio",
)
def krr(judged: Judgement) -> Estimate:
    """Share of answers that state the key facts and contradict none of them."""
    return _share([i.retained for i in judged.items], judged.groups, f"krr+{judged.judges}/1")


# -- language ------------------------------------------------------------------------------------------------------


def looks_fluent(text: str) -> bool:
    """A coarse check without a model: words, mostly letters, no word or word pair over and over.

    >>> looks_fluent("Paris."), looks_fluent(""), looks_fluent("the the the the"), looks_fluent("@@@ ### 00")
    (True, False, False, False)
    """
    words = text.lower().split()
    dense = "".join(words)
    if not words or sum(c.isalnum() for c in dense) < 0.6 * len(dense):
        return False
    if any(words[i] == words[i + 1] == words[i + 2] for i in range(len(words) - 2)):
        return False
    if max(map(len, words)) > 40:
        return False
    pairs = list(pairwise(words))
    return len(pairs) < 8 or len(set(pairs)) >= 0.5 * len(pairs)


def brunet_index(words: Sequence[str]) -> float:
    """Brunet's W = N^(V^-0.165) for N words, V different ones: lower is richer; inf without words."""
    return len(words) ** (len(set(words)) ** -0.165) if words else math.inf


def honore_statistic(words: Sequence[str]) -> float:
    """Honore's R = 100 ln N / (1 - V1/V), V1 words that occur once: higher is richer; inf when none repeats.

    A single word has neither a vocabulary nor a repetition: 0.
    """
    if len(words) <= 1:
        return 0.0
    counts = Counter(words)
    once = sum(count == 1 for count in counts.values()) / len(counts)
    return math.inf if once == 1.0 else 100 * math.log(len(words)) / (1 - once)


def linguistic_parts(perplexity: float, text: str) -> tuple[float, float, float]:
    """The three terms 1/(1 + PPL), 1/(1 + BI), HS/(1 + HS), each in [0, 1]; all 0 for an empty text."""
    words = text.lower().split()
    if not words:
        return 0.0, 0.0, 0.0
    honore = honore_statistic(words)
    return 1 / (1 + perplexity), 1 / (1 + brunet_index(words)), 1.0 if math.isinf(honore) else honore / (1 + honore)


@metric(
    name="linguistic_score",
    definition="ls/1",
    formula="mean of HM(1/(1 + PPL), 1/(1 + BI), HS/(1 + HS)) with Brunet's index BI and Honore's statistic HS",
    direction="higher is better; compare with the original and the reference",
    source="ReLearn (Xu et al. 2025), Linguistic Score: HM of s(-log PPL), s(-log BI), s(log HS), s logistic",
)
def linguistic_score(perplexities: Sequence[float], texts: Sequence[str], groups: Groups = None) -> Estimate:
    """Fluency and variety of the generated language, per output and then averaged.

    ``perplexities`` are the scorer's, of each text; name the scorer beside the number. 1/(1 + PPL) dominates, so
    the score mostly ranks by perplexity, under which short commonplaces do well.
    """
    if len(perplexities) != len(texts):
        raise UserError(f"{len(texts)} texts but {len(perplexities)} perplexities: give one per text.")
    if any(p < 0 for p in perplexities):
        raise UserError("a perplexity is negative: give exp(mean negative log-likelihood), which is at least 1.")
    scores = []
    for perplexity, text in zip(perplexities, texts, strict=True):
        parts = np.array(linguistic_parts(perplexity, text))
        scores.append(0.0 if np.any(parts == 0) else float(3 / np.sum(1 / parts)))
    return bootstrap_mean(scores, groups, definition="ls/1")
