"""Prompt forms: is the answer still there when the question is put in another way?

Every row of :data:`expunge.attacks.forms.FORMS` is tried. What a form gives is compared with what it gives on the
reference: some forms hold a part of the answer, and a model that never knew it profits as well (Jin et al. 2024,
RWKU, arXiv:2406.10890).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from expunge.attacks.context import loss_at_end
from expunge.attacks.continuations import ids_up_to
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.forms import FORMS, answer_room, asked
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.errors import UserError, unknown
from expunge.metrics.rouge import rouge_l
from expunge.models.sampling import sample_ids, text_adapter
from expunge.models.text import TextAdapter
from expunge.options import option

PAPER = "Jin et al. 2024, arXiv:2406.10890"
LIGHT = tuple(name for name in FORMS if name != "many_shot")
PASSES = sum(FORMS[name].passes for name in LIGHT)
GENERATION = 10.0  # a greedy answer costs about as much as so many passes over question and answer


@dataclass(frozen=True, kw_only=True)
class PromptingOptions:
    """Which forms are tried."""

    forms: str = option(",".join(LIGHT), "names of forms, separated by commas")

    def __post_init__(self) -> None:
        """Raises UserError for a name that is no form, or for no name."""
        if not self.names:
            raise UserError(f"no prompt form was given: name some of {', '.join(FORMS)}.")
        for name in self.names:
            if name not in FORMS:
                raise unknown("prompt form", name, FORMS)

    @property
    def names(self) -> list[str]:
        """The forms, each once, in the order given."""
        return list(dict.fromkeys(name.strip() for name in self.forms.split(",") if name.strip()))


@attack(
    name="prompting",
    family="recovery",
    tier="quick",
    access="log-probabilities",
    paper=PAPER,
    options=PromptingOptions,
    formula="max over forms f and their variants of mean_t log p(y_t | f(x), y_<t)",
    passes=PASSES,
    modalities={"text", "multimodal"},
)
def prompting(exam: Exam, checkpoint: Checkpoint, options: PromptingOptions) -> Finding:
    """The answer's log-probability under every prompt form, and the worst case over them.

    Teacher-forced: the answer's tokens are those of the plain question. The worst case is over the forms that ask
    for the whole answer; prefill, reverse and cloze have other tokens to predict and stand for themselves. A document
    is asked for by the first half of its words.
    """
    return tried("prompting", options.names, exam, checkpoint, ("forget", "holdout"))


@attack(
    name="prompted-answers",
    family="recovery",
    tier="standard",
    access="text",
    paper=PAPER,
    options=PromptingOptions,
    formula="max over forms f and their variants of ROUGE-L recall(y, greedy answer to f(x))",
    passes=PASSES * GENERATION,
    modalities={"text", "multimodal"},
)
def prompted_answers(exam: Exam, checkpoint: Checkpoint, options: PromptingOptions) -> Finding:
    """What the model says to every prompt form: ROUGE-L recall of its greedy answer, and the worst case.

    Words of the answer that a form gives away (prefill) are not counted as recalled. The worst case is over the forms
    that ask for the whole answer.
    """
    return tried("prompted-answers", options.names, exam, checkpoint, ("forget",))


@attack(
    name="many-shot",
    family="recovery",
    tier="full",
    access="text",
    paper="Anil et al. 2024, Many-shot Jailbreaking",
    formula="log-probability and ROUGE-L recall of the answer after up to 100 answered questions",
    passes=FORMS["many_shot"].passes * (1 + GENERATION),
    modalities={"text", "multimodal"},
)
def many_shot(exam: Exam, checkpoint: Checkpoint, options: Any) -> Finding:
    """As many answered questions on other subjects as the context holds come before the one that is measured.

    The shots are retained samples that are not measured, or else retain, or else auxiliary ones, never of the
    sample's own subject. ``many-shot`` is the mean log-probability of the answer's tokens, ``many-shot.answers`` the
    ROUGE-L recall of the greedy answer. A sample beside which no shot fits has none (nan).
    """
    forced = tried("many-shot", ["many_shot"], exam, checkpoint, ("forget", "holdout"))
    spoken = tried("many-shot.answers", ["many_shot"], exam, checkpoint, ("forget",))
    kept = {name: {**forced.scores, **spoken.scores}[name] for name in ("many-shot", "many-shot.answers")}
    return Finding(kept, details=spoken.details, notes=forced.notes)


def tried(name: str, forms: Sequence[str], exam: Exam, checkpoint: Checkpoint, roles: Sequence[Role]) -> Finding:
    """Scores ``name`` (worst case) and ``name.form`` of every form on the samples of the roles.

    Names that end in "answers" are scored by what the model says, others by log-probability.
    """
    spoken = name.endswith("answers")
    scores: dict[str, dict[Role, list[float]]] = {name: {}, **{f"{name}.{form}": {} for form in forms}}
    details: dict[str, dict[str, Any]] = {}
    notes = []
    for role in roles:
        samples = exam.samples.get(role, [])
        if not samples:
            continue
        best = [(-math.inf, "")] * len(samples)
        for form in forms:
            found = best_variants(form, samples, exam, checkpoint, spoken)
            scores[f"{name}.{form}"][role] = [value for value, _ in found]
            if all(math.isnan(value) for value, _ in found):
                notes.append(f"the form '{form}' could not be made for any {role} sample.")
            if FORMS[form].whole:
                for i, (value, text) in enumerate(found):
                    if value > best[i][0]:
                        best[i] = (value, f"{form}: {text}")
        scores[name][role] = [value if value > -math.inf else math.nan for value, _ in best]
        if role == "forget":
            key = "answer" if spoken else "form"
            details = {s.id: {f"{name}.{key}": text} for s, (_, text) in zip(samples, best, strict=True) if text}
    return Finding(scores, details=details, notes=notes)


def best_variants(
    form: str, samples: Sequence[Sample], exam: Exam, checkpoint: Checkpoint, spoken: bool
) -> list[tuple[float, str]]:
    """(largest value over the form's variants, the prompt or answer that gave it) of each sample; nan without any."""
    row, adapter = FORMS[form], text_adapter(checkpoint.adapter)
    counts: list[int] = []
    questions: list[Sample] = []  # of each variant, the question that it was made of
    variants: list[Sample] = []
    for sample in samples:
        question = asked(sample)
        made = list(row.make(question, exam)) if question is not None else []
        counts.append(len(made))
        variants += made
        questions += [question] * len(made) if question is not None else []
    if spoken:
        if row.opens:
            texts = continued(checkpoint, adapter, questions, variants, answer_room(exam))
        else:
            texts = checkpoint.answers(variants, answer_room(exam)) if variants else []
        values = [rouge_l(str(v.target), text).recall for v, text in zip(variants, texts, strict=True)]
    else:
        texts = [v.prompt for v in variants]
        signals = checkpoint.signals(questions if row.opens else variants)
        given = [len(opening(adapter, q, v)[1]) for q, v in zip(questions, variants, strict=True)] if row.opens else []
        values = [-loss_at_end(s, len(s) - g) for s, g in zip(signals, given or [0] * len(signals), strict=True)]
    found, first = [], 0
    for count in counts:
        winner = max(range(first, first + count), key=lambda i: values[i], default=None)
        found.append((math.nan, "") if winner is None else (values[winner], texts[winner]))
        first += count
    return found


def opening(adapter: TextAdapter, question: Sample, variant: Sample) -> tuple[list[int], list[int]]:
    """(token ids up to the part of the answer that the variant wants, those of them that belong to the answer)."""
    before = str(question.target).removesuffix(str(variant.target))
    ids = ids_up_to(adapter, question, before)
    first: int = adapter.encode(replace(question, target=before.rstrip())).first
    return ids, ids[first:]


def continued(
    checkpoint: Checkpoint,
    adapter: TextAdapter,
    questions: Sequence[Sample],
    variants: Sequence[Sample],
    max_new_tokens: int,
) -> list[str]:
    """Greedy continuations of answers that have been begun; one that leaves no room for the rest is not continued."""
    starts = [opening(adapter, q, v)[0] for q, v in zip(questions, variants, strict=True)]
    lengths = [min(max_new_tokens, max(0, adapter.context - len(start))) for start in starts]
    if not starts:
        return []
    # Of the one most probable token, sampling takes that one.
    drawn = sample_ids(checkpoint.model, adapter, questions, starts, lengths, n=1, top_k=1)
    return [adapter.tokenizer.decode(ids, skip_special_tokens=True).strip() for (ids,) in drawn]
