"""PDU: flatten the logits of the forget tokens as far as the retain loss allows; the trade-off finds itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from expunge.errors import UserError
from expunge.methods.families import Row, options_of, run_family
from expunge.methods.family_options import FamilyOptions
from expunge.methods.forget_terms import margin_N
from expunge.methods.registry import Context, Outcome, method
from expunge.models.losses import mean_losses
from expunge.options import option
from expunge.training.loop import Trainer

PAPER = "PDU, arXiv:2506.05314"


@dataclass(frozen=True, kw_only=True)
class PDUFields(FamilyOptions):
    """The retain loss may not pass a limit: its weight ``alpha`` is a start and moves with every violation."""

    limit: float | None = option(
        None, "largest retain loss that is allowed (ε), nats per token; by slack if none", f"{PAPER}, §3: (1+α)·L_r(o)"
    )
    slack: float = option(0.1, "share by which the original's own retain loss may be passed", "ours: the paper's α")
    dual_rate: float = option(1.0, "step of the weight per nat of violation (η)", "OpenUnlearning: 1")
    dual_warmup: float = option(
        5.0, "passes over the forget set before the weight begins to move", "OpenUnlearning: 5 of 10"
    )


ROW = Row(
    "pdu",
    margin_N,
    "token",
    "flatten the logits on forget while the retain loss stays below a limit",
    "(max z − mean z)²(f) + λ (NLL(r) − ε), λ ← max(0, λ + η(NLL(r) − ε))",
    "Entesari et al. 2025, arXiv:2506.05314",
    {"retain": "nll", "alpha": 50.0},
    PDUFields,
)
PDUOptions = options_of(ROW)


@method(
    name=ROW.name,
    options=PDUOptions,
    paper=ROW.paper,
    summary=ROW.summary,
    formula=ROW.formula,
    wants=frozenset({"retain"}),
)
def pdu(context: Context, options: PDUFields) -> Outcome:
    """Flatten the logits on forget while the retain loss stays below a limit."""
    if options.retain != "nll":
        raise UserError(f"pdu holds the retain loss below a limit: retain = {options.retain} cannot be, give nll.")
    if not context.retain:
        return run_family(ROW, context, options)
    limit = options.limit
    if limit is None:
        limit = (1 + options.slack) * token_mean_loss(context)
    warm = options.dual_warmup * -(-len(context.forget) // options.batch_size)

    def compute(trainer: Trainer, picks: Mapping[str, Sequence[int]]) -> dict[str, float]:
        forget, retain = trainer.terms
        weight = float(trainer.memory.get("dual", options.alpha))
        values = trainer.gradients(picks, [forget, replace(retain, weight=weight)])
        if trainer.step >= warm:
            trainer.memory["dual"] = max(0.0, weight + options.dual_rate * (values["retain"] - limit))
        return {**values, "dual": weight}

    outcome = run_family(ROW, context, options, compute=compute)
    outcome.record["limit"] = limit
    return outcome


def token_mean_loss(context: Context) -> float:
    """The model's mean loss over all target tokens of the retain set, nats: what the retain term is a mean of."""
    losses = mean_losses(context.model, context.adapter, context.retain)
    return float(np.average(losses, weights=[context.adapter.num_targets(s) for s in context.retain]))
