"""The loss families: one table of forget terms × retain terms × what the answer is replaced by.

Notation: θ the model, o the original (frozen), f forget, r retain, y the target of |y| tokens, σ the logistic
function. Every objective is gamma · forget term + alpha · retain term. The terms stand in ``forget_terms.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from expunge.data.refusals import REFUSALS
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods import forget_terms as terms
from expunge.methods.family_options import (
    CEUOptions,
    FamilyOptions,
    PreferenceOptions,
    SatImpOptions,
    SimNPOOptions,
    UndialOptions,
    WGAOptions,
)
from expunge.methods.focus import focus_weights
from expunge.methods.forget_terms import Aids, ForgetTerm
from expunge.methods.guards import Watch, answer_nll_B, counted
from expunge.methods.registry import Context, Method, Outcome, register
from expunge.models.adapter import Adapter
from expunge.options import option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, Trainer, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Teacher, Term, View, kl_C, nll_N

Replace = Literal["no", "answer", "partner"]
Prepare = Callable[[nn.Module, Adapter, Sequence[Sample], Any, int], Mapping[str, Tensor]]
Compute = Callable[[Trainer, Mapping[str, Sequence[int]]], dict[str, float]]


@dataclass(frozen=True)
class Row:
    """One family: its forget term, its options and the paper's defaults.

    ``prepare`` makes numbers per target token before the training; ``rate`` is the paper's learning rate, for models
    of a billion parameters and more.
    """

    name: str
    term: ForgetTerm
    unit: Literal["token", "sample"]
    summary: str
    formula: str
    paper: str
    defaults: dict[str, Any]
    options: type[FamilyOptions] = FamilyOptions
    replaces: Replace = "no"
    teacher: Literal["no", "sums", "states"] = "no"
    prepare: Prepare | None = None
    rate: float = 1e-5


TOFU = "TOFU, Maini et al. 2024, arXiv:2401.06121"
FAMILIES: tuple[Row, ...] = (
    Row(
        "ga",
        terms.ascent_N,
        "token",
        "gradient ascent on the forget loss, nothing else",
        "−NLL(f)",
        "Jang et al. 2023, arXiv:2210.01504",
        {"retain": "none"},
    ),
    Row(
        "graddiff",
        terms.ascent_N,
        "token",
        "gradient ascent on forget, descent on retain",
        "−NLL(f) + NLL(r)",
        "Liu et al. 2022, arXiv:2203.12817; TOFU, arXiv:2401.06121",
        {"retain": "nll"},
    ),
    Row(
        "kl",
        terms.ascent_N,
        "token",
        "gradient ascent on forget, close to the original on retain",
        "−NLL(f) + KL(p_o ‖ p_θ)(r)",
        TOFU,
        {"retain": "kl"},
    ),
    Row(
        "idk",
        terms.nll_of_replacement_N,
        "token",
        "learn a refusal in place of each answer",
        "NLL(refusal | f) + NLL(r)",
        TOFU,
        {"retain": "nll"},
        replaces="answer",
    ),
    Row(
        "idk-nll",
        terms.nll_of_replacement_N,
        "token",
        "learn a refusal in place of each answer, nothing else",
        "NLL(refusal | f)",
        "OpenUnlearning, Dorna et al. 2025, arXiv:2506.12618 (IdkNLL)",
        {"retain": "none"},
        replaces="answer",
    ),
    Row(
        "dpo",
        terms.dpo_B,
        "sample",
        "prefer a refusal to the answer",
        "−log σ(β[log p_θ/p_o(refusal) − log p_θ/p_o(y)]) + retain",
        "Rafailov et al. 2023, arXiv:2305.18290; as unlearning: arXiv:2404.05868",
        {"retain": "nll"},
        PreferenceOptions,
        replaces="partner",
        teacher="sums",
    ),
    Row(
        "npo",
        terms.npo_B,
        "sample",
        "negative preference: DPO with only the losing answer",
        "−(2/β) log σ(−β log p_θ/p_o(y)) + retain",
        "Zhang et al. 2024, arXiv:2404.05868",
        {"retain": "nll"},
        PreferenceOptions,
        teacher="sums",
    ),
    Row(
        "simnpo",
        terms.simnpo_B,
        "sample",
        "reference-free, length-normalised NPO",
        "−(2/β) log σ(−(β/|y|) log p_θ(y) − δ) + retain",
        "Fan et al. 2024, arXiv:2410.07163",
        {"retain": "nll", "gamma": 0.125},
        SimNPOOptions,
    ),
    Row(
        "undial",
        terms.undial_N,
        "token",
        "self-distillation from the original with the true token's logit lowered",
        "CE(softmax(z_o − β·1[y]), p_θ) + retain",
        "Dong et al. 2024, arXiv:2402.10052",
        {"retain": "none"},
        UndialOptions,
        teacher="states",
        prepare=focus_weights,
        rate=1e-4,
    ),
    Row(
        "wga",
        terms.wga_N,
        "token",
        "gradient ascent that fades where the token is forgotten",
        "p_θ(y)^β · log p_θ(y) + retain, the weight held constant",
        "Wang et al. 2025, arXiv:2502.19301",
        {"retain": "nll", "epochs": 5.0},
        WGAOptions,
    ),
    Row(
        "satimp",
        terms.satimp_N,
        "token",
        "gradient ascent weighted by saturation and importance of each token",
        "p_θ(y)^β₁ (1−p_θ(y))^β₂ · log p_θ(y) + retain, the weight held constant",
        "Yang et al. 2025, arXiv:2505.11953",
        {"retain": "nll", "gamma": 0.1, "epochs": 5.0},
        SatImpOptions,
    ),
    Row(
        "ceu",
        terms.ceu_N,
        "token",
        "distil into itself its own distribution without the true token",
        "CE(softmax(z_θ with z_y = −∞), p_θ) + retain, the target held constant",
        "Yang 2025, arXiv:2503.01224",
        {"retain": "none"},
        CEUOptions,
    ),
    Row(
        "entropy",
        terms.entropy_N,
        "token",
        "maximise the entropy of every forget token, so that no way of sampling finds the answer",
        "KL(p_θ ‖ uniform)(f) + retain, in [0, log V]",
        "Yuan et al. 2024, arXiv:2410.08109",
        {"retain": "nll"},
    ),
    Row(
        "random-labels",
        terms.random_label_N,
        "token",
        "learn a wrong token (or class) in place of each true one",
        "−log p_θ(y′) + retain, y′ ≠ y drawn once per token",
        "Graves et al. 2021, arXiv:2010.10981; on text: Yao et al. 2024, arXiv:2402.15159",
        {"retain": "nll"},
        prepare=terms.wrong_labels,
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


def run_family(
    row: Row,
    context: Context,
    options: Any,
    *,
    pairs: tuple[Sequence[Sample], Sequence[Sample]] | None = None,
    compute: Compute | None = None,
) -> Outcome:
    """Edit ``context.model`` by the row's objective.

    ``pairs``: forget samples and another answer to each, where the row does not make them; ``compute``: see
    :func:`expunge.training.loop.train`.
    """
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(context.model, row.rate))
    if row.replaces == "answer" and (options.bound is not None or options.stop_loss is not None):
        raise UserError(f"{row.name} trains on refusals and never meets the answers: use stop=unseen as its guard.")
    forget, partners = pairs or _answers(row, context)
    uses_retain = options.retain != "none" and bool(context.retain)
    feeds = {"forget": Feed(forget, partners)}
    sizes = {"forget": options.batch_size}
    notes = []
    if uses_retain:
        feeds["retain"] = Feed(context.retain)
        sizes["retain"] = options.retain_batch
    elif options.retain != "none":
        notes.append("no retain samples were given: nothing holds the rest of the model in place")
    lengths = {role: feed.lengths(context.adapter) for role, feed in feeds.items()}
    plan = EpochPlan(lengths, sizes, options.epochs, "forget", context.seed)
    held = met(plan, "retain", context.retain) if uses_retain and options.retain == "kl" else []
    aids = _aids(row, context, options, [*forget, *(partners or ())], held)

    def values(view: View) -> Tensor:
        found = row.term(view, options, aids)
        if options.bound is not None:
            found = counted(found, view, row.unit, options.bound)
        if options.stop_loss is not None:
            answer_nll_B(view)
        return found

    objective = [Term("forget", "forget", row.unit, values, options.gamma)]
    if uses_retain:
        objective += retain_term(options.retain, options.alpha, aids.teacher)
    watch = Watch.of(context, options, math.ceil(len(forget) / options.batch_size))
    log = train(
        context.model,
        context.adapter,
        feeds,
        objective,
        plan,
        options,
        seed=context.seed,
        work=context.work,
        progress=context.progress,
        name=row.name,
        compute=compute,
        on_step=watch,
    )
    record: dict[str, Any] = {"steps": len(log.steps), "log": log.steps}
    if watch.reason:
        record["stopped"] = watch.reason
        notes.append(f"stopped after {len(log.steps)} of {plan.steps} steps: {watch.reason}")
    return Outcome(context.model, notes, record)


def _answers(row: Row, context: Context) -> tuple[Sequence[Sample], Sequence[Sample] | None]:
    """The forget samples, with the answers replaced or with a partner for each, as the row asks."""
    if row.replaces == "no":
        return context.forget, None
    rng = np.random.default_rng(context.seed)
    others = [replacement(s, context.adapter, rng) for s in context.forget]
    return (others, None) if row.replaces == "answer" else (context.forget, others)


def met(plan: EpochPlan, role: str, samples: Sequence[Sample]) -> list[Sample]:
    """The samples of the role that some step of the plan sees."""
    return [samples[i] for i in sorted({i for step in range(plan.steps) for i in plan.batch(step)[role]})]


def _aids(row: Row, context: Context, options: Any, forget: Sequence[Sample], held: Sequence[Sample]) -> Aids:
    """Everything that the original has to say, in one pass: it is gone once the training has begun."""
    states = [*(forget if row.teacher == "states" else ()), *held]
    sums = forget if row.teacher == "sums" else ()
    teacher = Teacher.of(context.model, context.adapter, states, sums=sums) if states or sums else None
    made = {} if row.prepare is None else row.prepare(context.model, context.adapter, forget, options, context.seed)
    return Aids(teacher, made)


def options_of(row: Row) -> type[FamilyOptions]:
    """The row's options with its defaults, so that ``show`` prints the defaults that really hold."""
    body: dict[str, Any] = {"__annotations__": {}}
    for f in fields(row.options):
        if f.name in row.defaults:
            source = row.paper.split(";")[0]
            body["__annotations__"][f.name] = f.type
            body[f.name] = option(row.defaults[f.name], f.metadata["meaning"], source, f.metadata["choices"])
    name = f"{row.name.title().replace('-', '')}Options"
    made: type[FamilyOptions] = dataclass(frozen=True, kw_only=True)(
        type(name, (row.options,), body | {"__module__": __name__})
    )
    return made


for _row in FAMILIES:
    register(
        Method(
            name=_row.name,
            run=partial(run_family, _row),
            options=options_of(_row),
            paper=_row.paper,
            summary=_row.summary,
            formula=_row.formula,
            wants=frozenset({"retain"} if _row.defaults.get("retain") != "none" else ()),
        )
    )


def identities(beta: float) -> dict[str, float]:
    """Values of the forget terms at θ = original, for tests and ``show``."""
    return {"npo": 2 * math.log(2) / beta, "dpo": math.log(2), "kl": 0.0}
