"""Evidence for L0 and L1, made from the artefacts themselves: what was taken out, and what is built again without it.

``seen_before`` photographs a zone before the removal; ``of_zone`` compares the zone after it with one that was built
from the records that stay. ``of_training`` does the same for an exact retraining from two manifests. Nothing here is
taken on trust but the manifests: digests are computed again. ``of_residual`` takes over a residual certificate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from expunge.certify.provenance import Manifest, Part, describe, salted, tokenizer_digest
from expunge.certify.sections import Removal, Residual
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.zones.residual import ResidualCertificate
from expunge.zones.zone import FrozenBase, Zone

Statistics = Literal["public", "private", "unknown"]


@dataclass(frozen=True, slots=True)
class ZoneState:
    """A zone at one moment: its digest, the salted digests of its records, and the digest of its base."""

    digest: str
    records: frozenset[str]
    base: str
    salt: str


def seen_before(zone: Zone) -> ZoneState:
    """Take this before :meth:`Zone.remove`, which changes the zone in place."""
    return ZoneState(zone.digest(), _records(zone), zone.base_digest, zone.salt)


def of_zone(
    before: ZoneState,
    after: Zone,
    requested: Sequence[Sample],
    *,
    rebuilt: Zone | None = None,
    base: FrozenBase | None = None,
    private: Sequence[Sample] = (),
    deterministic: bool = True,
) -> Removal:
    """The evidence of a removal from a zone.

    Args:
        requested: the samples that somebody asked to forget. rebuilt: the zone built anew, under the same salt, from
        the records that stay. base: the frozen base; with it every row is extracted again, alone, and compared byte
        for byte. private: all private samples, none of which may be among the texts of the public artefacts.

    Raises:
        UserError: the zones have different salts, so their digests cannot be compared.
    """
    for other in (rebuilt, after):
        if other is not None and other.salt != before.salt:
            raise UserError("the zones have different salts: build the second one with the salt of the first.")
    rows: Literal["alone", "batched", "unknown"] = "unknown"
    if base is not None:
        rows = "batched" if after.check(base) else "alone"
    return Removal(
        requested=tuple(sorted({after.record_digest(s.digest()) for s in requested})),
        removed=tuple(sorted(before.records - _records(after))),
        before=before.digest,
        after=after.digest(),
        rebuilt=None if rebuilt is None else rebuilt.digest(),
        base_before=_as_digest(before.base),
        base_after=_as_digest(after.base_digest),
        statistics=_statistics(after, [*requested, *private]),
        rows=rows,
        deterministic=deterministic,
    )


def _records(zone: Zone) -> frozenset[str]:
    return frozenset(row.record.digest for block in zone.blocks.values() for row in block.rows.values())


def _as_digest(text: str) -> str | None:
    """Some bases are named by another digest than SHA-256; it is hashed, so that all have one form."""
    if not text:
        return None
    is_hex = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return text if is_hex else hashlib.sha256(text.encode()).hexdigest()


def _statistics(zone: Zone, private: Sequence[Sample]) -> Statistics:
    if any(s.digest() in zone.public.texts for s in private):
        return "private"
    return "public" if zone.public.texts else "unknown"


def manifest_of_zone(folder: Path, zone: Zone, records: Sequence[Sample], base: str, code: str) -> Manifest:
    """The manifest of a zone in its model folder: its records, and its public parts with the texts they were fitted on.

    ``base`` is the digest of the folder that its base was loaded from, ``code`` that of the code that built it.
    """
    first = describe(kind="zone", artefact=folder, records=records, code=code, made_from=(base,))
    texts = tuple(sorted(salted(text, first.salt) for text in zone.public.texts))
    public = Part(digest=zone.public.digest(), fitted_on=texts or None, source="public texts of the zone")
    parts = dict.fromkeys(("statistics", "gate", "constants"), public)
    tokenizer = tokenizer_digest(folder) or base
    parts["tokenizer"] = Part(digest=tokenizer, fitted_on=(), source="that of the base")
    return first.model_copy(update={"parts": parts})


def of_training(
    before: Manifest, after: Manifest, requested: Sequence[Sample], *, replayed: str | None, deterministic: bool = True
) -> Removal:
    """The evidence of an exact retraining: manifests of original and retrained model under one salt.

    ``replayed`` is the digest of a second training on the same records. Such a model has no rows; they count as alone.

    Raises:
        UserError: different salts, unknown records, or records in the retrained model that the original never had.
    """
    if before.salt != after.salt:
        raise UserError("the manifests have different salts: describe both models with one salt.")
    if before.records is None or after.records is None:
        raise UserError("a manifest does not know its records: nothing can be said about what was left out.")
    first, then = set(before.records), set(after.records)
    if then - first:
        raise UserError(f"the retrained model has {len(then - first)} record(s) more than the original: give its own.")
    asked = {salted(s.digest(), after.salt) for s in requested}
    fitted = [part.fitted_on for part in after.parts.values()]
    statistics: Statistics = "public"
    if any(asked & set(texts or ()) for texts in fitted):
        statistics = "private"
    elif any(texts is None for texts in fitted):
        statistics = "unknown"
    base = hashlib.sha256("/".join(sorted(after.made_from)).encode()).hexdigest()
    base_before = hashlib.sha256("/".join(sorted(before.made_from)).encode()).hexdigest()
    return Removal(
        requested=tuple(sorted(asked)),
        removed=tuple(sorted(first - then)),
        before=before.artefact,
        after=after.artefact,
        rebuilt=replayed,
        base_before=base_before,
        base_after=base,
        statistics=statistics,
        rows="alone",
        deterministic=deterministic,
    )


def of_residual(certificate: ResidualCertificate, zone: Zone, *, earlier_mu: Sequence[float] = ()) -> Residual:
    """The evidence of a shared zone that was released with noise, bound to the digest of the released zone.

    The noise is that of the certificate, so the zone must have been published with it. ``earlier_mu``: of the releases
    before. A certificate that refuses is taken over as it is: the claim refuses for the same reason.
    """
    names = ("residual", "reference_residual", "tolerance", "reference_tolerance", "rounding", "strong_convexity")
    numbers = {name: getattr(certificate, name) for name in (*names, "noise", "logit_noise", "delta")}
    return Residual(artefact=zone.digest(), earlier_mu=tuple(earlier_mu), **numbers)
