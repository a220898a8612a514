"""Options of the flagship. Values marked "measured" come from docs/log.md."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

from torch import nn

from expunge.data.samples import Modality
from expunge.options import option
from expunge.training.loop import ORDINARY_RATE, TrainOptions
from expunge.training.optimizers import sized_rate

OPTIMIZERS = ("muon", "adamw", "kfac")
GROUPS = ("spectral", "kmeans", "random", "all")
MEMBERS = ("base", "proxy", "counterfactual", "blend", "original")


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(TrainOptions):
    """Options of ``cluster``; four of them are none until :meth:`settled` has seen the model."""

    # how long
    epochs: float = option(1.5, "passes over the retain set in the edit; sets its cost", "measured")
    forget_epochs: float = option(
        None, "at least this many passes over the forget set; none = 3.4, or 20 for a classifier", "measured"
    )
    steps: int | None = option(None, "number of edit steps; overrides both")
    batch_size: int = option(None, "forget samples in one step; none = 2, or 8 for a classifier", "measured")
    retain_batch: int = option(None, "retain samples in one step; none = 4, or 16 for a classifier", "measured")
    # what towards
    members: str = option(
        "auto", "target ensemble, +-joined from base, proxy, counterfactual, blend, original", "measured"
    )
    proxy_epochs: float = option(0.5, "passes of a retraining from the base on retain only; 0 = none", "measured")
    scratch_epochs: float = option(2.0, "without a base: passes of a proxy from random weights; 0 = none", "measured")
    proxy_rate: float = option(1e-2, "its Muon learning rate", "measured")
    people: int = option(3, "other people that the counterfactual member asks about", "experiments: K = 3")
    sharpness: float | None = option(None, "exponent of the ensemble; calibrated on unseen texts if none")
    cap: float = option(0.02, "largest probability of a true token where no anchor bounds it (no base)", "ours")
    js: float = option(4.0, "weight of Jensen-Shannon(target, model)", "measured")
    reverse: float = option(0.0, "weight of KL(model ‖ target); .3 without match", "measured")
    forward: float = option(0.0, "weight of KL(target ‖ model)")
    match: float = option(0.12, "weight of the squared log ratio to the target at the true token", "measured")
    # from where
    start: float = option(0.9, "starting weights: this share original, the rest proxy (or base)", "measured")
    # how
    optimizer: str = option("muon", "optimizer of the hidden matrices", "measured", OPTIMIZERS)
    learning_rate: float = option(3.4e-3, "peak learning rate of the hidden matrices", "measured")
    other_learning_rate: float | None = option(
        None,
        "AdamW rate of the other parameters; none = 5e-4, or for a classifier, whose convolutions are among them, a "
        "third of the rate that trains a model of its size",
        "measured",
    )
    schedule: str = option("linear", "shape after warm-up", "measured", ("cosine", "linear", "constant"))
    rank: int | None = option(None, "largest rank of the change of each matrix; full if none")
    kfac_metric: str = option("logits", "curvature metric", "experiments", ("fisher", "gauss-newton", "logits"))
    damping: float = option(0.1, "relative damping of the K-FAC factors", "experiments: .03-.1")
    kl_clip: float = option(1e-3, "largest quadratic change of one K-FAC step", "experiments")
    refresh: int = option(20, "steps between refreshes of the K-FAC factors", "ours: cost")
    null_space: float | None = option(None, "control arm: hard null space of retain inputs at this energy")
    # where
    groups: str = option("spectral", "token groups that the influence ranks", "the published idea", GROUPS)
    clusters: int | None = option(None, "number of token clusters; by eigengap and stability if none")
    reach: float = option(
        0.95,
        "edit the smallest set of layer × cluster groups with this share of influence; 1 = all",
        "measured: costs nothing",
    )
    random_choice: bool = option(False, "control arm: as many groups, chosen at random instead of by influence")
    cluster_tokens: int = option(4000, "token states that are clustered", "ours: seconds")
    # what stays
    retain: str = option(
        "nll", "retain term: nll, kl to the original, or both", "measured", ("nll", "kl", "both", "none")
    )
    alpha: float = option(6.0, "weight of the retain term", "measured")
    heal_from: float = option(0.6, "share of the steps after which forgetting comes only now and then", "measured")
    heal_every: int = option(4, "one forget step in so many while healing", "measured")
    worst: float = option(1.0, "share of the retain samples, the most damaged, that healing uses; 1 = all", "measured")
    average: float = option(0.0, "weights are averaged over this last share of the steps: bought nothing", "measured")
    # closed loop and hardening
    negations: int = option(
        7,
        "times, until healing, that a copy relearns some forget samples and the weights move the other way",
        "measured",
    )
    negation_share: float = option(0.4, "share of the forget samples in one negation", "measured")
    negation_rate: float = option(3e-3, "Muon rate of the copy", "measured")
    negation_scale: float = option(1.6, "step against the copy's change, as a multiple of it", "measured")
    control: float = option(0.0, "gain of the loop that moves the forget loss to the never-seen loss; 0 = off")
    control_every: int = option(15, "steps between measurements of the never-seen loss", "measured")
    harden: float = option(
        0.0, "radius of the relearning direction that every other forget step withstands", "experiments: 1e-3"
    )
    rounding: int = option(4, "bits of the rounding that the last steps are taken under; 0 = none", "measured")
    rounding_from: float = option(0.75, "share of the steps after which that begins", "measured")
    checkpoint_every: int = option(50, "steps between checkpoints, where a work folder is given; 0 = none", "ours")

    def settled(self, modality: Modality, model: nn.Module) -> Self:
        """With numbers in place of what depends on the model.

        An answer of a language model has a dozen targets or more, a sample of a classifier one: its steps take more
        samples, and its forget set is passed over more often. Muon moves the matrices of a language model; of a
        convolutional network AdamW moves nearly everything, at the rate of the other parameters.
        """
        images = modality == "classifier"
        values: dict[str, Any] = {
            "forget_epochs": 20.0 if images else 3.4,
            "batch_size": 8 if images else 2,
            "retain_batch": 16 if images else 4,
            "other_learning_rate": sized_rate(model, ORDINARY_RATE) / 3 if images else 5e-4,
        }
        missing = {f.name for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **{name: value for name, value in values.items() if name in missing})
