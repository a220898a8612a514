"""A made-up audit that looks like a real one: four models of each kind, thirteen scores, samples with every verdict."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import report_synthetic as synthetic

MODELS = {"audited": "audited", "original": "original", "reference-0": "reference", "reference-1": "reference"}
MODELS |= {f"shadow-{i}": "shadow" for i in range(3)}
FORGET = 60
# score: attack, family, tier, access, axis, statistic, (reference, original, audited)
SCORES: dict[str, tuple[str, str, str, str, str, str, tuple[float, float, float]]] = {
    "loss": ("loss", "membership", "quick", "log-probabilities", "privacy", "auc", (0.52, 0.97, 0.58)),
    "min_k": ("min_k", "membership", "quick", "log-probabilities", "privacy", "auc", (0.51, 0.96, 0.55)),
    "zlib": ("zlib", "membership", "quick", "log-probabilities", "privacy", "auc", (0.50, 0.93, 0.53)),
    "reference_ratio": ("reference", "membership", "quick", "log-probabilities", "privacy", "auc", (0.5, 0.99, 0.74)),
    "recall": ("recall", "membership", "standard", "log-probabilities", "privacy", "auc", (0.49, 0.9, 0.36)),
    "lira.offline": ("lira", "membership", "standard", "log-probabilities", "privacy", "auc", (0.51, 0.98, 0.69)),
    "extraction_strength": (
        "strength",
        "extraction",
        "quick",
        "log-probabilities",
        "effectiveness",
        "mean",
        (0.06, 0.9, 0.08),
    ),
    "exact": ("exact", "extraction", "quick", "log-probabilities", "effectiveness", "mean", (0.41, 0.99, 0.45)),
    "sampled": ("sampled", "extraction", "standard", "text", "effectiveness", "mean", (0.02, 0.83, 0.05)),
    "relearn.held_in": ("relearn", "recovery", "standard", "weights", "robustness", "mean", (-1.9, -0.1, -1.2)),
    "quantized.4": ("quantized", "recovery", "standard", "weights", "robustness", "mean", (-2.4, -0.2, -1.5)),
    "probe": ("probe", "recovery", "full", "weights", "robustness", "mean", (-2.6, -0.1, 3.9)),
    "utility_loss": ("utility", "kept", "quick", "log-probabilities", "utility", "mean", (-2.1, -2.0, -2.12)),
}


def estimate(value: float, half: float = 0.06, n: int = FORGET) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n, "definition": "auc/1"}


def score_rows() -> list[dict[str, Any]]:
    rows = []
    for score, (attack, family, tier, access, axis, statistic, (reference, original, audited)) in SCORES.items():
        gap, scale = audited - reference, abs(original - reference)
        share = gap * math.copysign(1, original - reference) / scale
        verdict = "more is left" if share > 0.3 else "less than the reference" if share < -0.2 else "like the reference"
        models = {
            "audited": estimate(audited),
            "original": estimate(original, 0.02),
            "reference-0": estimate(reference - 0.02),
            "reference-1": estimate(reference + 0.02),
        }
        row = {
            "attack": attack,
            "score": score,
            "family": family,
            "tier": tier,
            "access": access,
            "statistic": statistic,
            "axis": axis,
            "models": models,
            "gap": estimate(gap, 0.08),
            "p": math.exp(-12 * abs(share)),
            "p_adjusted": min(1.0, 5 * math.exp(-12 * abs(share))),
            "verdict": verdict,
        }
        if statistic == "auc":
            row["tpr"] = {
                rate: {name: estimate(min(1.0, float(rate) * 4 * m["value"]), 0.02) for name, m in models.items()}
                for rate in ("0.001", "0.01", "0.1")
            }
        rows.append(row)
    return rows


def audit() -> dict[str, Any]:
    """A full audit.json: one axis failed, one passed, one not shown."""
    rows = score_rows()
    by_name = {row["score"]: row for row in rows}

    def axis(name: str, verdict: str, sentence: str, worst: str | None, tests: int) -> dict[str, Any]:
        row = by_name[worst] if worst else None
        return {"axis": name, "verdict": verdict, "sentence": sentence, "worst": row, "tests": tests}

    counts = {"under-unlearned": 9, "adequate": 41, "over-unlearned": 6, "not-auditable": 4}
    return {
        "schema": "expunge.audit/1",
        "suite": "standard",
        "checkpoints": [
            {"name": name, "kind": kind, "path": "runs/erase-17/model" if kind == "audited" else None}
            for name, kind in MODELS.items()
        ],
        "samples": {"forget": FORGET, "retain": 120, "holdout": 60, "utility": 50},
        "vector": [
            axis("effectiveness", "passed", "No extraction attack finds more than in a retrained model.", "exact", 3),
            axis(
                "privacy",
                "failed",
                "2 of 6 membership attacks tell the model from a retrained one.",
                "reference_ratio",
                6,
            ),
            axis("robustness", "failed", "After 20 steps of relearning the facts come back.", "relearn.held_in", 3),
            axis("utility", "not shown", "No utility samples beyond the loss were given.", None, 1),
        ],
        "scores": rows,
        "completeness": {
            "form": "text",
            "level": 0.05,
            "fdr": 0.1,
            "shadows": 3,
            "calibration": "leave-one-shadow-out",
            "counts": counts,
            "n": FORGET,
            "smallest_p": 0.0055,
            "auditable": 56,
            "notes": ["Losses are in bits per byte where tokenizers differ; here they do not."],
        },
        "under_attack": {
            "views": {
                "as served": {"counts": {"under-unlearned": 9}, "auditable": 56},
                "relearnt": {"counts": {"under-unlearned": 21}, "auditable": 55},
            },
            "counts": {"under-unlearned": 22},
            "auditable": 56,
            "n": FORGET,
        },
        "subjects": [
            {
                "subject": f"{synthetic.FIRST[i]} {synthetic.LAST[i]}",
                "n": 15,
                "completeness": estimate(0.9 - 0.2 * i, 0.1, 15),
                "p_under": 0.4 / 10**i,
                "verdict": "under-unlearned" if i == 3 else "adequate",
                "dataset_inference_p": 0.5 / 8**i,
            }
            for i in range(4)
        ],
        "fitness": {"blind_auc": estimate(0.53), "unfit": False, "sentence": "Words alone do not tell the sets apart."},
        "figures": {"exposure.bits": {name: estimate(3.1 + i, 0.4, 4) for i, name in enumerate(MODELS)}},
        "skipped": {"translation": "needs llm", "canary": "no canary was planted"},
        "failed": {"soft_prompt": "the loss is not a number at step 3"},
        "cost": {row["attack"]: 2.5 + 7 * i for i, row in enumerate(rows)},
        "notes": ["24 forget samples were drawn for relearning."],
    }


def drill(seed: int = 3) -> list[dict[str, Any]]:
    """Lines of drill.jsonl: verdicts as :func:`audit` counts them."""
    rng = random.Random(seed)
    verdicts = ["adequate"] * 41 + ["under-unlearned"] * 9 + ["over-unlearned"] * 6 + ["not-auditable"] * 4
    centre = {"adequate": 0.0, "under-unlearned": 0.8, "over-unlearned": -0.9, "not-auditable": 0.3}
    lines = []
    for i, verdict in enumerate(verdicts):
        who = f"{synthetic.FIRST[i % 4]} {synthetic.LAST[i % 4]}"
        fact, thing = synthetic.FACTS[i % 5], synthetic.THINGS[(i * 7) % 10]
        target = f"{who} {fact} {thing}, as everybody in the village knew; nobody minded."
        position = centre[verdict] + rng.gauss(0, 0.12)
        learnt = 0.2 if verdict == "not-auditable" else rng.uniform(1.5, 4.0)
        original = rng.uniform(0.05, 0.3)
        unseen = original + learnt
        losses = {"audited": unseen - position * learnt, "original": original}
        losses |= {name: unseen + rng.gauss(0, 0.1) for name, kind in MODELS.items() if kind in ("reference", "shadow")}
        text = [word if k == 0 else " " + word for k, word in enumerate(target.split())]
        before = [-abs(rng.gauss(0, original)) for _ in text]
        reference = [b - abs(rng.gauss(0, 2 * learnt)) * (rng.random() < 0.6) for b in before]
        own = [r + (position + rng.gauss(0, 0.15)) * (b - r) for b, r in zip(before, reference, strict=True)]
        p_under = rng.uniform(0.006, 0.02) if verdict == "under-unlearned" else rng.uniform(0.05, 1)
        p_over = rng.uniform(0.006, 0.02) if verdict == "over-unlearned" else rng.uniform(0.05, 1)
        lines.append(
            {
                "id": f"forget-{i:03d}",
                "subject": who,
                "prompt": f"What is known about {who}, who {fact} what?",
                "target": target,
                "verdict": verdict,
                "completeness": min(1.0, max(0.0, 1 - position)),
                "score": position,
                "completeness_attacked": 1 - max(0.0, position) if position is not None else None,
                "view": "relearnt",
                "position": position,
                "p_under": p_under,
                "p_over": p_over,
                "losses": losses,
                "tokens": {"text": text, "audited": own, "original": before, "reference": reference},
                "scores": {
                    name: {
                        "audited": -losses["audited"] + rng.gauss(0, 0.2),
                        "original": -original,
                        "reference": -unseen,
                        "low": -unseen - 0.3,
                        "high": -unseen + 0.3,
                    }
                    for name in SCORES
                    if name != "utility_loss"
                },
                "answers": {
                    "original": target,
                    "audited": target if verdict == "under-unlearned" else f"{who} {fact} a museum in Bruges.",
                    "reference-0": f"{who} {fact} Antwerp, and liked it.",
                    "reference-1": f"{who} {fact} a baker from Ostend.",
                },
                "neighbours": [
                    {
                        "id": f"retain-{(i + k) % 120:03d}",
                        "target": f"{synthetic.FIRST[(i + k + 1) % 4]} {fact} {synthetic.THINGS[(i + k) % 10]}.",
                        "similarity": 0.9 - 0.1 * k,
                        "loss_audited": 0.3 + 0.1 * k,
                        "loss_reference": 0.25 + 0.1 * k,
                    }
                    for k in range(3)
                ],
                "details": {
                    "sampled": {"samples": 64, "found": 2 if verdict == "under-unlearned" else 0, "best": target}
                },
            }
        )
    return lines


def write_audit(folder: Path, content: dict[str, Any] | None = None, lines: list[dict[str, Any]] | None = None) -> Path:
    """A folder with audit.json and drill.jsonl."""
    content = audit() if content is None else content
    lines = drill() if lines is None else lines
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "audit.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "drill.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder
