"""Build a zone over a base: public artefacts from the utility set, then one row per private record."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from expunge.data.samples import Dataset, Role, Sample
from expunge.errors import UserError
from expunge.models.adapter import evaluating
from expunge.models.load import Loaded
from expunge.options import configure
from expunge.zones.model import ZonedModel
from expunge.zones.storage import digest_weights
from expunge.zones.zone import FrozenBase, Zone, get_zone, shared_owners


def build_zone(
    loaded: Loaded,
    private: Sequence[Sample],
    public: Sequence[Sample],
    kind: str = "store",
    *,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    salt: str | None = None,
) -> ZonedModel:
    """A zoned model over ``loaded`` that knows ``private``; gates and statistics come from ``public`` alone.

    ``salt`` (hexadecimal) keys the digests of records; a new one by default. The same salt, data and seed give the
    same zone, byte for byte, whatever the order of ``private``.

    Raises:
        UserError: no text model, too few public subjects, unknown kind or option, or a private text among the public.
    """
    found = get_zone(kind)
    settings = configure(found.options, options or {}, f"option of zone {kind}")
    if isinstance(loaded.model, ZonedModel):
        raise UserError("this model has a zone already: build the new one over its base.")
    check_disjoint(private, public)
    base = FrozenBase(loaded.model, loaded.adapter)
    with evaluating(loaded.model):
        artefacts = found.build.prepare(base, public, settings, seed)
        zone: Zone = found.build(settings, artefacts, digest_weights(loaded.model), salt or secrets.token_hex(32))
        owners = shared_owners(private)
        zone.add([zone.record(s, base.adapter, owners.get(s.id, ())) for s in private], base)
    return ZonedModel(loaded.model, zone)


def check_disjoint(private: Sequence[Sample], public: Sequence[Sample]) -> None:
    """Refuse statistics on private texts: they would move when a subject leaves.

    Raises:
        UserError: a private sample, or a private subject, is among the public ones.
    """
    texts, people = {s.digest() for s in public}, {s.subject for s in public}
    for s in private:
        if s.digest() in texts or s.subject in people:
            raise UserError(
                f"'{s.subject}' (record '{s.id}') is private and among the public texts: statistics and gates of a "
                "zone may be fitted on public texts only; take it out of the utility set."
            )


def zone_samples(dataset: Dataset, roles: Sequence[Role]) -> list[Sample]:
    """The private samples of a training with a zone.

    Raises:
        UserError: utility is among the roles, or there is no utility set to fit gates on.
    """
    if "utility" in roles:
        raise UserError(
            "utility is what a zone's gate is fitted on, so it cannot be private too: leave it out of --roles."
        )
    if not dataset["utility"]:
        raise UserError("a zone fits its gate on public texts, and the data has none: add --utility FILE.")
    return [s for role in roles for s in dataset[role]]
