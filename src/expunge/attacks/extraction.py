"""Extraction by greedy decoding: is the text the model's first choice, and how much of it must be given?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from expunge.attacks.continuations import GIVEN, check_lengths, closing_ids, room_for, split_ids, suffix_span
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.metrics.memorization import hit_share, matching_suffix
from expunge.metrics.rouge import rouge_score, words
from expunge.models.sampling import sample_ids, text_adapter
from expunge.options import option
from expunge.stats import Estimate, bootstrap_mean

COMPARED: tuple[Role, ...] = ("forget", "retain", "holdout")  # to forget, known, and never seen


def compared(exam: Exam) -> list[Role]:
    """The roles that are attacked, of those that have samples."""
    return [role for role in COMPARED if exam.samples.get(role)]


def mean_over(exam: Exam, role: Role, values: Sequence[float], definition: str) -> Estimate:
    """Mean of per-sample values of a role, with an interval over its subjects."""
    subjects = [s.subject for s in exam.samples[role]]
    return bootstrap_mean(
        values, subjects, level=exam.level, resamples=exam.resamples, seed=exam.seed, definition=definition
    )


@dataclass(frozen=True, kw_only=True)
class MemorizationOptions:
    """How much of a document is given, and how much has to come back."""

    prefix: int = option(GIVEN, "tokens given of a document; half of a shorter one", "Carlini et al. 2023")
    suffix: int = option(GIVEN, "tokens that have to come back; 0 takes all", "Carlini et al. 2023")


@attack(
    name="memorization",
    family="extraction",
    tier="quick",
    access="log-probabilities",
    paper="Carlini et al. 2021, arXiv 2012.07805; Tirumala et al. 2022, arXiv 2205.10770; Carlini et al. 2023, "
    "arXiv 2202.07646",
    options=MemorizationOptions,
    modalities=("text", "multimodal"),
    formula="strength = 1 - k/L, k tokens given until the rest is the arg-max; exact = share of arg-max tokens; "
    "verbatim = all tokens of the suffix are the arg-max",
)
def memorization(exam: Exam, checkpoint: Checkpoint, options: MemorizationOptions) -> Finding:
    """Extraction strength, exact memorization and verbatim greedy extraction, from signals.

    Greedy decoding gives the suffix word for word exactly if each of its tokens is the arg-max after the true ones,
    so no text has to be generated. Closing tokens are left out of all three. Greedy decoding is a lower bound: an
    attacker who samples gets more (see ``discoverable``).
    """
    check_lengths(options.prefix, options.suffix)
    closing = closing_ids(checkpoint.adapter)
    strength: dict[Role, list[float]] = {}
    exact: dict[Role, list[float]] = {}
    verbatim: dict[Role, list[float]] = {}
    for role in compared(exam):
        samples = exam.samples[role]
        strength[role], exact[role], verbatim[role] = [], [], []
        for sample, signals in zip(samples, checkpoint.signals(samples, exam.progress), strict=True):
            content_L = signals.hit_L[suffix_span(signals.ids_L, True, closing, suffix=0)]
            suffix = suffix_span(signals.ids_L, bool(sample.prompt), closing, options.prefix, options.suffix)
            suffix_L = signals.hit_L[suffix]
            strength[role].append(matching_suffix(content_L))
            exact[role].append(hit_share(content_L))
            verbatim[role].append(float(suffix_L.all()) if len(suffix_L) else math.nan)
    definition = f"verbatim-greedy/1 prefix={options.prefix} suffix={options.suffix}"
    return Finding(
        scores={
            "memorization.strength": strength,
            "memorization.exact": exact,
            "memorization.verbatim": verbatim,
        },
        figures={f"memorization.verbatim.{r}": mean_over(exam, r, verbatim[r], definition) for r in verbatim},
    )


@dataclass(frozen=True, kw_only=True)
class GreedyOptions:
    """What is generated, and from which similarity on it counts as extracted."""

    prefix: int = option(GIVEN, "tokens given of a document; half of a shorter one", "Carlini et al. 2023")
    max_new_tokens: int = option(64, "tokens that are generated")
    alike: float = option(0.75, "similarity that counts as approximately extracted", "Ippolito et al. 2023")


def edit_similarity(wanted: str, given: str) -> float:
    """1 - edit distance in words / words of the longer text, in [0, 1]; nan when no word is wanted."""
    first, second = words(wanted, False), words(given, False)
    if not first:
        return math.nan
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, start=1):
        above, row = row, [i]
        for j, other in enumerate(second, start=1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
    return 1 - row[-1] / max(len(first), len(second))


def greedy_texts(
    checkpoint: Checkpoint, samples: Sequence[Sample], prefix: int, max_new_tokens: int
) -> list[tuple[str, str]]:
    """(wanted, generated) of each sample: answers to prompts, and continuations of documents of the wanted length."""
    adapter = text_adapter(checkpoint.adapter)
    asked = [s for s in samples if s.prompt]
    documents = [s for s in samples if not s.prompt]
    answers = iter(checkpoint.answers(asked, room_for(adapter, max_new_tokens)) if asked else [])
    cuts = [split_ids(adapter, s, prefix, max_new_tokens) for s in documents]
    starts, lengths = [given for given, _ in cuts], [len(wanted) for _, wanted in cuts]
    # One token to choose from is greedy decoding; a document goes on after its suffix, so the length is given.
    told = sample_ids(checkpoint.model, adapter, documents, starts, lengths, n=1, top_k=1) if documents else []
    decode = adapter.tokenizer.decode
    texts = ((decode(cut[1]).strip(), decode(new[0]).strip()) for cut, new in zip(cuts, told, strict=True))
    return [(str(s.target), next(answers)) if s.prompt else next(texts) for s in samples]


@attack(
    name="greedy",
    family="extraction",
    tier="standard",
    access="text",
    paper="Carlini et al. 2023, arXiv 2202.07646; Ippolito et al. 2023, arXiv 2210.17546",
    options=GreedyOptions,
    modalities=("text", "multimodal"),
    formula="max(ROUGE-L F1, 1 - word edit distance / longer length) of the greedy continuation and the true suffix",
    passes=30.0,
)
def greedy(exam: Exam, checkpoint: Checkpoint, options: GreedyOptions) -> Finding:
    """Greedy continuation of the prompt or prefix, compared with the true text word by word.

    Verbatim matching misses a text that comes back with a comma changed; from ``alike`` on the text counts as
    approximately extracted.
    """
    check_lengths(options.prefix, options.max_new_tokens)
    if not 0 < options.alike <= 1:
        raise UserError(f"similarity {options.alike} is not above 0 and at most 1: give for example 0.75.")
    scores: dict[Role, list[float]] = {}
    details: dict[str, dict[str, str]] = {}
    figures: dict[str, Estimate] = {}
    for role in compared(exam):
        pairs = greedy_texts(checkpoint, exam.samples[role], options.prefix, options.max_new_tokens)
        scores[role] = [max(rouge_score(w, g, "rougeL_f1"), edit_similarity(w, g)) for w, g in pairs]
        # A text without any word cannot be compared.
        scores[role] = [s if words(w, False) else math.nan for s, (w, _) in zip(scores[role], pairs, strict=True)]
        alike = [math.nan if math.isnan(s) else float(s >= options.alike) for s in scores[role]]
        same = [math.nan if math.isnan(s) else float(w == g) for s, (w, g) in zip(scores[role], pairs, strict=True)]
        definition = f"approximate-greedy/1 alike={options.alike:g}"
        figures[f"greedy.approximate.{role}"] = mean_over(exam, role, alike, definition)
        figures[f"greedy.exact.{role}"] = mean_over(exam, role, same, "exact-greedy/1")
        if role == "forget":
            ids = [s.id for s in exam.forget]
            details = {i: {"wanted": w, "generated": g} for i, (w, g) in zip(ids, pairs, strict=True)}
    return Finding(scores={"greedy": scores}, figures=figures, details=details)
