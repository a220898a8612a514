"""Keys, and signatures in a DSSE envelope: Ed25519 in PEM files that any tool reads.

A key may carry an ``Expires:`` line before its PEM block (RFC 7468 section 5.2 allows such text; OpenSSL skips it).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from expunge.certify.canonical import canonical
from expunge.certify.vendored import (
    PAYLOAD,
    PublicKey,
    Unreadable,
    key_id,
    load,
    pae,
    read_envelope,
    read_expiry,
    read_public_key,
)
from expunge.errors import UserError

PUBLIC = ".pub.pem"  # ends the name of the public file: signing.pem -> signing.pub.pem


@dataclass(frozen=True)
class SigningKey:
    """A private key and when it stops being good."""

    key: Ed25519PrivateKey
    expires: datetime | None = None

    @property
    def id(self) -> str:
        return key_id(self.key.public_key())

    @property
    def public(self) -> PublicKey:
        return PublicKey(self.key.public_key(), self.expires)


@dataclass(frozen=True)
class Keypair:
    """What :func:`keygen` wrote. ``id`` is the SHA-256 of the public key, to be compared by another way."""

    private: Path
    public: Path
    id: str
    expires: datetime | None


def stamp(time: datetime) -> str:
    """``2026-11-23T15:00:00Z``, the one spelling of times in certificates and keys."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def keygen(out: Path | str, *, days: int | None = None, now: datetime | None = None) -> Keypair:
    """Write a new Ed25519 key pair: ``out`` (mode 0600), and the public key in ``out`` with suffix ``.pub.pem``.

    Args:
        days: after how many days the key expires; None for never.

    Raises:
        UserError: one of the files exists (a key is never overwritten), or cannot be written.
    """
    private = Path(out)
    public = private.with_suffix(PUBLIC)
    if private.name.endswith(PUBLIC):
        raise UserError(f"--out '{out}' has the name of a public key: choose one like signing.pem.")
    if days is not None and days < 1:
        raise UserError(f"a key that expires after {days} days signs nothing: give at least 1.")
    for path in (private, public):
        if path.exists() or path.is_symlink():
            raise UserError(f"'{path}' exists, and a key is never overwritten: choose another --out.")
    expires = None if days is None else (now or datetime.now(UTC)) + timedelta(days=days)
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        private.parent.mkdir(parents=True, exist_ok=True)
        write_new(private, _head(expires) + secret, 0o600)
        write_new(public, public_pem(PublicKey(key.public_key(), expires)), 0o644)
    except OSError as error:
        raise UserError(f"'{private}' cannot be written ({error.strerror}): choose another --out.") from error
    return Keypair(private, public, key_id(key.public_key()), expires)


def _head(expires: datetime | None) -> bytes:
    return b"" if expires is None else f"Expires: {stamp(expires)}\n".encode()


def public_pem(key: PublicKey) -> bytes:
    """The content of a public key's file."""
    return _head(key.expires) + key.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def write_new(path: Path, data: bytes, mode: int) -> None:
    """Create a file that is not there yet, readable by nobody else from its first moment if ``mode`` says so."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def private_key(path: Path | str, now: datetime | None = None) -> SigningKey:
    """Read a private key to sign with.

    Raises:
        UserError: no such file, no Ed25519 private key in PEM, encrypted, or expired.
    """
    try:
        pem = load(Path(path))
        if b"PUBLIC KEY-----" in pem:
            raise UserError(f"'{path}' is a public key: sign with the private one; this one is for those who verify.")
        expires = read_expiry(pem, f"'{path}'")
        key = load_pem_private_key(pem, password=None)
    except Unreadable as error:
        raise UserError(str(error)) from error
    except TypeError:
        raise UserError(f"'{path}' is encrypted: decrypt it for signing, e.g. with openssl pkey.") from None
    except UserError:
        raise
    except (ValueError, UnsupportedAlgorithm):
        raise UserError(f"'{path}' holds no PEM private key: make one with expunge keygen.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(f"'{path}' is no Ed25519 key: make one with expunge keygen.")
    if expires is not None and (now or datetime.now(UTC)) >= expires:
        raise UserError(f"'{path}' expired on {expires:%Y-%m-%d}: make a new key with expunge keygen.")
    return SigningKey(key, expires)


def public_key(path: Path | str) -> PublicKey:
    """Read a public key to verify with.

    Raises:
        UserError: see :func:`expunge.certify.vendored.read_public_key`.
    """
    try:
        return read_public_key(load(Path(path)), f"'{path}'")
    except Unreadable as error:
        raise UserError(str(error)) from error


def envelope(payload: bytes, keys: Sequence[SigningKey]) -> bytes:
    """The DSSE envelope of ``payload`` with one signature per key, as canonical JSON.

    Every signature carries its key's id: DSSE lets it out, securesystemslib does not read an envelope without.
    """
    message = pae(PAYLOAD, payload)
    signatures = [{"keyid": k.id, "sig": base64.b64encode(k.key.sign(message)).decode()} for k in keys]
    return canonical({"payload": base64.b64encode(payload).decode(), "payloadType": PAYLOAD, "signatures": signatures})


def cosign(certificate: bytes, key: SigningKey) -> bytes:
    """The certificate with one more signature, over the same bytes.

    Raises:
        UserError: the certificate cannot be read, or this key has signed it already.
    """
    try:
        found = read_envelope(certificate)
    except Unreadable as error:
        raise UserError(str(error)) from error
    if any(key.public.verifies(signature, found.message) for _, signature in found.signatures):
        raise UserError("this key has signed the certificate already: a second signature comes from a second key.")
    entries = [
        {**({"keyid": hint} if hint else {}), "sig": base64.b64encode(signature).decode()}
        for hint, signature in found.signatures
    ]
    entries.append({"keyid": key.id, "sig": base64.b64encode(key.key.sign(found.message)).decode()})
    return canonical(
        {"payload": base64.b64encode(found.payload).decode(), "payloadType": PAYLOAD, "signatures": entries}
    )
