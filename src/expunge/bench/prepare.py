"""The models that a study starts from: base, originals, references; made once, kept in the run folder, re-used."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from expunge.bench.cost import Cost, measure
from expunge.bench.plan import StudyOptions
from expunge.data.samples import Dataset, Modality, Sample
from expunge.errors import UserError, unknown
from expunge.files import write_json
from expunge.models.adapter import Adapter
from expunge.models.load import Loaded, load_model, save_model
from expunge.progress import Progress
from expunge.training.loop import TrainOptions, fit


@dataclass
class Workshop:
    """Trains and keeps models in ``folder``; everything is resumable."""

    folder: Path
    loaded: Loaded  # the base, as it was loaded or initialised
    options: StudyOptions
    progress: Progress = field(default_factory=Progress)
    costs: dict[str, Cost] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter:
        return self.loaded.adapter

    def base(self) -> nn.Module:
        """A fresh copy of the base."""
        return copy.deepcopy(self.loaded.model)

    def trained(self, name: str, samples: Sequence[Sample], seed: int, epochs: float | None = None) -> nn.Module:
        """The base trained on ``samples``: loaded if it was made before, else trained and saved as ``name``."""
        kept = self.folder / name
        facts = self.folder / f"{name}.json"
        if facts.exists():
            self.costs[name] = Cost(**json.loads(facts.read_text()))
            first = next(self.loaded.model.parameters())
            dtype = str(first.dtype).removeprefix(
                "torch."
            )  # as the base was loaded, so that a resumed study is the same
            return load_model(kept, device=str(first.device), dtype=dtype).model
        model = self.base()
        settings = TrainOptions(
            epochs=self.options.epochs if epochs is None else epochs,
            learning_rate=self.options.learning_rate,
            batch_size=self.options.batch_size,
            precision=self.options.precision,
        )
        work = self.folder / f"{name}.work"
        with measure(self.adapter) as cost:
            fit(model, self.adapter, samples, settings, seed=seed, work=work, progress=self.progress, name=name)
        model.eval()
        save_model(Loaded(model, self.adapter, name), kept)
        self.costs[name] = cost
        write_json(facts, {k: v for k, v in vars(cost).items() if k != "model"})
        return model

    def original(self, dataset: Dataset, seed: int, suffix: str = "") -> nn.Module:
        """Trained on forget and retain, in the order of the private samples, whatever the split."""
        private = sorted(dataset.private, key=lambda s: s.id)
        return self.trained(f"original-{seed}{suffix}", private, seed)

    def reference(self, dataset: Dataset, number: int, suffix: str = "") -> nn.Module:
        """Trained on retain alone, with another seed than any original."""
        return self.trained(f"reference-{number}{suffix}", dataset["retain"], 1000 + number)

    def retraining(self, suffix: str = "") -> Cost | None:
        """Mean cost of the references of the main forget set, or of ``suffix``; earlier attempts count too."""
        kept = [p for p in sorted(self.folder.glob(f"reference-*{suffix}.json")) if suffix or "~" not in p.name]
        costs = [Cost(**json.loads(p.read_text())) for p in kept]
        if not costs:
            return None
        mean = Cost(flops=sum(c.flops for c in costs) / len(costs), wall_s=sum(c.wall_s for c in costs) / len(costs))
        return mean


def start_model(
    folder: Path,
    dataset: Dataset,
    options: StudyOptions,
    *,
    model: str | None,
    init: str | None,
    load: dict[str, Any],
    seed: int,
    progress: Progress,
) -> Loaded:
    """The base of the study: a model folder or hub name, or a small model trained on the utility set.

    Raises:
        UserError: neither or both of ``model`` and ``init``, or whatever loading finds wrong.
    """
    if (model is None) == (init is None):
        raise UserError("name the model that knows nothing of the private data: --model FOLDER or --init tiny.")
    if model is not None:
        return load_model(model, **load)
    assert init is not None
    kept = folder / "base"
    name = f"{init}, made anew"  # not the folder, which may be moved
    if (folder / "base.json").exists():
        return replace(load_model(kept, **load), source=name)
    made = initialised(dataset, init, seed)
    if dataset["utility"]:
        settings = TrainOptions(epochs=options.base_epochs, batch_size=options.batch_size, precision=options.precision)
        with measure(made.adapter) as cost:
            fit(
                made.model,
                made.adapter,
                dataset["utility"],
                settings,
                seed=seed,
                work=folder / "base.work",
                progress=progress,
                name="base",
            )
        seconds = cost.wall_s
    else:
        seconds = 0.0
    made.model.eval()
    save_model(made, kept)
    write_json(folder / "base.json", {"wall_s": seconds})
    return replace(load_model(kept, **load), source=name)


def check_preset(preset: str | None, modality: Modality) -> None:
    """Raises UserError for a preset of ``--init`` that does not exist, or not for such data."""
    from expunge.models.tiny import KINDS, PRESETS

    allowed = (*PRESETS, *KINDS[modality])
    if preset is None or preset in allowed:
        return
    if any(preset in kinds for kinds in KINDS.values()):
        raise UserError(f"preset {preset} is not for {modality} data: allowed are {', '.join(sorted(allowed))}.")
    raise unknown(f"preset for {modality} data", preset, allowed)


def initialised(dataset: Dataset, preset: str, seed: int) -> Loaded:
    """A small model of random weights for the dataset's modality; the tokenizer never reads the forget set.

    A preset that names a size of language model leaves the kind of a model that sees to its data: ResNet, MLP, LLaVA.
    """
    from expunge.models.tiny import ARCHS, classifier_for, init_llava, init_qwen2vl, init_text

    known = [s for role in ("utility", "retain") for s in dataset[role]]
    if dataset.modality == "classifier":
        # Of every role: people in holdout are classes that no model is trained on.
        everyone = [s for samples in dataset.roles.values() for s in samples]
        return classifier_for(everyone, next((arch for arch in ARCHS if arch == preset), None), seed)
    if dataset.modality == "multimodal":
        return init_qwen2vl(known, seed) if preset == "qwen2vl" else init_llava(known, seed)
    return init_text(known, preset, seed)


def split_holdout(dataset: Dataset, share: float) -> tuple[tuple[Sample, ...], Dataset]:
    """(never-trained samples that methods may calibrate on, the dataset whose holdout is only measured).

    Split by subject, so that nobody is on both sides.
    """
    people = list(dict.fromkeys(s.subject for s in dataset["holdout"]))
    count = round(share * len(people))
    if not 0 < count < len(people):
        return (), dataset
    ours = set(people[:count])
    seen = tuple(s for s in dataset["holdout"] if s.subject in ours)
    measured = tuple(s for s in dataset["holdout"] if s.subject not in ours)
    return seen, Dataset(
        name=dataset.name,
        roles={**dataset.roles, "holdout": measured},
        modality=dataset.modality,
        source=dataset.source,
        notes=dataset.notes,
    )
