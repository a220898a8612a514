"""KGA: the original's knowledge of the forget samples shrinks to what it knows of never-seen ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import Context, Outcome, method
from expunge.methods.retrain import from_scratch
from expunge.models.adapter import Adapter, evaluating
from expunge.models.losses import error_and_loss
from expunge.options import option
from expunge.training.batching import EpochPlan
from expunge.training.loop import ORDINARY_RATE, Feed, Trainer, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Teacher, Term, View, kl_C, training_term

RATE = 5e-6  # at a billion parameters; a third of the paper's 5e-5 at 140 million, which costs half of retain here


@dataclass(frozen=True, kw_only=True)
class KgaOptions(TrainOptions):
    """How the gap is aligned, and how long the helper models learn."""

    epochs: float = option(20.0, "most passes over the forget set", "ours: the paper has 5,000 to 12,000 steps")
    batch_size: int = option(8, "forget samples in one step", "ours: as every other method here")
    retain_batch: int = option(32, "retain samples in one step", "ours: authors' code has 10 batches for one of forget")
    learning_rate: float | None = option(
        None, "peak learning rate; by the model's size if none", "ours: a third of the paper's 5e-5 at 140 million"
    )
    alpha: float = option(0.3, "weight of the divergence from the original on retain", "authors' code, generation")
    stop_gap: float = option(0.05, "stop when the mean difference of the gaps is at most this, nats", "authors' code")
    helper_epochs: float = option(
        100.0,
        "most passes of a helper model over its samples; it stops when it knows them as the original knows forget",
        "ours: enough at every size tried",
    )
    helper_rate: float | None = option(None, "learning rate of the helper models; by the model's size if none")

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.alpha, self.stop_gap) < 0 or self.helper_epochs <= 0 or (self.helper_rate or 1.0) <= 0:
            raise UserError(
                f"alpha = {self.alpha}, stop_gap = {self.stop_gap}, helper_epochs = {self.helper_epochs}, "
                f"helper_rate = {self.helper_rate} cannot be: give numbers of 0 or more, and epochs and a rate above 0."
            )


def paired(forget: Sequence[Sample], unseen: Sequence[Sample], seed: int) -> list[Sample]:
    """A never-seen sample for each forget sample, in random order; each once before one comes again."""
    order = np.random.default_rng(seed).permutation(len(unseen))
    return [unseen[order[i % len(unseen)]] for i in range(len(forget))]


def gaps(teacher: Teacher, model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> dict[str, float]:
    """KL(teacher ‖ model) of each sample by id: mean over its target positions, nats."""
    found: dict[str, float] = {}
    with evaluating(model):
        for group in adapter.batches(samples):
            own = [samples[i] for i in group]
            view = View(adapter.positions(model, own), own)
            values_B = view.positions.mean_per_sample(teacher.compare(view, kl_C))
            found |= dict(zip((s.id for s in own), values_B.tolist(), strict=True))
    return found


def knowing(context: Context, samples: Sequence[Sample], name: str, level: float, options: KgaOptions) -> nn.Module:
    """A helper model that has learnt ``samples`` down to a loss of ``level`` nats per token, from the base."""
    model = context.base() if context.base is not None else from_scratch(context.model, context.seed)
    context.helpers.add(name, model, samples, "knows these samples alone; its distance to the original is measured")
    rate = options.helper_rate or sized_rate(model, ORDINARY_RATE)
    own = replace(options, learning_rate=rate, schedule="constant", epochs=options.helper_epochs)
    feed = Feed(samples)
    plan = EpochPlan(
        {"train": feed.lengths(context.adapter)}, {"train": own.batch_size}, own.epochs, "train", context.seed
    )
    each = -(-len(samples) // own.batch_size)  # steps of an epoch

    def enough(trainer: Trainer) -> None:
        if trainer.step >= each and trainer.log.last("nll", each) <= level:
            trainer.stop = f"loss at the original's {level:.3g} nats"

    train(
        model, context.adapter, {"train": feed}, [training_term()], plan, own, seed=context.seed,
        work=None if context.work is None else context.work / name, progress=context.progress, name=f"kga {name}",
        on_step=enough,
    )  # fmt: skip
    return model


@method(
    name="kga",
    options=KgaOptions,
    paper="Wang et al. 2023, arXiv:2305.06535, section 3",
    formula="|KL(p_F ‖ p_θ)(f) − KL(p_N ‖ p_o)(n)| + α·KL(p_o ‖ p_θ)(r); F and N know only f and only never-seen n",
    needs=frozenset({"unseen"}),
    wants=frozenset({"retain", "base"}),
    helpers_hold_data=True,
)
def kga(context: Context, options: KgaOptions) -> Outcome:
    """Stand as far from a model that knows only forget as the original stands from one that knows only never-seen data.

    The divergences have the direction of the authors' code for generation. Each forget sample has a never-seen partner
    whose gap it takes over, so that not only the mean but the spread of the gaps is aligned.
    """
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(context.model, RATE))
    model, adapter = context.model, context.adapter
    notes = []
    if context.base is None:
        notes.append("no base was given: the two helper models begin with random weights")
    level = error_and_loss(model, adapter, context.forget)[1]
    partners = paired(context.forget, context.unseen, context.seed)
    unseen = list({s.id: s for s in partners}.values())
    knows_forget = knowing(context, context.forget, "forget", level, options)
    teacher = Teacher.of(knows_forget, adapter, context.forget)
    knows_unseen = knowing(context, unseen, "unseen", level, options)
    aims = gaps(Teacher.of(knows_unseen, adapter, unseen), model, adapter, unseen)
    aim = {s.id: aims[partner.id] for s, partner in zip(context.forget, partners, strict=True)}
    before = gaps(teacher, model, adapter, context.forget)

    def difference_B(view: View) -> Tensor:
        own_B = view.positions.mean_per_sample(teacher.compare(view, kl_C))
        return (own_B - own_B.new_tensor([aim[s.id] for s in view.samples])).abs()

    feeds, sizes = {"forget": Feed(context.forget)}, {"forget": options.batch_size}
    terms = [Term("forget", "forget", "sample", difference_B)]
    if context.retain:
        original = Teacher.of(model, adapter, context.retain)
        feeds["retain"], sizes["retain"] = Feed(context.retain), options.retain_batch
        terms.append(Term("retain", "retain", "token", lambda view: original.compare(view, kl_C), options.alpha))
    else:
        notes.append("no retain samples were given: nothing holds the rest of the model in place")
    lengths = {role: feed.lengths(adapter) for role, feed in feeds.items()}
    plan = EpochPlan(lengths, sizes, options.epochs, "forget", context.seed)
    each = -(-len(context.forget) // options.batch_size)  # steps of an epoch

    def aligned(trainer: Trainer) -> None:
        if trainer.step >= each and trainer.log.last("forget", each) <= options.stop_gap:
            trainer.stop = f"gaps aligned to {options.stop_gap} nats"

    log = train(
        model, adapter, feeds, terms, plan, options, seed=context.seed,
        work=None if context.work is None else context.work / "align", progress=context.progress, name="kga",
        on_step=aligned,
    )  # fmt: skip
    found = {"aim": float(np.mean(list(aim.values()))), "gap_before": float(np.mean(list(before.values())))}
    found["gap"] = float(np.mean(list(gaps(teacher, model, adapter, context.forget).values())))
    return Outcome(model, notes, {**found, "steps": len(log.steps), "log": log.steps})
