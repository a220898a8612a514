"""O3: per request a low-rank adapter that learns other answers, let through by a gate that knows the request's prompts.

A guard: the weights keep what was learnt, and taking the adapters off brings it back. The paper's detector is a second
encoder (RoBERTa-large with a contrastive loss) whose weighting the released code calibrates on test scores; here the
model's own states are read, cosine and Mahalanobis distance are one (a cosine after whitening), and the threshold
comes from never-seen and retain prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.beside import block_sites, train_beside
from expunge.methods.families import replacement
from expunge.methods.gated_lora import GatedLora, Request, adapted_layers
from expunge.methods.registry import Context, Outcome, method
from expunge.models.attached import attach, attachments
from expunge.models.text import causal_lm
from expunge.options import Ranges, check_ranges, option
from expunge.stats import auc
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, TrainOptions
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Term, nll_N

PAPER = "Gao et al. 2025"
RATE = 3e-4  # the paper's, for a model of 7 billion parameters
SMALL_RATE = 3e-5  # where the size rule starts for adapters: at its 1e9 · P^-0.6 the paper's rate diverges below 1e6
KNOWN_WEIGHT = 0.99  # of the gate for a prompt of the request itself; for the median of the others, 1 minus it
NARROWEST = 1e-3  # least slope, on the scale of cosines
CLOSEST = 0.98  # largest threshold: above it rounding would decide
BOUNDS: Ranges = (
    (("rank",), "1 or more", lambda v: v >= 1),
    (("alpha",), "a number above 0", lambda v: 0 < v < math.inf),
    (("orthogonal",), "0 or more", lambda v: 0 <= v < math.inf),
    (("false_alarms", "missed"), "a share above 0 and below 1", lambda v: 0 < v < 1),
)


@dataclass(frozen=True, kw_only=True)
class O3Options(TrainOptions):
    """Options of ``o3``."""

    epochs: float = option(15.0, "passes over the forget set", f"{PAPER}, released settings: 15")
    learning_rate: float | None = option(
        None, "peak learning rate; the paper's, raised for small models, if none", f"{PAPER}, released settings: 3e-4"
    )
    batch_size: int = option(8, "forget samples in one step", "ours: the paper's 128 is more than most requests have")
    rank: int = option(8, "rank r of the adapters", f"{PAPER}, released settings: 8")
    alpha: float = option(16.0, "scale: the update is multiplied by α / r", f"{PAPER}, released settings: 16")
    orthogonal: float = option(0.1, "weight λ of the orthogonality penalty", f"{PAPER}, released settings: 0.1")
    false_alarms: float = option(
        0.05, "share of never-seen and retain prompts above the threshold", "ours: the paper calibrates on test data"
    )
    missed: float = option(
        0.1, "share of forget prompts below it, where there are no others", f"{PAPER}: ν = 0.1 of its one-class rule"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, BOUNDS)


def guard_of(context: Context) -> GatedLora:
    """The adapters that the model has from earlier requests, or new ones with room for none, attached."""
    found = next((a for a in attachments(context.model) if isinstance(a, GatedLora)), None)
    if found is not None:
        return found
    inner = causal_lm(context.model)
    sites = block_sites(context.model, context.adapter, context.forget[0])
    layers = adapted_layers(inner, sites)
    if not layers:
        raise UserError("method 'o3' found no linear layer in the model's blocks to put an adapter on: use another.")
    made = GatedLora(
        layers=list(layers),
        shapes=list(layers.values()),
        blocks=[s.name for s in sites],
        widths=[s.width for s in sites],
    )
    attach(inner, made)
    return made


def calibrate(
    guard: GatedLora, request: Request, context: Context, options: O3Options
) -> tuple[dict[str, Any], list[str]]:
    """Let the request's gate learn its prompts and choose its threshold; (figures, notes).

    Threshold: the score that a share ``false_alarms`` of the never-seen and retain prompts pass. Without any, the one
    that a share ``missed`` of the forget prompts fail, each scored by the others. Slope: a known prompt, whose score is
    1, has a weight of 0.99 at least, the median of the others 0.01 at most. No prompt of the evaluation is looked at.
    """
    others: Sequence[Sample] = [*context.unseen, *context.retain]
    known = guard.prompt_states(context.model, context.adapter, context.forget)
    other = guard.prompt_states(context.model, context.adapter, others) if others else [k[:0] for k in known]
    gate = request.gate
    gate.learn(known, other)
    left_out = gate.score(known, without_itself=True).double().cpu().numpy()
    outside = gate.score(other).double().cpu().numpy() if others else np.zeros(0)
    if others:
        chosen = float(np.quantile(outside, 1 - options.false_alarms))
    else:
        chosen = float(np.quantile(left_out, options.missed))
    threshold = min(chosen, CLOSEST)
    room = min(1 - threshold, threshold - float(np.median(outside))) if others else 1 - threshold
    slope = max(room / math.log(KNOWN_WEIGHT / (1 - KNOWN_WEIGHT)), NARROWEST)
    gate.get_buffer("threshold").fill_(threshold)
    gate.get_buffer("slope").fill_(slope)
    figures: dict[str, Any] = {
        "threshold": threshold,
        "slope": slope,
        "known_left_out_passed": float((left_out > threshold).mean()),
        "calibration": len(outside),
    }
    notes = []
    if others:
        figures |= {
            "false_alarms": float((outside > threshold).mean()),
            "auc": float(auc(left_out, outside)),
            "mean_weight_outside": float(gate.weight(other).mean()),
        }
    if chosen > CLOSEST:
        notes.append(
            f"some prompts that must not be caught are forget prompts almost word for word: score {chosen:.3f}"
        )
    return figures, notes


@method(
    name="o3",
    options=O3Options,
    paper="Gao et al. 2025 (ICLR), arXiv:2407.10223 (orthogonal LoRA, out-of-distribution gate)",
    wants=frozenset({"retain", "unseen"}),
    removes_from_weights=False,
    changes="beside",
    formula="W x + Σ_t w_t(prompt) (α/r) B_t A_t x; NLL(other answer | f) + λ Σ ‖A_earlier A_newᵀ‖²_F",
)
def o3(context: Context, options: O3Options) -> Outcome:
    """A guard: an adapter that answers otherwise, switched on per sample by a gate that knows the forget prompts.

    Other answers are refusals for text and other classes for images. Every request has its own adapter, kept
    orthogonal to all earlier ones, and its own gate; the released code switches all requests on when one matches.
    """
    if context.adapter.modality != "classifier":
        bare = [s for s in context.forget if not s.prompt and s.image is None]
        if bare:
            raise UserError(
                f"{len(bare)} of {len(context.forget)} forget samples have no prompt, which is what o3's gate reads: "
                "use a method that changes the weights, such as npo."
            )
    model = context.model
    if options.learning_rate is None:
        options = replace(options, learning_rate=max(RATE, sized_rate(model, SMALL_RATE)))
    notes = [
        "a guard: the weights still hold what was learnt, and without the adapters it is back",
        "the gate keeps hidden states of the forget prompts beside the weights: they are personal data",
    ]
    if not context.unseen:
        notes.append("no never-seen texts were given: the gate was calibrated without them")
    if not context.retain:
        notes.append("no retain samples were given: the gate was calibrated without them")

    guard = guard_of(context)
    place = len(guard.requests)
    request = guard.add(options.rank, options.alpha, len(context.forget)).to(next(model.parameters()).device)
    request.begin(context.seed * 1009 + place)
    rng = np.random.default_rng(context.seed)
    feed = Feed([replacement(s, context.adapter, rng) for s in context.forget])
    plan = EpochPlan(
        {"forget": feed.lengths(context.adapter)},
        {"forget": options.batch_size},
        options.epochs,
        "forget",
        context.seed,
    )
    terms = [
        Term("other_answer", "forget", "token", nll_N),
        # A number of the parameters alone: the same for every sample, so that its mean is itself.
        Term("overlap", "forget", "sample", lambda v: guard.overlap(place).expand(len(v.samples)), options.orthogonal),
    ]
    parameters = [*request.A, *request.B]
    guard.forced = [0.0] * place + [1.0]
    try:
        log = train_beside(context, parameters, {"forget": feed}, terms, plan, options, "o3")
    finally:
        guard.forced = None
    figures, more = calibrate(guard, request, context, options)
    record: dict[str, Any] = {
        "steps": len(log.steps),
        "log": log.steps,
        "requests": len(guard.requests),
        "adapter_parameters": sum(p.numel() for p in parameters),
        "overlap": float(guard.overlap(place).detach()),
        "gate": figures,
    }
    return Outcome(model, notes + more, record)
