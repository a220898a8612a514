"""Samples, probes, roles and datasets: the words that every other room uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from expunge.errors import UserError

Role = Literal["forget", "retain", "holdout", "utility"]
ROLES: tuple[Role, ...] = get_args(Role)
ProbeKind = Literal["paraphrase", "restated", "perturbed", "reverse", "twin"]
Modality = Literal["text", "classifier", "multimodal"]
Image = Path | np.ndarray  # a file, or (H, W, C) uint8


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Another view of a sample, used only for measuring.

    paraphrase: the question in other words, original answer. restated: original question, the answer in other
    words. perturbed: original question, a wrong answer of the same type. reverse: asks from the answer back to
    the subject. twin: the same question about a person who was never seen, with that person's answer.
    """

    kind: ProbeKind
    prompt: str
    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One training example.

    ``prompt`` is empty for a document, whose text is then the whole of ``target``; for an image classifier
    ``target`` is the class index. ``names`` are the ways in which the texts name the subject (full name first).
    """

    id: str
    subject: str
    target: str | int
    prompt: str = ""
    image: Image | None = field(default=None, compare=False)
    names: tuple[str, ...] = ()
    probes: tuple[Probe, ...] = ()

    def probes_of(self, kind: ProbeKind) -> tuple[Probe, ...]:
        return tuple(probe for probe in self.probes if probe.kind == kind)

    def as_probe(self, probe: Probe, number: int = 0) -> Sample:
        """The probe as a sample of its own, so that it goes through a model like any other."""
        return replace(self, id=f"{self.id}/{probe.kind}/{number}", prompt=probe.prompt, target=probe.target, probes=())

    def digest(self) -> str:
        """SHA-256 of what a model would see; equal content gives an equal digest whatever the id."""
        parts: list[Any] = [self.prompt, self.target]
        if isinstance(self.image, np.ndarray):
            pixels = np.ascontiguousarray(self.image)
            parts += [list(pixels.shape), hashlib.sha256(pixels.tobytes()).hexdigest()]
        elif self.image is not None:
            parts.append(hashlib.sha256(Path(self.image).read_bytes()).hexdigest())
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Samples in roles. ``source`` says where they come from (a folder, a hub name, a seed)."""

    name: str
    roles: Mapping[Role, tuple[Sample, ...]]
    modality: Modality = "text"
    source: str = ""
    notes: tuple[str, ...] = ()

    def __getitem__(self, role: Role) -> tuple[Sample, ...]:
        return self.roles.get(role, ())

    @property
    def private(self) -> tuple[Sample, ...]:
        """What the original was trained on beside its base: forget and retain, in that order."""
        return self["forget"] + self["retain"]

    def digest(self) -> str:
        """SHA-256 over roles and sample contents, independent of the order inside a role."""
        content = {role: sorted(s.digest() for s in self[role]) for role in ROLES}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def check(self) -> Dataset:
        """Return the dataset itself if it can be unlearned from.

        Raises:
            UserError: the forget set is empty, an id occurs twice, or a sample is in forget and in retain.
        """
        if not self["forget"]:
            raise UserError(f"the forget set of '{self.name}' is empty: name at least one sample to forget.")
        for role in ROLES:
            seen: set[str] = set()
            for sample in self[role]:
                if sample.id in seen:
                    raise UserError(f"the id '{sample.id}' occurs twice in role {role}: ids must be unique.")
                seen.add(sample.id)
        both = overlap(self["forget"], self["retain"])
        if both:
            shown = ", ".join(both[:5]) + (f" and {len(both) - 5} more" if len(both) > 5 else "")
            raise UserError(
                f"{len(both)} sample(s) stand in forget and in retain ({shown}): "
                "take them out of the retain set, or the model is told to keep what it must forget."
            )
        return self


def overlap(forget: Sequence[Sample], retain: Sequence[Sample]) -> list[str]:
    """Ids of the forget samples that are also in retain, by id or by content."""
    ids = {s.id for s in retain}
    contents = {s.digest() for s in retain}
    return [s.id for s in forget if s.id in ids or s.digest() in contents]


def subjects(samples: Iterable[Sample]) -> list[str]:
    """Subjects in order of first appearance."""
    return list(dict.fromkeys(s.subject for s in samples))
