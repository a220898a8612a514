"""Rows for samples.jsonl, and the verdict on each forget sample."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.attacks.membership import min_k_plus_plus_score, min_k_score
from expunge.bench.desk import Desk, log_ratios, losses, mean_over, number, rouge_of
from expunge.metrics.divergence import per_sample
from expunge.metrics.memorization import hit_share, matching_suffix

UNDER, OVER = 0.5, -0.5
VERDICTS = ("under-unlearned", "adequate", "over-unlearned", "not-auditable")


def position_of(loss: float, reference: float, original: float) -> float:
    """(loss_reference − loss) / (loss_reference − loss_original): 1 = like the original, 0 = like retrained.

    Negative: the loss is above the reference's, the sample is over-unlearned. nan when the two ends are equal.
    """
    return (reference - loss) / (reference - original) if reference != original else math.nan


def verdict_of(loss: float, reference: float, original: float, gap: float = 0.5) -> str:
    """The verdict on a forget sample from losses in nats per token.

    "not-auditable": the reference's loss does not exceed the original's by ``gap``, so the original knew little more
    than a model that never saw the sample, and nothing can be said about its forgetting. Otherwise by
    :func:`position_of`: above 0.5 "under-unlearned", below −0.5 "over-unlearned", else "adequate".
    """
    if not all(map(math.isfinite, (loss, reference, original))):
        return "over-unlearned" if loss == math.inf and reference - original >= gap else "not-auditable"
    if reference - original < gap:
        return "not-auditable"
    position = position_of(loss, reference, original)
    if position > UNDER:
        return "under-unlearned"
    return "over-unlearned" if position < OVER else "adequate"


def sample_rows(desk: Desk) -> list[dict[str, Any]]:
    """One row per sample of every role, as samples.jsonl wants it; nan and infinities become null."""
    own, percent = desk.own, desk.options.min_k
    rows: list[dict[str, Any]] = []
    for role, samples in own.samples.items():
        reference = [mean_over([losses(r.signals[role]) for r in desk.references])] if desk.references else []
        ids = [s.id for s in samples]
        original = [desk.original.losses(role, ids)] if desk.original is not None else []
        scores = rouge_of(own, role)
        ratios = log_ratios(own) if role == "forget" else None
        distance = per_sample(own.forget.tv) if role == "forget" and desk.references else None
        for i, (sample, signals) in enumerate(zip(samples, own.signals[role], strict=True)):
            row: dict[str, Any] = {
                "id": sample.id,
                "subject": sample.subject,
                "role": role,
                "prompt": sample.prompt,
                "target": sample.target,
                "tokens": len(signals),
                "loss": number(signals.loss),
                "prob": number(signals.prob),
                "accuracy": number(hit_share(signals.hit_L)),
                "min_k": number(min_k_score(signals, percent)),
                "min_k_plus": number(min_k_plus_plus_score(signals, percent)),
            }
            if desk.text:
                row["extraction_strength"] = number(matching_suffix(signals.hit_L))
            if sample.id in scores:
                row |= {"generated": own.generated[role][sample.id], "rouge_l": number(scores[sample.id])}
            if ratios is not None and math.isfinite(ratios[i]):
                row["truth_ratio"] = number(math.exp(min(ratios[i], 700.0)))
            if distance is not None:
                row["tv"] = number(distance[i])
            if reference:
                row["reference_loss"] = number(reference[0][i])
            if original:
                row["original_loss"] = number(original[0][i])
            row |= {"position": None, "verdict": None}
            if role == "forget" and reference and original and desk.options.verdicts:
                ends = float(reference[0][i]), float(original[0][i])
                row["verdict"] = verdict_of(signals.loss, *ends, desk.options.auditable_gap)
                if row["verdict"] != "not-auditable":
                    row["position"] = number(position_of(signals.loss, *ends))
            rows.append(row)
    return rows


def verdicts(desk: Desk, rows: Sequence[Mapping[str, Any]]) -> None:
    """Share of each verdict among the auditable forget samples; of "not-auditable" among all."""
    if not desk.options.verdicts:
        return
    judged = [r for r in rows if r["verdict"] is not None]
    if not judged:
        desk.skipped["verdict"] = "verdicts need the original and at least one reference model"
        return
    auditable = [r for r in judged if r["verdict"] != "not-auditable"]
    for name in VERDICTS:
        among = judged if name == "not-auditable" else auditable
        desk.metrics[f"verdict.{name.replace('-', '_')}"] = desk.mean(
            [float(r["verdict"] == name) for r in among], [r["subject"] for r in among], f"verdict-{name}/1"
        )
