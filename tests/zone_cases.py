"""A tiny base that knows public people, private people it has never seen, and zones over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from expunge.data.registry import load_dataset
from expunge.data.samples import Dataset, Sample
from expunge.models.load import Loaded
from expunge.models.text import TextAdapter
from expunge.models.tiny import init_text
from expunge.training.loop import TrainOptions, fit
from expunge.zones.build import build_zone
from expunge.zones.model import ZonedModel
from expunge.zones.zone import FrozenBase, Public, Zone, get_zone

SALT = "0f" * 32


@cache
def world() -> tuple[Loaded, Dataset]:
    """``people`` with four questions each; a base of some 20k parameters that has read the public ones."""
    sizes = {"people": "4", "forget": "1", "utility": "12", "holdout": "4", "questions": "4", "perturbed": "3"}
    data = load_dataset("people", data_dir=None, seed=0, options=sizes)
    loaded = init_text(data["utility"], "tiny-test", 0)
    fit(loaded.model, loaded.adapter, data["utility"], TrainOptions(epochs=12, batch_size=8, learning_rate=1e-2))
    loaded.model.eval()
    return loaded, data


def base() -> FrozenBase:
    loaded, _ = world()
    return FrozenBase(loaded.model, loaded.adapter)


def adapter() -> TextAdapter:
    found = world()[0].adapter
    assert isinstance(found, TextAdapter)
    return found


def private() -> list[Sample]:
    return list(world()[1].private)


@cache
def public(kind: str = "store") -> Public:
    """The public artefacts of a zone, fitted once."""
    loaded, data = world()
    return build_zone(loaded, private(), data["utility"], kind, salt=SALT).zone.public


def zone_of(samples: Sequence[Sample], kind: str = "store", owners: dict[str, tuple[str, ...]] | None = None) -> Zone:
    """A zone with these records and the public artefacts of :func:`public`."""
    from expunge.zones.storage import digest_weights

    found = get_zone(kind)
    zone = found.build(found.options(), public(kind), digest_weights(world()[0].model), SALT)
    zone.add([zone.record(s, adapter(), (owners or {}).get(s.id, ())) for s in samples], base())
    return zone


def zoned(samples: Sequence[Sample] | None = None) -> ZonedModel:
    return ZonedModel(world()[0].model, zone_of(private() if samples is None else samples))


def probes(samples: Sequence[Sample], kind: str = "paraphrase") -> list[Sample]:
    return [s.as_probe(p, i) for s in samples for i, p in enumerate(s.probes_of(kind))]  # type: ignore[arg-type]


def document(subject: str, text: str) -> Sample:
    return replace(private()[0], id=f"doc/{subject}", subject=subject, prompt="", target=text, names=(subject,))
