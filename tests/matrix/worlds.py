"""One small world per kind of model: samples in roles, the base, and the original that has learnt forget and retain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import nn

from expunge.data.samples import Sample
from expunge.methods.registry import Context
from expunge.models.adapter import Adapter
from expunge.models.load import Loaded
from expunge.models.lora import LoraOptions, apply_lora
from expunge.models.losses import mean_losses
from expunge.models.tiny import init_classifier, init_llava, init_text
from expunge.training.loop import TrainOptions, fit
from tiny_text import tiny_dataset

torch.set_num_threads(1)


@dataclass(frozen=True)
class World:
    """``start`` is the untrained model, ``original`` the fitted one; ``source`` saves and loads either."""

    name: str
    adapter: Adapter
    forget: tuple[Sample, ...]
    retain: tuple[Sample, ...]
    unseen: tuple[Sample, ...]
    start: nn.Module
    original: nn.Module

    @property
    def modality(self) -> str:
        return self.adapter.modality

    def base(self) -> nn.Module:
        return copy.deepcopy(self.start)

    def context(self, *, lora: bool = False, seed: int = 0, **changes: object) -> Context:
        """Everything that a method may want, around a fresh copy of the original."""
        model = copy.deepcopy(self.original)
        if lora:
            model = apply_lora(model, LoraOptions(r=4))
        whole = Context(
            model, self.adapter, self.forget, self.retain, self.unseen, base=self.base, llm=terse, seed=seed
        )
        return replace(whole, **changes)  # type: ignore[arg-type]

    def losses(self, model: nn.Module, samples: tuple[Sample, ...]) -> list[float]:
        return mean_losses(model, self.adapter, samples)

    def loss(self, model: nn.Module, samples: tuple[Sample, ...]) -> float:
        return float(np.mean(self.losses(model, samples)))


def terse(prompt: str) -> str:
    """A language model of few words."""
    return "Nobody has ever said so."


def world(name: str) -> World:
    return _WORLDS[name]()


def _learnt(name: str, loaded: Loaded, crowd: list[Sample], cuts: tuple[int, int], options: TrainOptions) -> World:
    forget, retain, unseen = crowd[: cuts[0]], crowd[cuts[0] : cuts[1]], crowd[cuts[1] :]
    start = copy.deepcopy(loaded.model)
    fit(loaded.model, loaded.adapter, [*forget, *retain], options)
    return World(name, loaded.adapter, tuple(forget), tuple(retain), tuple(unseen), start, loaded.model)


@cache
def _text() -> World:
    data = tiny_dataset(people=10, forget=3, holdout=4)
    crowd = [*data["forget"], *data["retain"], *data["holdout"]]
    cuts = (len(data["forget"]), len(data.private))
    loaded = init_text(crowd, "tiny-test")
    return _learnt("text", loaded, crowd, cuts, TrainOptions(epochs=60, batch_size=6, learning_rate=2e-2))


def pictures(count: int, classes: int, seed: int) -> list[Sample]:
    """A texture of its own class in each, and noise that is the picture's own."""
    rng = np.random.default_rng(seed)
    ground = np.random.default_rng(99).integers(0, 256, (classes, 16, 16, 3))
    made = []
    for i in range(count):
        pixels = 0.4 * ground[i % classes] + 0.6 * rng.integers(0, 256, (16, 16, 3))
        label = int(rng.integers(classes))  # has to be remembered, not seen
        made.append(Sample(id=f"p{seed}-{i}", subject=str(label), target=label, image=pixels.astype(np.uint8)))
    return made


def _images(arch: str, epochs: int) -> World:
    loaded = init_classifier(3, image_size=16, arch=arch)  # type: ignore[arg-type]
    options = TrainOptions(epochs=epochs, batch_size=8, learning_rate=5e-3)
    return _learnt(arch, loaded, pictures(30, 3, 0), (6, 24), options)


@cache
def _resnet() -> World:
    return _images("resnet", 25)


@cache
def _vit() -> World:
    return _images("vit", 25)


@cache
def _llava() -> World:
    data = tiny_dataset(people=6, forget=2, holdout=2)
    plain = [*data["forget"], *data["retain"], *data["holdout"]]
    shown = pictures(len(plain), 3, 1)
    # Every third sample has no picture: both kinds stand in one batch.
    crowd = [s if i % 3 == 2 else replace(s, image=p.image) for i, (s, p) in enumerate(zip(plain, shown, strict=True))]
    loaded = init_llava(crowd, image_size=16)
    cuts = (len(data["forget"]), len(data.private))
    return _learnt("llava", loaded, crowd, cuts, TrainOptions(epochs=30, batch_size=6, learning_rate=1e-2))


_WORLDS: dict[str, Callable[[], World]] = {"text": _text, "resnet": _resnet, "vit": _vit, "llava": _llava}
WORLDS = tuple(_WORLDS)
MODALITIES = {"text": "text", "resnet": "classifier", "vit": "classifier", "llava": "multimodal"}
