"""LLMU: ascend on the answers, learn random ones in their place, stay close to the original elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.families import replacement
from expunge.methods.registry import Context, Outcome, method
from expunge.models.adapter import Adapter
from expunge.options import option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, Trainer, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Teacher, Term, kl_C, nll_N

PAPER_RATE = 2e-6


@dataclass(frozen=True, kw_only=True)
class LlmuOptions(TrainOptions):
    """The three weights, and what an answer is replaced by."""

    epochs: float = option(10.0, "passes over the forget set", "ours: authors' code has 1,000 steps")
    batch_size: int = option(8, "forget samples in one step", "ours: authors' code has 2")
    retain_batch: int = option(8, "retain samples in one step", "ours: one per forget sample, as authors' code")
    learning_rate: float | None = option(
        None, "peak learning rate; the paper's, raised for small models, if none", "authors' code: 2e-6"
    )
    forget_weight: float = option(0.5, "weight of the ascent on the forget answers, the paper's ε1", "authors' code")
    random_weight: float = option(1.0, "weight of the random answers, ε2", "authors' code")
    normal_weight: float = option(1.0, "weight of the divergence from the original on retain, ε3", "authors' code")
    random_answers: int = option(5, "random answers to each forget prompt", "authors' code: K = 5")
    stop_loss: float | None = option(100.0, "stop when the forget loss passes this, nats per token", "authors' code")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.forget_weight, self.random_weight, self.normal_weight) < 0 or self.random_answers < 1:
            raise UserError(
                f"forget_weight = {self.forget_weight}, random_weight = {self.random_weight}, normal_weight = "
                f"{self.normal_weight}, random_answers = {self.random_answers} cannot be: give weights of 0 or more, "
                "and 1 or more answers."
            )


def mismatched(
    sample: Sample, pool: Sequence[Sample], count: int, adapter: Adapter, rng: np.random.Generator
) -> list[Sample]:
    """The sample's prompt (and image) with ``count`` targets of the pool, none of them its own.

    Where the pool has no other target, refusals (text) or other classes (classifier) stand in.
    """
    others = list(dict.fromkeys(s.target for s in pool if s.target != sample.target))
    if not others:
        made = [replacement(sample, adapter, rng) for _ in range(count)]
    else:
        drawn = rng.choice(len(others), size=count, replace=len(others) < count)
        made = [replace(sample, target=others[i], probes=()) for i in drawn]
    return [replace(s, id=f"{sample.id}/random{k}") for k, s in enumerate(made)]


@dataclass
class AnsweredPlan:
    """Batches of ``plan``, and with each forget sample all its random answers."""

    plan: EpochPlan
    answers: int

    @property
    def steps(self) -> int:
        return self.plan.steps

    def batch(self, step: int) -> dict[str, list[int]]:
        picks = self.plan.batch(step)
        return picks | {"random": [i * self.answers + k for i in picks["forget"] for k in range(self.answers)]}


@method(
    name="llmu",
    options=LlmuOptions,
    paper="Yao et al. 2023, arXiv:2310.10683, eq. 1 to 5",
    formula="−ε1·NLL(f) + ε2·NLL(random answers to f) + ε3·KL(p_o ‖ p_θ)(r)",
    wants=frozenset({"retain"}),
)
def llmu(context: Context, options: LlmuOptions) -> Outcome:
    """Three terms: away from the answers, towards random ones, as before on everything else.

    Random answers are targets of retain samples, so what is learnt in place of an answer is another's answer.
    """
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(context.model, PAPER_RATE))
    model, adapter = context.model, context.adapter
    rng = np.random.default_rng(context.seed)
    random = [
        s for own in context.forget for s in mismatched(own, context.retain, options.random_answers, adapter, rng)
    ]
    feeds = {"forget": Feed(context.forget), "random": Feed(random)}
    sizes = {"forget": options.batch_size}
    terms = [
        Term("forget", "forget", "token", nll_N, -options.forget_weight),
        Term("random", "random", "token", nll_N, options.random_weight),
    ]
    notes = []
    if context.retain:
        teacher = Teacher.of(model, adapter, context.retain)
        feeds["retain"], sizes["retain"] = Feed(context.retain), options.retain_batch
        terms.append(Term("retain", "retain", "token", lambda view: teacher.compare(view, kl_C), options.normal_weight))
    else:
        notes.append(
            "no retain samples were given: random answers are refusals or other classes, and nothing holds the rest"
        )
    lengths = {role: feeds[role].lengths(adapter) for role in sizes}
    plan = AnsweredPlan(EpochPlan(lengths, sizes, options.epochs, "forget", context.seed), options.random_answers)

    def guard(trainer: Trainer) -> None:
        if options.stop_loss is not None and trainer.log.last("forget", 3) > options.stop_loss:
            trainer.stop = f"forget loss above {options.stop_loss}"

    log = train(
        model, adapter, feeds, terms, plan, options,
        seed=context.seed, work=context.work, progress=context.progress, name="llmu", on_step=guard,
    )  # fmt: skip
    if len(log.steps) < plan.steps:
        notes.append(f"stopped after {len(log.steps)} of {plan.steps} steps: forget loss above {options.stop_loss}")
    return Outcome(model, notes, {"steps": len(log.steps), "log": log.steps})
