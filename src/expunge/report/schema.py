"""The schema of ``results.json``: typed models, the version check, and the published JSON schema.

Readers are tolerant of what is absent (metrics, studies, references, costs) and of fields they do not know;
they are strict about the version and about types.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from expunge.errors import UserError

SCHEMA = "expunge.results/1"
Kind = Literal["original", "reference", "base", "identity", "random-edit", "method"]
Study = Literal["main", "matched", "sequential", "size"]
CONTROLS: frozenset[str] = frozenset({"identity", "random-edit"})
ANCHORS: tuple[str, ...] = ("reference", "original", "base")


def _finite(value: Any) -> Any:
    """NaN and infinities are written by some tools for 'could not be computed': they are read as missing."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class OpenModel(BaseModel):
    model_config = ConfigDict(extra="allow", populate_by_name=True, protected_namespaces=())


class Measure(OpenModel):
    """One number with its evidence: ``low`` and ``high`` bound the interval, ``n`` counts samples."""

    value: Number = None
    low: Number = None
    high: Number = None
    n: int | None = None
    seeds: int | list[int] | None = None
    definition: str | None = None

    @property
    def seed_count(self) -> int | None:
        return len(self.seeds) if isinstance(self.seeds, list) else self.seeds


def _measure(value: Any) -> Any:
    """A bare number is a measure without evidence."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return {"value": value}
    return value


Measured = Annotated[Measure, BeforeValidator(_measure)]


class Row(OpenModel):
    """One model that was measured: a method at one seed, or an anchor (original, reference, base)."""

    model: str
    method: str
    kind: Kind = "method"
    study: Study = "main"
    position: int | None = None
    seed: int | None = None
    metrics: dict[str, Measured] = Field(default_factory=dict)
    cost: dict[str, Measured] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    properties: dict[str, Any] = Field(default_factory=dict)


class Summary(OpenModel):
    """A method over its seeds, at one position of one study."""

    method: str
    kind: Kind = "method"
    study: Study = "main"
    position: int | None = None
    metrics: dict[str, Measured] = Field(default_factory=dict)
    cost: dict[str, Measured] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)


class CurveStep(OpenModel):
    step: int
    forget_loss: Number = None
    retain_loss: Number = None


class Curve(OpenModel):
    model: str
    steps: list[CurveStep] = Field(default_factory=list)


class DatasetInfo(OpenModel):
    name: str = ""
    source: str = ""
    digest: str = ""
    samples: dict[str, int] = Field(default_factory=dict)
    modality: str = ""


class ModelInfo(OpenModel):
    name: str = ""
    parameters: int | None = None


class Results(OpenModel):
    """The whole of ``results.json``."""

    schema_version: Literal["expunge.results/1"] = Field(alias="schema")
    title: str = ""
    created: str = ""
    command: str | list[str] = ""
    dataset: DatasetInfo = Field(default_factory=DatasetInfo)
    model: ModelInfo = Field(default_factory=ModelInfo)
    seeds: list[int] = Field(default_factory=list)
    references: int = 0
    rows: list[Row] = Field(default_factory=list)
    summary: list[Summary] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)


def results_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of ``results.json``, under the names that stand in the file."""
    schema = Results.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA, **schema}


def parse_results(content: Any, where: str = "results.json") -> Results:
    """Check the version first, then the types.

    Raises:
        UserError: not an object, another schema version, or a field of the wrong type (the first is named).
    """
    if not isinstance(content, dict):
        raise UserError(f"{where} holds a {type(content).__name__}, not one JSON object: give the folder of a run.")
    version = content.get("schema")
    if isinstance(version, str) and not version.startswith("expunge.results/"):
        raise UserError(
            f"{where} is {version!r}, which holds no measurements: give the folder of a run that was measured."
        )
    if version != SCHEMA:
        raise UserError(
            f"{where} has schema {version!r}, and this version of Expunge reads '{SCHEMA}': "
            "write the results again with this version, or read them with the one that wrote them."
        )
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: field '{place}' is wrong ({first['msg']}); see the published schema.") from error


def load_results(folder: Path) -> Results:
    """Read and check ``results.json`` of a run folder (or the file itself).

    Raises:
        UserError: there is no such file, it is not JSON, or it does not follow the schema.
    """
    folder = Path(folder)
    path = folder if folder.is_file() else folder / "results.json"
    if not path.is_file():
        raise UserError(f"'{path}' does not exist: give the folder of a run that has been measured.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"'{path}' is not JSON ({error}): the run did not end, or the file was edited.") from error
    return parse_results(content, str(path))
