"""The edit itself: forget towards the targets, keep the rest, heal, and close the loop on never-seen text."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.methods.cluster.options import ClusterOptions
from expunge.methods.cluster.targets import Divergence, Targets
from expunge.models.adapter import Adapter
from expunge.models.losses import mean_losses
from expunge.models.rounding import rounded_weights
from expunge.training.batching import Stream
from expunge.training.loop import Trainer, TrainOptions, fit
from expunge.training.terms import Teacher, Term, View, kl_C, nll_N

CONTROL_SAMPLES = 40  # never-seen samples that one measurement of the loop reads
SHIFT_LIMIT = 6.0  # nats
CONTROL_FROM = 0.2  # share of the steps before the loop closes


def divergence(options: ClusterOptions) -> Divergence:
    """The forget objective that the options ask for."""
    return Divergence(options.js, options.reverse, options.forward, options.match)


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch normalisation uses its running statistics and leaves them as they are, in copies of the model too.

    Statistics of a batch that is mostly to be forgotten are not those that the model is used with: what is forgotten
    under them comes back without them.
    """

    def rest(module: nn.Module, _: object) -> None:
        module.eval()

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [m.register_forward_pre_hook(rest) for m in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class EditPlan:
    """Forget every step, then (healing) every ``heal_every``-th; healing may dwell on the worst retain samples."""

    lengths: Mapping[str, Sequence[int]]
    options: ClusterOptions
    seed: int
    memory: dict[str, Any]

    def __post_init__(self) -> None:
        sizes = {"forget": self.options.batch_size, "retain": self.options.retain_batch, "earlier": 2}
        self._streams = {
            role: Stream(lengths, sizes[role], [self.seed, i])
            for i, (role, lengths) in enumerate(sorted(self.lengths.items()))
            if lengths
        }

    @property
    def steps(self) -> int:
        options = self.options
        if options.steps is not None:
            return options.steps
        forget = math.ceil(options.forget_epochs * len(self.lengths["forget"]) / options.batch_size)
        # Healing steps see few forget samples: lengthen so that the forget passes are kept.
        active = options.heal_from + (1 - options.heal_from) / options.heal_every
        forget = math.ceil(forget / active)
        retain = math.ceil(options.epochs * len(self.lengths.get("retain", ())) / options.retain_batch)
        return max(forget, retain, 1)

    @property
    def healing(self) -> int:
        """First healing step."""
        return math.ceil(self.options.heal_from * self.steps)

    def batch(self, step: int) -> dict[str, list[int]]:
        picks: dict[str, list[int]] = {}
        heals = step >= self.healing
        if not heals or (step - self.healing) % self.options.heal_every == 0:
            number = step if not heals else self.healing + (step - self.healing) // self.options.heal_every
            picks["forget"] = self._streams["forget"][number]
        if "retain" in self._streams:
            worst: list[int] | None = self.memory.get("worst")
            if heals and worst:
                rng = np.random.default_rng([self.seed, 7, step])
                size = min(len(worst), self.options.retain_batch)
                picks["retain"] = [worst[int(i)] for i in rng.choice(len(worst), size, replace=False)]
            else:
                picks["retain"] = self._streams["retain"][step]
        if "earlier" in self._streams:
            picks["earlier"] = self._streams["earlier"][step]
        return picks


@dataclass
class Edit:
    """Terms and callbacks of one edit; ``memory`` holds what must survive a restart."""

    adapter: Adapter
    options: ClusterOptions
    targets: Targets
    teacher: Teacher | None
    forget: Sequence[Sample]
    retain: Sequence[Sample]
    unseen: Sequence[Sample]
    plan: EditPlan
    memory: dict[str, Any]
    project: Callable[[int, bool], None] | None = None  # rank limit or null space, after each step
    trace: list[dict[str, float]] = field(default_factory=list)

    def terms(self) -> list[Term]:
        """Forget towards the targets, retain, and what earlier requests must stay at."""
        options = self.options
        terms = [Term("forget", "forget", "token", self._forget_N)]
        if options.retain in ("nll", "both"):
            terms.append(Term("retain", "retain", "token", nll_N, options.alpha))
        if options.retain in ("kl", "both"):
            terms.append(Term("retain_kl", "retain", "token", self._kl_N, options.alpha))
        terms.append(Term("earlier", "earlier", "token", self._kl_N, options.alpha))
        return terms

    def _kl_N(self, view: View) -> Tensor:
        assert self.teacher is not None
        return self.teacher.compare(view, kl_C)

    def _forget_N(self, view: View) -> Tensor:
        with torch.no_grad():
            view.log_prob_N()  # for the loop's log, which the control reads
        return self.targets.compare(view, divergence(self.options))

    # -- callbacks of the loop -----------------------------------------------------------------------------------

    def compute(self, trainer: Trainer, picks: Mapping[str, Sequence[int]]) -> dict[str, float]:
        """Gradients of one step; every other forget step also withstands a relearning step (hardening)."""
        if trainer.step in self.negation_steps():
            self._negate(trainer)
        self.targets.shift = float(self.memory.get("shift", 0.0))
        if self.memory.get("unseen_loss") is None and self.unseen and self.options.control:
            self._measure(trainer)
        late = self.options.rounding and trainer.step >= self.options.rounding_from * self.plan.steps
        with rounded_weights(trainer.model, self.options.rounding) if late else nullcontext():
            values = trainer.gradients(picks)
        if "forget_nll" in values:
            self._control(trainer.step / self.plan.steps, values["forget_nll"])
        if self.options.harden and "forget" in picks and trainer.step % 2 == 0:
            self._harden(trainer, picks)
        return values

    def on_step(self, trainer: Trainer) -> None:
        """After each step: projection, the worst retain samples, weight average, never-seen loss."""
        step = trainer.step
        if self.project is not None:
            self.project(step, False)
        if step == self.plan.healing and self.options.worst < 1 and self.retain:
            losses = np.asarray(mean_losses(trainer.model, self.adapter, self.retain))
            count = max(1, round(self.options.worst * len(losses)))
            self.memory["worst"] = np.argsort(-losses, kind="stable")[:count].tolist()
        if self.unseen and self.options.control and step % self.options.control_every == 0:
            self._measure(trainer)
        if self.options.average and step > (1 - self.options.average) * self.plan.steps:
            seen = int(self.memory.get("averaged", 0))
            with torch.no_grad():
                for name, p in trainer.model.named_parameters():
                    if p.requires_grad:
                        mean = trainer.tensors.get(name)
                        value = p.detach().clone() if mean is None else mean + (p.detach() - mean) / (seen + 1)
                        trainer.tensors[name] = value
            self.memory["averaged"] = seen + 1
        if step == self.plan.steps and trainer.tensors:
            with torch.no_grad():
                for name, p in trainer.model.named_parameters():
                    if name in trainer.tensors:
                        p.copy_(trainer.tensors[name])
        if step == self.plan.steps and self.project is not None:
            self.project(step, True)

    def negation_steps(self) -> set[int]:
        """Evenly from the first step to the beginning of healing."""
        return {int(s) for s in np.linspace(0, self.plan.healing, self.options.negations)}

    def _negate(self, trainer: Trainer) -> None:
        """A copy learns some forget samples again; the weights move against its change (cf. task vectors, Ilharco
        et al. 2023): what a relearner would find first is taken away first."""
        options = self.options
        rng = np.random.default_rng([self.plan.seed, 11, trainer.step])
        count = max(1, round(options.negation_share * len(self.forget)))
        some = [self.forget[int(i)] for i in rng.permutation(len(self.forget))[:count]]
        learner = copy.deepcopy(trainer.model)
        settings = TrainOptions(
            epochs=1,
            batch_size=4,
            learning_rate=options.negation_rate,
            other_learning_rate=options.negation_rate / 6,
            optimizer="muon",
            micro_tokens=options.micro_tokens,
            precision=options.precision,
        )
        fit(learner, self.adapter, some, settings, seed=self.plan.seed + trainer.step, name="negation")
        with torch.no_grad():
            for p, learnt in zip(trainer.model.parameters(), learner.parameters(), strict=True):
                if p.requires_grad:
                    p.add_(p - learnt, alpha=options.negation_scale)

    def _measure(self, trainer: Trainer) -> None:
        few = self.unseen[:: max(1, len(self.unseen) // CONTROL_SAMPLES)]
        self.memory["unseen_loss"] = float(np.mean(mean_losses(trainer.model, self.adapter, few)))

    def _control(self, done: float, now: float) -> None:
        smooth = self.memory.get("forget_loss")
        smooth = now if smooth is None else 0.8 * smooth + 0.2 * now
        self.memory["forget_loss"] = smooth
        wanted = self.memory.get("unseen_loss")
        if not self.options.control or wanted is None or done < CONTROL_FROM:
            return
        shift = float(self.memory.get("shift", 0.0)) + self.options.control * (wanted - smooth)
        self.memory["shift"] = min(SHIFT_LIMIT, max(-SHIFT_LIMIT / 2, shift))
        self.trace.append({"forget_loss": smooth, "unseen_loss": wanted, "shift": self.memory["shift"]})

    def _harden(self, trainer: Trainer, picks: Mapping[str, Sequence[int]]) -> None:
        """Add the forget gradient at the weights that one sign step of relearning would reach."""
        own = {"forget": picks["forget"]}
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        kept = [None if p.grad is None else p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        trainer.gradients(own, [Term("relearn", "forget", "token", nll_N)])
        here = [None if p.grad is None else p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p.sub_(self.options.harden * p.grad.sign())
                p.grad = None
        trainer.gradients(own, [t for t in self.terms() if t.name == "forget"])
        with torch.no_grad():
            for p, before, grad in zip(parameters, here, kept, strict=True):
                if before is not None:
                    p.copy_(before)  # adding the move again would leave rounding behind
                if grad is not None:
                    p.grad = grad if p.grad is None else p.grad + grad
