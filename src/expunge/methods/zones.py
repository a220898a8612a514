"""Removal from a zone: ``zone-<kind>`` for every kind of zone there is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from expunge.errors import UserError
from expunge.methods.registry import Context, Method, Outcome, register
from expunge.options import option
from expunge.zones.model import ZonedModel
from expunge.zones.storage import block_name
from expunge.zones.zone import FrozenBase, all_zones


@dataclass(frozen=True, kw_only=True)
class ZoneRemovalOptions:
    """What goes with the forget samples."""

    scope: str = option(
        "records",
        "records: the forget samples alone; subjects: everything about their subjects",
        "ours: the request's own words",
        choices=("records", "subjects"),
    )


def remove_from_zone(kind: str, context: Context, options: ZoneRemovalOptions) -> Outcome:
    """Take the records out of the zone; the rest is what a zone built without them would be."""
    model = context.model
    if not isinstance(model, ZonedModel):
        raise UserError(
            "this model has no zone to remove from: build one with 'expunge train --zone store', or use a method that "
            "edits weights."
        )
    zone = model.zone
    if zone.kind != kind:
        raise UserError(f"this model's zone is of kind {zone.kind}: use --method zone-{zone.kind}.")
    by_digest = {row.record.digest: row_id for block in zone.blocks.values() for row_id, row in block.rows.items()}
    wanted = {s.id: by_digest.get(zone.record_digest(s.digest())) for s in context.forget} if zone.salt else {}
    found = sorted(row_id for row_id in wanted.values() if row_id is not None)
    lost = [s.id for s in context.forget if wanted.get(s.id) is None]
    people = {s.subject for s in context.forget}
    closed = {who for who in people if zone.salt and block_name(zone.salt, who) in zone.sealed}
    for who in sorted(closed):  # without its key a block can go only as a whole
        del zone.sealed[block_name(zone.salt, who)]
    if not found and not closed:
        raise UserError(
            f"none of the {len(context.forget)} forget samples is in the zone (first: '{lost[0]}'): give the "
            "samples as they were when the zone was built, and its key file beside the model."
        )
    base = FrozenBase(model.base, context.adapter)
    shared: dict[str, tuple[str, ...]] = {}
    if options.scope == "subjects":
        removed: list[str] = []
        for who in sorted(people & zone.blocks.keys()):
            done = zone.remove(subject=who, base=base)
            removed += done.records
            shared |= done.shared
    else:
        done = zone.remove(ids=found, base=base)
        removed, shared = [*done.records], {**done.shared}
    gone = sorted(who for who in people if who not in zone.blocks)
    notes = [f"{len(removed)} record(s) removed, {len(gone)} subject(s) gone altogether; no weight was touched"]
    if lost and not closed:
        notes.append(f"{len(lost)} forget sample(s) were not in the zone, first '{lost[0]}'")
    if shared:
        notes.append(f"{len(shared)} of the removed record(s) also spoke of others, who lose them too")
    notes.append("earlier copies of the zone still open with earlier key files: destroy the keys of what was removed")
    record = {"removed": len(removed), "subjects_gone": len(gone), "zone_digest": zone.digest()}
    return Outcome(model, notes, record)


for _kind in all_zones().values():
    register(
        Method(
            name=f"zone-{_kind.name}",
            run=partial(remove_from_zone, _kind.name),
            options=ZoneRemovalOptions,
            paper=_kind.source,
            summary=f"Remove records from a {_kind.name} zone ({_kind.summary}).",
            modalities=frozenset({"text"}),
            removes_from_weights=False,
            changes="memory",
            formula="zone without f = zone that was built without f, byte for byte",
        )
    )
