"""What a study is to do: its options, and how a method with settings is written on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from expunge.bench.evaluate import EvaluateOptions
from expunge.data.deletion import sequence
from expunge.data.samples import Dataset
from expunge.errors import UserError
from expunge.methods.registry import Method, all_methods, get_method
from expunge.options import option


@dataclass(frozen=True)
class Entry:
    """A method with its settings; ``label`` names its row."""

    label: str
    method: Method
    settings: dict[str, str] = field(default_factory=dict)

    def configured(self, more: dict[str, Any] | None = None) -> Any:
        return self.method.configure({**self.settings, **(more or {})})


def parse_methods(text: str) -> list[Entry]:
    """``all``, or a comma list of names with settings: ``npo:retain=kl;beta=0.05,cluster``.

    Raises:
        UserError: unknown method or option (the nearest is suggested), or the same entry twice.
    """
    entries: list[Entry] = []
    edits = [n for n in all_methods() if n != "retrain" and not n.startswith("zone-")]  # those need a model with a zone
    names = edits if text.strip() == "all" else text.split(",")
    for raw in names:
        item = raw.strip()
        if not item:
            continue
        name, _, settings_text = item.partition(":") if ".py:" not in item else (item, "", "")
        settings: dict[str, str] = {}
        for pair in filter(None, settings_text.split(";")):
            key, equals, value = pair.partition("=")
            if not equals:
                raise UserError(f"method setting '{pair}' is not key=value: write for example npo:beta=0.05;retain=kl.")
            settings[key.strip()] = value.strip()
        entry = Entry(item, get_method(name), settings)
        entry.configured()
        if any(entry.label == other.label for other in entries):
            raise UserError(f"method '{item}' is listed twice: list it once.")
        entries.append(entry)
    if not entries:
        raise UserError("no method was named: use --methods all, or a comma list such as npo,cluster.")
    return entries


def check_study(dataset: Dataset, options: StudyOptions) -> None:
    """Refuse before anything is trained what the study would stumble over hours later.

    Raises:
        UserError: no retain set, sizes or numbers of requests that the dataset does not have, too few subjects to tune.
    """
    from expunge.bench.tune import validation

    if not dataset["retain"]:
        raise UserError("a study retrains models on the retain set, and there is none: add --retain FILE.")
    total = len(dataset.private)
    for size in options.size_impact:
        if not 0 < size < total:
            raise UserError(f"--size-impact {size}: give numbers from 1 to {total - 1} (the private samples).")
    if len(set(options.size_impact)) < len(options.size_impact):
        raise UserError(f"--size-impact {','.join(map(str, options.size_impact))} names a size twice: name each once.")
    if options.sequential:
        sequence(dataset, options.sequential)
    if options.tune:
        validation(dataset)


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """How a study is run; what is measured stands in ``evaluate``."""

    seeds: int = option(3, "originals, each with its own seed; every method runs once from each")
    references: int = option(3, "models retrained without the forget set, for the floor and the two-sided distances")
    base_epochs: float = option(24.0, "passes over the utility set for a base made by --init")
    epochs: float = option(16.0, "passes over the private set for originals and references")
    learning_rate: float | None = option(None, "their learning rate; by the model's size if none")
    batch_size: int = option(16, "their batch size")
    blind: bool = option(False, "do not give the base to the methods, as when nobody kept it")
    calibration: float = option(0.34, "share of the holdout subjects that methods may see as never-trained text")
    sequential: int = option(0, "split the forget set into so many requests, one after another")
    size_impact: Sequence[int] = option((), "numbers of forget samples to compare")
    tune: int = option(0, "trials per method on validation subjects, before the measured runs")
    keep_models: bool = option(False, "keep the unlearned models in the run folder")
    precision: str = option("fp32", "fp32 or bf16 passes", "", ("fp32", "bf16"))
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
