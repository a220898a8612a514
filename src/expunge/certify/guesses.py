"""Guesses about canaries that were put in by coins, from what a run has measured of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from expunge.certify.sections import Guesses
from expunge.data.samples import Dataset

OTHERS = frozenset({"base", "original", "reference", "identity", "random-edit"})  # rows of models beside the unlearned
SHARE = 1 / 3  # of the canaries on either side; fixed here, so that nobody picks it by what comes out


def guesses_of(rows: Iterable[Mapping[str, Any]], dataset: Dataset) -> Guesses | None:
    """The third with the lowest loss is guessed to have been put in, the third with the highest to have stayed out.

    ``rows`` are lines of ``samples.jsonl``; those of the unlearned (or audited) model count. The rest is not guessed,
    as Steinke et al. 2023 (arXiv 2305.08846) allow; which loss a canary gets depends on no coin. None where fewer than
    three canaries were measured.
    """
    sides = {s.id: True for s in dataset["forget"]} | {s.id: False for s in dataset["holdout"]}
    losses: dict[str, float] = {}
    for row in rows:
        own = row.get("method") not in OTHERS and row.get("role") in ("forget", "holdout")
        loss = row.get("loss")
        if own and row.get("id") in sides and isinstance(loss, (int, float)) and math.isfinite(loss):
            losses[str(row["id"])] = float(loss)
    each = int(SHARE * len(losses))
    if each == 0:
        return None
    ranked = sorted(losses, key=lambda name: (losses[name], name))
    right = sum(sides[name] for name in ranked[:each]) + sum(not sides[name] for name in ranked[-each:])
    return Guesses(canaries=len(losses), guesses=2 * each, right=right, coins=True)
