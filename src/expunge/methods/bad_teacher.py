"""Bad teacher: on forget the student learns from random weights, on retain from the original."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import Context, Outcome, method
from expunge.methods.retrain import from_scratch
from expunge.options import option
from expunge.training.batching import Stream
from expunge.training.loop import Feed, Trainer, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Teacher, Term, kl_C

PAPER_RATE = 7e-6  # at a billion parameters; at the 11 million of the paper's ResNet-18 this is its 1e-4


@dataclass(frozen=True, kw_only=True)
class BadTeacherOptions(TrainOptions):
    """How much of retain stands beside forget, and for how long."""

    epochs: float = option(5.0, "passes over forget and the chosen retain samples", "ours: the paper has 1 long one")
    batch_size: int = option(8, "samples of both kinds together in one step", "ours: the paper has 256 of 13,000")
    learning_rate: float | None = option(
        None, "peak learning rate; by the model's size if none", "authors' code: 1e-4 at 11 million parameters"
    )
    retain_share: float = option(0.3, "share of the retain samples that is used", "paper §5: 30 %")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.retain_share <= 1:
            raise UserError(f"retain_share = {self.retain_share} cannot be: give a share above 0 and at most 1.")


@dataclass
class MixedPlan:
    """Batches drawn from forget and retain together, as from one set; each is then split by role.

    The first batch with a forget sample changes places with the very first: retain alone has no gradient yet, as the
    student still is the original there, and an adaptive optimizer would make full steps of rounding errors.
    """

    lengths: Mapping[str, Sequence[int]]
    size: int
    epochs: float
    seed: int = 0

    def __post_init__(self) -> None:
        self._items = [(role, i) for role, own in sorted(self.lengths.items()) for i in range(len(own))]
        self._stream = Stream([self.lengths[role][i] for role, i in self._items], self.size, [self.seed])
        first = next(n for n in range(self._stream.per_epoch) if "forget" in self._split(self._stream[n]))
        self._places = {0: first, first: 0}

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.epochs * self._stream.per_epoch))

    def batch(self, step: int) -> dict[str, list[int]]:
        return self._split(self._stream[self._places.get(step, step)])

    def _split(self, numbers: Sequence[int]) -> dict[str, list[int]]:
        picks: dict[str, list[int]] = {}
        for number in numbers:
            role, i = self._items[number]
            picks.setdefault(role, []).append(i)
        return picks


def some(samples: Sequence[Sample], share: float, seed: int) -> list[Sample]:
    """A random ``share`` of the samples, one at least, in their order."""
    count = max(1, round(share * len(samples)))
    return [samples[i] for i in sorted(np.random.default_rng(seed).permutation(len(samples))[:count])]


@method(
    name="bad-teacher",
    options=BadTeacherOptions,
    paper="Chundawat et al. 2023, arXiv:2205.08096, eq. 1",
    formula="mean over f and r of u·KL(p_random ‖ p_θ) + (1 − u)·KL(p_o ‖ p_θ); u = 1 on f, 0 on r",
    wants=frozenset({"retain"}),
)
def bad_teacher(context: Context, options: BadTeacherOptions) -> Outcome:
    """Learn from random weights on forget and from the original on retain, in mixed batches.

    What random weights say is close to uniform, so the result is less sure of the forget samples than a model that
    never saw them. Both teachers are asked once, before the training; neither stays in memory.
    """
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(context.model, PAPER_RATE))
    model, adapter = context.model, context.adapter
    feeds = {"forget": Feed(context.forget)}
    teachers = {"forget": Teacher.of(from_scratch(model, context.seed), adapter, context.forget)}
    notes = []
    if context.retain:
        retain = some(context.retain, options.retain_share, context.seed)
        feeds["retain"], teachers["retain"] = Feed(retain), Teacher.of(model, adapter, retain)
    else:
        notes.append("no retain samples were given: nothing holds the rest of the model in place")

    def term(role: str) -> Term:
        return Term(role, role, "token", lambda view: teachers[role].compare(view, kl_C))

    terms = [term(role) for role in feeds]
    plan = MixedPlan(
        {r: f.lengths(adapter) for r, f in feeds.items()}, options.batch_size, options.epochs, context.seed
    )

    def mixed(trainer: Trainer, picks: Mapping[str, Sequence[int]]) -> dict[str, float]:
        # One mean over the whole batch: each role counts by the number of its target tokens.
        counts = {role: sum(adapter.num_targets(feeds[role].samples[i]) for i in own) for role, own in picks.items()}
        total = max(1, sum(counts.values()))
        return trainer.gradients(picks, [replace(t, weight=counts[t.role] / total) for t in terms if t.role in counts])

    log = train(
        model, adapter, feeds, terms, plan, options,
        seed=context.seed, work=context.work, progress=context.progress, name="bad-teacher", compute=mixed,
    )  # fmt: skip
    return Outcome(model, notes, {"steps": len(log.steps), "log": log.steps})
