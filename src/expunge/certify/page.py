"""``certificate.html``: the claims for people. What is said in one sentence, what it rests on, what it does not say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

VERDICTS = {
    "certified": "This is certified.",
    "evidence-only": "There is evidence, and no guarantee.",
    "refused": "Nothing is certified.",
}
REASONS = {
    "certified": "At least one formal claim (L0 or L1) holds, and no claim is refuted.",
    "evidence-only": "Measured claims (L2 to L5) hold, none is refuted, and none is a formal guarantee.",
    "refused": "A claim is refuted, or the evidence for every claim is missing.",
}
LEVELS = {
    "L0": "exact",
    "L1": "(ε, δ)",
    "L2": "equivalent to retrained models",
    "L3": "bounded divergence",
    "L4": "audited by attacks",
    "L5": "robustness measured",
}
WORDS = {"certified": "holds", "refuted": "refuted", "unsupported": "no evidence"}
SHOWN = 40  # figures on the page; all of them are in the certificate


@cache
def _template() -> Template:
    text = files("expunge.certify").joinpath("certificate.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        text
    )


def page(statement: Mapping[str, Any], certificate: str) -> str:
    """A self-contained HTML page of a statement; ``certificate`` is the name of the file that is signed.

    The page itself is not signed, and says so.
    """
    predicate = statement["predicate"]
    manifest = predicate["model"]["manifest"]
    return _template().render(
        certificate=certificate,
        digest=statement["subject"][0]["digest"]["sha256"],
        files=len(manifest),
        size=f"{sum(f['size'] for f in manifest.values()):,}".replace(",", " "),
        headline=VERDICTS[predicate["verdict"]],
        reason=reason(predicate),
        levels=LEVELS,
        words=WORDS,
        measures=[m | {"text": number(m)} for m in predicate["evidence"]["measures"][:SHOWN]],
        hidden=max(0, len(predicate["evidence"]["measures"]) - SHOWN),
        p=predicate,
    )


def reason(predicate: Mapping[str, Any]) -> str:
    """Why the verdict is what it is."""
    if predicate["lineage"]["original"] == predicate["model"]["recorded"]:
        return "The model is the original, unchanged."
    return REASONS[predicate["verdict"]]


def number(measure: Mapping[str, Any]) -> str:
    """``0.123 [0.101, 0.145]``."""
    value, low, high = (measure[key] for key in ("value", "low", "high"))
    if value is None:
        return "–"
    return f"{value:.3g}" + (f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else "")
