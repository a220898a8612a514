"""A study: methods × seeds against several retrained references, with control rows; sequences; deletion sizes.

Every row is written to ``rows/`` as soon as it is measured, so that running the same command again goes on where it
stopped. results.json and samples.jsonl are made from these files alone.
"""

from __future__ import annotations

import copy
import gc
import math
import re
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from expunge.bench import results
from expunge.bench.cost import Cost, measure
from expunge.bench.evaluate import Evaluation, References, evaluate
from expunge.bench.matched import at_level
from expunge.bench.plan import Entry, StudyOptions
from expunge.bench.prepare import Workshop, split_holdout
from expunge.bench.tune import tuned
from expunge.data.deletion import by_size, sequence
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.methods.registry import Context, Method, Outcome
from expunge.models.load import Loaded, save_model
from expunge.progress import Progress, clock
from expunge.runs import Run

RANDOM_EDIT = 0.02  # relative norm of the random change of each tensor where no method's change is known


@dataclass
class Study:
    """One study in one run folder."""

    run: Run
    shop: Workshop
    dataset: Dataset
    entries: Sequence[Entry]
    options: StudyOptions
    progress: Progress = field(default_factory=Progress)
    _main_references: References | None = field(default=None, repr=False)
    _originals: dict[int, Evaluation] = field(default_factory=dict, repr=False)
    _started: float = field(default_factory=time.monotonic, repr=False)
    _announced: int = 0
    _planned: int = 0

    def __post_init__(self) -> None:
        self.unseen, self.measured = split_holdout(self.dataset, self.options.calibration)
        self.seeds = list(range(self.options.seeds))

    def complete(self) -> None:
        """Everything that the options ask for, then results.json and samples.jsonl."""
        options = self.options
        settings = {entry.label: entry.settings for entry in self.entries}
        self._planned = self.planned()
        if options.tune:
            settings = tuned(self, options.tune)
        self._main(settings)
        if options.size_impact:
            self._sizes(settings)
        if options.sequential:
            self._sequential(settings)
        results.write(self.run, self.shop, self.dataset, self.options, self.seeds)

    def planned(self) -> int:
        """How many measurements are left, about: what :meth:`announce` counts down."""
        options, labels = self.options, [e.label for e in self.entries]
        anchors = ["original", "identity", "random-edit"]
        missing = [k for s in self.seeds for k in (f"main/{n}/{s}" for n in anchors + labels) if not self.has(k)]
        count = len(missing) + (options.references if missing else 0)
        if options.tune and not (self.run.folder / "tuning.json").exists():
            count += options.tune * len(labels) + 1
        for size in options.size_impact:
            missing = [k for s in self.seeds for k in (f"size/{n}/{s}@{size}" for n in labels) if not self.has(k)]
            count += len(missing) + (2 + len(self.seeds) if missing else 0)
        for k in range(options.sequential):
            count += sum(not self.has(f"sequential/{n}/{s}@{k + 1}") for n in labels for s in self.seeds)
        return count

    def announce(self, what: str) -> None:
        """Say what begins, how far the study is, and about how long the rest takes."""
        done, left = self._announced, self._planned - self._announced
        self._announced += 1
        if left <= 0:
            return self.progress.say(what)
        eta = (time.monotonic() - self._started) / max(1, done) * left
        self.progress.say(f"[{done + 1}/{self._planned}] {what}" + (f", about {clock(eta)} left" if done > 1 else ""))

    def failure(self, key: str, error: Exception) -> str:
        """What went wrong, for the record; the traceback of anything but a user's mistake is kept in ``errors/``."""
        if isinstance(error, UserError):
            return str(error)
        log = self.run.write_text(f"errors/{slug(key)}.log", "".join(traceback.format_exception(error)))
        first = (str(error).strip().splitlines() or ["no message"])[0][:200]
        return f"unexpected {type(error).__name__}: {first} (see {log.relative_to(self.run.folder)})"

    # -- main ----------------------------------------------------------------------------------------------------

    def _main(self, settings: dict[str, dict[str, Any]]) -> None:
        options = self.options
        wanted = ["base/0", *(f"reference/{r}" for r in range(options.references))]
        wanted += [f"{name}/{s}" for s in self.seeds for name in ("original", "identity", "random-edit")]
        wanted += [f"{entry.label}/{s}" for s in self.seeds for entry in self.entries]
        if all(self.has(f"main/{name}") for name in wanted):
            return
        references = self.main_references()
        for seed in self.seeds:
            original = self.shop.original(self.dataset, seed)
            start = self.original_row(f"main/original/{seed}", original, seed, self.measured, references)
            self._originals[seed] = start
            if not self.has("main/base/0"):
                found = self.evaluate(self.shop.base(), self.measured, references, start)
                self._store("main/base/0", anchor("base", 0), found)
            for name, make in (("identity", copy.deepcopy), ("random-edit", lambda m, s=seed: random_edit(m, s))):
                if not self.has(f"main/{name}/{seed}"):
                    self.announce(f"main/{name}/{seed}")
                    found = self.evaluate(make(original), self.measured, references, start, seed)
                    self._store(f"main/{name}/{seed}", anchor(name, seed), found)
            for entry in self.entries:
                self.method_row(
                    f"main/{entry.label}/{seed}",
                    entry,
                    settings[entry.label],
                    original,
                    seed,
                    self.dataset,
                    self.measured,
                    references,
                    start,
                )

    def main_references(self) -> References:
        """The references of the whole forget set, measured once."""
        if self._main_references is None:
            self._main_references = self.references(self.measured, self.options.references, "main")
        return self._main_references

    def references(
        self, dataset: Dataset, count: int, study: str, suffix: str = "", position: int | None = None
    ) -> References:
        """Retrained models, measured against each other; their rows are written on the way."""
        options = self.options.evaluate
        if study == "tune":
            options = replace(options, suite="quick")
        references = References(self.shop.adapter, dataset, options=options)
        for r in range(count):
            model = self.shop.reference(dataset, r, suffix)
            self.announce(f"measuring {study}/reference/{r}{suffix}")
            references.add(model, self.progress)
        for r in range(count):
            key = f"{study}/reference/{r}{suffix}"
            if not self.has(key):
                spent = self.shop.costs[f"reference-{r}{suffix}"].record(self.shop.retraining())
                self._store(
                    key, {**anchor("reference", r), "position": position, "cost": spent}, references.evaluation(r)
                )
        return references

    def evaluate(
        self,
        model: nn.Module,
        dataset: Dataset,
        references: References | None,
        original: Evaluation | Literal["self"] | None = None,
        seed: int = 0,
    ) -> Evaluation:
        return evaluate(
            model,
            self.shop.adapter,
            dataset,
            references=references,
            original=original,
            options=self.options.evaluate,
            seed=seed,
            progress=self.progress,
        )

    def original_evaluation(self, seed: int) -> Evaluation:
        """The original of a seed on the main forget set."""
        if seed not in self._originals:
            original = self.shop.original(self.dataset, seed)
            self._originals[seed] = self.evaluate(original, self.measured, self.main_references(), "self", seed)
        return self._originals[seed]

    def original_row(
        self,
        key: str,
        model: nn.Module,
        seed: int,
        dataset: Dataset,
        references: References,
        position: int | None = None,
    ) -> Evaluation:
        """The original's own measurement, which every row of its seed is compared with."""
        self.announce(key)
        found = self.evaluate(model, dataset, references, "self", seed)
        if not self.has(key):
            spent = self.shop.costs[f"original-{seed}"].record(self.shop.retraining())
            self._store(key, {**anchor("original", seed), "position": position, "cost": spent}, found)
        return found

    # -- sizes and sequences -------------------------------------------------------------------------------------

    def _sizes(self, settings: dict[str, dict[str, Any]]) -> None:
        total = len(self.dataset.private)
        for size in self.options.size_impact:
            if not 0 < size < total:
                raise UserError(f"--size-impact {size}: give numbers from 1 to {total - 1} (the private samples).")
            cut = by_size(self.dataset, size, 0)
            _, measured = split_holdout(cut, self.options.calibration)
            keys = [f"size/{e.label}/{s}@{size}" for s in self.seeds for e in self.entries]
            if all(self.has(k) for k in keys):
                continue
            references = self.references(measured, 2, "size", f"~{size}", size)
            for seed in self.seeds:
                original = self.shop.original(self.dataset, seed)
                start = self.original_row(f"size/original/{seed}@{size}", original, seed, measured, references, size)
                for entry in self.entries:
                    self.method_row(
                        f"size/{entry.label}/{seed}@{size}",
                        entry,
                        settings[entry.label],
                        original,
                        seed,
                        cut,
                        measured,
                        references,
                        start,
                        position=size,
                    )

    def _sequential(self, settings: dict[str, dict[str, Any]]) -> None:
        requests = sequence(self.dataset, self.options.sequential, 0)
        for entry in self.entries:
            for seed in self.seeds:
                keys = [f"sequential/{entry.label}/{seed}@{k + 1}" for k in range(len(requests))]
                if all(self.has(k) for k in keys):
                    continue
                model = copy.deepcopy(self.shop.original(self.dataset, seed))
                start: Evaluation | None = None
                earlier: list[Sample] = []
                gone: set[str] = set()
                for k, request in enumerate(requests):
                    gone |= {s.id for s in request["forget"]}
                    retain = tuple(s for s in request["retain"] if s.id not in gone)
                    now = replace(request, roles={**request.roles, "retain": retain})
                    _, measured = split_holdout(now, self.options.calibration)
                    # After the last request everything of the main forget set is gone: its references compare.
                    last = k + 1 == len(requests)
                    references = self.main_references() if last else None
                    if last:
                        measured = self.measured
                        start = self.original_evaluation(seed)
                    made = self.method_row(
                        keys[k],
                        entry,
                        settings[entry.label],
                        model,
                        seed,
                        now,
                        measured,
                        references,
                        start,
                        position=k + 1,
                        earlier=tuple(earlier),
                        requests=requests[: k + 1],
                        in_place=True,
                    )
                    earlier += request["forget"]
                    if made is None:
                        break

    # -- rows ----------------------------------------------------------------------------------------------------

    def has(self, key: str) -> bool:
        return (self.run.folder / results.row_file(key)).exists()

    def context(self, entry: Entry, model: nn.Module, seed: int, dataset: Dataset, key: str) -> Context:
        """What the method may see: never the measured part of the holdout, nor a reference."""
        return Context(
            model=model,
            adapter=self.shop.adapter,
            forget=entry.forget(dataset["forget"]),
            retain=dataset["retain"],
            unseen=self.unseen,
            base=None if self.options.blind else self.shop.base,
            scope=entry.scope(),
            seed=seed,
            work=self.run.folder / "work" / slug(key),
            progress=self.progress,
        )

    def apply(self, context: Context, method: Method, options: Any) -> tuple[Outcome, Cost]:
        """Run a method and measure its cost."""
        assert context.work is not None
        context.work.mkdir(parents=True, exist_ok=True)
        with measure(context.adapter, context.model) as cost:
            outcome = method(context, options)
            cost.model = outcome.model
        outcome.model.eval()
        shutil.rmtree(context.work, ignore_errors=True)
        return outcome, cost

    def method_row(
        self,
        key: str,
        entry: Entry,
        settings: dict[str, Any],
        original: nn.Module,
        seed: int,
        dataset: Dataset,
        measured: Dataset,
        references: References | None,
        start: Evaluation | None,
        *,
        position: int | None = None,
        earlier: tuple[Sample, ...] = (),
        requests: Sequence[Dataset] = (),
        in_place: bool = False,
    ) -> dict[str, Any] | None:
        """One method from one original, measured; None where it failed (which is recorded, not hidden)."""
        if self.has(key) and not in_place:
            return results.read_row(self.run, key)
        self.announce(key)
        method, _ = entry.whole()
        model = original if in_place else copy.deepcopy(original)
        context = self.context(entry, model, seed, dataset, key)
        context.earlier = earlier
        common = {
            "method": entry.label,
            "kind": "method",
            "seed": seed,
            "position": position,
            "properties": results.properties(method),
        }
        try:
            outcome, cost = self.apply(context, *entry.whole(settings))
        except Exception as error:  # one method's defect must not cost the rows of the others
            failed = self.failure(key, error)
            self.progress.say(f"{key} failed: {failed}")
            results.write_row(self.run, key, {**common, "failed": failed, "metrics": {}, "cost": {}, "samples": []})
            return None
        if in_place and outcome.model is not model:  # a method that makes a new model; the next request starts from it
            model.load_state_dict(outcome.model.state_dict())
        common["properties"] = results.properties(method, outcome)
        matched = method.changes in ("all", "some") and key.startswith("main/")
        if self.options.matched and matched:  # first, so that a run that is stopped between the two does both again
            self.matched_row(key, common, outcome.model, original, dataset, measured, references, start)
        evaluation = self.evaluate(outcome.model, measured, references, start, seed)
        extra = results.request_metrics(outcome.model, self.shop.adapter, requests)
        if self.options.keep_models:
            save_model(Loaded(outcome.model, self.shop.adapter, key), self.run.folder / "models" / slug(key))
        return self._store(
            key,
            {
                **common,
                "settings": {k: str(v) for k, v in settings.items()},
                "notes": outcome.notes,
                "record": {k: v for k, v in outcome.record.items() if k != "log"},
                "curve": results.curve(outcome.record.get("log", [])),
                "cost": cost.record(self.shop.retraining()),
                "extra": extra,
            },
            evaluation,
        )

    def matched_row(
        self,
        key: str,
        common: dict[str, Any],
        model: nn.Module,
        original: nn.Module,
        dataset: Dataset,
        measured: Dataset,
        references: References | None,
        start: Evaluation | None,
    ) -> None:
        """The same edit, as far as the retain set stays at the level that all methods are compared at."""
        level, seed = self.options.matched, common["seed"]
        mixed, share = at_level(model, original, self.shop.adapter, dataset["retain"], level / 100, seed)
        evaluation = self.evaluate(mixed, measured, references, start, seed)
        notes = [f"share of the edit: {share:.3f}"]
        content = {**common, "position": level, "notes": notes, "record": {"share": share}, "cost": {}}
        self._store(f"{key.replace('main/', 'matched/', 1)}@{level}", content, evaluation)

    def _store(self, key: str, content: dict[str, Any], evaluation: Evaluation) -> dict[str, Any]:
        whole = results.write_row(self.run, key, {**content, **results.of_evaluation(evaluation)})
        gc.collect()
        return whole


def anchor(kind: str, seed: int) -> dict[str, Any]:
    """What a row says of a model that no method made."""
    return {"method": kind, "kind": kind, "seed": seed, "position": None, "cost": {}, "properties": {}}


def random_edit(model: nn.Module, seed: int) -> nn.Module:
    """Control: every tensor of the original moved by Gaussian noise of ``RANDOM_EDIT`` times its own norm."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in moved.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            p.add_(noise * (RANDOM_EDIT * p.norm() / math.sqrt(max(1, p.numel()))))
    return moved


def slug(key: str) -> str:
    """A file name for a row."""
    return re.sub(r"[^A-Za-z0-9_.@=+~-]+", "_", key)
