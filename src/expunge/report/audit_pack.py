"""The worst samples of an audit as the page carries them: short numbers, texts cut, scores as columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from expunge.report.audit_schema import Drill, Tokens
from expunge.report.samples import clip, short

TOKEN_LIMIT = 600  # tokens of one sample in the page
DETAIL_LIMIT = 2_000  # characters of what one attack says of one sample
NEIGHBOUR_LIMIT = 10


def pack_drill(worst: Sequence[Drill], models: Sequence[tuple[str, str]], total: int) -> dict[str, Any]:
    """``{"models": [[name, kind]], "scores": [name], "samples": [{...}], "total"}``; every text is as it was given.

    ``scores`` of a sample are ``[audited, original, reference, low, high]`` or null, in the order of the names.
    """
    scores = list(dict.fromkeys(name for drill in worst for name in drill.scores))
    return {
        "models": [[clip(name), kind] for name, kind in models],
        "scores": scores,
        "samples": [_sample(drill, scores) for drill in worst],
        "total": total,
    }


def _sample(drill: Drill, scores: Sequence[str]) -> dict[str, Any]:
    numbers = {
        name: short(getattr(drill, name))
        for name in ("completeness", "completeness_attacked", "position", "p_under", "p_over")
    }
    return {
        "id": clip(drill.id),
        "subject": clip(drill.subject),
        "prompt": clip(drill.prompt),
        "target": clip(drill.target),
        "verdict": drill.verdict,
        "view": clip(drill.view or ""),
        **numbers,
        "losses": {clip(name): short(loss) for name, loss in drill.losses.items()},
        "tokens": _tokens(drill.tokens) if drill.tokens is not None else None,
        "scores": [_five(drill, name) for name in scores],
        "answers": {clip(name): clip(text) for name, text in drill.answers.items() if text is not None},
        "neighbours": [
            [clip(n.id), clip(n.target), short(n.similarity), short(n.loss_audited), short(n.loss_reference)]
            for n in drill.neighbours[:NEIGHBOUR_LIMIT]
        ],
        "details": {clip(name): _detail(content) for name, content in drill.details.items()},
    }


def _five(drill: Drill, name: str) -> list[float | None] | None:
    score = drill.scores.get(name)
    if score is None:
        return None
    return [short(v) for v in (score.audited, score.original, score.reference, score.low, score.high)]


def _tokens(tokens: Tokens) -> dict[str, Any]:
    """Columns of equal length; ``more`` counts the tokens that were cut."""
    num = min(len(tokens.text), len(tokens.audited))
    kept = min(num, TOKEN_LIMIT)

    def column(values: Sequence[float | None] | None) -> list[float | None] | None:
        return None if values is None or len(values) < num else [short(v, 3) for v in values[:kept]]

    return {
        "text": tokens.text[:kept],
        "audited": column(tokens.audited),
        "original": column(tokens.original),
        "reference": column(tokens.reference),
        "more": num - kept,
    }


def _detail(content: Any) -> list[list[str]]:
    """What an attack says, as pairs of word and text."""
    pairs = content.items() if isinstance(content, dict) else [("", content)]
    return [[clip(str(word)), clip(_text(value), DETAIL_LIMIT)] for word, value in pairs]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    return json.dumps(value, ensure_ascii=False, indent=1)
