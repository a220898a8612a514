"""The statement that is signed: an in-toto Statement v1 about one model, with the evidence of one run.

Its shape is :data:`expunge.certify.vendored.SHAPE`; what is built here is read back through the verifier's own reader
before it is signed, so that nothing is signed which could not be verified.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import expunge
from expunge.certify import evidence
from expunge.certify.canonical import canonical
from expunge.certify.commitments import Keys
from expunge.certify.evidence import RunFacts
from expunge.certify.signing import stamp
from expunge.certify.timestamps import Bad, check_stamp, token_of
from expunge.certify.vendored import (
    DISPOSALS,
    PREDICATE,
    STATEMENT,
    Unreadable,
    check_statement,
    manifest_digest,
    manifest_of,
    oms_root,
    overall,
    read_statement,
)
from expunge.errors import UserError, unknown
from expunge.record import digest_code

STATES = ("destroyed", "sealed", "unknown")
STAMP_LIMIT = 2**16  # bytes of a time-stamp token; real ones have some thousand

ASSUMPTIONS = (
    "The run was carried out as its record says: a signature binds the signer to the measurements, and proves neither "
    "a training nor a measurement.",
    "The samples of the request are all that was to be forgotten: copies, translations and texts made from them count "
    "only where a claim names them.",
    "Disposal of other artefacts is as the signer states it; nobody can measure that a file is nowhere.",
)
NOT_CLAIMED = (
    "That no information about the data is left in the model, beyond what a claim says.",
    "Anything about attacks that were not run, or with more effort than was spent.",
    "Anything about the model after further training, merging, or a quantisation that was not measured.",
    "That the data cannot be had back from older checkpoints, adapters, optimizer states, caches or helper models "
    "whose disposal is unknown: beside an older checkpoint even an exact retrain gives them away (arXiv 2505.24379).",
    "That the law of any country is satisfied.",
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the signer adds to the run: whose request it was, by when it was due, what became of the rest.

    Args:
        id: of the request; random, never a name.
        regime: under which it was made, e.g. ``gdpr``.
        received, due: times of the request.
        disposal: ``{artefact: (state, when)}`` with artefacts :data:`expunge.certify.vendored.DISPOSALS` and states
            :data:`STATES`; what is not named is unknown.
        timestamp: RFC 3161 token (DER) over the digest of the model's manifest, by a time-stamping authority.
    """

    id: str | None = None
    regime: str | None = None
    received: datetime | None = None
    due: datetime | None = None
    disposal: Mapping[str, tuple[str, datetime | None]] = field(default_factory=dict)
    timestamp: bytes | None = None


def build(
    facts: RunFacts,
    claims: Sequence[Mapping[str, Any]],
    keys: Keys,
    request: Request,
    created: datetime,
    until: datetime,
) -> bytes:
    """The canonical bytes of the statement, ready to be signed.

    Raises:
        UserError: a claim or option that no certificate can hold, or a model folder that no manifest can.
    """
    forgotten = evidence.forgotten(facts.folder)
    try:
        manifest = manifest_of(facts.model)
        method = evidence.method(facts, keys)
        hidden = method["kind"] == "private" and any(c["level"] == "L1" and c["verdict"] == "certified" for c in claims)
        unchanged = facts.original == facts.recorded and not hidden
        found = {
            "_type": STATEMENT,
            "subject": [{"name": "model", "digest": {"sha256": manifest_digest(manifest)}}],
            "predicateType": PREDICATE,
            "predicate": {
                "created": stamp(created),
                "valid_until": stamp(until),
                "generator": {"name": "expunge", "version": expunge.__version__, "code": digest_code()},
                "model": {"manifest": manifest, "oms_root": oms_root(manifest), "recorded": facts.recorded},
                "request": _request(request, forgotten, keys),
                "lineage": _lineage(facts, request),
                "method": method,
                "evidence": evidence.evidence(facts, keys),
                "claims": [dict(claim) for claim in claims],
                "verdict": "refused" if unchanged else overall(claims),
                "assumptions": list(ASSUMPTIONS),
                "not_claimed": list(NOT_CLAIMED),
                "environment": facts.record.environment.model_dump(mode="json"),
                "timestamp": None
                if request.timestamp is None
                else _token(request.timestamp, manifest_digest(manifest)),
            },
        }
        payload = canonical(found)
        wrong = [f.text for f in check_statement(read_statement(payload), created) if f.state == "refuted"]
    except Unreadable as error:
        raise UserError(f"this cannot be certified: {error}") from error
    if wrong:
        raise UserError(f"this cannot be certified: {' '.join(wrong)}")
    return payload


def _request(request: Request, forgotten: Mapping[str, str], keys: Keys) -> dict[str, Any]:
    return {
        "id": request.id,
        "regime": request.regime,
        "received": None if request.received is None else stamp(request.received),
        "due": None if request.due is None else stamp(request.due),
        "samples": len(forgotten),
        "subjects": len(set(forgotten.values())),
        "commitment": commit_request(keys, forgotten),
    }


def commit_request(keys: Keys, forgotten: Mapping[str, str]) -> str:
    """Commitment to ids and subjects of the forgotten samples; their texts are in the commitment to the data."""
    return keys.commit("request", "forgotten", sorted([i, s] for i, s in forgotten.items()))


def _lineage(facts: RunFacts, request: Request) -> dict[str, Any]:
    digests = facts.record.digests if facts.made is None else {**facts.made.record.digests, **facts.record.digests}
    for artefact, (state, when) in request.disposal.items():
        if artefact not in DISPOSALS:
            raise unknown("artefact of --disposal", artefact, DISPOSALS)
        if state not in STATES:
            raise unknown("state of --disposal", state, STATES)
        if (when is None) != (state == "unknown"):
            raise UserError(f"--disposal {artefact}={state}: 'destroyed' and 'sealed' have a date, 'unknown' has none.")
        if state == "destroyed":
            _refuse_present(facts, artefact)
    given = {a: request.disposal.get(a, ("unknown", None)) for a in DISPOSALS}
    return {
        "original": facts.original,
        "base": facts.made.record.digests.get("model") if facts.private and facts.made else digests.get("base"),
        "references": [d for name, d in sorted(facts.record.digests.items()) if name.startswith("reference.")],
        "disposal": {a: {"state": s, "when": None if w is None else stamp(w)} for a, (s, w) in given.items()},
    }


def _refuse_present(facts: RunFacts, artefact: str) -> None:
    """What is said to be destroyed must at least not lie where the run had it."""
    places: list[Any] = []
    if artefact == "original":
        made = facts.made.config.get("model") if facts.made else None
        places = [facts.model if facts.private else made, facts.config.get("original")]
    elif artefact == "caches":
        places = [facts.folder / "signals"]
    elif artefact in ("helpers", "optimizer"):
        places = [run / "work" for run in (facts.folder, facts.model.resolve().parent)]
    for place in places:
        if place is not None and Path(str(place)).exists():
            raise UserError(f"--disposal {artefact}=destroyed, and '{place}' is there: destroy it, or say 'unknown'.")


def _token(given: bytes, digest: str) -> str:
    """The token of an authority's answer, if it is a good one over ``digest``.

    Raises:
        UserError: it is over something else, or none that can be read.
    """
    if len(given) > STAMP_LIMIT:
        raise UserError(f"--timestamp has {len(given)} bytes, and no RFC 3161 token is that large: give the .tsr file.")
    token = token_of(given)
    try:
        check_stamp(token, digest)
    except Bad as error:
        raise UserError(f"--timestamp: {error} It must be over the digest of the model's manifest.") from error
    return base64.b64encode(token).decode()


def day(text: str | None, option: str) -> datetime | None:
    """``2026-11-23`` or ``2026-11-23T15:00:00Z`` as UTC.

    Raises:
        UserError: another spelling.
    """
    if text is None:
        return None
    for form in ("%Y-%m-%d", "%Y-%m-%dT%H:%M:%SZ"):
        try:
            return datetime.strptime(text, form).replace(tzinfo=UTC)
        except ValueError:
            continue
    raise UserError(f"{option} {text!r} is no date: write 2026-11-23 or 2026-11-23T15:00:00Z.")
