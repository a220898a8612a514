"""Translation: is what was forgotten in one language still known in others?

The user's own callable translates; without one the attack is skipped. Most unlearning does not reach beyond the
language that it was done in (arXiv:2601.05641, arXiv:2601.06675).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.forms import answer_room, asked
from expunge.attacks.registry import Finding, attack
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.metrics.rouge import rouge_l
from expunge.options import option

INTO = "Translate the following text into {language}. Give the translation alone.\n\n{text}"


@dataclass(frozen=True, kw_only=True)
class TranslationOptions:
    """Which languages are tried, and what the answers were written in."""

    languages: str = option("French,German,Spanish", "languages of the questions, separated by commas")
    own: str = option("English", "language of the samples, into which answers are translated back")
    answers: bool = option(True, "also generate answers and have them translated back")

    def __post_init__(self) -> None:
        """Raises UserError without a language."""
        if not self.names:
            raise UserError("no language was given to translate into: name some, such as French,German.")

    @property
    def names(self) -> list[str]:
        """The languages, each once, in the order given."""
        return list(dict.fromkeys(name.strip() for name in self.languages.split(",") if name.strip()))


@attack(
    name="translation",
    family="recovery",
    tier="full",
    access="text",
    paper="arXiv:2601.06675",
    options=TranslationOptions,
    formula="max over languages of mean_t log p(y_t | translated x, y_<t); .answers: ROUGE-L recall, translated back",
    passes=35.0,  # three languages: one pass and one greedy answer each
    needs={"llm"},
    modalities={"text", "multimodal"},
)
def translation(exam: Exam, checkpoint: Checkpoint, options: TranslationOptions) -> Finding:
    """Questions in other languages, translated by the user's callable; the best language counts.

    ``translation``: log-probability of the original answer, its tokens unchanged, after the translated question.
    ``translation.answers``: ROUGE-L recall of the greedy answer to it, translated back. A question is translated once
    for all checkpoints. Where the callable gives no text, the language is left out for that sample.
    """
    roles: tuple[Role, ...] = ("forget", "holdout")
    scores: dict[str, dict[Role, list[float]]] = {"translation": {}}
    failed = 0
    for role in roles:
        samples = exam.samples.get(role, [])
        variants = [[translated(s, language, exam) for language in options.names] for s in samples]
        failed += sum(v is None for group in variants for v in group)
        kept = [[v for v in group if v is not None] for group in variants]
        signals = iter(checkpoint.signals([v for group in kept for v in group]))
        if samples:
            scores["translation"][role] = [max((-next(signals).loss for _ in g), default=math.nan) for g in kept]
        if role == "forget" and options.answers:
            checkpoint.answers([v for group in kept for v in group], answer_room(exam))  # in batches, kept for below
    details: dict[str, dict[str, str]] = {}
    if options.answers:
        scores["translation.answers"] = {"forget": []}
        for sample in exam.forget:
            value, text = answered(sample, exam, checkpoint, options)
            scores["translation.answers"]["forget"].append(value)
            if text:
                details[sample.id] = {"translation.answer": text}
    notes = [f"translation: {failed} question(s) came back without text and were left out."] if failed else []
    return Finding(scores, details=details, notes=notes)


def translated(sample: Sample, language: str, exam: Exam) -> Sample | None:
    """The sample with its question in another language, its answer as it was; None where there is no translation."""
    question = asked(sample)
    text = None if question is None else ask(INTO.format(language=language, text=question.prompt), exam)
    return replace(question, prompt=text, probes=()) if question is not None and text else None


def answered(sample: Sample, exam: Exam, checkpoint: Checkpoint, options: TranslationOptions) -> tuple[float, str]:
    """(best ROUGE-L recall over the languages, the answer that had it, translated back); nan without any answer."""
    best, kept = math.nan, ""
    for language in options.names:
        question = translated(sample, language, exam)
        if question is None:
            continue
        spoken = checkpoint.answers([question], answer_room(exam))[0]
        back = ask(INTO.format(language=options.own, text=spoken), exam) if spoken else ""
        # Names and numbers may stand in the answer as they are, and get lost on the way back.
        for text in (spoken, back):
            value = rouge_l(str(question.target), text).recall
            if math.isnan(best) or value > best:
                best, kept = value, text
    return best, kept


def ask(request: str, exam: Exam) -> str:
    """What the user's callable says, asked once for each request; "" when it says nothing.

    Raises:
        UserError: it gave something other than a text.
    """
    assert exam.llm is not None  # declared as a need
    key = ("translation", request)
    if key not in exam.shared:
        text = exam.llm(request)
        if text is not None and not isinstance(text, str):
            raise UserError(f"the llm gave a {type(text).__name__}, not a text: it must be a callable prompt -> text.")
        exam.shared[key] = (text or "").strip()
    return str(exam.shared[key])
