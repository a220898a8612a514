"""One method after another on the same model: training, then a post-hoc edit, without a new class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from expunge.methods.registry import Context, Method, Outcome
from expunge.methods.registry import Sequential as Rule


def chain(steps: Sequence[tuple[Method, Any]]) -> Method:
    """A method that runs the steps in order, each from the model of the one before; notes and records are kept apart.

    It needs what any of them needs, and promises what all of them promise.
    """
    methods = [m for m, _ in steps]

    def run(context: Context, _: Any) -> Outcome:
        model, notes, record, log = context.model, [], {}, []
        removes = True
        for number, (method, options) in enumerate(steps):
            work = None if context.work is None else context.work / f"{number}-{method.name}"
            made = method.run(replace(context, model=model, work=work), options)
            model, removes = made.model, removes and made.removes_from_weights
            notes += [f"{method.name}: {note}" for note in made.notes]
            record[f"{number + 1}-{method.name}"] = {k: v for k, v in made.record.items() if k != "log"}
            log += made.record.get("log", [])
        return Outcome(model, notes, {**record, "log": log}, removes)

    rules: list[Rule] = [m.sequential for m in methods]
    return Method(
        name=">".join(m.name for m in methods),
        run=run,
        options=methods[0].options,
        paper="; ".join(dict.fromkeys(m.paper for m in methods)),
        summary="; then ".join(m.summary.rstrip(".") for m in methods),
        needs=frozenset().union(*(m.needs for m in methods)),
        wants=frozenset().union(*(m.wants for m in methods)) - frozenset().union(*(m.needs for m in methods)),
        modalities=reduce(frozenset.intersection, (m.modalities for m in methods)),
        removes_from_weights=all(m.removes_from_weights for m in methods),
        helpers_hold_data=any(m.helpers_hold_data for m in methods),
        sequential="not-defined" if "not-defined" in rules else rules[0],
        formula=" ; then ".join(m.formula for m in methods if m.formula),
    )
