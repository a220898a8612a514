"""Evaluation of one model: measured once, compared two-sidedly with retrained models.

:func:`evaluate` is what a study calls for every model. :class:`References` takes the retrained models one at a time
and keeps only numbers and hidden states of the forget samples, never a model.

The verdict on a forget sample is a rule, not yet a calibrated test. With losses in nats per token,
position = (loss_reference − loss) / (loss_reference − loss_original), where loss_reference is the mean over the
references; see :func:`expunge.bench.verdicts.verdict_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch import nn

from expunge.bench.assess import assess
from expunge.bench.desk import Desk, Original
from expunge.bench.measuring import EvaluateOptions, Measured, distances_of, take
from expunge.data.samples import Dataset
from expunge.errors import UserError
from expunge.metrics.divergence import per_sample
from expunge.models.adapter import Adapter
from expunge.models.snapshot import TokenDistributions
from expunge.progress import Progress
from expunge.stats import Estimate

__all__ = ["EvaluateOptions", "Evaluation", "References", "evaluate"]


@dataclass
class Evaluation:
    """``metrics`` by name; ``samples``: rows for samples.jsonl; ``skipped``: what could not be measured, and why.

    ``measured`` is what the numbers were computed from, without the stored distributions.
    """

    metrics: dict[str, Estimate]
    samples: list[dict[str, Any]]
    skipped: dict[str, str]
    measured: Measured = field(repr=False)

    def record(self) -> dict[str, dict[str, Any]]:
        """The metrics as results.json has them."""
        return {name: found.record() for name, found in self.metrics.items()}

    def summary(self) -> dict[str, Any]:
        """As JSON, what later models need of the original: :func:`evaluate` takes it as ``original``."""
        return Original.of(self.measured).record()


Start = Evaluation | Mapping[str, Any] | Literal["self"] | None  # the original: measured, read back, or this model


@dataclass
class References:
    """Retrained models, one after another: ``add`` measures a model, which may be freed afterwards."""

    adapter: Adapter
    dataset: Dataset
    options: EvaluateOptions = field(default_factory=EvaluateOptions)
    seed: int = 0
    models: list[Measured] = field(default_factory=list)
    pairs: list[dict[str, float]] = field(default_factory=list)  # per pair: mean total variation by forget sample

    def __post_init__(self) -> None:
        self.options = self.options.resolved()

    def __len__(self) -> int:
        return len(self.models)

    def add(self, model: nn.Module, progress: Progress | None = None) -> None:
        """Measure a retrained model and its distances to the earlier ones.

        Raises:
            UserError: the dataset has nothing to forget, or the model has another vocabulary than the others.
        """
        fresh = take(model, self.adapter, self.dataset, self.options, self.stores(), progress)
        ids = [s.id for s in fresh.samples["forget"]]
        for earlier in range(len(self)):
            means = per_sample([tv_LR[:, earlier] for tv_LR in fresh.forget.tv])
            self.pairs.append(dict(zip(ids, means, strict=True)))
        self.models.append(fresh)

    def stores(self) -> list[TokenDistributions]:
        """The references' distributions on the forget samples."""
        return [m.forget.store for m in self.models if m.forget.store is not None]

    @property
    def floor(self) -> float:
        """Mean total variation between two references on forget: as near as retraining comes to itself; or nan."""
        return float(np.nanmean([v for pair in self.pairs for v in pair.values()])) if self.pairs else float("nan")

    def without(self, number: int) -> References:
        """The other references: what reference ``number`` itself is compared with. The floor stays that of all."""
        if not 0 <= number < len(self):
            raise UserError(f"there is no reference {number}: {len(self)} were added, counted from 0.")
        others = [m for i, m in enumerate(self.models) if i != number]
        return replace(self, models=others, pairs=list(self.pairs))

    def evaluation(self, number: int, original: Start = None) -> Evaluation:
        """Reference ``number`` compared with the others, from what was stored: nothing is run again.

        Raises:
            UserError: there is no such reference.
        """
        others = self.without(number)
        own = self.models[number]
        if len(others):
            # Each was compared with the earlier ones only when it was added.
            seen = {"forget": own.forget, "quantized": own.quantized}
            samples = own.samples["forget"]
            fresh = {
                name: replace(part, tv=distances_of(part.store, self.adapter, samples, others.stores()))
                for name, part in seen.items()
                if part is not None and part.store is not None
            }
            own = replace(own, forget=fresh["forget"], quantized=fresh.get("quantized"))
        return compare(own, others, original, self.options, self.seed)


def evaluate(
    model: nn.Module,
    adapter: Adapter,
    dataset: Dataset,
    *,
    references: References | None = None,
    original: Start = None,
    options: EvaluateOptions | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure one model and compare it with the references and the original.

    Args:
        references: retrained models, measured on the same dataset. Without them everything relative is skipped. For
            a reference itself see :meth:`References.evaluation`, or give :meth:`References.without`.
        original: the evaluation of the original, or its :meth:`Evaluation.summary` as read from disk; "self" if
            ``model`` is the original.
        options: the references' own when they are given.
        seed: of the bootstrap draws. Everything else is deterministic: relearning shows every model the same samples.

    Returns:
        Metrics ``prob|loss|accuracy.ROLE``, ``extraction_strength.forget``, ``rouge_l.ROLE``, ``truth_ratio.ROLE``,
        ``forget_quality.{ks_distance,ks_bound,p_value}``, ``model_utility``, ``perplexity.{retain,utility}``,
        ``kfr``, ``kfr_fluent``, ``krr``, ``ls``, ``privleak``, ``mia.{loss,zlib,min_k,min_k_plus}.{auc,gap}``,
        for classifiers ``u_mia``, ``mia_efficacy.{forget,attack,gap}``, ``tow``, ``tow_mia``, ``average_gap``,
        ``zrf.{forget,gap}`` and ``face_centroid.{forget,retain,holdout,gap.ROLE}``, for text with images
        ``modality.{image,text}.{forget,retain,closed}`` and CLEAR's scores (:mod:`expunge.bench.clear`),
        ``tv.{forget,floor,gap_closed}``, ``retain_ratio``, ``relearn.{loss,prob,loss_ratio}``,
        ``quantB.{prob.forget,loss.forget,tv.forget,mia.loss.auc,mia.loss.gap,retain_ratio}`` and ``verdict.NAME``,
        as far as modality, roles and probes allow; the reasons for what is missing stand in ``skipped``.

    Raises:
        UserError: an option is out of range, or the references were measured on other samples.
    """
    if options is None:
        options = references.options if references is not None else EvaluateOptions()
    options = options.resolved()
    stores = references.stores() if references is not None else []
    measured = take(model, adapter, dataset, options, stores, progress)
    return compare(measured, references, original, options, seed)


def compare(
    measured: Measured, references: References | None, original: Start, options: EvaluateOptions, seed: int
) -> Evaluation:
    """The metrics and rows of a model that was measured against the distributions of these references.

    Raises:
        UserError: the references were measured on other samples.
    """
    others = [r.on_samples_of(measured) for r in references.models] if references is not None else []
    pairs = references.pairs if references is not None else []
    if isinstance(original, Evaluation):
        first: Original | None = Original.of(original.measured)
    elif isinstance(original, Mapping):
        first = Original(original["loss"], original["tv"])
    else:
        first = Original.of(measured) if original == "self" else None
    desk = Desk(measured, others, pairs, first, options.resolved(), seed)
    rows = assess(desk)
    return Evaluation(desk.metrics, rows, desk.skipped, measured.without_store())
