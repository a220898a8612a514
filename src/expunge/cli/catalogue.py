"""What can be named on the command line, read from the registries into one form for ``ls`` and ``show``."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

KINDS = ("methods", "scopes", "attacks", "metrics", "datasets", "models")
# Which attribute of a registry's entry is shown under which word, in reading order.
SHOWN = {
    "modality": "modality",
    "modalities": "modalities",
    "needs": "needs",
    "wants": "uses if given",
    "removes_from_weights": "removes from weights",
    "helpers_hold_data": "helper models hold the data",
    "sequential": "sequence of requests",
    "changes": "changes",
    "family": "family",
    "tier": "from suite",
    "access": "attacker sees",
    "high": "a high score",
    "passes": "cost in passes",
    "definition": "definition",
    "direction": "good is",
    "licence": "licence",
}
# What a high score of an attack says, by its family; scores are always turned this way round.
HIGH = {
    "membership": "the sample is more likely one that the model was trained on",
    "extraction": "more of the text or its facts can be got out",
    "recovery": "more comes back under the attack",
}
# What an attack cannot run without, in words.
NEEDS = {
    "holdout": "holdout samples",
    "aux": "texts that no model has seen (a third of the holdout subjects)",
    "retain": "retain samples",
    "utility": "utility samples",
    "original": "the original",
    "other": "another model that never saw the samples, for a reference too",
    "base": "the base",
    "probes": "samples with probes",
    "names": "samples with names",
    "llm": "a callable prompt -> text, from Python",
}


@dataclass(frozen=True)
class Entry:
    """One thing with a name. ``properties`` are declared by it, ``options`` are the fields that ``--set`` takes."""

    kind: str
    name: str
    summary: str
    source: str = ""
    formula: str = ""
    properties: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[Mapping[str, Any], ...] = ()
    doc: str = ""


def catalogue(kind: str) -> dict[str, Entry]:
    """Everything of one of :data:`KINDS` by name."""
    entries = {
        "methods": _methods,
        "scopes": _scopes,
        "attacks": _attacks,
        "metrics": _metrics,
        "datasets": _datasets,
        "models": _models,
    }[kind]()
    return {name: _entry(kind, name, found) for name, found in sorted(entries.items())}


def _methods() -> Mapping[str, Any]:
    from expunge.methods.registry import all_methods

    return all_methods()


def _scopes() -> Mapping[str, Any]:
    from expunge.methods.scope import all_selectors

    return all_selectors()


def _datasets() -> Mapping[str, Any]:
    from expunge.data.registry import all_datasets

    return all_datasets()


def _metrics() -> Mapping[str, Any]:
    return {name: metric for name, metric in _measures().items() if not _is_attack(metric)}


def _attacks() -> Mapping[str, Any]:
    from expunge.attacks.registry import all_attacks

    return all_attacks()


def _measures() -> Mapping[str, Any]:
    """The table of metrics, filled by every module of the attacks too."""
    from expunge.metrics.registry import all_metrics

    package = importlib.import_module("expunge.attacks")
    for found in pkgutil.iter_modules(package.__path__, "expunge.attacks."):
        importlib.import_module(found.name)
    return all_metrics()


def _is_attack(metric: Any) -> bool:
    return str(metric.measure.__module__).startswith("expunge.attacks")


def _models() -> Mapping[str, Any]:
    """What can be built from nothing; any folder or hub name can be given beside it."""
    from expunge.models.tiny import KINDS, PRESETS

    kinds = {name: SimpleNamespace(summary=text) for named in KINDS.values() for name, text in named.items()}
    return kinds | {
        name: SimpleNamespace(
            summary=f"untrained Llama: {preset.layers} layers of width {preset.width}, {preset.heads} heads, at most "
            f"{preset.vocab} tokens in the vocabulary, context {preset.context}"
        )
        for name, preset in PRESETS.items()
    }


def _entry(kind: str, name: str, found: Any) -> Entry:
    def get(*names: str) -> str:
        return next((str(value) for key in names if (value := getattr(found, key, ""))), "")

    options = getattr(found, "options", None)
    properties = {key: getattr(found, key) for key in SHOWN if hasattr(found, key)}
    if kind == "attacks":
        properties["high"] = HIGH[properties["family"]]
    return Entry(
        kind=kind,
        name=name,
        summary=get("summary"),
        source=get("paper", "origin", "source"),
        formula=get("formula"),
        properties=properties,
        options=_options(options) if isinstance(options, type) else (),
        doc=readable(get("doc"), get("summary")),
    )


def readable(doc: str, summary: str) -> str:
    """A docstring for users: without the first line, where that is the summary, and without roles and double ticks.

    >>> readable("Adds one.\n\nSee :func:`add`, or ``--fast``.\n\nRaises:\n    UserError: x.", "Adds one.")
    'See `add`, or `--fast`.'
    """
    text = doc.removeprefix(summary).split("\nRaises:\n")[0]
    return re.sub(r":\w+:(?=`)", "", text).replace("``", "`").strip()


def _options(options: type[Any]) -> tuple[Mapping[str, Any], ...]:
    hints = typing.get_type_hints(options)
    return tuple(
        {
            "name": f.name,
            "type": getattr(hints[f.name], "__name__", "") if isinstance(hints[f.name], type) else str(hints[f.name]),
            "default": None if f.default is dataclasses.MISSING else f.default,
            "meaning": f.metadata.get("meaning", ""),
            "source": f.metadata.get("source", ""),
            "choices": list(f.metadata.get("choices", ())),
        }
        for f in dataclasses.fields(options)
    )
