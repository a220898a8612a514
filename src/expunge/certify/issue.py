"""Certify a run: claims, statement, signature, files. Nothing is overwritten and nothing is half written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from expunge.certify import oms
from expunge.certify.commitments import Keys, read_keys
from expunge.certify.evidence import read_run, rows
from expunge.certify.gather import Evidence
from expunge.certify.levels import assess
from expunge.certify.oms import elliptic_key
from expunge.certify.page import page
from expunge.certify.privacy import refuse_personal
from expunge.certify.signing import PUBLIC, cosign, envelope, private_key, public_pem
from expunge.certify.statement import Request, build
from expunge.certify.vendored import Unreadable, check_statement, load, read_envelope, read_statement, read_time
from expunge.errors import UserError
from expunge.files import SCRATCH, write_text

CERTIFICATE, KEYS, PAGE, OMS = "certificate.json", ".keys.json", ".html", ".sig"  # and PUBLIC, the signer's key
DAYS = 365  # for which a certificate is valid: attacks get better, and evidence gets old


@dataclass(frozen=True)
class Issued:
    """What :func:`certify` made. The paths are None when nothing was signed."""

    statement: Mapping[str, Any]
    certificate: Path | None = None
    keys: Path | None = None
    page: Path | None = None
    oms: Path | None = None
    new: bool = True

    @property
    def verdict(self) -> str:
        return str(self.statement["predicate"]["verdict"])

    @property
    def claims(self) -> Sequence[Mapping[str, Any]]:
        found: Sequence[Mapping[str, Any]] = self.statement["predicate"]["claims"]
        return found


def certify(
    run: Path | str,
    *,
    key: Path | str | None = None,
    model: Path | str | None = None,
    out: Path | str | None = None,
    request: Request | None = None,
    oms_key: Path | str | None = None,
    days: int = DAYS,
    now: datetime | None = None,
) -> Issued:
    """Sign what a finished run shows about its model; without ``key`` say only what would be signed.

    ``certificate.json`` and beside it ``certificate.keys.json`` (the keys of its commitments, for the signer alone),
    ``certificate.html`` and the public key ``certificate.pub.pem`` go into the run folder, or to ``out``. The same
    call on the same run gives the same bytes, and changes nothing. With ``oms_key`` the model gets a signature by
    OpenSSF Model Signing too, in ``certificate.sig``. A ``run`` that is itself a certificate gets one more signature;
    it goes to ``out``.

    Raises:
        UserError: the run, model or key is not fit for it, or another certificate is there already.
    """
    now = (now or datetime.now(UTC)).replace(microsecond=0)
    if days < 1:
        raise UserError(f"a certificate for {days} days says nothing: give at least 1.")
    if Path(run).is_file():
        return _cosigned(Path(run), key, out, now)
    facts = read_run(run, model)
    signer = None if key is None else private_key(key, now)
    elliptic = None if oms_key is None else elliptic_key(oms_key)
    target = facts.folder / CERTIFICATE if out is None else Path(out)
    if target.suffix != ".json":
        raise UserError(f"--out '{target}' must end in .json; keys and page go beside it.")
    secret = target.with_suffix(KEYS)
    there = load(target) if signer is not None and target.exists() else None
    until = now + timedelta(days=days)
    if signer is not None and signer.expires is not None:
        until = min(until, signer.expires)  # afterwards nobody could tell this signature from one dated back
    keys, created, until = _earlier(there, target, secret, now, until)
    payload = build(facts, claims_of(facts.folder), keys, request or Request(), created, until)
    statement = read_statement(payload)
    refuse_personal(statement, rows(facts.folder))
    if signer is None:
        return Issued(statement)
    certificate = envelope(payload, [signer])
    if there is not None and there != certificate:
        raise UserError(f"'{target}' is another certificate, and none is overwritten: choose a new --out.")
    if not secret.exists():
        keys.write(secret)
    released = None if elliptic is None else _release(target.with_suffix(OMS), statement, elliptic)
    if there is None:
        _place(target, certificate)
    write_text(target.with_suffix(PUBLIC), public_pem(signer.public).decode())
    return Issued(statement, target, secret, _written_page(target, statement), released, new=there is None)


def _release(path: Path, statement: Mapping[str, Any], key: EllipticCurvePrivateKey) -> Path:
    """Sign the model by OMS, unless this key has done so."""
    content = oms.payload(statement["predicate"]["model"]["manifest"])
    if not path.exists():
        _place(path, oms.bundle(content, key))
    elif not oms.is_signed(load(path), content, key):
        raise UserError(f"'{path}' is another signature, and none is overwritten: choose a new --out.")
    return path


def claims_of(folder: Path) -> list[dict[str, Any]]:
    """Claim records of L0 to L5 with their verdicts, from everything that the run brings forward.

    Raises:
        UserError: a file of the run is damaged.
    """
    return [claim.record() for claim in assess(Evidence.of_run(folder))]


def _earlier(
    there: bytes | None, target: Path, secret: Path, now: datetime, until: datetime
) -> tuple[Keys, datetime, datetime]:
    """Keys and times of the certificate that is there, so that the same run gives the same bytes; else new ones.

    Keys without a certificate are those of a call that was stopped in between, and are used.
    """
    if not secret.exists():
        if there is not None:
            raise UserError(f"'{target}' is there and its '{secret.name}' is not: choose a new --out.")
        return Keys(), now, until
    keys = read_keys(secret)
    if there is None:
        return keys, now, until
    try:
        predicate = read_statement(read_envelope(there).payload)["predicate"]
    except Unreadable as error:
        raise UserError(f"'{target}' is there and cannot be read ({error}): choose a new --out.") from error
    return keys, read_time(predicate["created"], "created"), read_time(predicate["valid_until"], "valid_until")


def _cosigned(certificate: Path, key: Path | str | None, out: Path | str | None, now: datetime) -> Issued:
    if key is None or out is None:
        raise UserError("to add a signature to a certificate give --key PEM and --out for the certificate with both.")
    try:
        data = load(certificate)
        statement = read_statement(read_envelope(data).payload)
        wrong = [f.text for f in check_statement(statement, now) if f.state == "refuted"]
    except Unreadable as error:
        raise UserError(f"'{certificate}' cannot be signed: {error}") from error
    if wrong:
        raise UserError(f"'{certificate}' cannot be signed: {wrong[0]}")
    _place(Path(out), cosign(data, private_key(key, now)))
    return Issued(statement, Path(out))


def _place(path: Path, data: bytes) -> None:
    """Write a file that is not there yet: whole under another name first, then linked to its own."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{SCRATCH}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _name_it(scratch, path)
    except FileExistsError:
        raise UserError(f"'{path}' exists, and nothing is overwritten: choose a new --out.") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be written ({error.strerror}): choose another --out.") from error
    finally:
        scratch.unlink(missing_ok=True)


def _name_it(scratch: Path, path: Path) -> None:
    """Give a whole file its name; unlike a rename, a link never replaces what has that name."""
    try:
        os.link(scratch, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(scratch, path)


def _written_page(target: Path, statement: Mapping[str, Any]) -> Path:
    return write_text(target.with_suffix(PAGE), page(statement, target.name))
