"""Options of the loss families: what every row has, and what single rows add."""

from __future__ import annotations

import math
from dataclasses import dataclass

from expunge.options import Ranges, check_ranges, option
from expunge.training.loop import TrainOptions

OPEN_UNLEARNING = "OpenUnlearning's setting of it, arXiv:2506.12618"


@dataclass(frozen=True, kw_only=True)
class FamilyOptions(TrainOptions):
    """Options of every row: gamma · forget term + alpha · retain term, and guards that look at no evaluation."""

    epochs: float = option(10.0, "passes over the forget set", "TOFU, OpenUnlearning: 10")
    learning_rate: float | None = option(
        None, "peak learning rate; the paper's, raised for small models, if none", "ours: sized_rate of the paper's"
    )
    batch_size: int = option(8, "forget samples in one step", "ours: a quarter of OpenUnlearning's 32")
    retain_batch: int = option(8, "retain samples in one step", "OpenUnlearning: one per forget sample")
    retain: str = option("nll", "retain term", "OpenUnlearning: NLL", ("nll", "kl", "none"))
    gamma: float = option(1.0, "weight of the forget term", "OpenUnlearning: 1")
    alpha: float = option(1.0, "weight of the retain term", "OpenUnlearning: 1")
    ascent: str = option(
        "log",
        "what ga, graddiff and kl lower: log p, without a bound below, or unlikelihood, −log(1−p), which ends at 0",
        "log as published; unlikelihood: Welleck et al. 2020, arXiv:1908.04319, eq. 4",
        ("log", "unlikelihood"),
    )
    bound: float | None = option(
        None, "a forget sample whose own loss is above this counts no more (nats per token)", "ours: off as published"
    )
    stop_loss: float | None = option(
        None, "stop when the forget loss of three steps is above this (nats per token)", "ours: off as published"
    )
    stop: str = option(
        "never",
        "unseen: stop when the forget loss reaches the original's loss on never-seen texts",
        "ours: off as published",
        ("never", "unseen"),
    )
    look_every: int | None = option(
        None, "steps between two looks of stop=unseen; one pass over the forget set if none", "ours"
    )
    ease: float | None = option(
        None, "halve the learning rate whenever the retain term has risen by more than this", "ours: off as published"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, RANGES)


RANGES: Ranges = (
    (("gamma", "alpha", "exponent", "doubt", "shift"), "0 or more", lambda v: 0 <= v < math.inf),
    (
        ("beta", "bound", "stop_loss", "ease", "focus_weight", "dual_rate", "limit", "temperature"),
        "a number above 0",
        lambda v: 0 < v < math.inf,
    ),
    (("look_every", "alternates"), "1 or more", lambda v: v >= 1),
    (("skip", "slack", "dual_warmup"), "0 or more", lambda v: 0 <= v < math.inf),
    (("delta",), "a finite number", math.isfinite),
)


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions(FamilyOptions):
    """npo, dpo, altpo."""

    beta: float = option(0.1, "inverse temperature: small is close to plain ascent", "NPO, arXiv:2404.05868, §4: 0.1")


@dataclass(frozen=True, kw_only=True)
class SimNPOOptions(FamilyOptions):
    beta: float = option(4.5, "inverse temperature", OPEN_UNLEARNING)
    delta: float = option(
        0.0, "margin on the scale of β·nats per token (the paper's γ)", "SimNPO, arXiv:2410.07163, §5: 0"
    )


@dataclass(frozen=True, kw_only=True)
class UndialOptions(FamilyOptions):
    """With ``focus`` only some tokens are forgotten, or more than others; a sample without any counts as a whole."""

    beta: float = option(
        10.0, "logits that the true token is lowered by in the target", "UNDIAL, §4 (its γ): 3, 10, 30"
    )
    focus: str = option(
        "none",
        "which tokens: none = all alike; hard = those of names and other words with capitals or digits alone; "
        "weight = those count focus_weight times",
        "UNDIAL, §3.2: entities and nouns; ours: found by their spelling",
        ("none", "hard", "weight"),
    )
    focus_weight: float = option(10.0, "with focus=weight: times that such a token counts", "UNDIAL's code: 10")


@dataclass(frozen=True, kw_only=True)
class WGAOptions(FamilyOptions):
    exponent: float = option(1.0, "β of the weight p^β: 0 is plain ascent", "WGA, arXiv:2502.19301; OpenUnlearning: 1")


@dataclass(frozen=True, kw_only=True)
class SatImpOptions(FamilyOptions):
    exponent: float = option(5.0, "β₁ of p^β₁: saturation", "SatImp, arXiv:2505.11953; OpenUnlearning: 5")
    doubt: float = option(1.0, "β₂ of (1−p)^β₂: importance", "SatImp, arXiv:2505.11953; OpenUnlearning: 1")


@dataclass(frozen=True, kw_only=True)
class CEUOptions(FamilyOptions):
    skip: int = option(1, "tokens at the start of an answer that are left alone, where it has more", OPEN_UNLEARNING)
