"""PCGU: descend on the forget answers in the weight vectors alone that tell them from a surrogate answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.curvature import some, standing, trainable
from expunge.methods.families import replacement
from expunge.methods.registry import Context, Outcome, method
from expunge.methods.scope import Masks, selector
from expunge.options import option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, Trainer, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Term, View

POOL = 256  # samples among which a surrogate is looked for
RATE = 1.6e-4  # the paper's 1e-5 on the sum over 16 pairs, as a mean; taken for that at a billion parameters
SHARE_SOURCE = "Yu et al. 2023: 10,000 of about 143,000 vectors of BERT-base"
PARTITIONS = ("input", "output")


@dataclass(frozen=True, kw_only=True)
class PCGUOptions(TrainOptions):
    """Plain SGD on chosen vectors."""

    epochs: float = option(5.0, "passes over the forget set", "released code: 5")
    batch_size: int = option(16, "pairs in one step, which chooses its own vectors", "released code: 16")
    learning_rate: float | None = option(
        None, "rate of plain SGD; by the model's size if none", "Yu et al. 2023: 1e-5 on a sum; scaled (sized_rate)"
    )
    optimizer: str = option("sgd", "SGD without momentum, as vectors change with each step", "released code", ("sgd",))
    schedule: str = option("constant", "shape after warm-up", "released code", ("cosine", "linear", "constant"))
    warmup: float = option(0.0, "share of the steps with rising learning rate", "released code")
    clip: float = option(0.0, "largest gradient norm; 0 = no clipping", "released code")
    share: float = option(0.07, "share of the weight vectors that a step moves", SHARE_SOURCE)
    partition: str = option(
        "input", "a vector is what enters (input) or leaves (output) a unit", "Yu et al. 2023: input", PARTITIONS
    )
    direction: str = option(
        "down", "lower the true answer (down) or raise the surrogate (up)", "Yu et al. 2023: down", ("down", "up")
    )
    score: str = option(
        "logit", "of a token: its logit, or its log-probability", "released code: logit", ("logit", "log-prob")
    )
    stop_loss: float | None = option(
        None, "stop when the forget loss passes this, nats per token", "ours: a guard, as descent on logits has no end"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.share)


@dataclass(frozen=True, kw_only=True)
class PCGUScope:
    """The same choice as a scope."""

    share: float = option(0.07, "share of the weight vectors that may move", SHARE_SOURCE)
    partition: str = option(
        "input", "a vector is what enters (input) or leaves (output) a unit", "Yu et al. 2023: input", PARTITIONS
    )
    score: str = option(
        "logit", "of a token: its logit, or its log-probability", "released code: logit", ("logit", "log-prob")
    )

    def __post_init__(self) -> None:
        check_share(self.share)


def check_share(share: float) -> None:
    """Raises UserError for a share that is none."""
    if not 0 < share <= 1:
        raise UserError(f"share = {share} cannot be: give a number above 0 and at most 1.")


# -- pairs -------------------------------------------------------------------------------------------------------------


def surrogates(context: Context) -> list[Sample]:
    """For each forget sample the answer to the most similar question about another subject, in its own name.

    A classifier's surrogate is another class; where there is no other subject, a refusal.
    """
    rng = np.random.default_rng([context.seed, 23])
    if context.adapter.modality == "classifier":
        return [replacement(s, context.adapter, rng) for s in context.forget]
    pool = some(context.retain or context.forget, POOL, context.seed)
    found = []
    for sample in context.forget:
        best: tuple[float, float, str] | None = None
        for other in pool:
            target = _renamed(other, sample)
            if other.subject != sample.subject and target != sample.target:
                entry = (_alike(sample.prompt, other.prompt), float(rng.random()), target)
                best = entry if best is None or entry > best else best
        if best is None:
            found.append(replacement(sample, context.adapter, rng))
        else:
            found.append(replace(sample, id=f"{sample.id}/surrogate", target=best[2], probes=()))
    return found


def _alike(one: str, other: str) -> float:
    """Share of the words that two questions have in common."""
    a, b = set(one.lower().split()), set(other.lower().split())
    return len(a & b) / max(1, len(a | b))


def _renamed(other: Sample, sample: Sample) -> str:
    """The other's answer with its subject's names replaced by the sample's."""
    text = str(other.target)
    for own, theirs in zip(sample.names, other.names, strict=False):
        text = text.replace(theirs, own)
    return text


def contrast_N(own: View, other: View, score: str) -> Tensor:
    """Score of each target token that the other answer does not have, 0 for the others; all count if none differs."""
    values_N = own.log_prob_N() if score == "log-prob" else own.positions.per_token(_logit)
    with torch.no_grad():
        if score == "logit":
            own.log_prob_N()  # for the loop's log and the guard
        tokens: dict[int, set[int]] = {}
        for row, token in zip(other.positions.sample_N.tolist(), other.positions.targets_N.tolist(), strict=True):
            tokens.setdefault(row, set()).add(token)
        pairs = list(zip(own.positions.sample_N.tolist(), own.positions.targets_N.tolist(), strict=True))
        differs = [token not in tokens.get(row, set()) for row, token in pairs]
        alike = {row for row, _ in pairs} - {row for (row, _), d in zip(pairs, differs, strict=True) if d}
        counts = [d or row in alike for (row, _), d in zip(pairs, differs, strict=True)]
    return values_N * torch.tensor(counts, device=values_N.device, dtype=values_N.dtype)


def _logit(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    return logits_CV.gather(1, targets_C[:, None])[:, 0]


# -- weight vectors ----------------------------------------------------------------------------------------------------


def vectors(tensor: Tensor, partition: str) -> Tensor:
    """A weight as its vectors, (vectors, length): rows or columns of a matrix; a 1-D tensor is one vector."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    matrix = tensor.flatten(1)
    return matrix if partition == "input" else tensor.transpose(0, 1).flatten(1)


def as_mask(chosen: Tensor, like: Tensor, partition: str) -> Tensor:
    """Chosen vectors, (vectors,) bool, as a mask of the weight's shape."""
    if like.ndim < 2:
        return chosen.expand(like.shape) if like.ndim else chosen[0]
    shape = [-1 if i == (0 if partition == "input" else 1) else 1 for i in range(like.ndim)]
    return chosen.view(shape).expand(like.shape)


def least_similar(
    true: Mapping[str, Tensor], surrogate: Mapping[str, Tensor], share: float, partition: str
) -> dict[str, Tensor]:
    """Masks of the ``share`` of all vectors whose two gradients point apart most (lowest cosine).

    Vectors that one of the two does not reach have no cosine and are never chosen, nor counted.
    """
    cosines = []
    for name, gradient in true.items():
        a, b = vectors(gradient, partition), vectors(surrogate[name], partition)
        reached = (a != 0).any(1) & (b != 0).any(1)
        cosine = cosine_similarity(a.double(), b.double(), dim=1, eps=1e-300)
        cosines.append(torch.where(reached, cosine, torch.inf).cpu())
    flat = torch.cat(cosines)
    count = min(int(flat.isfinite().sum()), max(1, round(share * flat.numel())))
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[torch.sort(flat, stable=True).indices[:count]] = True
    parts = torch.split(chosen, [len(c) for c in cosines])
    return {
        name: as_mask(part.to(gradient.device), gradient, partition)
        for (name, gradient), part in zip(true.items(), parts, strict=True)
    }


@selector(name="pcgu", options=PCGUScope, paper="Yu et al. 2023, Findings of ACL, 2023.findings-acl.375")
def pcgu_scope(context: Context, options: PCGUScope) -> Masks:
    """Weight vectors whose gradients for the true and for a surrogate answer point apart."""
    weights, adapter = trainable(context.model), context.adapter
    total = {side: {n: torch.zeros_like(p) for n, p in weights.items()} for side in ("true", "surrogate")}
    others = surrogates(context)
    with standing(context.model):
        for group in adapter.batches(context.forget, 2048):
            pair = [[samples[i] for i in group] for samples in (context.forget, others)]
            positions = adapter.positions(context.model, [*pair[0], *pair[1]])
            own = View(positions.select(0, len(group)), pair[0])
            other = View(positions.select(len(group), 2 * len(group)), pair[1])
            values = {"true": contrast_N(own, other, options.score), "surrogate": contrast_N(other, own, options.score)}
            for side, value_N in values.items():
                found = torch.autograd.grad(
                    value_N.sum(), list(weights.values()), retain_graph=side == "true", allow_unused=True
                )
                for name, gradient in zip(weights, found, strict=True):
                    if gradient is not None:
                        total[side][name] += gradient
    return least_similar(total["true"], total["surrogate"], options.share, options.partition)


# -- the method --------------------------------------------------------------------------------------------------------


@method(
    name="pcgu",
    options=PCGUOptions,
    paper="Yu et al. 2023, Unlearning Bias in Language Models by Partitioning Gradients, 2023.findings-acl.375",
    wants=frozenset({"retain"}),
    changes="some",
    formula="θ_v ← θ_v − η ∇z(y) for the vectors v with the lowest cos(∇z(y), ∇z(y'))",
)
def pcgu(context: Context, options: PCGUOptions) -> Outcome:
    """Lower the true answer in the weight vectors whose gradients tell it from a surrogate answer.

    The paper's pairs differ in one token, whose logit counts; here the pair is the true answer and that of the most
    similar question about somebody else, and the tokens count which the other answer does not have. No retain term:
    retain samples only lend surrogate answers, and are harmed (``people``: forget probability .99 to .33, retain to .84
    of what it was).
    """
    model, adapter = context.model, context.adapter
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(model, RATE))
    feeds = {"forget": Feed(context.forget, surrogates(context))}

    def of(side: str) -> Callable[[View], Tensor]:
        """Summed over the tokens of a sample, as the paper's pairs have one token that counts."""

        def values_B(view: View) -> Tensor:
            assert view.partner is not None
            own, other = (view, view.partner) if side == "true" else (view.partner, view)
            return own.positions.sum_per_sample(contrast_N(own, other, options.score))

        return values_B

    true, surrogate = (Term(side, "forget", "sample", of(side)) for side in ("true", "surrogate"))
    plan = EpochPlan(
        {"forget": feeds["forget"].lengths(adapter)},
        {"forget": options.batch_size},
        options.epochs,
        "forget",
        context.seed,
    )
    weights = trainable(model)

    def gradients(
        trainer: Trainer, picks: Mapping[str, Sequence[int]], term: Term
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        values = trainer.gradients(picks, [term])
        found = {}
        for name, p in weights.items():
            found[name] = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = None
        return found, values

    def compute(trainer: Trainer, picks: Mapping[str, Sequence[int]]) -> dict[str, float]:
        other, values = gradients(trainer, picks, surrogate)
        own, more = gradients(trainer, picks, true)
        masks = least_similar(own, other, options.share, options.partition)
        for name, p in weights.items():
            p.grad = (own[name] if options.direction == "down" else -other[name]) * masks[name]
        return {**values, **more}

    def guard(trainer: Trainer) -> None:
        if options.stop_loss is not None and trainer.log.last("forget_nll", 1) > options.stop_loss:
            trainer.stop = f"forget loss above {options.stop_loss}"

    assert options.learning_rate is not None
    sgd = torch.optim.SGD(list(weights.values()), lr=options.learning_rate, weight_decay=options.weight_decay)
    log = train(
        model,
        adapter,
        feeds,
        [true, surrogate],
        plan,
        options,
        seed=context.seed,
        optimizers=[sgd],
        work=context.work,
        progress=context.progress,
        name="pcgu",
        compute=compute,
        on_step=guard,
    )
    notes = []
    if not context.retain and adapter.modality != "classifier":
        notes.append("no retain samples were given: surrogate answers come from other forget samples")
    if len(log.steps) < plan.steps:
        notes.append(f"stopped after {len(log.steps)} of {plan.steps} steps: forget loss above {options.stop_loss}")
    return Outcome(model, notes, {"steps": len(log.steps), "log": log.steps})
