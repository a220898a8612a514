"""RFC 3161 tokens as OpenSSL makes them: read, bound to the digest, and refused when anything of them is changed."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.certify.certificate_cases import KEY, sign, statement, write_run
from tests.certify.stamp_cases import Authority, authority

from expunge.certify.signing import public_pem
from expunge.certify.timestamps import Bad, Stamp, check_stamp, token_of
from expunge.certify.verify import verify
from expunge.errors import UserError

DIGEST, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture(scope="module")
def tsa(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("tsa"))


@pytest.mark.parametrize(("kind", "alg"), [("rsa", "sha256"), ("rsa", "sha512"), ("rsa", "sha1"), ("ec", "sha256")])
def test_what_openssl_stamps_is_read(kind: str, alg: str, tmp_path: Path) -> None:
    made = authority(tmp_path, kind, alg=alg)
    found = check_stamp(token_of(made.response(DIGEST)), DIGEST)
    assert found.fingerprint == made.fingerprint
    assert abs(found.time - datetime.now(UTC)) < timedelta(minutes=5)


def test_a_bare_token_is_taken_too(tsa: Authority) -> None:
    token = token_of(tsa.response(DIGEST))
    assert token_of(token) == token


def test_no_change_of_a_byte_gives_another_stamp(tsa: Authority) -> None:
    """Bytes that nothing binds (version numbers, the serial that names the signer) may change, and say the same."""
    token = token_of(tsa.response(DIGEST))
    good, refused = check_stamp(token, DIGEST), 0
    for place in range(len(token)):
        changed = token[:place] + bytes([token[place] ^ 1]) + token[place + 1 :]
        try:
            assert check_stamp(changed, DIGEST) == good, place
        except Bad:
            refused += 1
    assert refused > 0.85 * len(token)
    for length in range(0, len(token), 7):
        with pytest.raises(Bad):
            check_stamp(token[:length], DIGEST)


def test_what_is_refused(tsa: Authority, tmp_path: Path) -> None:
    def refused(response: bytes, words: str, digest: str = DIGEST) -> None:
        with pytest.raises(Bad, match=words):
            check_stamp(token_of(response), digest)

    refused(tsa.response(OTHER), "over something else")
    refused(tsa.response("ab" * 64, hash_name="sha512"), "over something else")
    refused(tsa.response(DIGEST, with_certificate=False), "does not hold the certificate")
    with pytest.raises(Bad, match="no RFC 3161 token"):
        check_stamp(b"0\x03\x02\x01\x05", DIGEST)


@pytest.mark.parametrize("data", [b"", b"0", b"\x30\x80\x00\x00", b"\x30\x03abc", b"hello", b"\x30\x03\x02\x01\x02"])
def test_what_is_no_token_at_all(data: bytes) -> None:
    with pytest.raises(UserError, match=r"Give the \.tsr file"):
        token_of(data)


def test_a_refusal_of_the_authority_is_no_token() -> None:
    rejected = bytes.fromhex("3005" + "3003" + "020102")  # PKIStatus 2: rejection
    with pytest.raises(UserError, match="has not granted"):
        token_of(rejected)


def test_a_certificate_holds_only_a_stamp_of_its_own_model(tsa: Authority, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    digest = statement(run)["subject"][0]["digest"]["sha256"]
    with pytest.raises(UserError, match=r"over something else\. It must be over the digest of the model's manifest"):
        statement(run, timestamp=tsa.response(OTHER))
    content = statement(run, timestamp=tsa.response(digest))
    public = tmp_path / "k.pub.pem"
    public.write_bytes(public_pem(KEY.public))

    def said(found: dict[str, object]) -> tuple[str, str]:
        certificate = tmp_path / "c.json"
        certificate.write_bytes(sign(found))
        (line,) = [f for f in verify(certificate, pub=[public]).findings if "time stamp" in f.text]
        return line

    state, text = said(content)
    assert state == "holds" and tsa.fingerprint in text and "whether to trust this authority is yours to say" in text
    content["predicate"]["timestamp"] = base64.b64encode(token_of(tsa.response(OTHER))).decode()
    assert said(content) == ("refuted", "the RFC 3161 time stamp: the time stamp is over something else.")


def test_a_certificate_for_other_uses_does_not_stamp(tsa: Authority) -> None:
    """Signed by a certificate whose extended key usage is not critical, which RFC 3161 (section 2.3) demands."""
    token = token_of(tsa.response(DIGEST))
    assert isinstance(check_stamp(token, DIGEST), Stamp)
    critical = bytes.fromhex("0603551d250101ff")  # id-ce-extKeyUsage, critical TRUE
    assert token.count(critical) == 1
    with pytest.raises(Bad):
        check_stamp(token.replace(critical, critical[:-1] + b"\x00"), DIGEST)
