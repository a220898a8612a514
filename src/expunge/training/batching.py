"""Which samples each step sees: a pure function of (seed, step), so that resuming needs no sampler state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

WINDOW = 16  # batches that are bucketed by length together: padding shrinks, batches stay random
T = TypeVar("T")


class Plan(Protocol):
    """A schedule of batches: for each step, the sample indices of each role."""

    @property
    def steps(self) -> int: ...

    def batch(self, step: int) -> dict[str, list[int]]: ...


def epoch_batches(lengths: Sequence[int], size: int, rng: np.random.Generator) -> list[list[int]]:
    """One shuffled epoch in batches of ``size`` samples, similar lengths together. Every sample occurs once."""
    order = rng.permutation(len(lengths))
    batches: list[list[int]] = []
    for start in range(0, len(order), size * WINDOW):
        window = sorted(order[start : start + size * WINDOW].tolist(), key=lambda i: lengths[i])
        cut = [window[i : i + size] for i in range(0, len(window), size)]
        batches += [cut[i] for i in rng.permutation(len(cut))]
    return batches


@dataclass
class Stream:
    """An endless sequence of batches of one role, epoch after epoch, addressable by number."""

    lengths: Sequence[int]
    size: int
    seed: Sequence[int]
    _epochs: dict[int, list[list[int]]] = field(default_factory=dict, repr=False)

    @property
    def per_epoch(self) -> int:
        return max(1, math.ceil(len(self.lengths) / self.size))

    def __getitem__(self, number: int) -> list[int]:
        epoch, within = divmod(number, self.per_epoch)
        if epoch not in self._epochs:
            self._epochs = {epoch: epoch_batches(self.lengths, self.size, np.random.default_rng([*self.seed, epoch]))}
        return self._epochs[epoch][within]


@dataclass
class EpochPlan:
    """``epochs`` passes over the ``leading`` role; the other roles run beside it, each in its own order."""

    lengths: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int]
    epochs: float
    leading: str
    seed: int = 0

    def __post_init__(self) -> None:
        self._streams = {
            role: Stream(self.lengths[role], size, [self.seed, i])
            for i, (role, size) in enumerate(sorted(self.sizes.items()))
            if self.lengths[role]
        }

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.epochs * self._streams[self.leading].per_epoch))

    def batch(self, step: int) -> dict[str, list[int]]:
        return {role: stream[step] for role, stream in self._streams.items()}


def group_by_tokens(items: Sequence[T], lengths: Sequence[int], max_tokens: int) -> list[list[T]]:
    """Items sorted by length and cut into groups of at most ``max_tokens`` padded tokens (one item at least)."""
    order = sorted(range(len(items)), key=lambda i: lengths[i])
    groups: list[list[T]] = []
    for i in order:
        # ascending order: the new item is the longest of its group
        if groups and lengths[i] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(items[i])
        else:
            groups.append([items[i]])
    return groups
