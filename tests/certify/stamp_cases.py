"""A time-stamping authority of our own, by OpenSSL: its tokens are the oracle for what we read."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CONFIG = """
[tsa]
serial = {folder}/serial
crypto_device = builtin
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
accuracy = secs:1
ess_cert_id_chain = no
ess_cert_id_alg = {alg}
"""


@dataclass(frozen=True)
class Authority:
    folder: Path
    certificate: x509.Certificate

    @property
    def fingerprint(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def response(self, digest: str, *, hash_name: str = "sha256", with_certificate: bool = True) -> bytes:
        """The .tsr file over a digest."""
        query, answer = self.folder / "q.tsq", self.folder / "a.tsr"
        more = ["-cert"] if with_certificate else []
        _openssl("ts", "-query", "-digest", digest, f"-{hash_name}", *more, "-out", query)
        _openssl(
            "ts", "-reply", "-queryfile", query, "-config", self.folder / "tsa.cnf", "-section", "tsa",
            "-signer", self.folder / "tsa.pem", "-inkey", self.folder / "key.pem", "-out", answer,
        )  # fmt: skip
        return answer.read_bytes()


def authority(folder: Path, kind: str = "rsa", *, alg: str = "sha256", stamping: bool = True) -> Authority:
    """A self-signed authority; skips the test where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl on this machine to make a time stamp with")
    folder.mkdir(parents=True, exist_ok=True)
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
    key = ec.generate_private_key(ec.SECP256R1()) if kind == "ec" else rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Authority for tests")])
    now = datetime.now(UTC)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.TIME_STAMPING])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=9))
        .add_extension(usage, critical=stamping)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(pem)
    (folder / "tsa.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "serial").write_text("01\n")
    (folder / "tsa.cnf").write_text(CONFIG.format(folder=folder, alg=alg))
    return Authority(folder, certificate)


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
