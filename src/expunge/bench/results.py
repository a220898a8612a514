"""Rows on disk, and the whole of results.json and samples.jsonl made from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from expunge.bench.evaluate import Evaluation
from expunge.bench.populations import population_metrics
from expunge.bench.prepare import Workshop
from expunge.data.samples import ROLES, Dataset
from expunge.methods.registry import Method, Outcome
from expunge.metrics.ranges import cut, possible
from expunge.models.adapter import Adapter, evaluating, num_parameters
from expunge.record import now
from expunge.runs import Run
from expunge.stats import bootstrap_mean, seed_interval

if TYPE_CHECKING:
    from expunge.bench.plan import StudyOptions

STUDIES = ("main", "matched", "sequential", "size")
CURVE_POINTS = 120
SCHEMA = "expunge.results/1"
KINDS = ("base", "original", "reference", "identity", "random-edit", "method")


def row_file(key: str) -> str:
    """Where a row is kept, relative to the run folder."""
    from expunge.bench.study import slug

    return f"rows/{slug(key)}.json"


def read_row(run: Run, key: str) -> dict[str, Any]:
    content: dict[str, Any] = run.read_json(row_file(key))
    return content


def write_row(run: Run, key: str, content: dict[str, Any]) -> dict[str, Any]:
    whole = {"key": key, "study": key.split("/", 1)[0], **content}
    run.write_json(row_file(key), whole)
    run.event("row", key=key, failed="failed" in content)
    return read_row(run, key)


def properties(method: Method, outcome: Outcome | None = None) -> dict[str, Any]:
    """Declared properties, shown beside every score; what is known of this very run counts, too."""
    return {
        "needs": sorted(method.needs),
        "wants": sorted(method.wants),
        "removes_from_weights": method.removes_from_weights and (outcome is None or outcome.removes_from_weights),
        "helpers_hold_data": method.helpers_hold_data,
        "sequential": method.sequential,
        "changes": method.changes,
        "modalities": sorted(method.modalities),
        "paper": method.paper,
    }


def curve(log: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """At most ``CURVE_POINTS`` steps with forget and retain losses, nats per token."""
    stride = max(1, math.ceil(len(log) / CURVE_POINTS))
    points = []
    for i in range(0, len(log), stride):
        window = log[i : i + stride]
        point: dict[str, float] = {"step": i + 1}
        for role in ("forget", "retain"):
            values = [w[f"{role}_nll"] for w in window if f"{role}_nll" in w]
            if values:
                point[f"{role}_loss"] = float(np.mean(values))
        points.append(point)
    return points


def request_metrics(model: nn.Module, adapter: Adapter, requests: Sequence[Dataset]) -> dict[str, Any]:
    """``prob.request_i``: mean probability of the answers that the i-th request asked to forget, with interval."""
    out: dict[str, Any] = {}
    for i, request in enumerate(requests):
        order = [math.nan] * len(request["forget"])
        with evaluating(model):
            for group in adapter.batches(request["forget"]):
                positions = adapter.positions(model, [request["forget"][g] for g in group])
                means = positions.mean_per_sample(-positions.log_prob_N()).tolist()
                for place, mean in zip(group, means, strict=True):
                    order[place] = mean
        people = [s.subject for s in request["forget"]]
        out[f"prob.request_{i + 1}"] = bootstrap_mean(np.exp(-np.asarray(order)), people, definition="prob/1").record()
    return out


def of_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Metrics, samples and what the comparison with the original needs."""
    return {
        "metrics": evaluation.record(),
        "skipped": dict(evaluation.skipped),
        "samples": evaluation.samples,
    }


def write(
    run: Run, shop: Workshop, dataset: Dataset, options: StudyOptions, seeds: Sequence[int], title: str = ""
) -> None:
    """results.json and samples.jsonl from the rows on disk."""
    rows = [json.loads(p.read_text()) for p in sorted((run.folder / "rows").glob("*.json"))]
    rows = [r for r in rows if r["study"] in STUDIES]
    rows.sort(key=lambda r: (STUDIES.index(r["study"]), KINDS.index(r["kind"])))
    failed = [r for r in rows if "failed" in r]
    good = [r for r in rows if "failed" not in r]
    warnings = [*dataset.notes]
    warnings += [f"{r['key']} failed: {r['failed']}" for r in failed]
    if shop.adapter.truncated:
        warnings.append(truncation(shop.adapter))
    uses_base = [r["method"] for r in rows if "base" in (r.get("properties") or {}).get("wants", ())]
    if options.blind and uses_base:
        names = ", ".join(dict.fromkeys(uses_base))
        warnings.append(f"No base was given to {names}: blind to what the model said before the private data.")
    if not options.references:
        warnings.append(
            "No retrained reference was given: nothing says what never having seen the data looks like, so "
            "there are no verdicts."
        )
    for reason in sorted(
        {
            f"{name}: {why}"
            for r in good
            if r["kind"] == "method" and r["study"] == "main"
            for name, why in r["skipped"].items()
        }
    ):
        warnings.append(f"not measured: {reason}")
    content = {
        "schema": SCHEMA,
        "title": title or f"Unlearning study on {dataset.name}",
        "created": now().isoformat(),
        "command": run.record.command,
        "dataset": {
            "name": dataset.name,
            "source": dataset.source,
            "digest": dataset.digest(),
            "samples": {role: len(dataset[role]) for role in ROLES},
            "modality": dataset.modality,
        },
        "model": {"name": shop.loaded.source, "parameters": num_parameters(shop.loaded.model)},
        "seeds": list(seeds),
        "references": options.references,
        "rows": [_row(r) for r in good],
        "summary": list(summaries(good)),
        "curves": [{"model": _name(r), "steps": r["curve"]} for r in good if r.get("curve") and r["study"] == "main"],
        "warnings": warnings,
    }
    run.write_json("results.json", content)
    run.write_jsonl("samples.jsonl", _samples(good))


def truncation(adapter: Adapter) -> str:
    """How many samples were cut, and which."""
    ids = sorted(adapter.truncated)
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    return f"{len(ids)} sample(s) were longer than the context and cut: {', '.join(ids[:3])}{more}."


def _name(row: dict[str, Any]) -> str:
    return str(row["key"]).split("/", 1)[1] if row["study"] == "main" else str(row["key"])


def _row(row: dict[str, Any]) -> dict[str, Any]:
    kept = ("method", "kind", "study", "position", "seed", "cost", "properties")
    return {
        "model": _name(row),
        **{k: row.get(k) for k in kept},
        "metrics": {**row["metrics"], **row.get("extra", {})},
        "notes": row.get("notes", []),
        "settings": row.get("settings", {}),
        "record": row.get("record", {}),
    }


def _samples(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        if row["study"] == "main":
            for sample in row["samples"]:
                yield {"model": _name(row), "method": row["method"], "seed": row["seed"], **sample}


def summaries(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Mean over seeds with a Student t interval; over samples (bootstrap) where there is one seed only.

    A classifier with enough seeds and references is also judged as a population, over samples.
    """
    references = [r for r in rows if r["kind"] == "reference" and r["study"] == "main"]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["study"], row["kind"], row["method"], row.get("position")), []).append(row)
    for (study, kind, method, position), group in groups.items():
        metrics: dict[str, Any] = {}
        merged = [{**r["metrics"], **r.get("extra", {})} for r in group]
        for name in dict.fromkeys(n for m in merged for n in m):
            found = [m[name] for m in merged if m.get(name) and m[name]["value"] is not None]
            if found:
                metrics[name] = _over_seeds(name, found)
        if study == "main":
            metrics |= population_metrics(group, references)
        cost: dict[str, Any] = {}
        for name in dict.fromkeys(n for r in group for n in r.get("cost", {})):
            values = [r["cost"][name] for r in group if r["cost"].get(name) is not None]
            if values:
                cost[name] = float(np.mean(values))
        notes = list(dict.fromkeys(n for r in group for n in r.get("notes", [])))
        yield {
            "method": method,
            "kind": kind,
            "study": study,
            "position": position,
            "metrics": metrics,
            "cost": cost,
            "notes": notes,
            "properties": group[0].get("properties", {}),
        }


def _over_seeds(name: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = found[0]
    if len(found) == 1:
        return {**first, "seeds": 1}
    interval = seed_interval([f["value"] for f in found])
    low, high = cut(interval, *possible(name))
    return {
        "value": interval.value,
        "low": low,
        "high": high,
        "n": first["n"],
        "seeds": len(found),
        "definition": first["definition"],
    }
