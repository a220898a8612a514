"""``samples.jsonl`` as the report reads it: one line per sample and model, texts shared, damage reported."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

TEXT_FIELDS = ("model", "method", "seed", "id", "subject", "role", "prompt", "target", "generated", "verdict")
VERDICTS = ("under-unlearned", "adequate", "over-unlearned", "not-auditable")
# Runs of earlier versions say the same in other words
EARLIER = {"still-remembered": VERDICTS[0], "like-retrained": VERDICTS[1], "over-forgotten": VERDICTS[2]}
EMBED_LIMIT = 20_000  # rows in the page: about 4 MB; every row stays in samples.jsonl
TEXT_LIMIT = 4_000  # characters of one text in the page
_FIRST_NUMBERS = ("loss", "original_loss", "reference_loss", "prob", "tv")
FIRST_ROLES = {"forget": 0, "holdout": 1, "retain": 2, "utility": 3}


@dataclass
class SampleRecord:
    """The readable lines of ``samples.jsonl``; ``damaged`` counts lines that are not JSON objects."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0
    present: bool = False

    def values(self, model: str, name: str, role: str = "forget") -> list[float]:
        """Finite values of one number over the samples of one model in one role."""
        found = (row.get(name) for row in self.rows if row.get("model") == model and row.get("role") == role)
        return [float(v) for v in found if _is_number(v)]


def load_samples(folder: Path) -> SampleRecord:
    """Read ``samples.jsonl``; a missing file gives an empty record, a broken line is counted and left out."""
    path = Path(folder) / "samples.jsonl"
    record = SampleRecord(present=path.is_file())
    if not record.present:
        return record
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                row = None
            if isinstance(row, dict) and "id" in row:
                verdict = row.get("verdict")
                if isinstance(verdict, str):
                    row["verdict"] = EARLIER.get(verdict, verdict)
                record.rows.append(row)
            else:
                record.damaged += 1
    return record


def verdict_counts(rows: Sequence[dict[str, Any]], models: Collection[str] = ()) -> dict[str, Counter[str]]:
    """Per method, how many forget samples (over all its seeds) have each verdict.

    ``models`` restricts to these model names (the main study); empty means all.
    """
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        verdict = row.get("verdict")
        if row.get("role") != "forget" or not verdict or (models and row.get("model") not in models):
            continue
        counts.setdefault(str(row.get("method", "")), Counter())[str(verdict)] += 1
    return counts


def number_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the numeric fields, those that the verdict rests on first, then in order of first appearance."""
    names = dict.fromkeys(
        name for row in rows for name, value in row.items() if name not in TEXT_FIELDS and _is_number(value)
    )
    first = [name for name in _FIRST_NUMBERS if name in names]
    return first + [name for name in names if name not in first]


def pack(rows: Sequence[dict[str, Any]], methods: Sequence[str] = (), limit: int = EMBED_LIMIT) -> dict[str, Any]:
    """Rows as columns for the page: texts once per sample, numbers rounded to 5 digits.

    ``{"numbers": [name], "models": [[model, method, seed]], "texts": [[id, subject, role, prompt, target]],
    "rows": [[text, model, verdict, generated, number…]], "total": int}``. Rows come in the order of ``methods``, the
    forget set first. When there are more than ``limit``, forget samples and the under-unlearned among them are kept.
    """
    place = {method: i for i, method in reversed(list(enumerate(methods)))}
    kept = list(rows)
    if len(kept) > limit:
        kept.sort(key=lambda r: (FIRST_ROLES.get(str(r.get("role")), 4), r.get("verdict") != "under-unlearned"))
        kept = kept[:limit]
    kept.sort(key=lambda r: (place.get(str(r.get("method")), len(place)), FIRST_ROLES.get(str(r.get("role")), 4)))
    numbers = number_names(kept)
    texts: dict[tuple[str, ...], int] = {}
    models: dict[tuple[str, str, str], int] = {}
    packed: list[list[Any]] = []
    for row in kept:
        text = tuple(clip(row.get(name)) for name in ("id", "subject", "role", "prompt", "target"))
        model = (clip(row.get("model")), clip(row.get("method")), clip(row.get("seed")))
        packed.append(
            [
                texts.setdefault(text, len(texts)),
                models.setdefault(model, len(models)),
                row.get("verdict") if isinstance(row.get("verdict"), str) else None,
                None if row.get("generated") is None else clip(row["generated"]),
                *(short(row.get(name)) for name in numbers),
            ]
        )
    return {
        "numbers": numbers,
        "models": [list(model) for model in models],
        "texts": [list(text) for text in texts],
        "rows": packed,
        "total": len(rows),
    }


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def short(value: Any, digits: int = 5) -> float | None:
    """A number with few digits; None for what is none."""
    return float(f"{value:.{digits}g}") if _is_number(value) else None


def clip(value: Any, limit: int = TEXT_LIMIT) -> str:
    """A text no longer than the page carries; it says how much was cut."""
    text = "" if value is None else str(value)
    return text if len(text) <= limit else text[:limit] + f" … ({len(text) - limit} more characters)"
