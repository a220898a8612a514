"""Sections of evidence: what the tools that make evidence hand to the claims, as frozen, strictly read records.

``evidence.json`` of a run folder holds any of them under the names of :class:`Sections`; each is optional, none holds
a text, an id or a name. A field never changes its meaning: new meaning, new name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from expunge.certify.provenance import Clearance
from expunge.errors import UserError
from expunge.files import write_json

EVIDENCE = "evidence.json"
SCHEMA = "expunge.evidence/1"
REMAINDER = 0.1  # largest share of the direct KL by which the quadratic form may miss it
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Unit = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@+/=-]{0,99}$", description="of a metric or attack")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Removal(Section):
    """What was taken out of a zone, or left out of an exact retraining, and what that was compared with.

    ``requested`` and ``removed`` are commitments (salted digests under one salt) of records. ``rebuilt``: digest of the
    zone built, or of the model replayed, from the records that stay alone. ``statistics``: what the public artefacts
    were fitted on. ``rows``: "alone" when every row was found equal to extracting its record alone.
    """

    requested: tuple[Digest, ...]
    removed: tuple[Digest, ...]
    before: Digest
    after: Digest
    rebuilt: Digest | None = None
    base_before: Digest | None = None
    base_after: Digest | None = None
    statistics: Literal["public", "private", "unknown"] = "unknown"
    rows: Literal["alone", "batched", "unknown"] = "unknown"
    deterministic: bool = Field(default=True, description="no kernel that gives other bits when run again")


class DuplicateSearch(Section):
    """Counts of :class:`expunge.data.duplicates.Duplicates`: ``open`` pairs are those that nobody has decided about."""

    searched: Count
    kept: Count
    pairs: Count
    open: Count
    kinds: Mapping[Name, Count] = {}
    threshold: Unit = 0.5


class Released(Section):
    """Evidence about one release; ``artefact``: the digest of its zone or model, without which it proves nothing."""

    artefact: Digest | None = None


class Replayed(Released):
    """A release whose whole computation can be repeated; ``replayed``: the digest of the model that this gave.

    ``certify --collect`` repeats it. What another tool wrote here without that is read, and supports no claim.
    """

    replayed: Digest | None = None


class Residual(Released):
    """A strongly convex zone: gradient norms of the candidate and the reference, and the noise put on the weights.

    ``tolerance`` and ``reference_tolerance`` were fixed beforehand, the residuals are measured over all records, and
    ``rounding`` bounds the error of these measurements.
    """

    residual: NotNegative
    reference_residual: NotNegative
    tolerance: Positive
    reference_tolerance: Positive
    rounding: NotNegative = 0.0
    strong_convexity: Positive
    noise: NotNegative
    logit_noise: NotNegative | None = None
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    dtype: Literal["float64", "float32"] = "float64"
    earlier_mu: tuple[NotNegative, ...] = Field(default=(), description="of the releases before this one")


class Reset(Replayed):
    """Certified reset by clipping and noise (Koloskova et al. 2025): from a ball, ``steps`` noisy steps on retain data.

    ``decay`` = 1 − learning rate × weight decay.
    """

    radius: Positive
    clip: NotNegative
    learning_rate: Positive
    decay: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1)]
    noise: Positive
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    earlier_mu: tuple[NotNegative, ...] = ()


class PrivateTraining(Replayed):
    """A model trained with Gaussian privacy ``mu`` for one record; ``group`` records are to be forgotten.

    ``hides``: the size of group that the training promised to hide; None: not said.
    """

    mu: Positive
    group: Annotated[int, Field(ge=1)]
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    clipped: bool = Field(description="per-record gradients were clipped in every step")
    hides: Annotated[int, Field(ge=1)] | None = None


class Plan(Section):
    """Margins by statistic, and when they were fixed: before the runs, or they prove nothing."""

    fixed: datetime
    margins: Mapping[Name, Positive] = Field(min_length=1)


class Arms(Section):
    """One statistic over runs: a number per seed of the unlearned and of the retrained models."""

    unlearned: tuple[float, ...]
    retrained: tuple[float, ...]


class Equivalence(Section):
    plan: Plan
    started: datetime = Field(description="when the first of the runs began")
    arms: Mapping[Name, Arms] = Field(min_length=1)


class Distance(Section):
    """Divergence in [0, 1] to the retrained model(s): one mean per subject; ``floor``: between two retrained models."""

    name: Name = "tv.forget"
    subjects: tuple[Unit, ...] = Field(min_length=1)
    floor: Unit | None = Field(default=None, description="the same between retrained models; None: not measured")


def explains(quadratic: float, direct: float) -> bool:
    """Whether the second order gives the direct KL to :data:`REMAINDER` of it: the change is then a small one."""
    return abs(direct - quadratic) <= REMAINDER * direct


class Change(Section):
    """Collateral change of the named role, nats per token: :meth:`expunge.certify.fisher.Collateral.section`."""

    role: Literal["retain", "utility"]
    quadratic: NotNegative
    direct: NotNegative
    high: NotNegative = Field(description="upper end of the 95 % interval of the direct one")
    n: Count


class Guesses(Section):
    """One-run audit: canaries put in by fair coins, trained on, asked to be deleted; guesses on what came out."""

    canaries: Annotated[int, Field(ge=1)]
    guesses: Annotated[int, Field(ge=1)]
    right: Count
    delta: Annotated[float, Field(ge=0, lt=1)] = 1e-5
    coins: bool = Field(description="every canary was put in by a fair coin of its own")

    @model_validator(mode="after")
    def _possible(self) -> Guesses:
        if not self.right <= self.guesses <= self.canaries:
            raise ValueError("right <= guesses <= canaries does not hold")
        return self


class Trials(Section):
    """A membership attack on independently trained runs: how often it called each world, at the best threshold.

    ``thresholds``: among how many thresholds and attacks it was picked.
    """

    true_positives: Count
    positives: Annotated[int, Field(ge=1)]
    false_positives: Count
    negatives: Annotated[int, Field(ge=1)]
    thresholds: Annotated[int, Field(ge=1)] = 1
    delta: Annotated[float, Field(ge=0, lt=1)] = 1e-5

    @model_validator(mode="after")
    def _possible(self) -> Trials:
        if self.true_positives > self.positives or self.false_positives > self.negatives:
            raise ValueError("more calls than runs")
        return self


class Sections(Section):
    """Everything that ``evidence.json`` may hold."""

    removal: Removal | None = None
    provenance: Clearance | None = None
    duplicates: DuplicateSearch | None = None
    residual: Residual | None = None
    reset: Reset | None = None
    private_training: PrivateTraining | None = None
    equivalence: Equivalence | None = None
    distance: Distance | None = None
    change: Change | None = None
    guesses: Guesses | None = None
    trials: Trials | None = None


def read_sections(folder: Path) -> Sections:
    """The sections of ``evidence.json`` in a run folder; empty when there is none.

    Raises:
        UserError: no JSON, another schema, an unknown section or a wrong field (the first is named).
    """
    path = Path(folder) / EVIDENCE
    if not path.is_file():
        return Sections()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content.pop("schema")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"'{path}' is no evidence file: write it again with the tool that made the evidence."
        ) from error
    if schema != SCHEMA:
        raise UserError(f"'{path}' has schema {schema!r}, and this version reads '{SCHEMA}': make the evidence again.")
    return sections_of(content, str(path))


def sections_of(content: Mapping[str, Any], where: str) -> Sections:
    """Raises UserError for an unknown section or a wrong field; the first is named."""
    try:
        return Sections.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"'{where}': field '{place}' is wrong ({first['msg']}); see docs/claims.md.") from error


def add_section(folder: Path, **found: Section | Clearance) -> Path:
    """Put sections into ``evidence.json`` of a run folder, beside those that are there."""
    old = read_sections(folder).model_dump(mode="json", exclude_none=True)
    new = {name: section.model_dump(mode="json") for name, section in found.items()}
    both = sections_of(old | new, str(Path(folder) / EVIDENCE))
    return write_json(Path(folder) / EVIDENCE, {"schema": SCHEMA, **both.model_dump(mode="json", exclude_none=True)})
