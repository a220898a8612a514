"""Evidence: everything that a run folder can bring forward for a claim, read tolerantly and held immutably.

Nothing here judges. What is absent stays None or empty, and the claims say what they lack.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from expunge.certify.sections import Arms, Distance, Sections, read_sections
from expunge.errors import UserError
from expunge.files import read_jsonl

Kind = Literal["zone", "retrain", "private", "reset", "edit", "unknown"]
METHODS: dict[str, Kind] = {"retrain": "retrain", "reset": "reset", "private": "private"}
KEPT = "kept"  # the audit's own rows: log-probability of what must stay
STAYING = ("model_utility", "prob.retain", "prob.utility")
VERDICTS = ("under-unlearned", "adequate", "over-unlearned")


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its 95 % interval; nan where there is none."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    @classmethod
    def of(cls, record: Any) -> Interval:
        if not isinstance(record, Mapping):
            return cls(_float(record))
        value, low, high = (_float(record.get(k)) for k in ("value", "low", "high"))
        return cls(value, low, high, int(record.get("n") or 0))


@dataclass(frozen=True, slots=True)
class Score:
    """One row of an audit's table: a score under the audited model and its references."""

    attack: str
    name: str
    axis: str
    statistic: str
    audited: Interval
    references: tuple[Interval, ...]
    original: Interval | None
    gap: Interval
    verdict: str


@dataclass(frozen=True, slots=True)
class Staying:
    """How well the model still does what it must: larger is better. ``unit``: "nats" of log-probability, or "share"."""

    name: str
    unit: Literal["nats", "share"]
    audited: Interval
    references: tuple[Interval, ...]
    original: Interval | None


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Of the auditable forget samples, each at the error rate ``fdr``."""

    under: int = 0
    adequate: int = 0
    over: int = 0
    fdr: float = 0.05

    @property
    def n(self) -> int:
        return self.under + self.adequate + self.over


@dataclass(frozen=True, slots=True)
class Losses:
    """Medians over the forget samples, nats per token: of the model, the original, and each that never saw them.

    ``moved``: median of |loss − the original's| sample by sample.
    """

    own: float
    original: float
    moved: float
    never: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What there is to claim from.

    ``kind``: how the model came about. ``before``, ``after``: digests of the model. ``zone_digest``: of its zone, as
    the model folder itself says. ``scores``: the audit's attacks, without the kept rows.
    """

    kind: Kind = "unknown"
    method: str = ""
    removes_from_weights: bool | None = None
    finished: bool = True
    before: str = ""
    after: str = ""
    zone_digest: str | None = None
    parameters_changed: int | None = None
    sections: Sections = field(default_factory=Sections)
    scores: tuple[Score, ...] = ()
    staying: tuple[Staying, ...] = ()
    verdicts: Verdicts | None = None
    losses: Losses | None = None
    references: int = 0
    split_unfit: bool = False

    @classmethod
    def of_run(cls, folder: Path | str) -> Evidence:
        """From ``run.json``, ``run.yaml``, ``results.json``, ``audit.json``, ``samples.jsonl``, ``drill.jsonl`` and
        ``evidence.json`` of a run of ``unlearn`` or ``audit``; each of them may be missing.

        Raises:
            UserError: no such folder, or a file in it that is damaged.
        """
        place = Path(folder)
        if not place.is_dir():
            raise UserError(f"'{folder}' is no folder: give the --out folder of a run.")
        run, audit, results = (_object(place / n) for n in ("run.json", "audit.json", "results.json"))
        digests = run.get("digests") or {}
        audited = run.get("command") == "audit"
        after = str(digests.get("model" if audited else "output.model", ""))
        made_in = _maker(place, after) if audited else place
        made = _object(made_in / "run.json") if made_in is not None else {}
        before = str((digests if audited else {}).get("original") or (made.get("digests") or {}).get("model", ""))
        row = _row(results, "method")
        own_row = row if not audited or made_in is None else _row(_object(made_in / "results.json"), "method")
        options = _options(made_in) if made_in is not None else {}
        method = str(options.get("method") or own_row.get("method") or "")
        if made.get("command") == "train":  # an original: only a private one has anything to claim
            method, before = ("private", digests.get("original") or after) if options.get("private") else ("", "")
        sections = read_sections(place)
        samples = list(_lines(place / "samples.jsonl"))
        scores, kept = _scores(audit)
        drill = list(_lines(place / "drill.jsonl"))
        return cls(
            kind=_kind(method, sections),
            method=method.rpartition(".py:")[2] if ".py:" in method else method,
            removes_from_weights=(own_row.get("properties") or {}).get("removes_from_weights"),
            finished=run.get("status", "done") == "done" and made.get("status", "done") == "done",
            before=before,
            after=after,
            zone_digest=_object((_audited(place) if audited else place / "model") / "zone.json").get("digest"),
            parameters_changed=made.get("parameters_changed"),
            sections=_with_distance(sections, samples, row, _references(results)),
            scores=scores,
            staying=kept or _staying(results, row),
            verdicts=_verdicts(audit, samples, row),
            losses=_losses(drill, _of_method(samples, row), audit.get("checkpoints", [])),
            references=len([c for c in audit.get("checkpoints", []) if c.get("kind") == "reference"])
            or len(_references(results)),
            split_unfit=bool((audit.get("fitness") or {}).get("unfit")),
        )


# -- files -----------------------------------------------------------------------------------------------------------


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{path}' is not JSON: run its command again.") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' holds no JSON object: run its command again.")
    return content


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        try:
            yield from (row for row in read_jsonl(path) if isinstance(row, dict))
        except ValueError as error:
            raise UserError(f"'{path}' has a line that is not JSON: run its command again.") from error


def _options(folder: Path) -> dict[str, Any]:
    try:
        options = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["options"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return {}
    return dict(options) if isinstance(options, dict) else {}


def _audited(audit: Path) -> Path:
    return Path(str(_options(audit).get("model") or audit / "model")).expanduser().resolve()


def _maker(audit: Path, digest: str) -> Path | None:
    """The run that wrote the audited model, when it stands around it and says that it wrote these very files."""
    folder = _audited(audit).parent
    if not (folder / "run.json").is_file():
        return None
    return folder if (_object(folder / "run.json").get("digests") or {}).get("output.model") == digest else None


def _kind(method: str, sections: Sections) -> Kind:
    if not method:
        return "unknown"
    if method.startswith("zone"):
        return "zone"
    return METHODS.get(method, "edit")


# -- figures -----------------------------------------------------------------------------------------------------------


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _row(results: Mapping[str, Any], kind: str) -> dict[str, Any]:
    rows = [r for r in results.get("rows", []) if r.get("kind") == kind and r.get("study", "main") == "main"]
    return dict(rows[0]) if rows else {}


def _references(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [r for r in results.get("rows", []) if r.get("kind") == "reference" and "failed" not in r]


def arms_of_study(results: Mapping[str, Any], method: str, names: Iterable[str]) -> dict[str, Arms]:
    """Values per seed of some metrics, of a method's runs and of the retrained models, from a study's results.json.

    Raises:
        UserError: a metric that a run of either arm lacks, since dropping runs would choose among them.
    """
    rows = [r for r in results.get("rows", []) if r.get("study", "main") == "main"]
    found = {}
    for name in names:
        sides: dict[str, tuple[float, ...]] = {}
        for side, wanted in (("unlearned", "method"), ("retrained", "reference")):
            own = [r for r in rows if r.get("kind") == wanted and (wanted == "reference" or r.get("method") == method)]
            sides[side] = tuple(Interval.of((r.get("metrics") or {}).get(name)).value for r in own)
            if not own or not all(map(math.isfinite, sides[side])):
                raise UserError(
                    f"metric '{name}' is missing in {side} runs of '{method}': an arm needs all of its runs."
                )
        found[name] = Arms(**sides)
    return found


def _scores(audit: Mapping[str, Any]) -> tuple[tuple[Score, ...], tuple[Staying, ...]]:
    kinds = {c.get("name"): c.get("kind") for c in audit.get("checkpoints", [])}
    scores, kept = [], []
    for row in audit.get("scores", []):
        by_kind: dict[str, list[Interval]] = {}
        for name, record in (row.get("models") or {}).items():
            by_kind.setdefault(str(kinds.get(name)), []).append(Interval.of(record))
        own = (by_kind.get("audited") or [Interval()])[0]
        first = next(iter(by_kind.get("original", [])), None)
        theirs = tuple(by_kind.get("reference", []))
        if row.get("attack") == KEPT:
            kept.append(Staying(str(row.get("score")), "nats", own, theirs, first))
            continue
        gap = Interval.of(row.get("gap"))
        attack, name, axis, statistic, verdict = (
            str(row.get(k, "")) for k in ("attack", "score", "axis", "statistic", "verdict")
        )
        scores.append(Score(attack, name, axis, statistic, own, theirs, first, gap, verdict))
    return tuple(scores), tuple(kept)


def _staying(results: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[Staying, ...]:
    """Without an audit: the shares in results.json of which every row of the run has one."""
    own, first = row.get("metrics") or {}, (_row(results, "original").get("metrics") or {})
    theirs = [r.get("metrics") or {} for r in _references(results)]
    return tuple(
        Staying(
            name,
            "share",
            Interval.of(own[name]),
            tuple(Interval.of(m[name]) for m in theirs if name in m),
            Interval.of(first[name]) if name in first else None,
        )
        for name in STAYING
        if name in own and (name in first or any(name in m for m in theirs))
    )


def _verdicts(audit: Mapping[str, Any], samples: list[dict[str, Any]], row: Mapping[str, Any]) -> Verdicts | None:
    """The audit's calibrated ones; without an audit the run's own."""
    calibrated = audit.get("completeness")
    if calibrated:
        counts = calibrated.get("counts") or {}
        under, adequate, over = (int(counts.get(v, 0)) for v in VERDICTS)
        return Verdicts(under, adequate, over, float(calibrated.get("fdr") or 0.05))
    given = [s.get("verdict") for s in _of_method(samples, row)]
    if not any(v in VERDICTS for v in given):
        return None
    under, adequate, over = (sum(g == v for g in given) for v in VERDICTS)
    return Verdicts(under, adequate, over)


def _of_method(samples: list[dict[str, Any]], row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Forget samples under the unlearned model: rows of the method, whatever the model is called there."""
    same = ("method", "seed")
    return [s for s in samples if s.get("role") == "forget" and all(s.get(k) == row.get(k) for k in same)]


def _losses(
    drill: list[dict[str, Any]], samples: list[dict[str, Any]], checkpoints: list[dict[str, Any]]
) -> Losses | None:
    """From the lines of an audit; without one from the forget samples of the run itself."""
    kinds = {str(c.get("name")): str(c.get("kind")) for c in checkpoints}
    by_model: dict[str, list[float]] = {}
    for line in drill:
        for name, value in (line.get("losses") or {}).items():
            by_model.setdefault(str(name), []).append(_float(value))
    for sample in samples if not drill else []:
        for name, key in (("audited", "loss"), ("original", "original_loss"), ("reference", "reference_loss")):
            by_model.setdefault(name, []).append(_float(sample.get(key)))
    if not drill:
        kinds = {name: name for name in by_model}

    def of(*wanted: str) -> list[list[float]]:
        return [losses for name, losses in by_model.items() if kinds.get(name, name) in wanted]

    own, first = (next(iter(of(kind)), []) for kind in ("audited", "original"))
    if not own or not first or len(own) != len(first):
        return None
    moved = _median([abs(a - b) for a, b in zip(own, first, strict=True)])
    audited, original = _median(own), _median(first)
    if moved is None or audited is None or original is None:
        return None
    never = (_median(losses) for losses in of("reference", "shadow"))
    return Losses(audited, original, moved, tuple(m for m in never if m is not None))


def _median(values: list[float]) -> float | None:
    finite = [v for v in values if math.isfinite(v)]
    return statistics.median(finite) if finite else None


def _with_distance(
    sections: Sections, samples: list[dict[str, Any]], row: Mapping[str, Any], references: list[dict[str, Any]]
) -> Sections:
    """Total variation to the references from the samples of the run, where no tool brought a distance itself."""
    if sections.distance is not None or not references:
        return sections
    by_subject: dict[str, list[float]] = {}
    for sample in _of_method(samples, row):
        if math.isfinite(value := _float(sample.get("tv"))):
            by_subject.setdefault(str(sample.get("subject")), []).append(value)
    if not by_subject:
        return sections
    floor = Interval.of((row.get("metrics") or {}).get("tv.floor")).value
    means = tuple(min(1.0, max(0.0, statistics.fmean(v))) for v in by_subject.values())
    found = Distance(name="tv.forget", subjects=means, floor=floor if math.isfinite(floor) else None)
    return sections.model_copy(update={"distance": found})
