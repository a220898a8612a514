"""Check an unlearning certificate, offline. This one file stands alone: copy it, read it, run it.

    python vendored.py CERTIFICATE --pub KEY.pem [--pub KEY2.pem] [--model DIR]

It needs Python 3.11 and the package ``cryptography``; ``expunge verify`` runs this same code. It says line by line
what holds, what is refuted, what was not checked and what was only read; exit code 0 nothing is refuted, 1 refuted,
2 unreadable.

A certificate is a DSSE 1.0.2 envelope around an in-toto Statement v1. Both are RFC 8785 canonical JSON, byte for
byte, so that no byte can change without notice. Nothing of the content is looked at before a signature over these
very bytes was found good, and nothing unknown (type, version, level, field) is guessed.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://expunge.dev/unlearning-evidence/v1"
PAYLOAD = "application/vnd.in-toto+json"
LIMIT = 16 * 2**20  # bytes of a certificate
SIGNATURES = 16  # most signatures of one envelope
BLOCK = 2**20
SHOWN = 8  # files that one line names
LEVELS = ("L0", "L1", "L2", "L3", "L4", "L5")
FORMAL = ("L0", "L1")  # levels whose claim is more than evidence
DISPOSALS = ("original", "adapters", "optimizer", "caches", "helpers")  # what may hold the data beside the model
DIGEST, TIME = r"[0-9a-f]{64}", r"20[0-9]{2}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z"

State = Literal["holds", "refuted", "not checked", "read"]


class Unreadable(ValueError):
    """What was given is no certificate, key or model folder that this version knows; one sentence says why."""


class Finding(NamedTuple):
    """One line of the answer."""

    state: State
    text: str


# -- JSON --------------------------------------------------------------------------------------------------------


def need(holds: bool, otherwise: str) -> None:
    """Raise :class:`Unreadable` unless ``holds``."""
    if not holds:
        raise Unreadable(otherwise)


def read_json(data: bytes, what: str) -> Any:
    """The value of ``data``, which must be RFC 8785 canonical JSON of at most :data:`LIMIT` bytes.

    Raises:
        Unreadable: too large, cut off, not UTF-8, a key twice, NaN, too deep, or any other spelling of the value.
    """
    need(len(data) <= LIMIT, f"{what} has {len(data)} bytes; at most {LIMIT} are read.")
    hooks: dict[str, Any] = {"parse_constant": _finite, "parse_int": _integer, "parse_float": _finite}
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object, **hooks)
        same = canonical(value) == data
    except Unreadable as error:
        raise Unreadable(f"{what}: {error}") from None
    except RecursionError:
        raise Unreadable(f"{what} is nested too deeply.") from None
    except ValueError as error:
        raise Unreadable(f"{what} is no JSON ({error}): it was cut off, or is another file.") from None
    need(same, f"{what} is not in the one canonical spelling (RFC 8785): it was written anew, or changed.")
    return value


def canonical(value: Any) -> bytes:
    """RFC 8785 bytes: keys sorted by UTF-16 units, shortest numbers as ECMAScript prints them, no white space.

    Raises:
        Unreadable: a number that is not finite or an integer beyond 2^53 - 1, a lone surrogate, no JSON value.
    """
    if isinstance(value, str):
        try:  # escapes of json.dumps are those of RFC 8785 section 3.2.2.2
            return json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise Unreadable("a text has half of a surrogate pair.") from None
    if value is None or isinstance(value, bool):
        return {None: b"null", True: b"true", False: b"false"}[value]
    if isinstance(value, int):
        need(abs(value) < 2**53, f"the integer {value} is beyond 2^53 - 1.")
        return b"%d" % value
    if isinstance(value, float):
        return _number(value).encode()
    if isinstance(value, Mapping):
        keys = sorted(value, key=lambda key: str(key).encode("utf-16-be", "surrogatepass"))
        return b"{" + b",".join(canonical(key) + b":" + canonical(value[key]) for key in keys) + b"}"
    if isinstance(value, (list, tuple)):
        return b"[" + b",".join(map(canonical, value)) + b"]"
    raise Unreadable(f"a {type(value).__name__} is no JSON value.")


def _number(value: float) -> str:
    """Number::toString of ECMA-262 (RFC 8785 section 3.2.2.3); Python's repr has the same shortest digits."""
    need(math.isfinite(value), f"{value} is no JSON number.")
    if value == 0:
        return "0"
    sign, digits, exponent = Decimal(repr(value)).as_tuple()
    text = "".join(map(str, digits))
    assert isinstance(exponent, int)
    point = len(text) + exponent  # value = 0.text x 10^point
    text = text.rstrip("0")
    minus = "-" if sign else ""
    if len(text) <= point <= 21:
        return minus + text.ljust(point, "0")
    if 0 < point <= 21:
        return f"{minus}{text[:point]}.{text[point:]}"
    if -6 < point <= 0:
        return f"{minus}0.{'0' * -point}{text}"
    return f"{minus}{text[0]}{'.' if text[1:] else ''}{text[1:]}e{point - 1:+d}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    need(len(found) == len(pairs), "a key occurs twice in one object.")
    return found


def _integer(text: str) -> int | float:
    """Canonical JSON writes large floats without an exponent: 1e20 as 100000000000000000000."""
    return int(text) if len(text) < 18 and abs(int(text)) < 2**53 else _finite(text)


def _finite(text: str) -> float:
    value = float(text)
    need(math.isfinite(value), f"{text[:20]} is no finite number.")
    return value


def printable(text: str) -> str:
    """``text`` without characters that could steer a terminal."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


# -- keys and envelope -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublicKey:
    """An Ed25519 key to check with; ``expires`` stands in an ``Expires:`` line before the PEM block, if at all."""

    key: Ed25519PublicKey
    expires: datetime | None = None

    @property
    def id(self) -> str:
        return key_id(self.key)

    def verifies(self, signature: bytes, message: bytes) -> bool:
        try:
            self.key.verify(signature, message)
        except InvalidSignature:
            return False
        return True


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the key's SubjectPublicKeyInfo (DER), in hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def read_public_key(pem: bytes, what: str = "the key") -> PublicKey:
    """A PEM public key.

    Raises:
        Unreadable: no PEM, a private key, another kind of key, or an expiry that is no time.
    """
    need(
        b"PRIVATE KEY-----" not in pem, f"{what} is a private key: give the public one, and keep this one to yourself."
    )
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        raise Unreadable(f"{what} holds no PEM public key: give the one that keygen wrote.") from None
    if not isinstance(key, Ed25519PublicKey):
        raise Unreadable(f"{what} is a {type(key).__name__.strip('_')}: certificates are signed with Ed25519.")
    return PublicKey(key, read_expiry(pem, what))


def read_expiry(pem: bytes, what: str = "the key") -> datetime | None:
    """The time in the ``Expires:`` line of a PEM file, or None if there is none."""
    text = pem.decode("utf-8", "replace")
    need(text.count("-----BEGIN") < 2, f"{what} holds several keys: give one file for each.")
    found = re.findall(r"^\s*Expires:[ \t]*(.*?)[ \t\r]*$", text, re.MULTILINE | re.IGNORECASE)
    need(len(found) < 2, f"{what} has {len(found)} Expires lines: one is allowed.")
    return read_time(found[0], f"the expiry of {what}") if found else None


def read_time(text: str, what: str) -> datetime:
    """``2026-11-23T15:00:00Z``, and no other spelling."""
    try:
        if not re.fullmatch(TIME, text):
            raise ValueError(text)
        return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except ValueError:
        raise Unreadable(f"{what} is {text[:40]!r}: a time like 2026-11-23T15:00:00Z is expected.") from None


@dataclass(frozen=True)
class Envelope:
    """A DSSE envelope: the very bytes that were signed, and pairs of key id (a hint, may be empty) and signature."""

    payload: bytes
    signatures: tuple[tuple[str, bytes], ...]

    @property
    def message(self) -> bytes:
        return pae(PAYLOAD, self.payload)


def pae(payload_type: str, payload: bytes) -> bytes:
    """Pre-authentication encoding of DSSE: what is signed. Lengths are of bytes, in decimal."""
    kind = payload_type.encode("utf-8")
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def read_envelope(data: bytes) -> Envelope:
    """The envelope of a certificate's bytes.

    Raises:
        Unreadable: see :func:`read_json`; another envelope or payload type, no signature or too many, bad base64.
    """
    found = read_json(data, "the certificate")
    need(
        isinstance(found, dict) and set(found) == {"payload", "payloadType", "signatures"},
        "the certificate is no DSSE envelope (payload, payloadType, signatures).",
    )
    kind, entries = found["payloadType"], found["signatures"]
    need(kind == PAYLOAD, f"the envelope holds '{printable(str(kind)[:80])}'; only '{PAYLOAD}' is read.")
    need(
        isinstance(entries, list) and 1 <= len(entries) <= SIGNATURES,
        f"the envelope must have 1 to {SIGNATURES} signatures.",
    )
    signatures = []
    for entry in entries:
        known = isinstance(entry, dict) and {"sig"} <= set(entry) <= {"sig", "keyid"}
        need(known and isinstance(entry.get("keyid", ""), str), "a signature must have a sig and may have a keyid.")
        signatures.append((entry.get("keyid", ""), _base64(entry["sig"], "a signature")))
    return Envelope(_base64(found["payload"], "the payload"), tuple(signatures))


def _base64(text: Any, what: str) -> bytes:
    """Only the one spelling that encoding gives: no line breaks, padding whole, unused bits zero."""
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise Unreadable(f"{what} is no base64.") from None
    need(base64.b64encode(data).decode() == text, f"{what} is not in canonical base64.")
    return data


def check_signatures(
    envelope: Envelope, keys: Sequence[PublicKey], now: datetime, threshold: int | None = None
) -> list[Finding]:
    """Who signed. Every key is tried on every signature: in DSSE the key id is a hint that nobody vouches for.

    ``threshold`` distinct keys must have signed; without it, all that are given.
    """
    good, bad, matched = [], [], set()
    for key in {key.id: key for key in keys}.values():
        number = next((i for i, (_, s) in enumerate(envelope.signatures) if key.verifies(s, envelope.message)), None)
        name, until = key.id[:16], f"valid until {key.expires:%Y-%m-%d}" if key.expires else "without date of expiry"
        if number is None:
            bad.append(f"no signature is by key {name}: the content was changed, or another key signed.")
        elif envelope.signatures[number][0] not in ("", key.id):
            bad.append(f"the signature by key {name} carries the id of another key.")
        elif key.expires is not None and now >= key.expires:
            bad.append(f"key {name} has expired ({until}): whoever holds it could date a signature back.")
        else:
            good.append(f"signed by key {name}, {until}.")
        matched |= {number} - {None}
    if threshold is not None and len(good) < threshold:
        bad.append(f"{len(good)} of the given keys signed; {threshold} are required.")
    state: State = "not checked" if threshold is not None and len(good) >= threshold else "refuted"
    findings = [Finding("holds", text) for text in good] + [Finding(state, text) for text in bad]
    if others := len(envelope.signatures) - len(matched):
        findings.append(Finding("not checked", f"{others} more signature(s), by none of the given keys."))
    return findings


# -- model folder ------------------------------------------------------------------------------------------------


class Broken(Unreadable):
    """A model folder with something that no manifest can hold: a link, a device, a name that is no text."""


def manifest_of(folder: Path) -> dict[str, dict[str, Any]]:
    """``{name: {"sha256", "size"}}`` of every file below ``folder`` (hidden ones too), read in blocks.

    Raises:
        Unreadable: no such folder, or it is empty or cannot be read.
        Broken: a symbolic link or special file anywhere in it, a name that is no portable text.
    """
    need(folder.is_dir(), f"'{folder}' is no folder: give the folder of the model.")
    try:
        found = {_name(path.relative_to(folder)): _entry(path) for path in _files(folder)}
    except OSError as error:
        raise Unreadable(f"'{folder}' cannot be read: {error.strerror}.") from None
    need(bool(found), f"'{folder}' holds no file: give the folder of the model.")
    return dict(sorted(found.items()))


def _files(folder: Path) -> Iterator[Path]:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from _files(folder / entry.name)
        elif entry.is_file(follow_symlinks=False):
            yield folder / entry.name
        else:
            kind = (
                "a symbolic link: copy the model with links followed (cp -rL)"
                if entry.is_symlink()
                else "no plain file"
            )
            raise Broken(f"'{_shown(entry.name)}' in the model folder is {kind}.")


def _shown(name: str) -> str:
    return printable(os.fsencode(name).decode("utf-8", "replace"))


def _name(path: Path) -> str:
    name = path.as_posix()
    if not portable(name):
        raise Broken(f"the file name '{_shown(name)}' cannot stand in a manifest: rename the file.")
    return name


def portable(name: str) -> bool:
    """Whether a manifest may hold the name: relative, inside the folder, printable, the same on every system."""
    parts = name.split("/")
    return name.isprintable() and "\\" not in name and ":" not in parts[0] and not {"", ".", ".."} & set(parts)


def _entry(path: Path) -> dict[str, Any]:
    state, size = hashlib.sha256(), 0
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
            size += len(block)
    return {"sha256": state.hexdigest(), "size": size}


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest's canonical JSON: binds names, contents and sizes."""
    return hashlib.sha256(canonical(manifest)).hexdigest()


def oms_root(manifest: Mapping[str, Mapping[str, Any]]) -> str:
    """Root digest of OpenSSF Model Signing 1.0: SHA-256 over the files' digests in the order of their paths.

    It does not bind the names; :func:`manifest_digest` does. It is there to find a signature of the model by OMS.
    """
    names = sorted(manifest, key=lambda name: name.split("/"))  # part by part, as the package model-signing does
    return hashlib.sha256(b"".join(bytes.fromhex(manifest[name]["sha256"]) for name in names)).hexdigest()


def compare(certified: Mapping[str, Any], found: Mapping[str, Any]) -> list[Finding]:
    """The files of a folder against those of the certificate."""
    differ = {
        "changed": [n for n in certified if n in found and found[n] != certified[n]],
        "missing": [n for n in certified if n not in found],
        "not in the certificate": [n for n in found if n not in certified],
    }
    if any(differ.values()):
        texts = {w: ", ".join(n[:SHOWN]) + " ..." * (len(n) > SHOWN) for w, n in differ.items() if n}
        return [Finding("refuted", f"{len(differ[w])} file(s) of the model {w}: {t}.") for w, t in texts.items()]
    size = sum(entry["size"] for entry in certified.values())
    return [
        Finding("holds", f"the model is the certified one: {len(certified)} files, {size} bytes, by name and content.")
    ]


# -- statement ---------------------------------------------------------------------------------------------------

# What a predicate of version 1 may say: a tuple lists the allowed values, a list holds items of one kind, "*" is any
# key, "|null" allows null. Nothing else is read.
# fmt: off
MEASURE: dict[str, Any] = {
    "name": "text", "value": "number|null", "low": "number|null", "high": "number|null", "n": "count|null",
    "definition": "text|null",
}
CLAIM: dict[str, Any] = {
    "level": LEVELS, "claim": "text", "verdict": ("certified", "refuted", "unsupported"), "assumptions": ["text"],
    "evidence": {"*": "any"}, "not_claimed": ["text"],
}
DISPOSAL: dict[str, Any] = {"state": ("destroyed", "sealed", "unknown"), "when": "time|null"}
SHAPE: dict[str, Any] = {
    "created": "time",
    "valid_until": "time",
    "generator": {"name": "text", "version": "text", "code": "digest"},
    "model": {"manifest": {"*": {"sha256": "digest", "size": "count"}}, "oms_root": "digest", "recorded": "digest"},
    "request": {
        "id": "text|null", "regime": "text|null", "received": "time|null", "due": "time|null", "samples": "count",
        "subjects": "count", "commitment": "digest",
    },
    "lineage": {
        "original": "digest|null", "base": "digest|null", "references": ["digest"],
        "disposal": dict.fromkeys(DISPOSALS, DISPOSAL),
    },
    "method": {
        "name": "text|null", "kind": ("edit", "zone", "retrain", "private", "reset", "unknown"), "version": "text",
        "code": "digest", "config_commitment": "digest", "seeds": ["count"], "parameters_changed": "count|null",
        "helpers_held_data": "flag|null",
    },
    "evidence": {
        "command": "text", "data_commitment": "digest", "record_commitments": {"*": "digest"}, "references": "count",
        "measures": [MEASURE], "axes": [{"axis": "text", "verdict": "text", "tests": "count"}],
        "completeness": {"*": "any"},
    },
    "claims": [CLAIM],
    "verdict": ("certified", "evidence-only", "refused"),
    "assumptions": ["text"],
    "not_claimed": ["text"],
    "environment": {"*": "any"},
    "timestamp": "text|null",
}
ENVELOPED: dict[str, Any] = {  # an in-toto statement; its types are looked at one by one
    "_type": "text", "predicateType": "text", "predicate": "any",
    "subject": [{"name": "text", "digest": {"sha256": "digest"}}],
}
# fmt: on


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Refuse a value that is not of the shape.

    Raises:
        Unreadable: the first place that differs.
    """
    if isinstance(shape, tuple):
        known = isinstance(value, str) and value in shape
        need(known, f"{where} is '{printable(str(value)[:40])}', and this version knows {', '.join(shape)}.")
    elif isinstance(shape, list):
        need(isinstance(value, list), f"{where} is no list.")
        for number, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{number}]")
    elif isinstance(shape, dict):
        need(isinstance(value, dict), f"{where} is no object.")
        free = shape.get("*")
        odd = sorted(set(value) ^ set(shape)) if free is None else ()
        need(not odd, f"{where} has unknown or missing fields: {printable(', '.join(odd)[:200])}.")
        for key, item in value.items():
            check_shape(item, shape[key] if free is None else free, f"{where}.{printable(key)}")
    else:
        need(_is(value, shape), f"{where} is no {shape.replace('|', ' or ')}.")


def _is(value: Any, kind: str) -> bool:
    kind, _, null = kind.partition("|")
    if value is None:
        return bool(null) or kind == "any"
    if isinstance(value, str) and kind in ("time", "digest"):
        return re.fullmatch(DIGEST if kind == "digest" else TIME, value) is not None
    if isinstance(value, bool):
        return kind in ("flag", "any")
    if kind == "count":
        return isinstance(value, int) and value >= 0
    if kind == "number":
        return isinstance(value, (int, float))
    return kind == "any" or (kind == "text" and isinstance(value, str))


def read_statement(payload: bytes) -> dict[str, Any]:
    """The in-toto statement of a payload whose signature was found good.

    Raises:
        Unreadable: see :func:`read_json`; another statement or predicate type, or another shape.
    """
    found = read_json(payload, "the statement")
    check_shape(found, ENVELOPED, "the statement")
    for key, known in (("_type", STATEMENT), ("predicateType", PREDICATE)):
        need(found[key] == known, f"the statement has {key} '{printable(found[key][:80])}'; only '{known}' is read.")
    check_shape(found["predicate"], SHAPE, "predicate")
    need(len(found["subject"]) == 1, f"the statement names {len(found['subject'])} subjects; one model is expected.")
    odd = next((name for name in found["predicate"]["model"]["manifest"] if not portable(name)), None)
    need(odd is None, f"the manifest names '{printable(str(odd))}', which is no file inside of a model folder.")
    return dict(found)


def overall(claims: Sequence[Mapping[str, Any]]) -> str:
    """The verdict that follows from claims: one refuted refuses all; levels from L2 on, alone, are evidence."""
    verdicts = [claim["verdict"] for claim in claims]
    if "refuted" in verdicts or "certified" not in verdicts:
        return "refused"
    formal = any(c["verdict"] == "certified" and c["level"] in FORMAL for c in claims)
    return "certified" if formal else "evidence-only"


def check_statement(statement: Mapping[str, Any], now: datetime) -> list[Finding]:
    """Whether the statement agrees with itself and is still valid."""
    predicate = statement["predicate"]
    model, claims, verdict = predicate["model"], predicate["claims"], predicate["verdict"]
    unchanged = predicate["lineage"]["original"] == model["recorded"]
    certified = {c["level"] for c in claims if c["verdict"] == "certified"}
    formal = bool(certified & set(FORMAL))
    kind, subject = predicate["method"]["kind"], statement["subject"][0]["digest"]["sha256"]
    # The original itself has forgotten nothing; unless its training hid every record from the start.
    follows = "refused" if unchanged and not (kind == "private" and "L1" in certified) else overall(claims)
    allowed = {"zone": FORMAL, "retrain": FORMAL, "private": ("L1",), "reset": ("L1",)}.get(kind, ())
    created, until = (read_time(predicate[key], key) for key in ("created", "valid_until"))
    wrong = {
        "the subject of the statement is not the digest of its manifest.": subject
        != manifest_digest(model["manifest"]),
        "the OMS root digest is not that of the manifest.": model["oms_root"] != oms_root(model["manifest"]),
        f"the verdict is '{verdict}', and '{follows}' follows from the claims.": verdict != follows,
        f"L0 or L1 is certified, and the model came about by {kind}.": formal
        and not certified & set(FORMAL) <= set(allowed),
        f"the certificate ran out on {until:%Y-%m-%d}: certify the model again.": now >= until,
        f"the certificate is dated {predicate['created']}, which is still to come.": now < created,
    }
    whole = f"the statement of {created:%Y-%m-%d} agrees with itself, and runs until {until:%Y-%m-%d}."
    return [Finding("refuted", text) for text, found in wrong.items() if found] or [Finding("holds", whole)]


def read_only(predicate: Mapping[str, Any]) -> list[Finding]:
    """What the signer asserts, and no look at certificate and model can check."""
    disposal = [f"{k} {v['state']}" for k, v in predicate["lineage"]["disposal"].items()]
    texts = [f"{c['level']} {c['verdict']}: {c['claim']}" for c in predicate["claims"]]
    texts += [f"disposal, as the signer states it: {', '.join(disposal)}."]
    texts += [f"evidence: {len(predicate['evidence']['measures'])} figures, measured by the signer."]
    found = [Finding("read", printable(text)) for text in (f"verdict: {predicate['verdict']}.", *texts)]
    if predicate["timestamp"] is not None:
        found.append(Finding("not checked", "the RFC 3161 time stamp: give it to a tool for time stamps."))
    return found


# -- all of it ---------------------------------------------------------------------------------------------------


def check(
    certificate: bytes,
    keys: Sequence[PublicKey],
    model: Path | None = None,
    *,
    now: datetime | None = None,
    threshold: int | None = None,
) -> list[Finding]:
    """Check a certificate's bytes against keys and, if given, a model folder.

    Args:
        keys: who must have signed: all of them, or ``threshold`` of them.
        now: the time at which key and certificate must be valid; UTC.

    Raises:
        Unreadable: the certificate, or the model folder, is nothing that this version reads.
    """
    now = now or datetime.now(UTC)
    need(bool(keys), "without a public key nothing can be checked: give the key of whoever signed.")
    most = len({key.id for key in keys})
    need(
        threshold is None or 1 <= threshold <= most,
        f"{threshold} of {most} keys cannot be required: allowed is 1 to {most}.",
    )
    envelope = read_envelope(certificate)
    findings = check_signatures(envelope, keys, now, threshold)
    if not any(f.state == "holds" for f in findings):
        return [*findings, Finding("not checked", "the content: nobody whom you trust has signed it.")]
    statement = read_statement(envelope.payload)
    findings += check_statement(statement, now)
    predicate = statement["predicate"]
    if model is None:
        findings.append(Finding("not checked", "the model's files: give the folder of the model."))
    else:
        try:
            findings += compare(predicate["model"]["manifest"], manifest_of(model))
        except Broken as error:
            findings.append(Finding("refuted", str(error)))
    return findings + read_only(predicate)


def exit_code(findings: Sequence[Finding]) -> int:
    return int(any(f.state == "refuted" for f in findings))


def lines(findings: Sequence[Finding]) -> str:
    return "\n".join(f"{f.state:<12} {f.text}" for f in findings)


def load(path: Path) -> bytes:
    """The bytes of a small file; never more than one byte beyond :data:`LIMIT`."""
    try:
        with path.open("rb") as file:
            return file.read(LIMIT + 1)
    except OSError as error:
        raise Unreadable(f"'{path}' cannot be read: {error.strerror}.") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check an unlearning certificate, offline.")
    parser.add_argument("certificate", type=Path)
    parser.add_argument("--pub", type=Path, action="append", required=True, help="public key (PEM); repeat for more")
    parser.add_argument("--model", type=Path, help="folder of the model")
    given = parser.parse_args(arguments)
    try:
        keys = [read_public_key(load(path), f"'{path}'") for path in given.pub]
        findings = check(load(given.certificate), keys, given.model)
    except Unreadable as error:
        print(f"unreadable: {error}", file=sys.stderr)
        return 2
    print(lines(findings))
    return exit_code(findings)


if __name__ == "__main__":
    sys.exit(main())
