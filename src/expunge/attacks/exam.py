"""What an audit lays before its attacks: the checkpoints, the samples in roles, and what is kept from evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from expunge.attacks.continuations import room_for
from expunge.attacks.registry import Need
from expunge.data.samples import Modality, Role, Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter
from expunge.models.text import TextAdapter
from expunge.progress import Progress
from expunge.signals.cache import SignalCache
from expunge.signals.forward import collect
from expunge.signals.record import Signals

Kind = Literal["audited", "original", "reference", "shadow", "base"]


@dataclass(eq=False)
class Checkpoint:
    """One model under examination. It is loaded when first asked for; signals and answers are kept, the model need not.

    ``load`` gives the model; ``digest`` names its weights and is the key of the cache on disk, "" for no such cache.
    Every checkpoint has its own adapter, since tokenizers may differ between models.
    """

    name: str
    kind: Kind
    adapter: Adapter
    load: Callable[[], nn.Module]
    digest: str = ""
    cache: SignalCache | None = None
    max_tokens: int = 4096
    path: str = ""  # where it came from, for the report
    _model: nn.Module | None = field(default=None, repr=False)
    _signals: dict[str, Signals] = field(default_factory=dict, repr=False)
    _answers: dict[tuple[str, int], str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: nn.Module, adapter: Adapter, kind: Kind = "audited", name: str = "") -> Checkpoint:
        """A model that is in memory already."""
        return cls(name or kind, kind, adapter, lambda: model)

    @property
    def model(self) -> nn.Module:
        """The model itself, in eval mode; attacks that change weights work on a copy."""
        if self._model is None:
            self._model = self.load().eval()
        return self._model

    def release(self) -> None:
        """Let the model go; signals and answers stay."""
        self._model = None

    def signals(self, samples: Sequence[Sample], progress: Progress | None = None) -> list[Signals]:
        """Signals of the samples in the order given; only what was never asked before goes through the model.

        The texts that are new run in an order of their own (by content), so the numbers of a text do not depend on
        the order in which samples are given.
        """
        keys = [key_of(s) for s in samples]
        fresh = {k: s for k, s in zip(keys, samples, strict=True) if k not in self._signals}
        wanted = [fresh[k] for k in sorted(fresh)]
        if wanted:
            found = None
            if self.cache is not None and self.digest:
                found = self.cache.get(self.digest, self.adapter, wanted)
            if found is None:
                found = collect(self.model, self.adapter, wanted, max_tokens=self.max_tokens, progress=progress)
                if self.cache is not None and self.digest:
                    self.cache.put(self.digest, self.adapter, wanted, found)
            self._signals.update(zip(sorted(fresh), found, strict=True))
        return [replace(self._signals[k], id=s.id, subject=s.subject) for k, s in zip(keys, samples, strict=True)]

    def answers(self, samples: Sequence[Sample], max_new_tokens: int = 64) -> list[str]:
        """Greedy answers to the prompts, kept in memory; at most half the context long, so that prompts stay whole."""
        if isinstance(self.adapter, TextAdapter):
            max_new_tokens = room_for(self.adapter, max_new_tokens)
        keys = [(key_of(s), max_new_tokens) for s in samples]
        fresh = {k: s for k, s in zip(keys, samples, strict=True) if k not in self._answers}
        if fresh:
            order = sorted(fresh)
            found = self.adapter.generate(self.model, [fresh[k] for k in order], max_new_tokens)
            self._answers.update(zip(order, found, strict=True))
        return [self._answers[k] for k in keys]


def key_of(sample: Sample) -> str:
    """What a text is kept under: its content, whatever its id."""
    return sample.digest()


@dataclass(eq=False)
class Exam:
    """Everything an attack may look at.

    ``samples``: the measured samples of each role. ``aux``: texts of the same kind that no model was trained on and
    that are in no role: prefixes, calibration and attack training come from here and never from ``samples``.
    ``trained``: retain samples that are not in ``samples``: known members for attacks that want them.
    ``llm``: a callable prompt -> text given by the user (translations, paraphrases), or None.
    """

    audited: Checkpoint
    samples: dict[Role, list[Sample]]
    original: Checkpoint | None = None
    references: Sequence[Checkpoint] = ()
    shadows: Sequence[Checkpoint] = ()
    base: Checkpoint | None = None
    aux: Sequence[Sample] = ()
    trained: Sequence[Sample] = ()
    llm: Callable[[str], str] | None = None
    seed: int = 0
    resamples: int = 1000
    level: float = 0.95
    work: Path | None = None
    progress: Progress = field(default_factory=Progress)
    shared: dict[Any, Any] = field(default_factory=dict)  # what attacks compute once for all checkpoints

    def __post_init__(self) -> None:
        if not self.samples.get("forget"):
            raise UserError("an audit needs at least one forget sample: name some with --forget or --data.")

    @property
    def modality(self) -> Modality:
        return self.audited.adapter.modality

    @property
    def forget(self) -> list[Sample]:
        return self.samples["forget"]

    @property
    def holdout(self) -> list[Sample]:
        return self.samples.get("holdout", [])

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those that are examined: the audited model, its original, its references."""
        first = [self.audited, *([self.original] if self.original else [])]
        return [*first, *self.references]

    def others(self, checkpoint: Checkpoint) -> list[Checkpoint]:
        """Models that never saw the forget samples, other than this one: what pair attacks compare with."""
        own = [*self.references, *self.shadows, *([self.base] if self.base else [])]
        return [c for c in own if c is not checkpoint]

    def has(self, need: Need) -> bool:
        return {
            "holdout": bool(self.holdout),
            "aux": bool(self.aux),
            "retain": bool(self.samples.get("retain")) or bool(self.trained),
            "utility": bool(self.samples.get("utility")),
            "original": self.original is not None,
            "other": len(self.others(self.audited)) > 0,
            "base": self.base is not None,
            "probes": any(s.probes for s in self.forget),
            "names": any(s.names for s in self.forget),
            "llm": self.llm is not None,
        }[need]

    def rng(self, *what: object) -> np.random.Generator:
        """A generator of its own for each purpose, the same for every checkpoint."""
        words = [ord(c) for c in "/".join(map(str, what))]
        return np.random.default_rng([self.seed, *words])
