"""What a study is to do: its options, and how a method with settings is written on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from expunge.bench.evaluate import EvaluateOptions
from expunge.data.deletion import sequence
from expunge.data.samples import Dataset, Modality, Sample
from expunge.errors import UserError, unknown
from expunge.methods.compose import chain
from expunge.methods.registry import Method, all_methods, get_method
from expunge.methods.scope import Scope, get_scope
from expunge.options import name_and_settings, option

# Settings that every method has.
SCOPE = "scope"
THROUGH = "through"
WAYS = ("all", "image", "text")


@dataclass(frozen=True)
class Entry:
    """A method with its settings; ``label`` names its row.

    Settings ``scope`` and ``scope.KEY`` name a selector of weights and its options; ``through`` says which forget
    samples the method is shown: all, those with an image, or those of text alone (CLEAR, arXiv:2410.18057, forgets a
    person through either or both). ``then``: methods that edit the result afterwards, each with settings of its own.
    """

    label: str
    method: Method
    settings: dict[str, str] = field(default_factory=dict)
    then: tuple[Entry, ...] = ()

    def scope(self) -> Scope | None:
        """Which weights may move; None for all."""
        own = {k.removeprefix(SCOPE + "."): v for k, v in self.settings.items() if k.startswith(SCOPE + ".")}
        return get_scope(self.settings.get(SCOPE, "all"), own)

    def configured(self, more: Mapping[str, Any] | None = None) -> Any:
        """The first method's options."""
        settings = {**self.settings, **(more or {})}
        return self.method.configure({k: v for k, v in settings.items() if k.split(".")[0] not in (SCOPE, THROUGH)})

    def forget(self, samples: Sequence[Sample]) -> tuple[Sample, ...]:
        """Of the forget set, what the method is shown.

        Raises:
            UserError: there is no such way, or nothing to forget through it.
        """
        way = self.settings.get(THROUGH, "all")
        if way not in WAYS:
            raise UserError(unknown("way to forget through", way, WAYS))
        kept = tuple(s for s in samples if way == "all" or (s.image is None) == (way == "text"))
        if samples and not kept:
            raise UserError(
                f"no forget sample {'comes with an image' if way == 'image' else 'is text alone'}, so there is nothing "
                f"to forget through={way}: leave it out, or choose data of both kinds."
            )
        return kept

    def whole(self, more: Mapping[str, Any] | None = None) -> tuple[Method, Any]:
        """What is run: the method, or the chain of methods, and the options of the first."""
        options = self.configured(more)
        if not self.then:
            return self.method, options
        return chain([(self.method, options), *(step.whole() for step in self.then)]), options


def entry_of(label: str, name: str, settings: Mapping[str, str], then: Sequence[Entry] = ()) -> Entry:
    """An entry whose options and scope have been read once, so that what is wrong shows before anything is loaded."""
    entry = Entry(label, get_method(name), dict(settings), tuple(then))
    entry.whole()
    entry.scope()
    entry.forget(())
    return entry


def parse_methods(text: str) -> list[Entry]:
    """``all``, or a comma list of names with settings: ``npo:retain=kl;beta=0.05,cluster``.

    ``npo:scope=salun;scope.share=0.3`` restricts a method to some weights, ``npo:through=image`` shows it the forget
    samples with an image alone; ``npo>task-vector:scale=0.5`` runs one after another.

    Raises:
        UserError: unknown method or option (the nearest is suggested), or the same entry twice.
    """
    entries: list[Entry] = []
    names = everything() if text.strip() == "all" else text.split(",")
    for raw in names:
        item = raw.strip()
        if not item:
            continue
        first, *rest = (parse_method(step.strip()) for step in item.split(">"))
        entry = replace(first, label=item, then=tuple(rest))
        if any(entry.label == other.label for other in entries):
            raise UserError(f"method '{item}' is listed twice: list it once.")
        entries.append(entry)
    if not entries:
        raise UserError("no method was named: use --methods all, or a comma list such as npo,cluster.")
    return entries


def everything(modality: Modality | None = None) -> list[str]:
    """The methods that ``all`` stands for: every one that a study of such models can run on its own."""
    found = all_methods()
    alone = [n for n, m in found.items() if m.changes not in ("new", "memory") and "llm" not in m.needs]
    # Retraining is the yardstick, and zones need a model with a zone.
    return [n for n in alone if modality is None or modality in found[n].modalities]


def parse_method(item: str) -> Entry:
    """``name``, or ``name:key=value;…``.

    Raises:
        UserError: see :func:`parse_methods`.
    """
    name, settings = name_and_settings(item, "method", "npo:beta=0.05;retain=kl")
    return entry_of(item, name, settings)


def check_study(dataset: Dataset, options: StudyOptions, entries: Sequence[Entry] = ()) -> None:
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
    if not 0 <= options.matched <= 100:
        raise UserError(f"--matched {options.matched}: give a percentage from 1 to 100, such as 98.")
    for entry in entries:
        entry.forget(dataset["forget"])
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
    matched: int = option(0, "compare at this percentage of the original's retain probability too; 0 = do not")
    keep_models: bool = option(False, "keep the unlearned models in the run folder")
    precision: str = option("fp32", "fp32 or bf16 passes", "", ("fp32", "bf16"))
    evaluate: EvaluateOptions = field(default_factory=EvaluateOptions)
