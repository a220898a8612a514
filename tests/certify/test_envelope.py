"""Canonical JSON and DSSE, against the published vectors, the rfc8785 package and securesystemslib."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.certify.certificate_cases import KEY, NOW, OTHER, sign

from expunge.certify.canonical import canonical as written
from expunge.certify.signing import cosign
from expunge.certify.vendored import (
    LIMIT,
    PAYLOAD,
    PublicKey,
    Unreadable,
    canonical,
    check_signatures,
    pae,
    read_envelope,
    read_json,
)
from expunge.errors import UserError

NUMBERS = {  # RFC 8785 appendix B
    "0000000000000000": "0",
    "8000000000000000": "0",
    "0000000000000001": "5e-324",
    "8000000000000001": "-5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308",
    "ffefffffffffffff": "-1.7976931348623157e+308",
    "4340000000000000": "9007199254740992",
    "c340000000000000": "-9007199254740992",
    "4430000000000000": "295147905179352830000",
    "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23",
    "44b52d02c7e14af7": "1.0000000000000001e+23",
    "444b1ae4d6e2ef4e": "999999999999999700000",
    "444b1ae4d6e2ef4f": "999999999999999900000",
    "444b1ae4d6e2ef50": "1e+21",
    "3eb0c6f7a0b5ed8c": "9.999999999999997e-7",
    "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332",
    "41b3de4355555554": "333333333.33333325",
    "41b3de4355555555": "333333333.3333333",
    "41b3de4355555556": "333333333.3333334",
    "41b3de4355555557": "333333333.33333343",
    "becbf647612f3696": "-0.0000033333333333333333",
    "43143ff3c1cb0959": "1424953923781206.2",
}
SAFE = st.integers(-(2**53) + 1, 2**53 - 1)
VALUES = st.recursive(
    st.none() | st.booleans() | SAFE | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(("bits", "text"), NUMBERS.items())
def test_numbers_of_the_standard(bits: str, text: str) -> None:
    value = struct.unpack(">d", bytes.fromhex(bits))[0]
    assert canonical(value).decode() == text
    assert canonical(read_json(text.encode(), "it")) == text.encode()  # and it is read as the number it was


def test_keys_are_sorted_by_utf16() -> None:
    keys = ["€", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "ö"]  # RFC 8785 section 3.2.3
    assert list(json.loads(canonical(dict.fromkeys(keys, 0)))) == [
        "\r",
        "1",
        "\u0080",
        "ö",
        "€",
        "\U0001f600",
        "\ufb33",
    ]


@given(VALUES)
@settings(max_examples=300, deadline=None)
def test_the_two_implementations_agree(value: Any) -> None:
    data = rfc8785.dumps(value)
    assert canonical(value) == data
    assert canonical(read_json(data, "it")) == data


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b'{"a":1,"a":2}', "twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":-Infinity}', "Infinity"),
        (b'{"a":1e999}', "finite"),
        (b'{"a":' + b"9" * 5000 + b"}", "finite"),
        (b'{"a":1.0}', "canonical"),
        (b'{"a":1 }', "canonical"),
        (b'{"a":1}\n', "canonical"),
        (b'{"b":1,"a":2}', "canonical"),
        (b'"\\u0041"', "canonical"),
        (b'"\\ud800"', "surrogate"),
        (b'\xef\xbb\xbf{}', "JSON"),
        (b'"\xff"', "JSON"),
        (b'{"a":1', "cut off"),
        (b"", "cut off"),
        (b"[" * 100_000 + b"]" * 100_000, "deeply"),
        (b" " * (LIMIT + 1), "at most"),
    ],
)  # fmt: skip
def test_anything_but_canonical_json_is_refused(data: bytes, word: str) -> None:
    with pytest.raises(Unreadable, match=word):
        read_json(data, "it")


def test_what_cannot_be_written() -> None:
    with pytest.raises(UserError, match="cannot be signed"):
        written({"a": 2**53})
    with pytest.raises(UserError, match="cannot be signed"):
        written({"a": "\ud800"})
    assert written({"a": float("nan")}) == b'{"a":null}'
    for value in (2**53, -(2**53), "\ud800", {"\ud800": 1}, float("inf"), float("nan"), {1, 2}):
        with pytest.raises(Unreadable):
            canonical(value)


def test_pae_of_the_specification() -> None:
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pae("ü", b"") == b"DSSEv1 2 \xc3\xbc 0 "  # lengths count bytes


def states(certificate: bytes, *keys: PublicKey, threshold: int | None = None) -> list[str]:
    return [f.state for f in check_signatures(read_envelope(certificate), keys, NOW, threshold)]


def test_signatures() -> None:
    one, both = sign({"a": 1}), sign({"a": 1}, KEY, OTHER)
    assert states(one, KEY.public) == ["holds"]
    assert states(one, OTHER.public) == ["refuted", "not checked"]
    assert states(both, KEY.public, OTHER.public) == ["holds", "holds"]
    assert states(both, OTHER.public) == ["holds", "not checked"]
    assert states(one, KEY.public, OTHER.public) == ["holds", "refuted"]  # all that are given must have signed
    assert states(one, KEY.public, OTHER.public, threshold=1) == ["holds", "not checked"]
    assert "refuted" in states(one, KEY.public, OTHER.public, threshold=2)
    assert "refuted" in states(sign({"a": 1}, KEY, KEY), KEY.public, OTHER.public, threshold=2)  # one key twice is one


def changed(certificate: bytes, **fields: Any) -> bytes:
    return written({**json.loads(certificate), **fields})


def test_the_key_id_is_only_a_hint() -> None:
    entries = json.loads(sign({"a": 1}, OTHER, KEY))["signatures"]
    bare = [{"sig": e["sig"]} for e in entries]
    assert states(changed(sign({"a": 1}), signatures=bare), KEY.public) == ["holds", "not checked"]
    lying = [{"keyid": OTHER.id, "sig": e["sig"]} for e in entries]
    assert states(changed(sign({"a": 1}), signatures=lying), KEY.public)[0] == "refuted"  # it says who signed: untrue


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"payloadType": "application/vnd.cyclonedx+json"}, "only 'application/vnd.in-toto"),
        ({"payloadType": ["application/vnd.in-toto+json"]}, "only 'application/vnd.in-toto"),
        ({"signatures": []}, "1 to 16"),
        ({"signatures": [{"sig": "AAAA"}] * 17}, "1 to 16"),
        ({"signatures": {"sig": ""}}, "1 to 16"),
        ({"signatures": ["x"]}, "must have a sig"),
        ({"signatures": [{"keyid": "x"}]}, "must have a sig"),
        ({"signatures": [{"sig": "AAAA", "cert": "x"}]}, "must have a sig"),
        ({"signatures": [{"sig": "AAAA", "keyid": 1}]}, "must have a sig"),
        ({"signatures": [{"sig": 5}]}, "base64"),
        ({"payload": "AAA"}, "base64"),
        ({"payload": "AB=="}, "canonical base64"),  # bits that decode to nothing
        ({"payload": "AA=\n="}, "base64"),
        ({"payload": "ÄÄÄÄ"}, "base64"),
        ({"mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json"}, "no DSSE envelope"),
    ],
)
def test_other_envelopes_are_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(Unreadable, match=word):
        read_envelope(changed(sign({"a": 1}), **fields))


def test_a_second_signature_is_added() -> None:
    one = sign({"a": 1})
    both = cosign(one, OTHER)
    assert both == sign({"a": 1}, KEY, OTHER)
    with pytest.raises(UserError, match="signed the certificate already"):
        cosign(both, OTHER)
    with pytest.raises(UserError, match="cut off"):
        cosign(one[:-1], OTHER)
    bare = changed(one, signatures=[{"sig": e["sig"]} for e in json.loads(one)["signatures"]])
    assert states(cosign(bare, OTHER), KEY.public, OTHER.public) == ["holds", "holds"]


def test_securesystemslib_reads_what_we_sign() -> None:
    dsse = pytest.importorskip("securesystemslib.dsse")
    signer = pytest.importorskip("securesystemslib.signer")
    errors = pytest.importorskip("securesystemslib.exceptions")
    content = json.loads(sign({"a": 1}, KEY, OTHER))
    theirs = dsse.Envelope.from_dict(content)
    keys = [signer.SSlibKey.from_crypto(k.public.key, keyid=k.id) for k in (KEY, OTHER)]
    assert theirs.payload == b'{"a":1}' and theirs.payload_type == PAYLOAD
    assert set(theirs.verify(keys, 2)) == {KEY.id, OTHER.id}
    theirs.payload = b'{"a":2}'
    with pytest.raises(errors.VerificationError):
        theirs.verify(keys, 1)


def test_we_read_what_securesystemslib_signs() -> None:
    dsse = pytest.importorskip("securesystemslib.dsse")
    signer = pytest.importorskip("securesystemslib.signer")
    key = signer.SSlibKey.from_crypto(KEY.public.key, keyid=KEY.id)
    theirs = dsse.Envelope(b'{"a":1}', PAYLOAD, {})
    theirs.sign(signer.CryptoSigner(KEY.key, key))
    data = written(theirs.to_dict())
    assert data == sign({"a": 1})  # Ed25519 gives one signature
    assert base64.b64decode(json.loads(data)["payload"]) == b'{"a":1}'
