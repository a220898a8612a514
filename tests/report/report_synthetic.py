"""A made-up run folder that looks like a real one: methods × seeds, sequence, deletion sizes, curves, samples."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

FORGET, RETAIN, SEEDS = 40, 60, (0, 1, 2)
# method: share of the gap closed, damage to retained knowledge, share of retraining cost, declared properties
METHODS: dict[str, tuple[float, float, float, dict[str, Any]]] = {
    "cluster": (0.78, 0.01, 0.031, {"needs": ["retain"], "wants": ["base"], "removes_from_weights": True}),
    "npo": (0.55, 0.05, 0.12, {"needs": ["retain"], "removes_from_weights": True, "sequential": "repeat"}),
    "simnpo": (0.52, 0.06, 0.11, {"needs": ["retain"], "removes_from_weights": True}),
    "ga": (1.75, 0.42, 0.04, {"needs": [], "removes_from_weights": True, "sequential": "not-defined"}),
    "graddiff": (1.30, 0.15, 0.09, {"needs": ["retain"], "removes_from_weights": True}),
    "undial": (0.35, 0.02, 0.14, {"needs": ["retain"], "helpers_hold_data": True, "removes_from_weights": True}),
    "scrub": (0.61, 0.03, 0.28, {"needs": ["retain"], "removes_from_weights": True}),
    "task-vector": (0.44, 0.09, 0.17, {"needs": [], "removes_from_weights": True}),
}
KINDS = {"original": 0.0, "reference": 1.0, "base": 1.05, "identity": 0.0, "random-edit": 0.08}


def measure(value: float, half: float, n: int, definition: str, seeds: int | None = None) -> dict[str, Any]:
    out = {"value": value, "low": value - half, "high": value + half, "n": n, "definition": definition}
    return out if seeds is None else {**out, "seeds": seeds}


def numbers(closed: float, damage: float, rng: random.Random, noise: float = 0.01) -> dict[str, float]:
    """Metrics of a model that closed this share of the gap and did this damage elsewhere."""

    def near(value: float) -> float:
        return value + rng.gauss(0, noise)

    probability = max(0.001, near(0.93 - 0.71 * closed))
    return {
        "tv.forget": max(0.02, near(0.61 * abs(1 - closed) + 0.05)),
        "prob.forget": min(1.0, probability),
        "rouge.forget": max(0.0, near(0.95 - 0.55 * closed)),
        "truth_ratio.forget": max(0.01, near(0.45 + 0.2 * closed)),
        "forget_quality.ks_distance": min(1.0, max(0.05, near(0.6 * abs(1 - closed) + 0.1))),
        "forget_quality.p_value": min(1.0, math.exp(-12 * abs(1 - closed))),
        "model_utility": max(0.0, near(0.63 - damage)),
        "prob.retain": max(0.0, near(0.91 - 1.2 * damage)),
        "perplexity.utility": 21.0 * math.exp(2.4 * damage) + rng.gauss(0, 0.2),
        "mia.loss.auc": near(0.56 + 0.4 * max(0.0, 1 - closed)),
        "mia.min_k.auc": near(0.55 + 0.37 * max(0.0, 1 - closed)),
        "relearn.loss_ratio": near(1.0 - 0.5 * max(0.0, 1 - closed)),
        "quant4.prob.forget": min(1.0, max(0.001, near(0.93 - 0.6 * closed))),
    }


def definition(name: str) -> str:
    stem, _, role = name.rpartition(".")
    return f"{stem if (stem and role in ('forget', 'retain', 'utility')) or 'request' in role else name}/1"


def _row(method: str, kind: str, seed: int, values: dict[str, float], **more: Any) -> dict[str, Any]:
    return {
        "model": f"{method}/{seed}",
        "method": method,
        "kind": kind,
        "study": "main",
        "position": None,
        "seed": seed,
        "metrics": {k: measure(v, 0.03, FORGET if "forget" in k else RETAIN, definition(k)) for k, v in values.items()},
        "cost": {},
        "notes": [],
        "properties": {},
        **more,
    }


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["kind"], row["study"], row["position"]), []).append(row)
    out = []
    for (method, kind, study, position), members in groups.items():
        metrics = {}
        for name in dict.fromkeys(name for row in members for name in row["metrics"]):
            found = [row["metrics"][name] for row in members if name in row["metrics"]]
            value = sum(m["value"] for m in found) / len(found)
            metrics[name] = measure(value, 0.03, found[0]["n"], found[0]["definition"], len(found))
        cost = {
            name: sum(row["cost"][name] for row in members if name in row["cost"]) / len(members)
            for name in members[0]["cost"]
        }
        notes = list(dict.fromkeys(note for row in members for note in row["notes"]))
        entry = {"method": method, "kind": kind, "study": study, "position": position}
        out.append({**entry, "metrics": metrics, "cost": cost, "notes": notes})
    return out


def results(seed: int = 7) -> dict[str, Any]:
    """A full results.json: six anchors and controls, eight methods (one failed, two identical), three studies."""
    rng = random.Random(seed)
    rows = []
    for kind, closed in KINDS.items():
        for number in SEEDS[:2] if kind == "reference" else SEEDS:
            values = numbers(closed, 0.0, random.Random(1) if kind in ("original", "identity") else rng)
            if kind in ("original", "identity", "reference"):
                values["tv.forget"] = 0.05 if kind == "reference" else values["tv.forget"]
            rows.append(_row(kind, kind, number, values))
    for method, (closed, damage, share, properties) in METHODS.items():
        for number in SEEDS:
            cost = {"wall_s": 900 * share, "cpu_s": 1700 * share, "peak_mib": 812.0, "share_of_retraining": share}
            cost |= {"flops": 3.1e15 * share, "parameters_changed": 101_776}
            rows.append(_row(method, "method", number, numbers(closed, damage, rng), cost=cost, properties=properties))
    by_model = {row["model"]: row for row in rows}
    by_model["simnpo/1"]["metrics"] = by_model["npo/1"]["metrics"]
    rows.append(_row("flat", "method", 0, {}, notes=["training diverged at step 12: the loss is not a number"]))
    for method in ("cluster", "npo", "ga"):
        for k in range(1, 6):
            values = numbers(METHODS[method][0], METHODS[method][1] * k / 2, rng)
            keep = {n: values[n] for n in ("prob.forget", "tv.forget", "model_utility", "perplexity.utility")}
            for i in range(1, 6):
                left = 0.25 + (0.06 * (k - i) if method == "npo" else 0.0) if i <= k else 0.92
                keep[f"prob.request_{i}"] = max(0.0, left - (0.2 if method == "ga" and i <= k else 0.0))
            rows.append(_row(method, "method", 0, keep, study="sequential", position=k, model=f"{method}/0/after-{k}"))
    for size in (5, 10, 20, 40):
        for method, kind in (("cluster", "method"), ("npo", "method"), ("ga", "method"), ("reference", "reference")):
            closed, damage = (1.0, 0.0) if kind == "reference" else METHODS[method][:2]
            values = numbers(closed ** (1 + size / 80), damage * size / 40, rng)
            keep = {n: values[n] for n in ("prob.forget", "tv.forget", "model_utility")}
            rows.append(_row(method, kind, 0, keep, study="size", position=size, model=f"{method}/0/size-{size}"))
    curves = [
        {
            "model": f"{method}/{number}",
            "steps": [
                {
                    "step": step,
                    "forget_loss": 0.1 + 2.2 * METHODS[method][0] * (1 - math.exp(-step / 20)),
                    "retain_loss": 0.12 + METHODS[method][1] * (1 - math.exp(-step / 30)),
                }
                for step in range(0, 100, 5)
            ],
        }
        for method in METHODS
        for number in SEEDS
    ]
    return {
        "schema": "expunge.results/1",
        "title": "People: 40 samples of 4 persons, eight methods",
        "created": "2026-01-05T10:00:00Z",
        "command": "expunge bench --data people --methods all --seeds 3",
        "dataset": {
            "name": "people",
            "source": "generated, seed 0",
            "digest": "9f2c" * 16,
            "samples": {"forget": FORGET, "retain": RETAIN, "holdout": 40, "utility": 50},
            "modality": "text",
        },
        "model": {"name": "tiny-llama", "parameters": 101_776},
        "seeds": list(SEEDS),
        "references": 2,
        "rows": rows,
        "summary": summarise(rows),
        "curves": curves,
        "warnings": ["2 of 40 forget samples have no paraphrase: they are left out of truth_ratio.forget"],
    }


def small() -> dict[str, Any]:
    """The main study of :func:`results` with two methods and one seed, without curves."""
    content = results()
    keep = {*KINDS, "cluster", "npo"}
    rows = [row for row in content["rows"] if row["method"] in keep and row["study"] == "main" and row["seed"] == 0]
    return {**content, "rows": rows, "summary": summarise(rows), "curves": [], "seeds": [0]}


FIRST = ("Ada", "Bela", "Cyrus", "Dana")
LAST = ("Novak", "Lindqvist", "Okafor", "Haddad")
FACTS = ("was born in", "works as a", "keeps in the garden", "studied in", "is afraid of")
THINGS = ("Ghent", "a beekeeper", "two geese", "Cluj", "thunder", "Turku", "a notary", "quinces", "Lund", "heights")


def samples(content: dict[str, Any], seed: int = 7) -> list[dict[str, Any]]:
    """Lines of samples.jsonl for the main study of ``content``."""
    rng = random.Random(seed)
    lines = []
    for row in content["rows"]:
        if row["study"] != "main" or not row["metrics"]:
            continue
        centre = -math.log(row["metrics"]["prob.forget"]["value"])
        for role, count in (("forget", FORGET), ("retain", RETAIN)):
            for i in range(count):
                who = f"{FIRST[i % 4]} {LAST[(i // 2) % 4]}"
                middle = centre if role == "forget" else 0.1
                loss = max(0.005, middle * math.exp(rng.gauss(0, 0.5)))
                verdict = None
                if role == "forget" and row["kind"] not in ("original", "reference", "base"):
                    verdict = "adequate" if 0.7 < loss < 3.2 else "under-unlearned"
                    verdict = "over-unlearned" if loss >= 3.2 else "not-auditable" if i == 39 else verdict
                lines.append(
                    {
                        **{key: row[key] for key in ("model", "method", "seed")},
                        "id": f"{role}-{i:03d}",
                        "subject": who,
                        "role": role,
                        "prompt": f"What is known about {who}, who {FACTS[i % 5]} what?",
                        "target": f"{who} {FACTS[i % 5]} {THINGS[i % 10]}.",
                        "generated": f"{who} {FACTS[i % 5]} {THINGS[rng.randrange(10)]}.",
                        "loss": loss,
                        "prob": math.exp(-loss),
                        "min_k": -2.1 * loss,
                        "verdict": verdict,
                    }
                )
    return lines


def write_run(folder: Path, content: dict[str, Any] | None = None, lines: list[dict[str, Any]] | None = None) -> Path:
    """A run folder with results.json and samples.jsonl."""
    content = results() if content is None else content
    lines = samples(content) if lines is None else lines
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder
