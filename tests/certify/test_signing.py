"""Keys: made once, kept secret, expired ones refused, and readable by other tools."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from tests.certify.certificate_cases import NOW

from expunge.certify.commitments import Keys, read_keys
from expunge.certify.signing import keygen, private_key, public_key
from expunge.errors import UserError


def test_a_pair_belongs_together(tmp_path: Path) -> None:
    made = keygen(tmp_path / "keys" / "signing.pem", days=30, now=NOW)
    private, public = private_key(made.private, NOW), public_key(made.public)
    assert made.public.name == "signing.pub.pem"
    assert public.verifies(private.key.sign(b"x"), b"x") and not public.verifies(private.key.sign(b"x"), b"y")
    assert made.id == private.id == public.id
    assert made.expires == private.expires == public.expires == NOW + timedelta(days=30)
    if os.name == "posix":
        assert stat.S_IMODE(made.private.stat().st_mode) == 0o600
    other = keygen(tmp_path / "other.pem")
    assert other.id != made.id and public_key(other.public).expires is None


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    made = keygen(tmp_path / "signing.pem")
    before = made.private.read_bytes()
    with pytest.raises(UserError, match="never overwritten"):
        keygen(tmp_path / "signing.pem")
    made.private.unlink()
    with pytest.raises(UserError, match=r"signing\.pub\.pem' exists"):
        keygen(tmp_path / "signing.pem")
    made.public.unlink()
    made.public.symlink_to(tmp_path / "nowhere")  # a dangling link would be written through
    with pytest.raises(UserError, match="never overwritten"):
        keygen(tmp_path / "signing.pem")
    assert len(before) > 100 and not (tmp_path / "nowhere").exists()
    with pytest.raises(UserError, match="at least 1"):
        keygen(tmp_path / "new.pem", days=0)
    with pytest.raises(UserError, match="name of a public key"):
        keygen(tmp_path / "new.pub.pem")
    assert keygen(tmp_path / "bare").public.name == "bare.pub.pem"


def test_expired_keys_do_not_sign(tmp_path: Path) -> None:
    made = keygen(tmp_path / "signing.pem", days=30, now=NOW)
    private_key(made.private, NOW + timedelta(days=29))
    with pytest.raises(UserError, match="expired on 2026-12-23"):
        private_key(made.private, NOW + timedelta(days=30))


def test_openssl_reads_both_files(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    made = keygen(tmp_path / "signing.pem", days=30)
    read = subprocess.run(["openssl", "pkey", "-in", made.private, "-pubout"], capture_output=True, check=True).stdout
    assert read.decode().strip() in made.public.read_text()
    shown = subprocess.run(["openssl", "pkey", "-pubin", "-in", made.public, "-text"], capture_output=True, check=True)
    assert b"ED25519" in shown.stdout


def pem(key: Ed25519PrivateKey | rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, secret: bytes | None = None) -> bytes:
    hidden = NoEncryption() if secret is None else BestAvailableEncryption(secret)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, hidden)


def test_other_files_are_no_keys(tmp_path: Path) -> None:
    made = keygen(tmp_path / "signing.pem")
    rsa_key = rsa.generate_private_key(65537, 2048)
    files = {
        "rsa": pem(rsa_key),
        "ec": pem(ec.generate_private_key(ec.SECP256R1())),
        "secret": pem(Ed25519PrivateKey.generate(), b"word"),
        "text": b"hello",
        "cut": made.private.read_bytes()[:60],
        "empty": b"",
        "rsa.pub": rsa_key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        "late": b"Expires: tomorrow\n" + made.public.read_bytes(),
        "after": made.public.read_bytes() + b"expires: 2020-01-01\n",
        "two": made.public.read_bytes() * 2,
        "twice": b"Expires: 2026-01-01T00:00:00Z\nExpires: 2036-01-01T00:00:00Z\n" + made.public.read_bytes(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name, word in {
        "rsa": "no Ed25519", "ec": "no Ed25519", "secret": "encrypted", "text": "no PEM private key",
        "cut": "no PEM private key", "empty": "no PEM private key", "signing.pub.pem": "is a public key",
        "missing": "cannot be read",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=word):
            private_key(tmp_path / name)
    for name, word in {
        "signing.pem": "private key", "rsa.pub": "signed with Ed25519", "text": "no PEM public key",
        "late": "a time like", "twice": "one is allowed", "after": "a time like", "two": "several keys",
        "missing": "cannot be read", ".": "cannot be read",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=word):
            public_key(tmp_path / name)


def test_commitments_need_their_key(tmp_path: Path) -> None:
    keys = Keys()
    assert keys.commit("request", "a", ["x"]) == keys.commit("request", "a", ["x"])
    other = {
        keys.commit("request", "a", ["y"]), keys.commit("request", "b", ["x"]), keys.commit("record", "a", ["x"]),
        Keys().commit("request", "a", ["x"]),
    }  # fmt: skip
    assert len(other) == 4 and keys.commit("request", "a", ["x"]) not in other
    path = keys.write(tmp_path / "keys.json")
    assert read_keys(path) == keys
    assert keys.request not in repr(keys)
    with pytest.raises(UserError, match="never overwritten"):
        keys.write(path)
    destroyed = path.read_text().replace(keys.request, "")
    path.write_text(destroyed)
    left = read_keys(path)
    assert left.commit("record", "a", 1) == keys.commit("record", "a", 1)
    with pytest.raises(UserError, match="'request' has been destroyed"):
        left.commit("request", "a", 1)


@pytest.mark.parametrize(
    "content",
    [
        "{}", "[]", "x", "",
        '{"keys":{},"schema":"expunge.commitment_keys/2"}',
        '{"keys":{"request":"00"},"schema":"expunge.commitment_keys/1"}',
        '{"keys":{"other":""},"schema":"expunge.commitment_keys/1"}',
        '{"keys":"x","schema":"expunge.commitment_keys/1"}',
    ],
)  # fmt: skip
def test_other_files_are_no_keys_of_commitments(content: str, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(UserError, match=r"certify wrote\."):
        read_keys(tmp_path / "keys.json")
