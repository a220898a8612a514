"""The world of a protocol: who is trained on what. Targets learn the private samples, shadows never see them.

The holdout role is cut by subject into a shadow set, from which every shadow takes its own part, and a population that
no model ever sees (reference models, RMIA's z). Source of the splits: IAM, arXiv 2506.06112; there a shadow takes 80 %,
here as many samples as a retrained model has, because p-values want shadows that are like it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from expunge.attacks.exam import Checkpoint
from expunge.completeness.lira import random_halves
from expunge.completeness.protocols.store import Start, Store
from expunge.data.chance import hashed, shuffled
from expunge.data.registry import load_dataset
from expunge.data.samples import Dataset, Sample, subjects
from expunge.errors import UserError, unknown
from expunge.models.classifier import ClassifierAdapter
from expunge.models.load import Loaded, load_model
from expunge.models.tiny import PRESETS, classifier_for, init_text
from expunge.options import option
from expunge.progress import Progress
from expunge.training.loop import TrainOptions

MOST = 0.8  # of the shadow set, that one shadow is trained on: beyond that all shadows are nearly one model
POPULATION = 0.25  # of the holdout subjects
ARCHS = ("resnet", "vit")  # of pictures; vectors of features have mlp
SIZES: Mapping[str, Mapping[str, Any]] = {  # dataset options where the user gives none
    "classifier": {"private": 400, "forget": 0.25, "holdout": 1200, "utility": 0},
    "people": {"people": 60, "forget": 0.25, "holdout": 240, "utility": 40, "questions": 5},
    "tofu": {"authors": 16, "forget_authors": 4, "holdout_authors": 48, "base_authors": 40, "public": False},
}
QUICK: Mapping[str, Mapping[str, Any]] = {
    "classifier": {"private": 160, "forget": 0.25, "holdout": 300, "utility": 0},
    "people": {"people": 16, "forget": 0.25, "holdout": 24, "utility": 12, "questions": 4},
    "tofu": {"authors": 6, "forget_authors": 2, "holdout_authors": 12, "base_authors": 6, "public": False},
}
# Memorised texts are told apart by every score; after so few passes the better scores show. See docs/protocols.md.
BRIEF: Mapping[str, float] = {"people": 2.0, "tofu": 1.0}


@dataclass(frozen=True, kw_only=True)
class ProtocolOptions:
    """How large a protocol is. The defaults finish within five minutes on two cores."""

    targets: int = option(3, "independent originals, each with its own forget set and retrained model")
    groups: int = option(4, "disjoint groups of shadow models; every score is computed once with each")
    shadows: int = option(2, "shadow models per group")
    share: float = option(
        0.0, "of the shadow set, that each shadow is trained on; 0 = as many samples as a retrained model, at most 0.8"
    )
    halves: int = option(4, "models trained on half of the private samples each, for the online attacks; 0 = none")
    points: int = option(10, "steps between never seen and fully trained, in ScoreUI")
    epochs: float = option(25.0, "passes of every training over its samples (people 2, tofu 1; 25 in protocol fake)")
    base_epochs: float = option(20.0, "passes of the base of a text model over the utility samples")
    batch_size: int = option(32, "samples per step")
    learning_rate: float = option(3e-3, "peak learning rate")
    resamples: int = option(200, "bootstrap draws of targets, groups and subjects")
    methods: str = option(
        "finetune,ga,boundary,forsaken,fisher-noise,l-codec,ssd,salun,scrub",
        "those of protocol approximate, with commas",
    )
    arch: str = option("resnet", "architecture of classifiers; mlp for vectors of features", choices=(*ARCHS, "mlp"))

    def __post_init__(self) -> None:
        least = {"targets": 1, "groups": 1, "shadows": 1, "halves": 0, "points": 2, "resamples": 10}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise UserError(f"option '{name}' of a protocol = {getattr(self, name)}: give {low} or more.")
        if not 0 <= self.share <= 1:
            raise UserError(f"option 'share' of a protocol = {self.share}: give a number from 0 to 1.")
        if self.halves % 2:
            raise UserError(f"option 'halves' of a protocol = {self.halves}: give an even number.")

    def quick(self) -> ProtocolOptions:
        """A smaller form, for a first look: under a minute."""
        caps: dict[str, float] = {"targets": 1, "groups": 2, "halves": 2, "points": 4, "resamples": 50}
        caps |= {"epochs": 15.0, "base_epochs": 8.0}
        return replace(self, **{name: min(getattr(self, name), cap) for name, cap in caps.items()})


@dataclass(frozen=True, eq=False)
class Target:
    """One served model: ``truth_N`` says for each sample how much of it is left, 1 = trained on, 0 = never seen."""

    name: str
    unlearned: Checkpoint
    original: Checkpoint
    samples: Sequence[Sample]
    truth_N: NDArray[np.float64]
    posteriors: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # of its two models, by their names


@dataclass(frozen=True, eq=False)
class Group:
    """Shadow models that are used together, with what each was trained on."""

    name: str
    shadows: Sequence[Checkpoint]
    parts: Sequence[Sequence[Sample]]
    whole: Sequence[Sample]  # the shadow set
    population: Sequence[Sample]
    origin: Checkpoint | None = None  # trained on the whole shadow set; only UnLeak wants it
    learnt: dict[str, Any] = field(default_factory=dict)  # what attacks learn from the shadows alone, once for all


@dataclass(frozen=True, eq=False)
class Halves:
    """Models trained on half of the private samples and half as many shadow samples again: IN and OUT for each."""

    models: Sequence[Checkpoint]
    saw_MN: NDArray[np.bool_]
    samples: Sequence[Sample]


@dataclass(eq=False)
class World:
    """Dataset, splits and models. Everything random is a function of ``seed`` and the samples' ids."""

    dataset: Dataset
    options: ProtocolOptions
    store: Store
    start: Callable[[int, str], Start]  # (seed, architecture) -> initial weights
    seed: int = 0
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        if len(subjects(self.dataset["holdout"])) < 8 or len(self.dataset["retain"]) < 4:
            raise UserError(
                f"a protocol needs 8 holdout subjects and 4 retain samples or more, and '{self.dataset.name}' has "
                f"{len(subjects(self.dataset['holdout']))} and {len(self.dataset['retain'])}: ask for more."
            )

    @property
    def private(self) -> list[Sample]:
        return sorted(self.dataset.private, key=lambda s: s.id)

    @cached_property
    def cut(self) -> tuple[list[Sample], list[Sample]]:
        """(shadow set, population): the holdout role by subject."""
        order = shuffled(subjects(self.dataset["holdout"]), "population", self.seed)
        outside = set(order[: max(4, round(POPULATION * len(order)))])
        held = self.dataset["holdout"]
        return [s for s in held if s.subject not in outside], [s for s in held if s.subject in outside]

    def seed_of(self, *what: object) -> int:
        """A training seed of its own for every purpose."""
        return hashed(self.seed, *what) % 2**31

    def train(self, samples: Sequence[Sample], name: str, arch: str | None = None) -> Checkpoint:
        """The initial model trained on ``samples``; both initial weights and order follow from the name."""
        seed = self.seed_of(name)
        return self.store.model(self.start(seed, arch or self.options.arch), samples, seed, name)

    # -- who learns what -------------------------------------------------------------------------------------------

    def forget_set(self, number: int) -> set[str]:
        """Ids to forget of target ``number``: the dataset's own for the first, as many other subjects after it."""
        chosen = subjects(self.dataset["forget"])
        if number:
            chosen = shuffled(subjects(self.private), "forget", self.seed, number)[: len(chosen)]
        gone = set(chosen)
        return {s.id for s in self.private if s.subject in gone}

    def target(self, number: int, arch: str | None = None) -> Target:
        """An original on all private samples and the model retrained without the forget set."""
        gone = self.forget_set(number)
        kept = [s for s in self.private if s.id not in gone]
        label = "" if arch is None else f" {arch}"
        original = self.train(self.private, f"original {number}{label}", arch)
        retrained = self.train(kept, f"retrained {number}{label}", arch)
        truth_N = np.array([0.0 if s.id in gone else 1.0 for s in self.private])
        return Target(f"target {number}{label}", retrained, original, self.private, truth_N)

    def targets(self, arch: str | None = None) -> list[Target]:
        return [self.target(number, arch) for number in range(self.options.targets)]

    def part(self, number: int, whole: Sequence[Sample] | None = None) -> list[Sample]:
        """What shadow ``number`` learns: subjects of the shadow set at random, up to the size that options say."""
        whole = self.cut[0] if whole is None else whole
        retrained = len(self.private) - len(self.forget_set(0))
        size = round(self.options.share * len(whole)) or min(retrained, round(MOST * len(whole)))
        chosen: set[str] = set()
        held = Counter(s.subject for s in whole)
        for subject in shuffled(held, "shadow", self.seed, number):
            if chosen and size < held[subject]:
                break
            chosen.add(subject)
            size -= held[subject]
        return [s for s in whole if s.subject in chosen]

    def shadow(
        self, number: int, whole: Sequence[Sample] | None = None, arch: str | None = None, label: str = ""
    ) -> Checkpoint:
        return self.train(self.part(number, whole), f"shadow {number}{label}", arch)

    def group(
        self,
        number: int,
        count: int | None = None,
        *,
        whole: Sequence[Sample] | None = None,
        population: Sequence[Sample] | None = None,
        arch: str | None = None,
        label: str = "",
    ) -> Group:
        """Group ``number`` of ``count`` shadows; groups share no shadow. Another shadow set makes other shadows."""
        count = self.options.shadows if count is None else count
        samples = self.cut[0] if whole is None else whole
        numbers = range(number * count, (number + 1) * count)
        origin = self.train(samples, f"shadow origin{label}", arch) if self.unleak else None
        return Group(
            f"group {number}{label}",
            [self.shadow(n, samples, arch, label) for n in numbers],
            [self.part(n, samples) for n in numbers],
            samples,
            self.cut[1] if population is None else population,
            origin,
        )

    def groups(self, count: int | None = None, **more: Any) -> list[Group]:
        return [self.group(number, count, **more) for number in range(self.options.groups)]

    @property
    def unleak(self) -> bool:
        """UnLeak works on class probabilities, which only classifiers have."""
        return self.dataset.modality == "classifier"

    def halves(self) -> Halves | None:
        """The models of the online attacks, or None where the options ask for none."""
        count, private = self.options.halves, self.private
        if not count:
            return None
        saw_MN = random_halves(count, len(private), np.random.default_rng(self.seed_of("halves")))
        models = []
        for number, saw_N in enumerate(saw_MN):
            more = shuffled(self.cut[0], "half", self.seed, number)[: len(private) - int(saw_N.sum())]
            own = [s for s, saw in zip(private, saw_N, strict=True) if saw] + more
            models.append(self.train(own, f"half {number}"))
        return Halves(models, saw_MN, private)


# -- making one ----------------------------------------------------------------------------------------------------


def make_world(
    data: str,
    folder: Path,
    options: ProtocolOptions,
    *,
    data_dir: Path | str | None = None,
    data_options: Mapping[str, Any] | None = None,
    model: str | None = None,
    init: str | None = None,
    quick: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> World:
    """Load the dataset in a size for protocols, and decide what trainings start from.

    ``model``: a trained base that knows nothing of the data. Without one, text models start from a small Llama
    (``init``: tiny, small or tiny-test) trained on the utility samples, classifiers from random weights of their own.

    Raises:
        UserError: both ``model`` and ``init``, an unknown preset, or whatever is wrong with the dataset.
    """
    if model is not None and init is not None:
        raise UserError("give --model FOLDER or --init PRESET, not both.")
    progress = progress or Progress()
    from expunge.data.registry import get_dataset

    kind = get_dataset(data).modality
    sizes = dict((QUICK if quick else SIZES).get("classifier" if kind == "classifier" else data, {}))
    dataset = load_dataset(data, data_dir=data_dir, seed=seed, options=sizes | dict(data_options or {}))
    if dataset.modality == "multimodal":
        raise UserError(f"protocols measure text models and image classifiers, and '{data}' is multimodal.")
    training = TrainOptions(
        epochs=options.epochs, batch_size=options.batch_size, learning_rate=options.learning_rate, checkpoint_every=0
    )
    store = Store(folder / "models", training, progress)
    starts = _Starts(dataset, store, options, model, init, seed)
    return World(dataset, options, store, starts, seed, progress)


@dataclass(eq=False)
class _Starts:
    """Initial weights: given, a base made once, or random ones."""

    dataset: Dataset
    store: Store
    options: ProtocolOptions
    model: str | None
    init: str | None
    seed: int
    _bases: dict[str, Start] = field(default_factory=dict)

    def __call__(self, seed: int, arch: str) -> Start:
        if self.model is not None:
            if self.model not in self._bases:
                loaded = load_model(self.model, device="cpu")
                self._bases[self.model] = _fixed(f"model:{weights_digest(loaded.model)}", loaded)
            return self._bases[self.model]
        if self.dataset.modality == "classifier":
            return self._classifier(seed, self.init or arch)
        preset = arch if arch in PRESETS else self.init or "tiny"
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        if preset not in self._bases:
            known = self.dataset["utility"]
            if not known:
                raise UserError("a small text model is trained on utility samples first, and there are none.")
            made = init_text(known, preset, self.seed)
            raw = _fixed(f"init:{preset}:{self.seed}:{weights_digest(made.model)}", made)
            settings = replace(self.store.options, epochs=self.options.base_epochs)
            base = self.store.model(raw, known, self.seed, f"base {preset}", settings)
            self._bases[preset] = Start(base.digest, lambda: copy.deepcopy(base.model), made.adapter)
        return self._bases[preset]

    def _classifier(self, seed: int, arch: str) -> Start:
        if arch not in (*ARCHS, "mlp"):
            raise unknown("architecture", arch, (*ARCHS, "mlp"))
        everyone = [s for samples in self.dataset.roles.values() for s in samples]

        def build(seed: int = 0) -> Loaded:
            return classifier_for(everyone, arch, seed)  # type: ignore[arg-type]

        if arch not in self._bases:
            self._bases[arch] = _fixed("", build())
        adapter = self._bases[arch].adapter  # one adapter for all: it keeps the images that it has read
        assert isinstance(adapter, ClassifierAdapter)
        rules = adapter.preprocess
        size = rules.height if rules.height == rules.width else f"{rules.height}x{rules.width}"
        key = f"init:{arch}:{size}:{rules.channels}:{adapter.num_classes}:{seed}"
        return Start(key, lambda: build(seed).model, adapter)


def _fixed(key: str, loaded: Loaded) -> Start:
    return Start(key, lambda: copy.deepcopy(loaded.model), loaded.adapter)


def weights_digest(model: nn.Module) -> str:
    """40 hexadecimal digits of the weights' names and values."""
    import hashlib

    state = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        state.update(name.encode())
        state.update(np.ascontiguousarray(value.detach().cpu().float().numpy()).tobytes())
    return state.hexdigest()[:40]
