"""A detached signature of the model by OpenSSF Model Signing 1.0, beside the certificate: optional.

It says who released which files and nothing about forgetting; the certificate's ``oms_root`` is its subject. The
tools of that standard verify it (``model_signing verify key ... --signature certificate.sig --public_key PEM``).
They know no Ed25519: the key is an elliptic-curve key of its own (P-256, P-384 or P-521).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from expunge.certify.canonical import canonical
from expunge.certify.vendored import PAYLOAD, STATEMENT, Unreadable, load, oms_root, pae
from expunge.errors import UserError

PREDICATE = "https://model_signing/signature/v1.0"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
HASHES: dict[str, type[hashes.HashAlgorithm]] = {
    "secp256r1": hashes.SHA256,
    "secp384r1": hashes.SHA384,
    "secp521r1": hashes.SHA512,
}


def elliptic_key(path: Path | str) -> EllipticCurvePrivateKey:
    """Read the key.

    Raises:
        UserError: no such file, or no elliptic-curve private key that OMS knows.
    """
    try:
        key = load_pem_private_key(load(Path(path)), password=None)
    except Unreadable as error:
        raise UserError(str(error)) from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in HASHES:
        raise UserError(
            f"'{path}' is no P-256, P-384 or P-521 private key, and OMS takes no other: "
            "openssl ecparam -name prime256v1 -genkey -noout makes one."
        )
    return key


def payload(manifest: Mapping[str, Mapping[str, Any]]) -> bytes:
    """The in-toto statement of OMS: every file with its digest, in the order of their paths.

    The subject is called "model": the folder's own name may be a person's.
    """
    names = sorted(manifest, key=lambda n: n.split("/"))
    content = {
        "_type": STATEMENT,
        "subject": [{"name": "model", "digest": {"sha256": oms_root(manifest)}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False},
            "resources": [{"name": n, "algorithm": "sha256", "digest": manifest[n]["sha256"]} for n in names],
        },
    }
    return canonical(content)


def bundle(statement: bytes, key: EllipticCurvePrivateKey) -> bytes:
    """The signed payload as a sigstore bundle. ``keyid`` stays empty, as in the bundles of OMS itself."""
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signature = key.sign(pae(PAYLOAD, statement), ECDSA(HASHES[key.curve.name]()))
    return canonical(
        {
            "mediaType": BUNDLE,
            "verificationMaterial": {"publicKey": {"hint": hashlib.sha256(public).hexdigest()}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": base64.b64encode(statement).decode(),
                "payloadType": PAYLOAD,
                "signatures": [{"keyid": "", "sig": base64.b64encode(signature).decode()}],
            },
        }
    )


def is_signed(data: bytes, statement: bytes, key: EllipticCurvePrivateKey) -> bool:
    """Whether ``data`` is a bundle of ``statement`` by this key; ECDSA signs the same bytes anew each time."""
    try:
        envelope = json.loads(data)["dsseEnvelope"]
        signature = base64.b64decode(envelope["signatures"][0]["sig"])
        key.public_key().verify(signature, pae(PAYLOAD, statement), ECDSA(HASHES[key.curve.name]()))
        return bool(base64.b64decode(envelope["payload"]) == statement)
    except (ValueError, KeyError, TypeError, IndexError, InvalidSignature):
        return False
