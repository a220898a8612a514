"""SKU: make a model that knows the forget samples all too well and little else, and subtract what made it so."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from expunge.errors import UserError
from expunge.methods.llmu import AnsweredPlan, mismatched
from expunge.methods.registry import Context, Outcome, method
from expunge.methods.task_vector import check_scale, learnt, walk_back
from expunge.options import option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, Log, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Teacher, Term, View, kl_C, nll_N

RATE = 1e-5


@dataclass(frozen=True, kw_only=True)
class SkuOptions(TrainOptions):
    """What the bad model learns, and how far to walk back from it."""

    epochs: float = option(10.0, "passes over the forget set", "ours: authors' code has 1,000 steps of 2 samples")
    batch_size: int = option(8, "forget samples in one step", "ours: authors' code has 2")
    retain_batch: int = option(8, "retain samples in one step", "ours: one per forget sample, as authors' code")
    learning_rate: float | None = option(
        None, "peak learning rate; 1e-5, raised for small models, if none", "ours: authors' 2e-4 is for LoRA"
    )
    guided: float = option(2.5, "weight of learning the forget answers (guided distortion), ε1", "authors' README")
    random: float = option(
        2.5, "weight of learning other forget answers (random disassociation), ε2", "authors' README"
    )
    preserving: float = option(1.0, "weight of leaving the original on retain (preservation divergence), ε3", "README")
    random_answers: int = option(5, "other answers to each forget prompt", "authors' code: K = 5")
    bound: float = option(
        2.0, "divergence on retain that is far enough, nats per token", "ours: the paper's has no end"
    )
    scale: float | None = option(None, "multiple of the task vector that is subtracted; chosen on retain if none")
    keep: float = option(0.95, "share of the original's retain accuracy that the chosen scale must leave", "ours")
    largest: float = option(1.0, "largest scale that is tried", "paper §3.2: the scale is 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.scale, self.keep, self.largest)
        if min(self.guided, self.random, self.preserving) < 0 or self.random_answers < 1 or self.bound <= 0:
            raise UserError(
                f"guided = {self.guided}, random = {self.random}, preserving = {self.preserving}, random_answers = "
                f"{self.random_answers}, bound = {self.bound} cannot be: give weights of 0 or more, 1 or more answers, "
                "and a bound above 0."
            )


@method(
    name="sku",
    options=SkuOptions,
    paper="Liu et al. 2024, arXiv:2402.10058, section 3",
    formula="θ_o − λ·(θ_bad − θ_o); θ_bad: min ε1·NLL(f) + ε2·NLL(other f answers) − ε3·min(KL(p_o ‖ p_θ)(r), bound)",
    wants=frozenset({"retain"}),
    helpers_hold_data=True,
)
def sku(context: Context, options: SkuOptions) -> Outcome:
    """Learn what is unwanted and unlearn what is wanted, then negate both at once.

    The bad model is pushed away from the original on retain, so that the negated step leads towards it there. The
    paper's scale of 1 leaves a fifth of the retain probability of small models here, so retain chooses the scale by
    default. On a classifier of few classes the other answers are wrong classes: negating them strengthens the right
    one, and ``random=0`` forgets where the default does not.
    """
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(context.model, RATE))
    model, adapter, notes = context.model, context.adapter, list[str]()
    feeds, sizes = {"forget": Feed(context.forget)}, {"forget": options.batch_size}
    terms = [Term("forget", "forget", "token", nll_N, options.guided)]
    answers = 0
    if len({s.target for s in context.forget}) > 1:
        answers, rng = options.random_answers, np.random.default_rng(context.seed)
        others = [s for own in context.forget for s in mismatched(own, context.forget, answers, adapter, rng)]
        feeds["random"] = Feed(others)
        terms.append(Term("random", "random", "token", nll_N, options.random))
    else:
        notes.append("all forget samples have one answer: no other answers were learnt beside it")
    if context.retain:
        teacher = Teacher.of(model, adapter, context.retain)

        def away_N(view: View) -> Tensor:
            return teacher.compare(view, kl_C).clamp_max(options.bound)

        feeds["retain"], sizes["retain"] = Feed(context.retain), options.retain_batch
        terms.append(Term("retain", "retain", "token", away_N, -options.preserving))
    lengths = {role: feeds[role].lengths(adapter) for role in sizes}
    plan = AnsweredPlan(EpochPlan(lengths, sizes, options.epochs, "forget", context.seed), answers)

    def learn() -> Log:
        return train(
            model, adapter, feeds, terms, plan, options, seed=context.seed,
            work=None if context.work is None else context.work / "bad", progress=context.progress, name="sku",
        )  # fmt: skip

    seen = [*context.forget, *context.retain]
    vector, log = learnt(context, learn, seen, "knows the forget answers and little else, to be subtracted")
    scale, chosen = walk_back(context, vector, options.scale, options.keep, options.largest)
    return Outcome(model, notes + chosen, {"scale": scale, "steps": len(log.steps), "log": log.steps})
