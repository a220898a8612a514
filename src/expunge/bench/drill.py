"""One line per forget sample: tokens, answers, scores under every model, and the nearest samples that stay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding
from expunge.bench.judge import Judged
from expunge.completeness.calibration import Completeness
from expunge.completeness.views import UnderAttack
from expunge.data.samples import Sample

NEIGHBOURS = 3


def drill_rows(
    exam: Exam,
    findings: Mapping[str, Mapping[str, Finding]],
    rows: Sequence[Judged],
    answers: Completeness | None,
    deeper: UnderAttack | None = None,
) -> list[dict[str, Any]]:
    """What ``drill.jsonl`` holds, in the order of the forget samples."""
    everyone = [*exam.checkpoints, *exam.shadows]
    losses = {c.name: [s.loss for s in c.signals(exam.forget)] for c in everyone}
    tokens = _tokens(exam)
    replies = _answers(exam)
    near = _neighbours(exam)
    lines = []
    for i, sample in enumerate(exam.forget):
        line: dict[str, Any] = {
            "id": sample.id,
            "subject": sample.subject,
            "prompt": sample.prompt,
            "target": str(sample.target),
        }
        if answers is not None:
            line |= {
                "verdict": answers.verdict_N[i],
                "completeness": answers.completeness_N[i],
                "score": answers.score_N[i],
                "position": answers.position_N[i],
                "p_under": answers.p_under_N[i],
                "p_over": answers.p_over_N[i],
            }
        if deeper is not None:
            line |= {"completeness_attacked": deeper.answer.completeness_N[i], "view": deeper.view_N[i]}
        details = {
            name: found[exam.audited.name].details[sample.id]
            for name, found in findings.items()
            if sample.id in found[exam.audited.name].details
        }
        line |= {
            "losses": {name: own[i] for name, own in losses.items()},
            "tokens": tokens[i],
            "scores": {row.panel.score: _score(row, exam, i) for row in rows if _is_on_forget(row)},
            "answers": {name: own.get(sample.id) for name, own in replies.items()},
            "neighbours": near[i],
            "details": details,
        }
        lines.append(line)
    return lines


def _is_on_forget(row: Judged) -> bool:
    return all("forget" in values for values in row.panel.models.values())


def _score(row: Judged, exam: Exam, place: int) -> dict[str, float | None]:
    def of(name: str) -> float:
        return float(row.panel.models[name]["forget"][place]) if name in row.panel.models else math.nan

    theirs = [v for v in map(of, row.panel.references) if math.isfinite(v)]
    known = {
        "audited": of(exam.audited.name),
        "original": of(exam.original.name) if exam.original else math.nan,
        "reference": float(np.mean(theirs)) if theirs else math.nan,
        "low": min(theirs, default=math.nan),
        "high": max(theirs, default=math.nan),
    }
    return {name: value if math.isfinite(value) else None for name, value in known.items()}


def _tokens(exam: Exam) -> list[dict[str, Any] | None]:
    """Log-probability of each target token under the audited model, the original and the references' mean.

    Models with another tokenizer are left out: their tokens are not these.
    """
    tokenizer = getattr(exam.audited.adapter, "tokenizer", None)
    if tokenizer is None:
        return [None] * len(exam.forget)
    own = exam.audited.signals(exam.forget)

    def of(checkpoint: Checkpoint | None) -> list[list[float] | None]:
        if checkpoint is None:
            return [None] * len(own)
        theirs = checkpoint.signals(exam.forget)
        return [
            [float(v) for v in b.log_prob_L] if np.array_equal(a.ids_L, b.ids_L) else None
            for a, b in zip(own, theirs, strict=True)
        ]

    audited, original = of(exam.audited), of(exam.original)
    references = [of(c) for c in exam.references]
    rows: list[dict[str, Any] | None] = []
    for i, signals in enumerate(own):
        theirs = [r[i] for r in references if r[i] is not None]
        rows.append(
            {
                "text": [tokenizer.decode([int(token)]) for token in signals.ids_L],
                "audited": audited[i],
                "original": original[i],
                "reference": [float(v) for v in np.mean(np.array(theirs, dtype=np.float64), axis=0)]
                if theirs
                else None,
            }
        )
    return rows


def _answers(exam: Exam) -> dict[str, dict[str, str]]:
    asked = [s for s in exam.forget if s.prompt]
    if not exam.audited.adapter.can_generate or not asked:
        return {}
    return {c.name: dict(zip([s.id for s in asked], c.answers(asked), strict=True)) for c in exam.checkpoints}


def _neighbours(exam: Exam) -> list[list[dict[str, Any]]]:
    """The retain samples whose words are nearest (TF-IDF cosine): what unlearning may have damaged."""
    kept = exam.samples.get("retain", [])
    if exam.modality == "classifier" or not kept:
        return [[] for _ in exam.forget]
    from sklearn.feature_extraction.text import TfidfVectorizer

    def text(sample: Sample) -> str:
        return f"{sample.prompt} {sample.target}"

    try:
        words = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit([text(s) for s in [*exam.forget, *kept]])
    except ValueError:  # no sample has a word
        return [[] for _ in exam.forget]
    forget_NW, kept_MW = words.transform(map(text, exam.forget)), words.transform(map(text, kept))
    own = [s.loss for s in exam.audited.signals(kept)]
    theirs = [[s.loss for s in c.signals(kept)] for c in exam.references]
    rows = []
    for row_W in forget_NW:  # one at a time: the whole table may be larger than the models
        line = (row_W @ kept_MW.T).toarray()[0]
        nearest = np.argsort(-line, kind="stable")[:NEIGHBOURS]
        rows.append(
            [
                {
                    "id": kept[j].id,
                    "target": str(kept[j].target),
                    "similarity": float(line[j]),
                    "loss_audited": own[j],
                    "loss_reference": float(np.mean([r[j] for r in theirs])) if theirs else None,
                }
                for j in nearest
            ]
        )
    return rows
