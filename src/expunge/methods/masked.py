"""A loss family on chosen weights alone: what the saliency methods have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from expunge.errors import UserError
from expunge.methods.families import FAMILIES, run_family
from expunge.methods.registry import Context, Outcome
from expunge.methods.scope import Masks, held
from expunge.models.adapter import num_parameters
from expunge.options import Ranges
from expunge.training.optimizers import sized_rate

SHARE: Ranges = ((("share",), "a share above 0 and at most 1", lambda v: 0 < v <= 1),)


def edit_within(context: Context, options: Any, family: str, masks: Masks, rate: float | None = None) -> Outcome:
    """Edit ``context.model`` by a row of the loss families; only what ``masks`` allow moves, bit for bit.

    ``rate``: learning rate at a billion parameters and more, where it is not the row's.

    Raises:
        UserError: nothing may move.
    """
    free = sum(int(m.sum()) for m in masks.values())
    if not free:
        raise UserError("no weight was chosen to move: loosen the thresholds that choose them.")
    if options.learning_rate is None and rate is not None:
        options = replace(options, learning_rate=sized_rate(context.model, rate))
    row = next(row for row in FAMILIES if row.name == family)
    with held(context.model, masks):
        outcome = run_family(row, context, options)
    outcome.notes.append(f"{free} of {num_parameters(context.model)} weights could move")
    outcome.record["weights_free"] = free
    return outcome
