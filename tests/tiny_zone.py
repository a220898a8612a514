"""Tiny zones: a base that has learnt public people, private people it has never seen, and zones built over it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.data.samples import Dataset, Sample
from expunge.models.adapter import evaluating
from expunge.signals.forward import collect
from expunge.training.loop import TrainOptions, fit
from expunge.zones.model import ZonedModel
from expunge.zones.storage import digest_weights
from expunge.zones.zone import FrozenBase, Public, get_zone
from tiny_text import tiny_adapter, tiny_dataset, tiny_model

SALT = "5a" * 32


@cache
def world() -> Dataset:
    """Two subjects to forget, three to keep, twelve public ones."""
    return tiny_dataset(people=5, forget=2, holdout=4, utility=12)


@cache
def base() -> nn.Module:
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)  # tied to the head: logits can tell tokens apart that are unlearnt
    fit(model, tiny_adapter(), world()["utility"], TrainOptions(epochs=16, batch_size=8, learning_rate=1e-2))
    return model


def frozen() -> FrozenBase:
    return FrozenBase(base(), tiny_adapter())


@cache
def public(kind: str, options: tuple[tuple[str, Any], ...]) -> Public:
    """The public artefacts of a zone, fitted once."""
    found = get_zone(kind)
    with evaluating(base()):
        return found.build.prepare(frozen(), world()["utility"], found.options(**dict(options)), 0)


def zone_over(
    kind: str, private: Sequence[Sample], owners: Mapping[str, tuple[str, ...]] | None = None, **options: Any
) -> ZonedModel:
    """A zone of that kind over the base; ``options`` as the kind's, ``owners`` by record id."""
    found, here = get_zone(kind), frozen()
    options = {"false_open": 0.05, **options}
    with evaluating(base()):
        artefacts = public(kind, tuple(sorted(options.items())))
        zone = found.build(found.options(**options), artefacts, digest_weights(base()), SALT)
        zone.add([zone.record(s, here.adapter, (owners or {}).get(s.id, ())) for s in private], here)
    return ZonedModel(base(), zone)


def probabilities(model: nn.Module, samples: Sequence[Sample]) -> np.ndarray:
    """exp(-loss) of each sample."""
    adapter = tiny_adapter()
    bind: Callable[..., Any] = adapter.bind
    bind(model)
    return np.array([s.prob for s in collect(model, adapter, samples)])
