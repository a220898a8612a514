"""The loss families: one table of forget terms × retain terms × what the answer is replaced by.

Notation: θ the model, o the original (frozen), f forget, r retain, y the target of |y| tokens, σ the logistic
function. Every objective is gamma · forget term + alpha · retain term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

from expunge.data.refusals import REFUSALS
from expunge.data.samples import Sample
from expunge.methods.registry import Context, Method, Outcome, register
from expunge.options import option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, Trainer, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Teacher, Term, View, kl_C, nll_N

Replace = Literal["no", "answer", "partner"]


@dataclass(frozen=True, kw_only=True)
class FamilyOptions(TrainOptions):
    """Options of every row; what a row does not use has no effect."""

    epochs: float = option(10.0, "passes over the forget set", "TOFU, OpenUnlearning: 10")
    learning_rate: float | None = option(None, "peak learning rate; the paper's, raised for small models, if none")
    batch_size: int = option(8, "forget samples in one step")
    retain_batch: int = option(8, "retain samples in one step", "one per forget sample, as OpenUnlearning")
    retain: str = option("nll", "retain term", "", ("nll", "kl", "none"))
    gamma: float = option(1.0, "weight of the forget term")
    alpha: float = option(1.0, "weight of the retain term")
    beta: float = option(0.1, "inverse temperature (npo, dpo, simnpo); logit shift (undial)")
    delta: float = option(0.0, "margin of simnpo, on the scale of β·nats per token (the paper's γ)")
    stop_loss: float | None = option(
        None, "stop when the forget loss passes this (nats per token): a guard for the ascent rows"
    )


# -- forget terms: (N,) per token or (B,) per sample -----------------------------------------------------------------


def ascent_N(view: View, options: FamilyOptions, teacher: Teacher | None) -> Tensor:
    """log p_θ(y): descending on it is ascending on the loss."""
    return view.log_prob_N()


def nll_of_replacement_N(view: View, options: FamilyOptions, teacher: Teacher | None) -> Tensor:
    """−log p_θ of the refusal that stands in the answer's place."""
    return nll_N(view)


def dpo_B(view: View, options: FamilyOptions, teacher: Teacher | None) -> Tensor:
    """−log σ(β[log p_θ/p_o(refusal) − log p_θ/p_o(answer)]); ln 2 at θ = o."""
    assert teacher is not None and view.partner is not None
    won_B = view.partner.log_prob_B()
    lost_B = view.log_prob_B()
    margin_B = (won_B - teacher.log_prob_B(view.partner.samples, won_B)) - (
        lost_B - teacher.log_prob_B(view.samples, lost_B)
    )
    return -logsigmoid(options.beta * margin_B)


def npo_B(view: View, options: FamilyOptions, teacher: Teacher | None) -> Tensor:
    """−(2/β) log σ(−β log p_θ/p_o(y)); 2 ln 2/β at θ = o."""
    assert teacher is not None
    own_B = view.log_prob_B()
    return -2.0 / options.beta * logsigmoid(-options.beta * (own_B - teacher.log_prob_B(view.samples, own_B)))


def simnpo_B(view: View, options: FamilyOptions, teacher: Teacher | None) -> Tensor:
    """−(2/β) log σ(−(β/|y|) log p_θ(y) − δ)."""
    mean_B = view.log_prob_B() / view.positions.count_per_sample().clamp_min(1)
    return -2.0 / options.beta * logsigmoid(-options.beta * mean_B - options.delta)


def undial_N(view: View, options: FamilyOptions, teacher: Teacher | None) -> Tensor:
    """CE(q, p_θ), q = softmax(z_o − β·onehot(y)): the original with the true token's logit lowered."""
    assert teacher is not None

    def value(logits_CV: Tensor, teacher_CV: Tensor, targets_C: Tensor) -> Tensor:
        lowered_CV = teacher_CV - options.beta * one_hot(targets_C, teacher_CV.shape[1])
        return -(lowered_CV.softmax(1) * logits_CV.log_softmax(1)).sum(1)

    return teacher.compare(view, value)


@dataclass(frozen=True)
class Row:
    """One family: its forget term and the paper's defaults."""

    name: str
    term: Callable[[View, FamilyOptions, Teacher | None], Tensor]
    unit: Literal["token", "sample"]
    summary: str
    formula: str
    paper: str
    defaults: dict[str, Any]
    replaces: Replace = "no"
    teacher: bool = False
    rate: float = 1e-5  # the paper's learning rate, for models of a billion parameters and more


FAMILIES: tuple[Row, ...] = (
    Row(
        "ga",
        ascent_N,
        "token",
        "gradient ascent on the forget loss, nothing else",
        "−NLL(f)",
        "Jang et al. 2023, arXiv:2210.01504",
        {"retain": "none"},
    ),
    Row(
        "graddiff",
        ascent_N,
        "token",
        "gradient ascent on forget, descent on retain",
        "−NLL(f) + NLL(r)",
        "Liu et al. 2022, arXiv:2203.12817; TOFU, arXiv:2401.06121",
        {"retain": "nll"},
    ),
    Row(
        "kl",
        ascent_N,
        "token",
        "gradient ascent on forget, close to the original on retain",
        "−NLL(f) + KL(p_o ‖ p_θ)(r)",
        "TOFU, Maini et al. 2024, arXiv:2401.06121",
        {"retain": "kl"},
    ),
    Row(
        "idk",
        nll_of_replacement_N,
        "token",
        "learn a refusal in place of each answer",
        "NLL(refusal | f) + NLL(r)",
        "TOFU, Maini et al. 2024, arXiv:2401.06121",
        {"retain": "nll"},
        replaces="answer",
    ),
    Row(
        "dpo",
        dpo_B,
        "sample",
        "prefer a refusal to the answer",
        "−log σ(β[log p_θ/p_o(refusal) − log p_θ/p_o(y)]) + retain",
        "Rafailov et al. 2023, arXiv:2305.18290; as unlearning: arXiv:2404.05868",
        {"retain": "nll", "beta": 0.1},
        replaces="partner",
        teacher=True,
    ),
    Row(
        "npo",
        npo_B,
        "sample",
        "negative preference: DPO with only the losing answer",
        "−(2/β) log σ(−β log p_θ/p_o(y)) + retain",
        "Zhang et al. 2024, arXiv:2404.05868",
        {"retain": "nll", "beta": 0.1},
        teacher=True,
    ),
    Row(
        "simnpo",
        simnpo_B,
        "sample",
        "reference-free, length-normalised NPO",
        "−(2/β) log σ(−(β/|y|) log p_θ(y) − δ) + retain",
        "Fan et al. 2024, arXiv:2410.07163",
        {"retain": "nll", "beta": 4.5, "gamma": 0.125},
    ),
    Row(
        "undial",
        undial_N,
        "token",
        "self-distillation from the original with the true token's logit lowered",
        "CE(softmax(z_o − β·1[y]), p_θ) + retain",
        "Dong et al. 2024, arXiv:2402.10052",
        {"retain": "none", "beta": 10.0},
        rate=1e-4,
        teacher=True,
    ),
)


def replacement(sample: Sample, adapter: Any, rng: np.random.Generator) -> Sample:
    """The sample with a refusal (text) or another class (classifier) in place of its target."""
    if adapter.modality == "classifier":
        other, own = int(rng.integers(adapter.num_classes - 1)), adapter.label(sample)
        return replace(sample, id=f"{sample.id}/other", target=other + (other >= own), probes=())
    return replace(sample, id=f"{sample.id}/refusal", target=str(rng.choice(REFUSALS)), probes=())


def retain_term(kind: str, alpha: float, teacher: Teacher | None) -> list[Term]:
    """Nothing, NLL, or KL(original ‖ model) over the retain tokens."""
    if kind == "none":
        return []
    if kind == "nll":
        return [Term("retain", "retain", "token", nll_N, alpha)]
    assert teacher is not None
    return [Term("retain", "retain", "token", lambda view: teacher.compare(view, kl_C), alpha)]


def run_family(row: Row, context: Context, options: FamilyOptions) -> Outcome:
    """Edit ``context.model`` by the row's objective."""
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(context.model, row.rate))
    rng = np.random.default_rng(context.seed)
    forget: Sequence[Sample] = context.forget
    partners: Sequence[Sample] | None = None
    if row.replaces != "no":
        replaced = [replacement(s, context.adapter, rng) for s in context.forget]
        if row.replaces == "answer":
            forget = replaced
        else:
            partners = replaced
    uses_retain = options.retain != "none" and bool(context.retain)
    teacher = None
    if row.teacher or (uses_retain and options.retain == "kl"):
        seen = [*forget, *(partners or ())] if row.teacher else []
        seen += context.retain if uses_retain and options.retain == "kl" else []
        teacher = Teacher.of(context.model, context.adapter, seen)

    terms = [Term("forget", "forget", row.unit, lambda view: row.term(view, options, teacher), options.gamma)]
    feeds = {"forget": Feed(forget, partners)}
    sizes = {"forget": options.batch_size}
    notes = []
    if uses_retain:
        terms += retain_term(options.retain, options.alpha, teacher)
        feeds["retain"] = Feed(context.retain)
        sizes["retain"] = options.retain_batch
    elif options.retain != "none":
        notes.append("no retain samples were given: nothing holds the rest of the model in place")
    lengths = {
        role: [feed.length(context.adapter, i) for i in range(len(feed.samples))] for role, feed in feeds.items()
    }
    plan = EpochPlan(lengths, sizes, options.epochs, "forget", context.seed)

    def guard(trainer: Trainer) -> None:
        if (
            options.stop_loss is not None
            and row.term is ascent_N
            and -trainer.log.last("forget", 3) > options.stop_loss
        ):
            trainer.stop = f"forget loss above {options.stop_loss}"

    log = train(
        context.model,
        context.adapter,
        feeds,
        terms,
        plan,
        options,
        seed=context.seed,
        work=context.work,
        progress=context.progress,
        name=row.name,
        on_step=guard,
    )
    if len(log.steps) < plan.steps:
        notes.append(f"stopped after {len(log.steps)} of {plan.steps} steps: forget loss above {options.stop_loss}")
    return Outcome(context.model, notes, {"steps": len(log.steps), "log": log.steps})


def _options_class(row: Row) -> type[FamilyOptions]:
    """``FamilyOptions`` with the row's defaults, so that ``show`` prints the defaults that really hold."""
    body: dict[str, Any] = {"__annotations__": {}}
    for f in fields(FamilyOptions):
        if f.name in row.defaults:
            source = row.paper.split(";")[0]
            body["__annotations__"][f.name] = f.type
            body[f.name] = option(row.defaults[f.name], f.metadata["meaning"], source, f.metadata["choices"])
    made: type[FamilyOptions] = dataclass(frozen=True, kw_only=True)(
        type(f"{row.name.title()}Options", (FamilyOptions,), body | {"__module__": __name__})
    )
    return made


for _row in FAMILIES:
    register(
        Method(
            name=_row.name,
            run=partial(run_family, _row),
            options=_options_class(_row),
            paper=_row.paper,
            summary=_row.summary,
            formula=_row.formula,
            wants=frozenset({"retain"} if _row.defaults.get("retain") != "none" else ()),
        )
    )


def identities(beta: float) -> dict[str, float]:
    """Values of the forget terms at θ = original, for tests and ``show``."""
    return {"npo": 2 * math.log(2) / beta, "dpo": math.log(2), "kl": 0.0}
