"""Make the evidence of a finished ``unlearn`` run from the run, the models around it and the data: ``evidence.json``.

For every run near-duplicates are searched. For a zone the removal is recomputed: the zone from before, the zone after,
one built again from the records that stay, every row extracted again; and the chain of manifests is followed through
the runs that trained zone and base. Nothing is written about whatever cannot be looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.certify.exact import of_zone, seen_before
from expunge.certify.provenance import MANIFEST, Manifest, Part, describe, never_saw, read_manifest, salted
from expunge.certify.sections import DuplicateSearch, Section, add_section
from expunge.data.duplicates import near_duplicates
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.files import digest_file, digest_folder
from expunge.models.load import load_model
from expunge.record import digest_code, read_record
from expunge.runs import read_config
from expunge.zones.model import ZonedModel
from expunge.zones.zone import FrozenBase, Zone, shared_owners

TRAINED_ON = "trained_on.json"  # what ``expunge train`` writes beside a model


def collect(
    run: Path | str, dataset: Dataset, *, decisions: Mapping[tuple[str, str], str] | None = None
) -> tuple[str, ...]:
    """Add what can be found out to ``evidence.json`` of the run; the names of the sections that were written.

    ``dataset`` is what the run was given. ``decisions``: (forget id, kept id) -> why this near-duplicate may stay.

    Raises:
        UserError: no finished unlearn run, other data than the run was given, or a decision on no pair.
    """
    folder = Path(run)
    record, options = read_record(folder), read_config(folder)
    if record.command != "unlearn" or record.status != "done":
        raise UserError(f"'{folder}' is no finished run of 'unlearn': evidence is collected for those.")
    if record.digests.get("data") not in (None, dataset.digest()):
        raise UserError(f"the data given is not the data of '{folder}': give the same --data or --forget and --retain.")
    search = near_duplicates(dataset["forget"], dataset["retain"], handled=decisions)
    found: dict[str, Any] = {"duplicates": DuplicateSearch.model_validate(search.record())}
    if str(options.get("method", "")).startswith("zone-"):
        scope = (options.get("set") or {}).get("scope", "records")
        found |= _of_zone_run(folder, Path(str(options["model"])), dataset, by_subject=scope == "subjects")
    add_section(folder, **found)
    return tuple(found)


def _of_zone_run(folder: Path, original: Path, dataset: Dataset, *, by_subject: bool) -> dict[str, Any]:
    old, new = load_model(original), load_model(folder / "model")
    if not isinstance(old.model, ZonedModel) or not isinstance(new.model, ZonedModel):
        raise UserError(f"'{original}' or '{folder / 'model'}' holds no zone: nothing can be compared.")
    before, after = seen_before(old.model.zone), new.model.zone
    if old.model.zone.sealed or after.sealed:
        raise UserError("blocks of the zone are closed: give the key files of both zones, or nothing can be compared.")
    base = FrozenBase(new.model.base, new.adapter)
    owners = shared_owners(dataset.private)
    requested = _requested(dataset, owners, by_subject)
    stay = {row.record.digest for block in after.blocks.values() for row in block.rows.values()}
    kept = [s for s in dataset.private if after.record_digest(s.digest()) in stay]
    if len(kept) < len(stay):
        raise UserError(
            f"the zone holds {len(stay) - len(kept)} record(s) that the data given does not: give all of its data."
        )
    new.model.eval()
    again = type(after)(after.options, after.public, after.base_digest, after.salt)
    again.add([again.record(s, base.adapter, owners.get(s.id, ())) for s in kept], base)
    removal = of_zone(before, after, requested, rebuilt=again, base=base, private=dataset.private)
    manifests = _manifests(original, dataset)
    own = _zone_manifest(folder / "model", after, kept, manifests)
    # Of a zone from which nothing was removed the run before speaks too; what stands in it now is what counts.
    clearance = never_saw(own.artefact, [own, *(m for m in manifests if m.artefact != own.artefact)], requested)
    sections: dict[str, Section | Any] = {"removal": removal, "provenance": clearance}
    return sections


def _requested(dataset: Dataset, owners: Mapping[str, Sequence[str]], by_subject: bool) -> list[Sample]:
    """The forget samples; where whole subjects were asked for, everything that is about them."""
    if not by_subject:
        return list(dataset["forget"])
    people = {s.subject for s in dataset["forget"]}
    return [s for s in dataset.private if s.subject in people or people & set(owners.get(s.id, ()))]


def _zone_manifest(folder: Path, zone: Zone, kept: Sequence[Sample], below: Sequence[Manifest]) -> Manifest:
    """The zone that is released: its records, and public parts with the texts that they were fitted on."""
    first = describe(kind="zone", artefact=folder, records=kept, code=digest_code())
    texts = tuple(sorted(salted(text, first.salt) for text in zone.public.texts))
    public = Part(digest=zone.public.digest(), fitted_on=texts or None, source="public texts of the zone")
    names = [folder / n for n in ("tokenizer.json", "tokenizer.model") if (folder / n).is_file()]
    own = digest_file(names[0]) if names else zone.base_digest
    parts = dict.fromkeys(("statistics", "gate", "constants"), public)
    parts["tokenizer"] = Part(digest=own, fitted_on=(), source="that of the base")
    base = next((parent for m in below[:1] for parent in m.made_from), zone.base_digest)
    return first.model_copy(update={"parts": parts, "made_from": (base,)})


# -- manifests of the runs around a model ------------------------------------------------------------------------------


def _manifests(model: Path, dataset: Dataset) -> list[Manifest]:
    """Manifests of the model and of what it was trained from, as far as the runs around them are there."""
    found: list[Manifest] = []
    place: Path | None = model
    while place is not None and len(found) < 16:
        run = place.expanduser().resolve().parent
        manifest = manifest_of_run(run, dataset)
        if manifest is None:
            break
        found.append(manifest)
        start = read_config(run).get("model")
        place = Path(str(start)) if start and manifest.made_from else None
    return found


def manifest_of_run(run: Path, dataset: Dataset | None = None) -> Manifest | None:
    """``provenance.json`` of a run; or one made from what ``expunge train`` recorded; None when there is neither.

    A model that was initialised has a tokenizer of its own, learnt from the texts that the run was given (utility and
    retain): known when ``dataset`` is that data, else open.

    Raises:
        UserError: a record is damaged, or the model is not the one that the run wrote.
    """
    if (run / MANIFEST).is_file():
        return read_manifest(run)
    if not ((run / TRAINED_ON).is_file() and (run / "run.json").is_file()):
        return None
    record, options = read_record(run), read_config(run)
    try:
        content = json.loads((run / TRAINED_ON).read_text(encoding="utf-8"))
        salt, records = str(content["salt"]), tuple(sorted(map(str, content["samples"])))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{run / TRAINED_ON}' is damaged: train the model again to have it written.") from error
    model = run / "model"
    artefact = record.digests.get("output.model", "")
    if not model.is_dir() or digest_folder(model) != artefact:
        raise UserError(f"'{model}' is not the model that its run wrote: nothing says what it was trained on.")
    parts: dict[str, Part] = {}
    start = record.digests.get("model")
    if not start:
        known = None
        if dataset is not None and record.digests.get("data") == dataset.digest():
            known = tuple(sorted(salted(s.digest(), salt) for role in ("utility", "retain") for s in dataset[role]))
        tokenizer = model / "tokenizer.json"
        if tokenizer.is_file():
            parts["tokenizer"] = Part(digest=digest_file(tokenizer), fitted_on=known, source="texts of the run")
    return Manifest(
        kind="zone's first state" if options.get("zone") else "base",
        artefact=artefact,
        salt=salt,
        records=records,
        made_from=(start,) if start else (),
        parts=parts,
        code=record.digests["code"],
    )
