"""EUL, "Unlearn What You Want to Forget": bottleneck layers that follow the original on retain and leave it on forget.

The paper subtracts a divergence and a language-model loss on the forget samples. Both are unbounded, so each is cut
here at the loss of a uniform guess, ln V: a token that the model finds as unlikely as that no longer pulls, and only
the retain terms move the layers then. Below the bound the objective is the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.methods.beside import block_sites, train_beside
from expunge.methods.eul_layers import UnlearningLayers, fuse
from expunge.methods.registry import Context, Outcome, method
from expunge.models.adapter import num_parameters
from expunge.models.attached import attach, attachments
from expunge.models.text import causal_lm
from expunge.options import Ranges, check_ranges, option
from expunge.training.batching import Stream
from expunge.training.loop import Feed, TrainOptions
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Teacher, Term, View, kl_C, nll_N

PAPER = "Chen & Yang 2023"
SHARE = 0.005  # of the model's parameters in the layers
RATE = 2e-5  # at a billion parameters: the paper's 5e-5 for the 220 million of T5-base, by the rule of sizes
BOUNDS: Ranges = (
    (("alpha", "task", "gamma"), "0 or more", lambda v: 0 <= v < math.inf),
    (("rank",), "1 or more", lambda v: v >= 1),
    (("bound", "ridge"), "a number above 0", lambda v: 0 < v < math.inf),
)


@dataclass(frozen=True, kw_only=True)
class EulOptions(TrainOptions):
    """Options of ``eul``."""

    epochs: float = option(5.0, "rounds: one pass over retain, then one over forget", f"{PAPER}, §4: 3 to 5")
    learning_rate: float | None = option(
        None, "peak learning rate; the paper's, by the model's size, if none", f"{PAPER}, §4: 5e-5 for T5-base"
    )
    batch_size: int = option(8, "forget samples in one step", "ours: as the loss families")
    retain_batch: int | None = option(
        None,
        "retain samples in one step; none: so many that both passes of a round have as many steps",
        "ours: with many short steps on retain the few on forget are undone",
    )
    schedule: str = option("linear", "shape after warm-up", f"{PAPER}, §4", ("cosine", "linear", "constant"))
    warmup: float = option(0.06, "share of the steps with rising learning rate", f"{PAPER}, §4")
    rank: int | None = option(None, "bottleneck width; none: 0.5 % of the parameters, at least 8", f"{PAPER}, §4")
    alpha: float = option(0.8, "weight of KL(original ‖ model) on retain", f"{PAPER}, §4")
    task: float = option(1.0, "weight of the loss on retain (the paper's λ)", f"{PAPER}, §4")
    gamma: float = option(0.2, "weight of minus the loss on forget", f"{PAPER}, §4")
    bound: float | None = option(
        None, "nats per token beyond which forget tokens no longer pull; none: ln V", "ours: the paper has no bound"
    )
    ridge: float = option(
        1e-3, "share of the mean diagonal added to each Gram matrix in a fusion", "ours: the sum may be singular"
    )
    keep_gram: bool = option(
        False, "store the Gram matrices with the layers, for the next fusion", "ours: they are personal data"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, BOUNDS)


@dataclass
class Turns:
    """The plan: one pass over retain, one over forget, and so on; a role without samples has no turn."""

    lengths: Mapping[str, Sequence[int]]
    sizes: Mapping[str, int]
    rounds: float
    seed: int

    def __post_init__(self) -> None:
        self._streams = {
            role: Stream(self.lengths[role], self.sizes[role], [self.seed, number])
            for number, role in enumerate(("retain", "forget"))
            if self.lengths.get(role)
        }

    @property
    def per_round(self) -> int:
        return sum(stream.per_epoch for stream in self._streams.values())

    @property
    def steps(self) -> int:
        return max(1, math.ceil(self.rounds * self.per_round))

    def batch(self, step: int) -> dict[str, list[int]]:
        turn, within = divmod(step, self.per_round)
        for role, stream in self._streams.items():
            if within < stream.per_epoch:
                return {role: stream[turn * stream.per_epoch + within]}
            within -= stream.per_epoch
        raise AssertionError("a step lies in the pass of some role")


def objective(teacher: Teacher, options: EulOptions) -> list[Term]:
    """α KL(o ‖ θ)(r) + λ NLL(r) − min(KL(o ‖ θ), b)(f) − γ min(NLL, b)(f), each a mean over target tokens."""

    def bound(classes: int) -> float:
        return math.log(classes) if options.bound is None else options.bound

    def far_C(logits_CV: Tensor, teacher_CV: Tensor, targets_C: Tensor) -> Tensor:
        return -kl_C(logits_CV, teacher_CV, targets_C).clamp_max(bound(logits_CV.shape[1]))

    def lost_N(view: View) -> Tensor:
        return -nll_N(view).clamp_max(bound(view.positions.vocab))

    return [
        Term("retain_kl", "retain", "token", lambda view: teacher.compare(view, kl_C), options.alpha),
        Term("retain_task", "retain", "token", nll_N, options.task),
        Term("forget_kl", "forget", "token", lambda view: teacher.compare(view, far_C)),
        Term("forget_lm", "forget", "token", lost_N, options.gamma),
    ]


def layers_of(model: nn.Module) -> UnlearningLayers | None:
    """The unlearning layers that the model has from an earlier request."""
    return next((a for a in attachments(model) if isinstance(a, UnlearningLayers)), None)


def new_layers(context: Context, rank: int | None) -> UnlearningLayers:
    """Unlearning layers for this model, not attached yet."""
    sites = block_sites(context.model, context.adapter, context.forget[0])
    if rank is None:
        rank = max(8, round(SHARE * num_parameters(context.model) / (2 * sum(site.width for site in sites))))
    return UnlearningLayers(
        blocks=[s.name for s in sites], widths=[s.width for s in sites], rank=rank, seed=context.seed
    )


@method(
    name="eul",
    options=EulOptions,
    paper="Chen & Yang 2023, arXiv:2310.20150, §3 (selective teacher-student, fusion)",
    wants=frozenset({"retain"}),
    removes_from_weights=False,
    sequential="fuse",
    changes="beside",
    formula="α KL(o ‖ θ)(r) + λ NLL(r) − KL(o ‖ θ)(f) − γ NLL(f); W = (Σ XᵢᵀXᵢ)⁻¹ Σ XᵢᵀXᵢ Wᵢ",
)
def eul(context: Context, options: EulOptions) -> Outcome:
    """Train bottleneck layers beside the frozen weights: like the original on retain, far from it on forget.

    A second request trains its layers from the same beginning on the bare model and fuses the two. The language-model
    loss is taken on the targets, the positions that every modality has, where the paper takes the whole input.
    """
    model, notes = context.model, ["the weights still hold what was learnt: without the unlearning layers it is back"]
    if not context.retain:
        notes.append("no retain samples were given: nothing holds the rest of the model in place")
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(model, RATE))
    layers = layers_of(model)
    earlier: dict[str, Any] | None = None
    if layers is None:
        layers = new_layers(context, options.rank)
        attach(causal_lm(model), layers)
    elif options.rank not in (None, layers.rank):
        raise UserError(f"rank = {options.rank} cannot be: the model's unlearning layers have rank {layers.rank}.")
    else:
        earlier = {"weights": {n: p.detach().clone() for n, p in layers.maps().items()}}
        earlier["grams"] = layers.kept_grams()
        if earlier["grams"] is None and context.earlier:
            earlier["grams"] = layers.grams(model, context.adapter, context.earlier)
        layers.keep_grams(None)  # they are no part of what is trained now
        layers.reset()

    feeds = {"retain": Feed(context.retain), "forget": Feed(context.forget)}
    lengths = {role: feed.lengths(context.adapter) for role, feed in feeds.items()}
    steps = math.ceil(len(context.forget) / options.batch_size)
    retain_batch = options.retain_batch or max(1, math.ceil(len(context.retain) / steps))
    sizes = {"retain": retain_batch, "forget": options.batch_size}
    teacher = Teacher.of(model, context.adapter, [*context.forget, *context.retain])  # U = 0: the original
    plan = Turns(lengths, sizes, options.epochs, context.seed)
    log = train_beside(context, list(layers.parameters()), feeds, objective(teacher, options), plan, options, "eul")

    record: dict[str, Any] = {"steps": len(log.steps), "log": log.steps, "rank": layers.rank}
    record["layer_parameters"] = sum(p.numel() for p in layers.parameters())
    grams = layers.grams(model, context.adapter, context.forget) if options.keep_gram or earlier else None
    if earlier is not None and grams is not None:
        grams, note = fuse_requests(layers, earlier, grams, options.ridge)
        notes.append(note)
    record["requests"] = layers.requests
    if options.keep_gram and grams is not None:
        layers.keep_grams(grams)
        notes.append(
            "Gram matrices of the forget samples' hidden states are stored with the layers: they are personal data"
        )
    return Outcome(model, notes, record)


def fuse_requests(
    layers: UnlearningLayers, earlier: Mapping[str, Any], grams: dict[str, Tensor], ridge: float
) -> tuple[dict[str, Tensor] | None, str]:
    """Fuse the earlier layers into the new ones in place; the Gram matrices of both, and what to say of it.

    Without the earlier requests' Gram matrices or samples, all inputs count alike: the layers are averaged with the
    number of requests in each as their weight, and there is nothing to store.
    """
    old, number = earlier["grams"], layers.requests
    known = old is not None
    with torch.no_grad():
        for name, weight in layers.maps().items():
            same = torch.eye(len(weight), dtype=torch.float64, device=weight.device)
            both = [old[name], grams[name]] if known else [number * same, same]
            weight.copy_(fuse([earlier["weights"][name], weight.detach()], both, ridge if known else 1e-12))
    layers.requests += 1
    said = f"fused in closed form with the unlearning layers of {number} earlier request(s)"
    if not known:
        return None, (
            "no Gram matrices and no earlier forget samples were given: averaged with the unlearning layers of "
            f"{number} earlier request(s)"
        )
    return {name: old[name] + grams[name] for name in grams}, said
