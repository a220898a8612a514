"""``expunge train --zone``: a zone over a base as a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expunge.bench.cost import measure
from expunge.bench.provenance import record_training
from expunge.bench.single import TRAINING, Request, say_truncated
from expunge.data.samples import Dataset, Role
from expunge.errors import UserError
from expunge.files import digest_folder
from expunge.models.load import load_model, save_model
from expunge.options import configure
from expunge.progress import Progress
from expunge.runs import Run
from expunge.signals.forward import collect
from expunge.zones.build import build_zone, check_disjoint, zone_samples
from expunge.zones.storage import key_file
from expunge.zones.zone import get_zone


def check_zone(
    dataset: Dataset, roles: Sequence[Role], kind: str, options: Mapping[str, Any], start: Path | str | None
) -> None:
    """Refuse before anything is loaded what a zone cannot be built from.

    Raises:
        UserError: no base, no public texts, an unknown kind or option, or a private subject among the public ones.
    """
    configure(get_zone(kind).options, options, f"option of zone {kind}")
    if start is None:
        raise UserError(
            "a zone is built over a trained base, not over random weights: give --model in place of --init."
        )
    check_disjoint(zone_samples(dataset, roles), dataset["utility"])


def train_zone(
    run: Run,
    request: Request,
    dataset: Dataset,
    kind: str,
    options: Mapping[str, Any],
    *,
    model: str,
    roles: Sequence[Role],
    progress: Progress,
) -> Path:
    """Build the zone, save base and zone together, and record what it cost; the folder of the model."""
    samples = zone_samples(dataset, roles)
    loaded = load_model(model, **request.loading)
    before = np.mean([s.loss for s in collect(loaded.model, loaded.adapter, samples)])
    progress.say(f"building a zone of kind {kind} from {len(samples)} records")
    with measure(loaded.adapter, loaded.model) as cost:
        zoned = build_zone(loaded, samples, dataset["utility"], kind, options=options, seed=request.seed)
    loaded.model = zoned
    after = np.mean([s.loss for s in collect(zoned, loaded.adapter, samples)])
    say_truncated(run, loaded.adapter, progress)
    folder = save_model(loaded, run.folder / "model")
    keys = key_file(zoned.zone.salt, folder)
    progress.say(f"the keys of the zone are in {keys}: keep them apart from the model")
    figures = {
        "first_loss": float(before),
        "last_loss": float(after),
        "steps": 0,
        "zone": kind,
        "records": len(zoned.zone.record_ids),
        "subjects": len(zoned.zone.blocks),
        "zone_digest": zoned.zone.digest(),
        "gate": {k: v for k, v in zoned.zone.public.constants.items() if isinstance(v, (int, float, str))},
    }
    record_training(run, folder, samples, roles, start=model, zone=zoned.zone)
    run.write_json("results.json", {"schema": TRAINING, **figures, "cost": cost.record(), "roles": roles})
    outputs = {"model": digest_folder(folder)}
    run.finish(flops=cost.flops, parameters_changed=cost.parameters_changed, figures=figures, outputs=outputs)
    return folder
