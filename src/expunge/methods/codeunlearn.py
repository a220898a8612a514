"""CodeUnlearn: a codebook bottleneck is learnt once; codes that forget samples use more than others are deleted.

The bottleneck costs quality before anything is forgotten, and is learnt without the forget samples, so part of what
is lost on them is lost to it and not to the deletion: the record has the loss of the original, of the bottlenecked
model and after the deletion, for each role.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import hypergeom
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.beside import block_sites, train_beside
from expunge.methods.codebook import Codebook
from expunge.methods.registry import Context, Outcome, method
from expunge.models.attached import attach, attachments
from expunge.models.losses import mean_losses
from expunge.models.text import causal_lm
from expunge.options import Ranges, check_ranges, option
from expunge.stats import discoveries
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, TrainOptions
from expunge.training.terms import Term, View, nll_N

RATE = 3e-3  # the bottleneck is new, so its rate does not depend on the model's size
BOUNDS: Ranges = (
    (("codes", "top"), "1 or more", lambda v: v >= 1),
    (("layer",), "0 or more", lambda v: v >= 0),
    (("reconstruction", "commitment"), "0 or more", lambda v: 0 <= v < math.inf),
    (("fdr",), "a rate above 0 and below 1", lambda v: 0 < v < 1),
    (("neighbour",), "a cosine above 0 and at most 1", lambda v: 0 < v <= 1),
)


@dataclass(frozen=True, kw_only=True)
class CodeUnlearnOptions(TrainOptions):
    """Options of ``codeunlearn``; those of the bottleneck have no effect on a model that has one."""

    epochs: float = option(10.0, "passes over retain to learn the bottleneck", "ours: the paper gives none")
    learning_rate: float | None = option(None, "peak learning rate; 3e-3 if none", "ours: usual for codebooks")
    codes: int = option(1024, "codes in the book", "ours: large, as the paper asks")
    top: int = option(8, "codes that are summed at each position", "Wu et al. 2024: S = 8")
    layer: int | None = option(None, "block after which the bottleneck stands; none: the middle one", "ours")
    reconstruction: float = option(1.0, "weight of the reconstruction and codebook losses", "ours")
    commitment: float = option(0.25, "weight of the commitment loss among them", "van den Oord 2017, §3.2: β = 0.25")
    fdr: float = option(0.05, "false discovery rate of the enrichment test", "ours: the paper does not correct")
    neighbour: float = option(0.9, "cosine from which a code is a near-duplicate of a deleted one", "ours")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, BOUNDS)
        if self.top > self.codes:
            raise UserError(f"top = {self.top} cannot be: there are {self.codes} codes to choose from.")


def enrichment(forget_NK: NDArray[np.bool_], control_NK: NDArray[np.bool_]) -> NDArray[np.float64]:
    """One-sided p-value of each code (K,): is it used by more forget samples than chance would give?

    Fisher's exact test on samples that use the code and those that do not; a sample counts once however many of its
    tokens use it, since they are not independent.
    """
    inside_K, outside_K = forget_NK.sum(0), control_NK.sum(0)
    total = len(forget_NK) + len(control_NK)
    return np.asarray(hypergeom.sf(inside_K - 1, total, inside_K + outside_K, len(forget_NK)), dtype=np.float64)


def book_of(model: nn.Module) -> Codebook | None:
    """The bottleneck that the model has from an earlier request."""
    return next((a for a in attachments(model) if isinstance(a, Codebook)), None)


def learn(context: Context, options: CodeUnlearnOptions) -> tuple[Codebook, list[dict[str, float]]]:
    """Attach a bottleneck and train it on retain: NLL + reconstruction + commitment; (it, the steps)."""
    model, adapter = context.model, context.adapter
    sites = block_sites(model, adapter, context.retain[0])
    layer = (len(sites) - 1) // 2 if options.layer is None else options.layer
    if layer >= len(sites):
        raise UserError(f"layer = {layer} cannot be: the model has blocks 0 to {len(sites) - 1}.")
    if options.learning_rate is None:
        options = replace(options, learning_rate=RATE)
    book = Codebook(block=sites[layer].name, width=sites[layer].width, codes=options.codes, top=options.top)
    attach(causal_lm(model), book)
    book.begin(book.inputs(model, adapter, context.retain), context.seed)

    def told(samples: Sequence[Sample]) -> None:
        # Text is padded on the right; positions of an image classifier are all real.
        book.lengths = None if adapter.modality == "classifier" else [adapter.num_tokens(s) for s in samples]

    def penalty_B(_view: View) -> Tensor:
        assert book.penalty_B is not None
        return book.penalty_B

    terms = [
        Term("retain", "retain", "token", nll_N),
        Term("bottleneck", "retain", "sample", penalty_B, options.reconstruction),
    ]
    feed = Feed(context.retain)
    plan = EpochPlan(
        {"retain": feed.lengths(adapter)}, {"retain": options.batch_size}, options.epochs, "retain", context.seed
    )
    book.commitment = options.commitment
    try:
        log = train_beside(
            context, list(book.parameters()), {"retain": feed}, terms, plan, options, "codeunlearn", told
        )
    finally:
        book.commitment = book.lengths = book.penalty_B = None
    return book, log.steps


@method(
    name="codeunlearn",
    options=CodeUnlearnOptions,
    paper="Wu, Dossou & Liu 2024, arXiv:2410.10866 (codebook bottleneck, enrichment, deletion of codes)",
    needs=frozenset({"retain"}),
    wants=frozenset({"unseen"}),
    removes_from_weights=False,
    changes="beside",
    formula="h ← D Σ_{k ∈ top-S cos(Eh, c)} c_k + b; delete k with p_k(f against controls) below FDR",
)
def codeunlearn(context: Context, options: CodeUnlearnOptions) -> Outcome:
    """Learn a codebook bottleneck on retain, then delete the codes that are enriched on the forget samples.

    A second request uses the bottleneck that is there: only more codes are deleted. The paper deletes topics, words
    that many texts share; a handful of samples about nothing in common leaves no code enriched, and a note says so.
    """
    model, adapter = context.model, context.adapter
    notes = ["the weights still hold what was learnt: without the bottleneck it is back"]
    roles = {"forget": context.forget, "retain": context.retain, "unseen": context.unseen}

    def losses() -> dict[str, float]:
        return {
            role: float(np.mean(mean_losses(model, adapter, samples))) for role, samples in roles.items() if samples
        }

    book = book_of(model)
    log: list[dict[str, float]] = []
    if book is None:
        book, log = learn(context, options)
    else:
        notes.append("the bottleneck that the model has was used again: nothing was trained")
    with book.opened():
        quality = {"original": losses()}
    quality["bottlenecked"] = losses()

    if not context.unseen:
        notes.append("no never-seen texts were given: the controls are the retain samples alone")
    used_NK = book.usage(model, adapter, context.forget).numpy()
    control_NK = book.usage(model, adapter, [*context.retain, *context.unseen]).numpy()
    tested = np.flatnonzero(used_NK.any(0) | control_NK.any(0))
    p_K = np.ones(len(book.codes))
    p_K[tested] = enrichment(used_NK, control_NK)[tested]
    enriched_K = np.zeros(len(p_K), dtype=bool)
    enriched_K[tested] = discoveries(p_K[tested], options.fdr)
    deleted: Tensor = book.get_buffer("deleted")
    before = int(deleted.sum())
    gone_K = deleted | book.near(torch.from_numpy(enriched_K).to(deleted.device), options.neighbour)
    if int((~gone_K).sum()) < book.top:
        raise UserError(
            f"deleting {int(gone_K.sum())} of {len(gone_K)} codes would leave fewer than the {book.top} that are "
            "summed at each position: give more codes, a lower fdr, or a neighbour nearer to 1."
        )
    deleted.copy_(gone_K)
    quality["deleted"] = losses()
    if not enriched_K.any():
        notes.append(
            f"none of {len(tested)} codes in use is enriched on the forget samples at a false discovery rate of "
            f"{options.fdr:g}: none was deleted"
        )
    notes.append(
        "loss on retain, nats per token: "
        + ", ".join(f"{what} {value['retain']:.3g}" for what, value in quality.items())
    )
    record: dict[str, Any] = {
        "steps": len(log),
        "log": log,
        "quality": quality,
        "codes": {
            "tested": len(tested),
            "enriched": int(enriched_K.sum()),
            "near_duplicates": int(gone_K.sum()) - before - int((torch.from_numpy(enriched_K)).sum()),
            "deleted": int(gone_K.sum()),
            "smallest_p": float(p_K.min()),
        },
    }
    return Outcome(model, notes, record)
