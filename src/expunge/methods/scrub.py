"""SCRUB: away from the original on forget, close to it on retain, then back to the epoch that forgot just enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.methods.registry import Context, Outcome, method
from expunge.models.losses import error_and_loss
from expunge.options import option
from expunge.training.batching import Stream
from expunge.training.loop import Feed, Trainer, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Teacher, Term, View, kl_C, nll_N

SMALL = "authors' small-scale setting"
PAPER_RATE = 1e-5  # at a billion parameters; at the 1.4 million of the paper's All-CNN this is its 5e-4


@dataclass(frozen=True, kw_only=True)
class ScrubOptions(TrainOptions):
    """What a max pass and a min pass do, and how many there are."""

    epochs: float = option(
        10.0, "passes over the retain set, the paper's min-steps; broken numbers are rounded up", SMALL
    )
    max_epochs: int = option(
        5,
        "how many of them begin with a pass of ascent over the forget set, the paper's max-steps",
        f"ours: {SMALL} has 3",
    )
    batch_size: int = option(8, "forget samples in one step", "ours: few samples, and a pass needs several steps")
    retain_batch: int = option(8, "retain samples in one step", "ours: as every other method here")
    learning_rate: float | None = option(
        None, "peak learning rate; by the model's size if none", f"{SMALL}: 5e-4 at 1.4 million parameters"
    )
    alpha: float = option(0.5, "weight of the divergence from the original on retain", SMALL)
    gamma: float = option(1.0, "weight of the loss on retain", SMALL)
    temperature: float = option(2.0, "logits are divided by it before they are compared", SMALL)
    compare: str = option(
        "logits",
        "what is near the original or far from it: logits, by the tempered divergence, or embeddings (the head's "
        "input), by cosine, where forget is pushed no further than a right angle",
        "logits: Kurmanji et al. 2023; embeddings: CLEAR, arXiv:2410.18057, SCRUB_bio (there with gamma=0)",
        ("logits", "embeddings"),
    )
    rewind: bool = option(
        True, "take the max epoch whose forget error is nearest to the last epoch's never-seen error", "paper §3.3"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0 or self.max_epochs < 1 or min(self.alpha, self.gamma) < 0:
            raise UserError(
                f"temperature = {self.temperature}, max_epochs = {self.max_epochs}, alpha = {self.alpha}, gamma = "
                f"{self.gamma} cannot be: give a temperature above 0, 1 or more max epochs, and weights of 0 or more."
            )


def tempered_kl(temperature: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """T²·KL(softmax(z_o/T) ‖ softmax(z/T)) per position, nats (Hinton et al. 2015, section 2, keeps T² so)."""

    def value(logits_CV: Tensor, teacher_CV: Tensor, targets_C: Tensor) -> Tensor:
        return temperature**2 * kl_C(logits_CV / temperature, teacher_CV / temperature, targets_C)

    return value


def angle_N(view: View, teacher: Teacher) -> Tensor:
    """1 − cos between a position's embedding and the original's, in [0, 2]."""
    own_ND = view.positions.hidden_ND.float()
    return 1.0 - torch.cosine_similarity(own_ND, teacher.hidden_ND(view.samples).to(own_ND), dim=1)


@dataclass
class AlternatingPlan:
    """Each epoch is a pass over retain; each of the first ``max_epochs`` begins with one over forget.

    One retain step comes before everything: at the original itself the divergence has no gradient, and ascent would
    only blow up rounding errors. (The authors' student leaves that point through batch norm in training mode.)
    """

    lengths: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int]
    epochs: int
    max_epochs: int
    seed: int = 0

    def __post_init__(self) -> None:
        self._streams = {
            role: Stream(self.lengths[role], self.sizes[role], [self.seed, i])
            for i, role in enumerate(("forget", "retain"))
        }
        self._order: list[tuple[str, int]] = [("retain", 0)]
        self.ends: list[int] = []  # steps after which an epoch is over
        for epoch in range(self.epochs):
            for role in ("forget", "retain") if epoch < self.max_epochs else ("retain",):
                first, count = epoch * self._streams[role].per_epoch, self._streams[role].per_epoch
                self._order += [(role, number) for number in range(first, first + count)]
            self.ends.append(len(self._order))

    @property
    def steps(self) -> int:
        return len(self._order)

    def batch(self, step: int) -> dict[str, list[int]]:
        role, number = self._order[step]
        return {role: self._streams[role][number]}


@method(
    name="scrub",
    options=ScrubOptions,
    paper="Kurmanji et al. 2023, arXiv:2302.09880, eq. 3 and algorithm 1; rewinding: §3.3",
    formula="in turn: max KL(p_o ‖ p_θ)(f); min α·KL(p_o ‖ p_θ)(r) + γ·NLL(r); then back to the right epoch; "
    "or 1 − cos(h, h_o) in place of KL",
    needs=frozenset({"retain"}),
    wants=frozenset({"unseen"}),
)
def scrub(context: Context, options: ScrubOptions) -> Outcome:
    """Disobey the original on forget and obey it on retain, in turns; rewind to where forget looks never seen.

    Without never-seen samples there is no rewinding, and the result forgets as far as the max passes have pushed it.
    A face embedder is better asked for its embeddings: pictures are compared by these, not by the classes it learnt.
    """
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(context.model, PAPER_RATE))
    model, adapter = context.model, context.adapter
    feeds = {"forget": Feed(context.forget), "retain": Feed(context.retain)}
    teacher = Teacher.of(model, adapter, [*context.forget, *context.retain])
    tempered = tempered_kl(options.temperature)

    def apart_N(view: View) -> Tensor:
        return teacher.compare(view, tempered) if options.compare == "logits" else angle_N(view, teacher)

    def disobeyed_N(view: View) -> Tensor:
        return apart_N(view) if options.compare == "logits" else apart_N(view).clamp_max(1.0)

    terms = [
        Term("forget", "forget", "token", disobeyed_N, -1.0),
        Term("retain", "retain", "token", apart_N, options.alpha),
        Term("retain_loss", "retain", "token", nll_N, options.gamma),
    ]
    lengths = {role: feed.lengths(adapter) for role, feed in feeds.items()}
    sizes = {"forget": options.batch_size, "retain": options.retain_batch}
    plan = AlternatingPlan(lengths, sizes, math.ceil(options.epochs), options.max_epochs, context.seed)
    rewinds = options.rewind and bool(context.unseen)
    kept: dict[str, Tensor] = {}

    def keep(trainer: Trainer) -> None:
        if rewinds and trainer.step in plan.ends[: options.max_epochs]:
            trainer.tensors |= {f"{plan.ends.index(trainer.step)}/{n}": t for n, t in _state(model).items()}
        if trainer.step == plan.steps:
            kept.update(trainer.tensors)

    log = train(
        model, adapter, feeds, terms, plan, options,
        seed=context.seed, work=context.work, progress=context.progress, name="scrub", on_step=keep,
    )  # fmt: skip
    record: dict[str, Any] = {"steps": len(log.steps), "log": log.steps}
    if not rewinds:
        notes = ["no rewinding: the last epoch is the result"]
        if options.rewind:
            notes = ["no never-seen samples were given: the last epoch is the result, without rewinding"]
        return Outcome(model, notes, record)
    epoch, found = _rewind(context, kept, len(plan.ends))
    return Outcome(model, [f"rewound to epoch {epoch + 1} of {len(plan.ends)}"], record | found)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training moves, on the CPU."""
    moving = {n: p for n, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())
    return {n: t.detach().to("cpu", copy=True) for n, t in moving.items()}


def _rewind(context: Context, kept: Mapping[str, Tensor], epochs: int) -> tuple[int, dict[str, Any]]:
    """Put the best epoch's weights back: its number, and what was measured. Ties in error are broken by the loss."""
    model, adapter = context.model, context.adapter
    states: dict[int, dict[str, Tensor]] = {epochs - 1: _state(model)}
    for name, tensor in kept.items():
        number, own = name.split("/", 1)
        states.setdefault(int(number), {})[own] = tensor
    wanted = error_and_loss(model, adapter, context.unseen)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    errors: dict[int, tuple[float, float]] = {}

    def put(epoch: int) -> None:
        with torch.no_grad():
            for name, values in states[epoch].items():
                tensors[name].copy_(values)

    for epoch in sorted(states):
        put(epoch)
        errors[epoch] = error_and_loss(model, adapter, context.forget)
    best = min(errors, key=lambda e: (abs(errors[e][0] - wanted[0]), abs(errors[e][1] - wanted[1])))
    put(best)
    return best, {"epoch": best + 1, "unseen_error": wanted[0], "errors": {e + 1: v[0] for e, v in errors.items()}}
