"""RFC 3161 time stamps, offline: that a token is over this digest, and who signed it when.

A token is a CMS SignedData (RFC 5652) around a TSTInfo. Checked are: the imprint, the digest of the TSTInfo among the
signed attributes, the binding of the signer's certificate (ESSCertID, RFC 2634 and 5816), the signature, and that the
certificate was valid then and is for time stamping alone. Whether the authority is to be trusted is for the reader, who
gets the fingerprint of its certificate: no list of authorities is kept here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from expunge.errors import UserError

SIGNED_DATA, TST_INFO = "1.2.840.113549.1.7.2", "1.2.840.113549.1.9.16.1.4"
CONTENT_TYPE, MESSAGE_DIGEST = "1.2.840.113549.1.9.3", "1.2.840.113549.1.9.4"
CERTIFICATE_V1, CERTIFICATE_V2 = "1.2.840.113549.1.9.16.2.12", "1.2.840.113549.1.9.16.2.47"
HASHES: dict[str, type[hashes.HashAlgorithm]] = {
    "2.16.840.1.101.3.4.2.1": hashes.SHA256,
    "2.16.840.1.101.3.4.2.2": hashes.SHA384,
    "2.16.840.1.101.3.4.2.3": hashes.SHA512,
}
INTEGER, OCTETS, OID, TIME, SEQUENCE, SET, FIRST = 0x02, 0x04, 0x06, 0x18, 0x30, 0x31, 0xA0


class Bad(ValueError):
    """The token is no good; one sentence says why."""


@dataclass(frozen=True)
class Stamp:
    """What a good token says: when, and by whose certificate (SHA-256 of its DER)."""

    time: datetime
    fingerprint: str


# -- DER -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One DER element: its tag, its content, and all of its bytes."""

    tag: int
    content: bytes
    whole: bytes

    def items(self) -> list[Item]:
        return list(_items(self.content))

    def of(self, tag: int) -> Item:
        if self.tag != tag:
            raise Bad("the time stamp is no RFC 3161 token.")
        return self

    @property
    def oid(self) -> str:
        numbers: list[int] = []
        value = 0
        for byte in self.of(OID).content:
            value = value << 7 | byte & 0x7F
            if byte < 0x80:
                numbers, value = [*numbers, value], 0
        first = min(numbers[0] // 40, 2)
        return ".".join(map(str, (first, numbers[0] - 40 * first, *numbers[1:])))


def _items(data: bytes) -> Iterator[Item]:
    place = 0
    while place < len(data):
        if place + 2 > len(data):
            raise Bad("the time stamp was cut off.")
        start, tag, size = place, data[place], data[place + 1]
        place += 2
        if size >= 0x80:
            count = size & 0x7F
            size, place = int.from_bytes(data[place : place + count]), place + count
            if not 1 <= count <= 4:
                raise Bad("the time stamp is not in DER.")
        if place + size > len(data):
            raise Bad("the time stamp was cut off.")
        yield Item(tag, data[place : place + size], data[start : place + size])
        place += size


# -- tokens --------------------------------------------------------------------------------------------------------


def token_of(data: bytes) -> bytes:
    """The token of a time-stamp response (a .tsr file); a bare token is given back as it is.

    Raises:
        UserError: neither, or a response that grants nothing.
    """
    try:
        (whole,) = _items(data)
        parts = whole.of(SEQUENCE).items()
        if parts[0].tag == OID and parts[0].oid == SIGNED_DATA:
            return data
        if parts[0].of(SEQUENCE).items()[0].of(INTEGER).content not in (b"\x00", b"\x01"):
            raise Bad("the authority has not granted the time stamp.")
        if parts[1].of(SEQUENCE).items()[0].oid != SIGNED_DATA:
            raise Bad("the time stamp is no RFC 3161 token.")
        return parts[1].whole
    except (ValueError, LookupError) as error:
        why = str(error) if isinstance(error, Bad) else "the time stamp is no RFC 3161 token."
        raise UserError(f"{why} Give the .tsr file of the authority.") from None


def check_stamp(token: bytes, digest: str) -> Stamp:
    """Check a token over the SHA-256 ``digest`` (hexadecimal).

    Raises:
        Bad: it is over something else, was not signed so, or cannot be read.
    """
    try:
        return _checked(token, digest)
    except Bad:
        raise
    except (ValueError, LookupError, UnsupportedAlgorithm, x509.InvalidVersion, x509.ExtensionNotFound):
        raise Bad("the time stamp is no RFC 3161 token that can be read here.") from None


def _checked(token: bytes, digest: str) -> Stamp:
    (whole,) = _items(token)
    kind, content = whole.of(SEQUENCE).items()
    if kind.oid != SIGNED_DATA:
        raise Bad("the time stamp is no signed data.")
    parts = content.of(FIRST).items()[0].of(SEQUENCE).items()
    inner, box = parts[2].of(SEQUENCE).items()
    if inner.oid != TST_INFO:
        raise Bad("the signed data is no time stamp.")
    info = box.of(FIRST).items()[0].of(OCTETS).content
    fields = next(_items(info)).of(SEQUENCE).items()
    algorithm, imprint = fields[2].of(SEQUENCE).items()
    if _hash(algorithm.items()[0].oid).name != "sha256" or imprint.of(OCTETS).content != bytes.fromhex(digest):
        raise Bad("the time stamp is over something else.")
    time = datetime.strptime(fields[4].of(TIME).content[:14].decode() + "Z", "%Y%m%d%H%M%SZ").replace(tzinfo=UTC)
    certificates = [x509.load_der_x509_certificate(c.whole) for p in parts[3:-1] if p.tag == FIRST for c in p.items()]
    (signer,) = parts[-1].of(SET).items()
    return Stamp(time, _signer(signer, info, certificates, time))


def _signer(signer: Item, info: bytes, certificates: Sequence[x509.Certificate], time: datetime) -> str:
    """SHA-256 of the signer's certificate, after all that binds it to the TSTInfo."""
    _, _, digest, attributes, algorithm, signature = signer.of(SEQUENCE).items()[:6]
    attributes.of(FIRST)
    found = {a.items()[0].oid: a.items()[1].of(SET).items()[0] for a in attributes.items()}
    chosen = _hash(digest.items()[0].oid)
    if found[CONTENT_TYPE].oid != TST_INFO or found[MESSAGE_DIGEST].of(OCTETS).content != _digest(chosen, info):
        raise Bad("the signed attributes are not those of this time stamp.")
    certificate = next((c for c in certificates if _names(found, c.public_bytes(Encoding.DER))), None)
    if certificate is None:
        raise Bad("the token does not hold the certificate of its signer: ask the authority for one that does.")
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    if list(usage.value) != [ExtendedKeyUsageOID.TIME_STAMPING] or not usage.critical:
        raise Bad("the signer's certificate is not for time stamping alone.")
    if not certificate.not_valid_before_utc <= time <= certificate.not_valid_after_utc:
        raise Bad("the signer's certificate was not valid at the time that is stamped.")
    signed = bytes([SET]) + attributes.whole[1:]  # signed as a SET, stored under another tag (RFC 5652, section 5.4)
    key, used = certificate.public_key(), _signature_hash(algorithm.items()[0].oid) or chosen
    try:
        if isinstance(key, rsa.RSAPublicKey):
            key.verify(signature.of(OCTETS).content, signed, padding.PKCS1v15(), used)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature.of(OCTETS).content, signed, ec.ECDSA(used))
        else:
            raise Bad("the signer's key is neither RSA nor of an elliptic curve: nothing else is read here.")
    except InvalidSignature:
        raise Bad("the signature of the time stamp is not by the certificate that it names.") from None
    return certificate.fingerprint(hashes.SHA256()).hex()


def _names(attributes: dict[str, Item], certificate: bytes) -> bool:
    """Whether the signed attributes name this very certificate, by SHA-1 (RFC 2634) or another digest (RFC 5816)."""
    if CERTIFICATE_V2 in attributes:
        first = attributes[CERTIFICATE_V2].items()[0].items()[0].items()
        named = _hash(first[0].items()[0].oid) if first[0].tag == SEQUENCE else hashes.SHA256()
        return any(i.tag == OCTETS and i.content == _digest(named, certificate) for i in first)
    first = attributes[CERTIFICATE_V1].items()[0].items()[0].items()
    return first[0].of(OCTETS).content == hashlib.sha1(certificate, usedforsecurity=False).digest()


SIGNATURES: dict[str, type[hashes.HashAlgorithm]] = {
    "1.2.840.113549.1.1.11": hashes.SHA256,  # RSA
    "1.2.840.113549.1.1.12": hashes.SHA384,
    "1.2.840.113549.1.1.13": hashes.SHA512,
    "1.2.840.10045.4.3.2": hashes.SHA256,  # elliptic curves
    "1.2.840.10045.4.3.3": hashes.SHA384,
    "1.2.840.10045.4.3.4": hashes.SHA512,
}


def _hash(oid: str) -> hashes.HashAlgorithm:
    if oid not in HASHES:
        raise Bad("the time stamp uses a digest other than SHA-256, SHA-384 and SHA-512.")
    return HASHES[oid]()


def _signature_hash(oid: str) -> hashes.HashAlgorithm | None:
    """The digest that a signature algorithm names; None for plain RSA, which names none."""
    return SIGNATURES[oid]() if oid in SIGNATURES else None


def _digest(algorithm: hashes.HashAlgorithm, data: bytes) -> bytes:
    state = hashes.Hash(algorithm)
    state.update(data)
    return state.finalize()
