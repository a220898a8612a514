"""The schema of ``audit.json`` and of a line of ``drill.jsonl``: typed models, version check, tolerant reading.

``audit.json`` holds what an audit says of the whole model, ``drill.jsonl`` one line per forget sample. Readers take
what is there and know no field they would miss; they are strict about the version and about types.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from expunge.errors import UserError
from expunge.report.samples import VERDICTS
from expunge.report.schema import Measure, Measured, Number, OpenModel

AUDIT_SCHEMA = "expunge.audit/1"
DRILL_LIMIT = 500  # samples in the page, worst first: 2-5 MB; every sample stays in drill.jsonl
AUDIT_FILE, DRILL_FILE = "audit.json", "drill.jsonl"

Axis = Literal["effectiveness", "privacy", "robustness", "utility"]
AXES: tuple[Axis, ...] = ("effectiveness", "privacy", "robustness", "utility")


def _by_model(value: Any) -> Any:
    """Rates at one false-positive rate: by checkpoint, or a bare estimate, which is the audited model's."""
    return {"": value} if isinstance(value, dict) and "value" in value else value


class CheckpointInfo(OpenModel):
    name: str
    kind: str
    path: str | None = None


class ScoreRow(OpenModel):
    """One score of one attack on every checkpoint.

    ``gap`` is signed: audited model minus the mean of the references (positive: more is left, or more exposed).
    ``p_adjusted`` is the p-value of "like the reference", corrected for all tests of the audit.
    """

    attack: str
    score: str
    family: str = ""
    tier: str = ""
    access: str = ""
    statistic: str = "auc"
    axis: str = ""
    models: dict[str, Measured] = Field(default_factory=dict)
    gap: Measured | None = None
    p: Number = None
    p_adjusted: Number = None
    verdict: str = "no reference"
    tpr: dict[str, Annotated[dict[str, Measured], BeforeValidator(_by_model)]] | None = None


class AxisVerdict(OpenModel):
    axis: Axis
    verdict: Literal["passed", "failed", "not shown"] = "not shown"
    sentence: str = ""
    worst: ScoreRow | None = None
    tests: int = 0


class Completeness(OpenModel):
    form: str = "text"
    level: Number = None
    fdr: Number = None
    shadows: int = 0
    calibration: Any = None
    counts: dict[str, int] = Field(default_factory=dict)
    n: int = 0
    smallest_p: Number = None
    auditable: int | None = None
    notes: list[str] = Field(default_factory=list)


class AttackedView(OpenModel):
    """One view of :class:`UnderAttack`: as served, rounded, best prompt, relearnt."""

    counts: dict[str, int] = Field(default_factory=dict)
    auditable: int = 0


class UnderAttack(OpenModel):
    """Completeness in the worst of several views."""

    views: dict[str, AttackedView] = Field(default_factory=dict)
    counts: dict[str, int] = Field(default_factory=dict)
    auditable: int = 0
    n: int = 0


class SubjectRow(OpenModel):
    subject: str
    n: int = 0
    completeness: Measured | None = None
    p_under: Number = None
    verdict: str | None = None
    dataset_inference_p: Number = None


class Fitness(OpenModel):
    """Whether the split can be audited: the AUC of a baseline that sees the texts but no model."""

    blind_auc: Measured | None = None
    unfit: bool = False
    sentence: str = ""


class Audit(OpenModel):
    """The whole of ``audit.json``."""

    schema_version: Literal["expunge.audit/1"] = Field(alias="schema")
    suite: str = ""
    checkpoints: list[CheckpointInfo] = Field(default_factory=list)
    samples: dict[str, int] = Field(default_factory=dict)
    vector: list[AxisVerdict] = Field(default_factory=list)
    scores: list[ScoreRow] = Field(default_factory=list)
    completeness: Completeness | None = None
    under_attack: UnderAttack | None = None
    subjects: list[SubjectRow] = Field(default_factory=list)
    fitness: Fitness | None = None
    figures: dict[str, dict[str, Measured]] = Field(default_factory=dict)
    skipped: dict[str, str] = Field(default_factory=dict)
    failed: dict[str, str] = Field(default_factory=dict)
    cost: dict[str, Number] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


class Neighbour(OpenModel):
    id: str
    target: str = ""
    similarity: Number = None
    loss_audited: Number = None
    loss_reference: Number = None


class Tokens(OpenModel):
    """Target tokens of one sample with their log-probabilities in nats."""

    text: list[str] = Field(default_factory=list)
    audited: list[Number] = Field(default_factory=list)
    original: list[Number] | None = None
    reference: list[Number] | None = None


class SampleScore(OpenModel):
    """``low`` and ``high``: the range over references and shadows."""

    audited: Number = None
    original: Number = None
    reference: Number = None
    low: Number = None
    high: Number = None


class Drill(OpenModel):
    """One line of ``drill.jsonl``: everything that an audit knows of one forget sample."""

    id: str
    subject: str = ""
    prompt: str | None = ""
    target: str = ""
    verdict: str | None = None
    completeness: Number = None
    completeness_attacked: Number = None
    view: str | None = None
    score: Number = None
    position: Number = None
    p_under: Number = None
    p_over: Number = None
    losses: dict[str, Number] = Field(default_factory=dict)
    tokens: Tokens | None = None
    scores: dict[str, SampleScore] = Field(default_factory=dict)
    answers: dict[str, str | None] = Field(default_factory=dict)
    neighbours: list[Neighbour] = Field(default_factory=list)
    details: dict[str, Any] = Field(default_factory=dict)

    @property
    def rank(self) -> tuple[int, float, float]:
        """Worst first: under-unlearned by their p-value, then over-unlearned, then by how much is left."""
        order = VERDICTS[0], VERDICTS[2], VERDICTS[1]
        place = order.index(self.verdict) if self.verdict in order else len(order)
        p = self.p_over if self.verdict == "over-unlearned" else self.p_under
        return place, 1.0 if p is None else p, -(self.position or 0.0)


@dataclass(frozen=True, slots=True)
class Point:
    """What the figures need of a sample.

    ``gap``: mean loss of references and shadows, which never saw it, minus the original's, nats per token.
    """

    verdict: str | None
    position: float | None
    gap: float | None
    completeness: float | None
    p_under: float | None
    p_over: float | None


@dataclass
class DrillRecord:
    """The readable lines of ``drill.jsonl``: ``worst`` whole, worst first; ``points`` of all in the file's order."""

    worst: list[Drill] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    damaged: int = 0

    @property
    def total(self) -> int:
        return len(self.points)

    @property
    def counts(self) -> Counter[str]:
        return Counter(point.verdict or "not judged" for point in self.points)


def audit_schema() -> dict[str, Any]:
    """JSON schemas (draft 2020-12) of ``audit.json`` and of a line of ``drill.jsonl``, by file name."""
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {
        AUDIT_FILE: {"$schema": draft, "$id": AUDIT_SCHEMA, **Audit.model_json_schema(by_alias=True)},
        DRILL_FILE: {"$schema": draft, "$id": "expunge.drill/1", **Drill.model_json_schema(by_alias=True)},
    }


def load_audit(folder: Path) -> Audit | None:
    """``audit.json`` of a run folder; None when there is none.

    Raises:
        UserError: it is not JSON, is of another schema version, or has a field of the wrong type (the first is named).
    """
    path = Path(folder) / AUDIT_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"'{path}' is not JSON ({error}): the audit did not end, or the file was edited.") from error
    version = content.get("schema") if isinstance(content, dict) else None
    if version != AUDIT_SCHEMA:
        raise UserError(
            f"'{path}' has schema {version!r}, and this version of Expunge reads '{AUDIT_SCHEMA}': audit again with "
            "this version."
        )
    try:
        return Audit.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"'{path}': field '{place}' is wrong ({first['msg']}); see the published schema.") from error


def load_drill(folder: Path, audit: Audit, limit: int = DRILL_LIMIT) -> DrillRecord:
    """Read ``drill.jsonl`` line by line and keep the ``limit`` worst; lines that do not fit are counted."""
    path, record = Path(folder) / DRILL_FILE, DrillRecord()
    if not path.is_file():
        return record
    kinds = {checkpoint.name: checkpoint.kind for checkpoint in audit.checkpoints}
    heap: list[tuple[tuple[int, float, float], int, Drill]] = []  # the worst is the smallest, the heap's root the best
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                drill = Drill.model_validate(json.loads(line))
            except (ValidationError, json.JSONDecodeError):
                record.damaged += 1
                continue
            record.points.append(_point(drill, kinds))
            place, p, left = drill.rank
            entry = ((-place, -p, -left), -number, drill)
            if len(heap) < limit:
                heapq.heappush(heap, entry)
            elif entry[:2] > heap[0][:2]:
                heapq.heapreplace(heap, entry)
    record.worst = [drill for *_, drill in sorted(heap, key=lambda entry: entry[:2], reverse=True)]
    return record


def _point(drill: Drill, kinds: dict[str, str]) -> Point:
    def mean(*wanted: str) -> float | None:
        found = [loss for name, loss in drill.losses.items() if kinds.get(name) in wanted and loss is not None]
        return sum(found) / len(found) if found else None

    original, unseen = mean("original"), mean("reference", "shadow")
    gap = None if original is None or unseen is None else unseen - original
    return Point(drill.verdict, drill.position, gap, drill.completeness, drill.p_under, drill.p_over)


def of_kind(models: dict[str, Measure], audit: Audit, kind: str) -> list[tuple[str, Measure]]:
    """Measured values on the checkpoints of one kind, in the audit's order."""
    names = [checkpoint.name for checkpoint in audit.checkpoints if checkpoint.kind == kind]
    return [(name, models[name]) for name in names if name in models and models[name].value is not None]
