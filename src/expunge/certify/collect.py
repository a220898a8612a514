"""Make ``evidence.json`` of a finished ``unlearn`` or ``audit`` run, from its files, the models and the data.

* near-duplicates of what is to be forgotten among what stays; the pairs stand in ``duplicates.jsonl``, to be decided;
* of a zone the removal: the zone from before, the zone after, one built again from the records that stay, every row
  extracted again; of one that is released with noise the gradient norms in place of the second zone; and the chain of
  manifests of what it was made from;
* of a private training, or a reset, the same model made once more from the same data and seeds;
* of an edit how far what stays has moved, by forward-mode Fisher beside the direct divergence;
* where canaries were put in by coins, guesses about them.

Nothing is written about whatever cannot be looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from expunge.certify.evidence import rows
from expunge.certify.exact import manifest_of_zone, of_residual, of_zone, seen_before
from expunge.certify.fisher import collateral
from expunge.certify.guesses import guesses_of
from expunge.certify.noisy import hidden_by, of_private, of_reset
from expunge.certify.provenance import Manifest, lineage_of, never_saw, normalised_digest
from expunge.certify.sections import Change, DuplicateSearch, Section, add_section
from expunge.data.canary_coins import DATASET as COINS
from expunge.data.duplicates import Duplicates, near_duplicates
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.files import digest_folder, read_jsonl, write_jsonl
from expunge.models.load import load_model
from expunge.record import digest_code, read_record
from expunge.runs import read_config
from expunge.zones.model import ZonedModel
from expunge.zones.shared import Shared
from expunge.zones.zone import FrozenBase, Zone, shared_owners

DUPLICATES = "duplicates.jsonl"
MOST = 200  # samples on which the change of what stays is measured


@dataclass(frozen=True)
class Place:
    """Where the models of a run are, and the options of the unlearning that made the later one."""

    model: Path
    original: Path | None
    method: str
    settings: Mapping[str, Any]


def collect(
    run: Path | str, dataset: Dataset, *, decisions: Mapping[tuple[str, str], str] | None = None
) -> tuple[str, ...]:
    """Add what can be found out to ``evidence.json`` of the run; the names of the sections that were written.

    ``dataset`` is what the run was given. ``decisions``: (forget id, kept id) -> why this near-duplicate may stay; to
    those that stand in ``duplicates.jsonl`` of the run already.

    Raises:
        UserError: no finished run, other data than the run was given, other models, or a decision on no pair.
    """
    folder = Path(run)
    record = read_record(folder)
    if record.command not in ("unlearn", "audit") or record.status != "done":
        raise UserError(f"'{folder}' is no finished run of 'unlearn' or 'audit': evidence is collected for those.")
    if record.digests.get("data") not in (None, dataset.digest()):
        raise UserError(f"the data given is not the data of '{folder}': give the same --data or --forget and --retain.")
    search = near_duplicates(dataset["forget"], dataset["retain"], handled={**_decided(folder), **(decisions or {})})
    _list(search, folder)
    found: dict[str, Any] = {"duplicates": DuplicateSearch.model_validate(search.record())}
    place = place_of(folder)
    trained = hidden_by(place.model)
    if trained is not None:
        found |= of_private(place.model, trained, dataset["forget"])
    elif place.method == "reset" and place.original is not None:
        found |= of_reset(place.model, place.original, dataset, {kept for _, kept in search.handled})
    elif place.method.startswith("zone-") and place.original is not None:
        found |= _of_zone(place, place.original, dataset, {kept for _, kept in search.handled})
    elif place.original is not None and (change := _moved(place, place.original, dataset)) is not None:
        found["change"] = change
    if dataset.name == COINS and (guessed := guesses_of(rows(folder), dataset)) is not None:
        found["guesses"] = guessed
    add_section(folder, **found)
    return tuple(found)


def place_of(folder: Path) -> Place:
    """The models of an ``unlearn`` run, or of an ``audit`` run whose model an ``unlearn`` run made.

    Raises:
        UserError: a model has changed since the run.
    """
    record, options = read_record(folder), read_config(folder)
    model, made, digests = folder / "model", options, record.digests
    if record.command == "audit":
        model = Path(str(options["model"])).expanduser()
        made, digests = _maker(model, record.digests["model"])
    before = options.get("original") if record.command == "audit" else None
    original = before or made.get("model")
    known = record.digests.get("original") if before else digests.get("model")
    path = None if original is None or known is None else Path(str(original)).expanduser()
    for given, digest in ((model, record.digests.get("output.model", record.digests.get("model"))), (path, known)):
        if given is not None and (not given.is_dir() or digest_folder(given) != digest):
            raise UserError(f"'{given}' is not the model that '{folder}' had: put it back to collect evidence.")
    return Place(model, path, str(made.get("method", "")), made.get("set") or {})


def _maker(model: Path, digest: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(options, digests) of the run that made a model; empty when that is not known."""
    folder = model.resolve().parent
    try:
        record = read_record(folder)
        if record.command == "unlearn" and record.digests.get("output.model") == digest:
            return read_config(folder), record.digests
    except UserError:  # a model from elsewhere
        pass
    return {}, {}


# -- near-duplicates ---------------------------------------------------------------------------------------------------


def _decided(folder: Path) -> dict[tuple[str, str], str]:
    """Pairs for which somebody has written a reason into the list of an earlier search.

    Raises:
        UserError: the list is damaged.
    """
    path = folder / DUPLICATES
    if not path.is_file():
        return {}
    try:
        return {(str(r["forget"]), str(r["kept"])): why for r in read_jsonl(path) if (why := str(r["why"]).strip())}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"'{path}' is damaged: delete it, collect again, and write your reasons anew.") from None


def _list(search: Duplicates, folder: Path) -> None:
    """The pairs, each with the reason for which it may stay: empty until somebody writes one."""
    lines = [{**asdict(pair), "why": search.handled.get((pair.forget, pair.kept), "")} for pair in search.pairs]
    if lines or (folder / DUPLICATES).is_file():
        write_jsonl(folder / DUPLICATES, lines)


# -- edits -------------------------------------------------------------------------------------------------------------


def _moved(place: Place, original: Path, dataset: Dataset) -> Change | None:
    """How far the model has moved on what stays; None where nothing stays, or the two are of different shapes."""
    kept: tuple[Literal["retain", "utility"], ...] = ("retain", "utility")
    role = next((name for name in kept if dataset[name]), None)
    if role is None:
        return None
    samples = dataset[role]
    samples = samples[:: -(-len(samples) // MOST)]  # spread over all of them
    before, after = load_model(str(original)), load_model(str(place.model))
    try:
        return collateral(before.model, after.model, before.adapter, samples).section(role)
    except UserError:
        return None


# -- zones -------------------------------------------------------------------------------------------------------------


def _of_zone(place: Place, original: Path, dataset: Dataset, may_stay: Set[str]) -> dict[str, Any]:
    """``may_stay``: ids of near-duplicates that somebody has decided to keep; their words count as their own."""
    old, new = load_model(str(original)), load_model(str(place.model))
    if not isinstance(old.model, ZonedModel) or not isinstance(new.model, ZonedModel):
        raise UserError(f"'{original}' or '{place.model}' holds no zone: nothing can be compared.")
    before, after = seen_before(old.model.zone), new.model.zone
    if old.model.zone.sealed or after.sealed:
        raise UserError("blocks of the zone are closed: give the key files of both zones, or nothing can be compared.")
    base = FrozenBase(new.model.base, new.adapter)
    owners = shared_owners(dataset.private)
    requested = _requested(dataset, owners, by_subject=place.settings.get("scope", "records") == "subjects")
    stay = {row.record.digest for block in after.blocks.values() for row in block.rows.values()}
    kept = [s for s in dataset.private if after.record_digest(s.digest()) in stay]
    if len(kept) < len(stay):
        raise UserError(
            f"the zone holds {len(stay) - len(kept)} record(s) that the data given does not: give all of its data."
        )
    new.model.eval()
    sections: dict[str, Section | Any] = {}
    again: Zone | None = None
    if isinstance(after, Shared) and after.options.epsilon:  # its weights are no function of the rows
        judged, earlier = after.certificate()
        sections["residual"] = of_residual(judged, after, earlier_mu=earlier)
    else:
        again = type(after)(after.options, after.public, after.base_digest, after.salt)
        again.add([again.record(s, base.adapter, owners.get(s.id, ())) for s in kept], base)
    sections["removal"] = of_zone(before, after, requested, rebuilt=again, base=base, private=dataset.private)
    below = _below(original)
    under = below[0].made_from[0] if below and below[0].made_from else after.base_digest
    own = manifest_of_zone(place.model, after, kept, under, digest_code())
    named = (normalised_digest(s, own.salt) for s in kept if s.id not in may_stay)
    own = own.model_copy(update={"normalised": tuple(sorted({d for d in named if d is not None}))})
    # Of a zone from which nothing was removed the run before speaks too; what stands in it now is what counts.
    sections["provenance"] = never_saw(
        own.artefact, [own, *(m for m in below if m.artefact != own.artefact)], requested
    )
    return sections


def _below(zone: Path) -> list[Manifest]:
    """Manifests of a zone and of what it was made from; a removal before this one adds nothing to them."""
    options, _ = _maker(zone, digest_folder(zone))
    if str(options.get("method", "")).startswith("zone-"):
        return _below(Path(str(options["model"])).expanduser())
    return lineage_of(zone)


def _requested(dataset: Dataset, owners: Mapping[str, Sequence[str]], *, by_subject: bool) -> list[Sample]:
    """The forget samples; where whole subjects were asked for, everything that is about them."""
    if not by_subject:
        return list(dataset["forget"])
    people = {s.subject for s in dataset["forget"]}
    return [s for s in dataset.private if s.subject in people or people & set(owners.get(s.id, ()))]
