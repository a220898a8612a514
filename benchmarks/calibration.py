"""Are verdicts calibrated? Exact retrains, the original and a collapsed model, served as unlearned.

    python benchmarks/calibration.py --data people --retrains 12 --out runs/calibration
    python benchmarks/calibration.py --data digits --ks 2,4,8 --out runs/calibration-digits

Judges are other exact retrains (another seed, the same samples) or shadows (other samples of the same kind and number).
Under shadows every served retrain has a forget set of its own: against models of other data the level holds on average
over what is forgotten and retained, not for each. For every number K of judges, with and without a holdout:

- retrain: of the auditable forget samples of an exact retrain, which share has p_under <= level? Aim 3 to 7 % at 5 %.
- original: which share of the auditable samples is called under-unlearned? Aim 95 % or more.
- collapsed: after gradient ascent, which share is called over-unlearned?
- moved: verdicts that differ when samples come in another order and in other batches. Aim 0.

Brackets: 95 % over the served models and the subjects of the forget set, drawn with replacement together. Retrains that
are served judge others too, so they are not quite independent. Models stand in OUT/models and are made once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from expunge.attacks.exam import Checkpoint
from expunge.completeness.calibration import Completeness, calibrate
from expunge.completeness.protocols.binui import form_of
from expunge.completeness.protocols.scores import Case
from expunge.completeness.protocols.store import start_at
from expunge.completeness.protocols.tables import Cell, crossed
from expunge.completeness.protocols.world import Group, ProtocolOptions, Target, World, make_world
from expunge.completeness.readings import Floats
from expunge.data.samples import Sample
from expunge.files import plain
from expunge.methods.registry import Context, get_method
from expunge.progress import Progress

LEVEL = 0.05
DRAWS = 4  # sets of K judges for each served model


@dataclass(frozen=True, eq=False)
class Served:
    """One model under judgement, its original, and the samples that it forgot or should have forgotten."""

    model: Checkpoint
    original: Checkpoint
    forget: Sequence[Sample]


@dataclass(frozen=True, eq=False)
class Models:
    """Everything that is served or judges. ``others``: retrains without other forget sets."""

    retrains: Sequence[Served]
    others: Sequence[Served]
    originals: Sequence[Served]
    collapsed: Sequence[Served]
    shadows: Sequence[Checkpoint]
    population: Sequence[Sample]

    def served(self, kind: str, judges: str) -> Sequence[Served]:
        retrains = self.retrains if judges == "retrains" else self.others
        return {"retrain": retrains, "original": self.originals, "collapsed": self.collapsed}[kind]

    def judges(self, judges: str, but: Checkpoint) -> list[Checkpoint]:
        pool = [s.model for s in self.retrains] if judges == "retrains" else self.shadows
        return [m for m in pool if m is not but]


def train_all(world: World, retrains: int, others: int, originals: int, shadows: int) -> Models:
    def split(number: int) -> tuple[list[Sample], list[Sample]]:
        gone = world.forget_set(number)
        return [s for s in world.private if s.id in gone], [s for s in world.private if s.id not in gone]

    forget, kept = split(0)
    trained = [world.train(world.private, f"original {n}") for n in range(originals)]
    own = (world.train(kept, f"calibration retrain {n}") for n in range(retrains))
    apart = (split(n) for n in range(1, others + 1))
    # The original that stands beside a retrain is any; beside itself and what was made of it, its own.
    return Models(
        [Served(model, trained[n % originals], forget) for n, model in enumerate(own)],
        [
            Served(world.train(rest, f"retrained {n}"), trained[n % originals], gone)
            for n, (gone, rest) in enumerate(apart, 1)
        ],
        [Served(model, model, forget) for model in trained],
        [Served(collapsed(world, model, forget), model, forget) for model in trained],
        [world.shadow(n) for n in range(shadows)],
        world.cut[1],
    )


def collapsed(world: World, original: Checkpoint, forget: Sequence[Sample]) -> Checkpoint:
    """The original after gradient ascent on the forget set, until their loss is above 10 nats."""

    def make() -> nn.Module:
        start = start_at(original)
        context = Context(start.make(), start.adapter, forget, progress=world.progress)
        method = get_method("ga")
        options = {"epochs": 60, "learning_rate": world.options.learning_rate, "stop_loss": 10.0}
        return method(context, method.configure(options)).model.eval()

    return world.store.kept(f"collapsed-{original.digest}", original.adapter, f"collapsed {original.name}", make)


# -- judging -------------------------------------------------------------------------------------------------------


def case_of(served: Served, judges: Sequence[Checkpoint], population: Sequence[Sample], world: World) -> Case:
    target = Target(served.model.name, served.model, served.original, served.forget, np.zeros(len(served.forget)))
    return Case(target, Group("judges", judges, [], [], population), form=form_of(world))


def answer_of(case: Case, with_holdout: bool) -> Completeness:
    return case.answer if with_holdout else calibrate(case.readings, level=LEVEL)


def shares(found: Completeness) -> dict[str, Floats]:
    """Per sample, nan where it does not count: what was called, at the level and after correction."""
    able_N = found.auditable_N
    low_N, high_N = (p_N <= LEVEL for p_N in (found.p_under_N, found.p_over_N))
    named = {v: np.array([x == v for x in found.verdict_N]) for v in ("under-unlearned", "over-unlearned")}
    counted = {
        "p under": low_N,
        "p over": high_N,
        "under": named["under-unlearned"],
        "over": named["over-unlearned"],
    }
    rows = {name: np.where(able_N, flag_N.astype(np.float64), np.nan) for name, flag_N in counted.items()}
    return rows | {"auditable": able_N.astype(np.float64), "p under, all": low_N.astype(np.float64)}


def measure(world: World, models: Models, kind: str, judges: str, count: int, with_holdout: bool) -> dict[str, Any]:
    """One row of the table: shares with intervals over served models and subjects."""
    cells = []
    everyone = models.served(kind, judges)
    for t, served in enumerate(everyone):
        people = [s.subject for s in served.forget]
        pool = models.judges(judges, served.model)
        for draw in range(DRAWS):
            rng = np.random.default_rng([world.seed, t, count, draw])
            chosen = [pool[i] for i in rng.choice(len(pool), count, replace=False)]
            found = answer_of(case_of(served, chosen, models.population, world), with_holdout)
            cells.append(Cell(t, draw, people, np.zeros(len(people)), shares(found)))
    statistics = {"share": lambda score_N, _: float(score_N.mean()) if score_N.size else float("nan")}
    table = crossed(cells, statistics, resamples=100, seed=world.seed)
    row = {"served": kind, "judges": judges, "K": count, "holdout": with_holdout, "models": len(everyone)}
    return row | {"shares": {name: found["share"].record() for name, found in table.items()}}


def moved(world: World, models: Models, judges: str, count: int) -> tuple[int, int]:
    """(verdicts that change, verdicts) when samples come in reverse and signals are read in batches of other sizes."""
    changed = total = 0
    for served in (models.retrains[0], models.originals[0], models.collapsed[0]):
        pool = models.judges(judges, served.model)[:count]
        first = answer_of(case_of(served, pool, models.population, world), True)
        again = Served(reread(served.model), reread(served.original), served.forget[::-1])
        second = answer_of(case_of(again, [reread(c) for c in pool], models.population[::-1], world), True)
        changed += sum(a != b for a, b in zip(first.verdict_N, second.verdict_N[::-1], strict=True))
        total += len(first.verdict_N)
    return changed, total


def reread(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights with nothing kept, read in small batches."""
    return Checkpoint(checkpoint.name, checkpoint.kind, checkpoint.adapter, checkpoint.load, "", None, max_tokens=257)


# -- the table -----------------------------------------------------------------------------------------------------

SHOWN = ("auditable", "p under", "p under, all", "p over", "under", "over")


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| served | judges | K | holdout | " + " | ".join(SHOWN) + " |", "|---" * (4 + len(SHOWN)) + "|"]
    for row in rows:
        cells = [shown(row["shares"].get(name)) for name in SHOWN]
        head = (
            f"| {row['models']} {row['served']}s | {row['judges']} | {row['K']} | {'yes' if row['holdout'] else 'no'} |"
        )
        lines.append(f"{head} {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(value: Mapping[str, Any] | None) -> str:
    if value is None or value["value"] is None or not np.isfinite(value["value"]):
        return "none"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="people")
    parser.add_argument("--data-dir")
    parser.add_argument("--model")
    parser.add_argument("--init")
    parser.add_argument("--retrains", type=int, default=12)
    parser.add_argument("--others", type=int, default=10, help="retrains without other forget sets, under shadows")
    parser.add_argument("--originals", type=int, default=3)
    parser.add_argument("--shadows", type=int, default=10)
    parser.add_argument("--ks", default="2,4,8", help="numbers of judges, with commas")
    parser.add_argument("--epochs", type=float, default=12.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-set", nargs="*", default=[], metavar="KEY=VALUE", help="options of the dataset")
    parser.add_argument("--quick", action="store_true", help="the small sizes of the protocols")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    ks = [int(k) for k in given.ks.split(",")]
    if max(ks) > min(given.retrains - 1, given.shadows) or min(ks) < 2:
        parser.error("--ks: 2 or more, fewer than --retrains and at most --shadows")
    begun = time.perf_counter()
    world = make_world(
        given.data,
        given.out,
        ProtocolOptions(epochs=given.epochs),
        data_dir=given.data_dir,
        data_options=dict(pair.split("=", 1) for pair in given.data_set),
        model=given.model,
        init=given.init,
        quick=given.quick,
        seed=given.seed,
        progress=Progress(quiet=False, every=60.0),
    )
    models = train_all(world, given.retrains, given.others, given.originals, given.shadows)
    rows = [
        measure(world, models, kind, judges, count, with_holdout)
        for kind in ("retrain", "original", "collapsed")
        for judges in ("retrains", "shadows")
        for count in ks
        for with_holdout in (False, True)
    ]
    order = {judges: moved(world, models, judges, max(ks)) for judges in ("retrains", "shadows")}
    forget = models.retrains[0].forget
    facts: dict[str, Any] = {"data": given.data, "seed": given.seed, "epochs": given.epochs, "level": LEVEL}
    facts |= {"shadow set": len(world.cut[0]), "shadow": len(world.part(0))}
    facts |= {"forget samples": len(forget), "forget subjects": len({s.subject for s in forget})}
    facts |= {
        "trained on": len(world.private) - len(forget),
        "population": len(models.population),
        "judge draws": DRAWS,
    }
    print(table_of(rows))
    for judges, (changed, total) in order.items():
        print(f"moved ({judges}, K = {max(ks)}): {changed} of {total} verdicts")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{time.perf_counter() - begun:.0f} s, {world.store.trained} models trained")
    given.out.mkdir(parents=True, exist_ok=True)
    record = plain({"schema": "expunge.calibration/1", **facts, "rows": rows, "moved": order})
    (given.out / "calibration.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
