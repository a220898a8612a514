"""Models of the protocols: trained once, kept under a key of their content, shared by all protocols of one folder."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from expunge.attacks.exam import Checkpoint
from expunge.data.samples import Sample
from expunge.models.adapter import Adapter
from expunge.models.load import Loaded, load_model, save_model
from expunge.progress import Progress
from expunge.training.batching import EpochPlan
from expunge.training.loop import ORDINARY_RATE, Feed, Trainer, TrainOptions, train
from expunge.training.many import Job, load_weights, train_many
from expunge.training.optimizers import sized_rate
from expunge.training.terms import training_term


@dataclass(frozen=True, eq=False)
class Start:
    """What a training starts from: ``key`` names its weights, ``make`` gives a fresh copy of them.

    ``key`` may be that of a model of the store that is itself still to be trained.
    """

    key: str
    make: Callable[[], nn.Module]
    adapter: Adapter


@dataclass(eq=False)
class Store:
    """Trains into ``folder``. A model that is there already, from whatever protocol or earlier run, is loaded.

    Models are trained when the first of them is looked at, all that were asked for until then together
    (:func:`train_many`): ask for all shadows of a table before measuring with the first.
    """

    folder: Path
    options: TrainOptions
    progress: Progress = field(default_factory=Progress)
    trained: int = 0  # models trained by this process
    _known: dict[str, Checkpoint] = field(default_factory=dict, repr=False)
    _waiting: dict[str, _Wanted] = field(default_factory=dict, repr=False)

    def model(
        self, start: Start, samples: Sequence[Sample], seed: int, name: str, options: TrainOptions | None = None
    ) -> Checkpoint:
        """``start`` trained on ``samples``; ``name`` is what progress and tables call it."""
        options = options or self.options
        key = content_key(start.key, samples, seed, options)
        if key not in self._known and not self._there(key):
            self._waiting[key] = _Wanted(start, Job(key, start.make, samples, seed, name, start.key), options)
        return self._loaded(key, start.adapter, name)

    def train_waiting(self) -> None:
        """Train all models that were asked for and are not there: first those that others start from."""
        while self._waiting:
            ready = [w for w in self._waiting.values() if w.start.key not in self._waiting]
            alike = [w for w in ready if w.kind == ready[0].kind]
            adapter = alike[0].start.adapter
            work = self.folder / ".many"
            files = train_many([w.job for w in alike], adapter, alike[0].options, work, progress=self.progress)
            for key, file in files.items():
                self._save(key, load_weights(self._waiting.pop(key).job.make(), file), adapter)
                file.unlink()
                self.trained += 1
            with suppress(OSError):  # a killed run's other models wait there until they are asked for again
                work.rmdir()

    def trajectory(
        self, start: Start, samples: Sequence[Sample], seed: int, name: str, points: int
    ) -> list[Checkpoint]:
        """The weights after b / points of one training at a constant rate, b = 0 (``start`` itself) to ``points``."""
        options = replace(self.options, schedule="constant", warmup=0.0)
        key = content_key(start.key, samples, seed, options)
        names = [f"{key}-{b}of{points}" for b in range(points + 1)]
        if not all(self._there(n) for n in names):
            model = start.make()
            self._save(names[0], model.eval(), start.adapter)
            if options.learning_rate is None:
                options = replace(options, learning_rate=sized_rate(model, ORDINARY_RATE))
            lengths = [start.adapter.num_tokens(s) for s in samples]
            plan = EpochPlan({"train": lengths}, {"train": options.batch_size}, options.epochs, "train", seed)

            def keep(trainer: Trainer) -> None:
                for b in range(1, points + 1):
                    if trainer.step == max(1, round(trainer.steps * b / points)):
                        self._save(names[b], copy.deepcopy(trainer.model).eval(), start.adapter)

            feeds = {"train": Feed(samples)}
            terms = [training_term()]
            progress = self.progress
            train(
                model, start.adapter, feeds, terms, plan, options, seed=seed, progress=progress, name=name, on_step=keep
            )
            self.trained += 1
        return [self._loaded(n, start.adapter, f"{name} {b}/{points}") for b, n in enumerate(names)]

    # -- files -----------------------------------------------------------------------------------------------------

    def kept(self, key: str, adapter: Adapter, name: str, make: Callable[[], nn.Module]) -> Checkpoint:
        """The model that stands under ``key``, made if it is not there yet."""
        if key not in self._known and not self._there(key):
            self._save(key, make(), adapter)
            self.trained += 1
        return self._loaded(key, adapter, name)

    def _there(self, key: str) -> bool:
        return (self.folder / key / "config.json").is_file()

    def _save(self, key: str, model: nn.Module, adapter: Adapter) -> None:
        save_model(Loaded(model, adapter, key), self.folder / key)

    def _loaded(self, key: str, adapter: Adapter, name: str) -> Checkpoint:
        if key not in self._known:
            self._known[key] = Checkpoint(name, "shadow", adapter, lambda: self._load(key), key)
        return self._known[key]

    def _load(self, key: str) -> nn.Module:
        if key in self._waiting:
            self.train_waiting()
        return load_model(self.folder / key, device="cpu").model


@dataclass(frozen=True, eq=False)
class _Wanted:
    """A model that was asked for."""

    start: Start
    job: Job
    options: TrainOptions

    @property
    def kind(self) -> tuple[int, TrainOptions]:
        """Equal for models that can be trained together: one architecture reads through one adapter."""
        return id(self.start.adapter), self.options


def content_key(start: str, samples: Sequence[Sample], seed: int, options: TrainOptions) -> str:
    """40 hexadecimal digits of what a training depends on: start, contents in their order, options, seed."""
    content = [start, [s.digest() for s in samples], seed, asdict(options)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


def start_at(checkpoint: Checkpoint) -> Start:
    """A training that goes on from a checkpoint of the store."""
    return Start(checkpoint.digest, lambda: copy.deepcopy(checkpoint.model), checkpoint.adapter)


def between(start: Checkpoint, end: Checkpoint, alpha: float) -> Checkpoint:
    """The model with weights (and running statistics) start + alpha (end - start); it is made when asked for."""

    def make() -> nn.Module:
        model = copy.deepcopy(start.model)
        with torch.no_grad():
            there = end.model.state_dict()
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(there[name].to(value), alpha)
                else:  # counters of batches
                    value.copy_(there[name] if alpha >= 0.5 else value)
        return model

    return Checkpoint(f"interpolated {alpha:.2f}", "audited", start.adapter, make)
