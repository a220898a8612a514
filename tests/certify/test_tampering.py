"""No byte changes without notice: of the certificate, of its manifest, of the model."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.certify.certificate_cases import KEY, NOW, OTHER, sign, statement, write_run

from expunge.certify.canonical import canonical
from expunge.certify.vendored import Unreadable, check, compare, exit_code, manifest_of, read_statement

LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("tampering") / "run")


@pytest.fixture(scope="module")
def certificate(run: Path) -> bytes:
    return sign(statement(run))


def rejected(data: bytes, model: Path | None = None) -> bool:
    try:
        return exit_code(check(data, [KEY.public], model, now=NOW)) == 1
    except Unreadable:
        return True


def with_byte(data: bytes, place: int, byte: int) -> bytes:
    return data[:place] + bytes([byte]) + data[place + 1 :]


def test_the_certificate_itself_is_accepted(certificate: bytes, run: Path) -> None:
    assert not rejected(certificate, run / "model")


def test_every_byte_of_the_certificate_matters(certificate: bytes) -> None:
    """One other byte at every place, of the base64 letters wherever these stand: the kindest change to a reader."""
    chance = random.Random(0)
    for place, byte in enumerate(certificate):
        other = (
            chance.choice(LETTERS.replace(bytes([byte]), b"")) if byte in LETTERS else byte ^ chance.randrange(1, 256)
        )
        assert rejected(with_byte(certificate, place, other)), (place, byte, other)


def test_every_other_value_of_every_byte_around_the_payload(certificate: bytes) -> None:
    start = certificate.index(b'","payloadType"')
    for place in [*range(12), *range(start - 3, len(certificate))]:
        for other in range(256):
            if other != certificate[place]:
                assert rejected(with_byte(certificate, place, other)), (place, other)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_every_other_value_of_every_byte(part: int, certificate: bytes) -> None:
    for place in range(part, len(certificate), 10):
        for other in set(range(256)) - {certificate[place]}:
            assert rejected(with_byte(certificate, place, other)), (place, other)


def test_every_byte_of_the_payload_matters(certificate: bytes) -> None:
    """The payload changed and encoded anew: base64 and envelope are right, the signature is not."""
    content = json.loads(certificate)
    payload = base64.b64decode(content["payload"])
    chance = random.Random(1)
    for place, byte in enumerate(payload):
        changed = with_byte(payload, place, byte ^ chance.randrange(1, 256))
        data = canonical({**content, "payload": base64.b64encode(changed).decode()})
        assert exit_code(check(data, [KEY.public], now=NOW)) == 1, place


def test_cut_and_longer_certificates(certificate: bytes) -> None:
    for length in range(len(certificate)):
        assert rejected(certificate[:length]), length
    chance = random.Random(2)
    for _ in range(1000):
        place, byte = chance.randrange(len(certificate) + 1), bytes([chance.randrange(256)])
        assert rejected(certificate[:place] + byte + certificate[place:]), (place, byte)
        assert rejected(certificate[:place] + certificate[place + 1 :]) or place == len(certificate)
    for space in (b" ", b"\n", b"\t", b"\r\n", b"\xef\xbb\xbf", b"\x00"):
        assert rejected(certificate + space) and rejected(space + certificate)
    assert rejected(certificate * 2)


def test_signatures_cannot_be_moved(run: Path, certificate: bytes) -> None:
    other = json.loads(sign(statement(run, regime="ccpa")))
    own = json.loads(certificate)
    assert rejected(canonical({**own, "signatures": other["signatures"]}))
    assert rejected(canonical({**own, "payload": other["payload"]}))
    assert rejected(canonical({**own, "signatures": json.loads(sign(statement(run), OTHER))["signatures"]}))
    raw = base64.b64decode(own["payload"])
    bare = {"keyid": KEY.id, "sig": base64.b64encode(KEY.key.sign(raw)).decode()}  # over the payload without its type
    assert rejected(canonical({**own, "signatures": [bare]}))
    order = 2**252 + 27742317777372353535851937790883648493
    signature = base64.b64decode(own["signatures"][0]["sig"])
    again = signature[:32] + (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
    malleable = {"keyid": KEY.id, "sig": base64.b64encode(again).decode()}  # S + L: refused by RFC 8032 section 5.1.7
    assert rejected(canonical({**own, "signatures": [malleable]}))


def test_every_byte_of_the_manifest_matters(run: Path) -> None:
    """Even signed anew: a manifest that is not the subject's is refused."""
    content = statement(run)
    manifest = canonical(content["predicate"]["model"]["manifest"])
    whole = canonical(content)
    start = whole.index(manifest)
    chance = random.Random(3)
    for place in range(start, start + len(manifest)):
        byte = whole[place]
        others = [byte ^ chance.randrange(1, 256), chance.choice(b"0123456789abcdef".replace(bytes([byte]), b""))]
        for other in others:
            assert rejected(sign(with_byte(whole, place, other))), (place, other)


def test_every_byte_of_small_files_matters(run: Path) -> None:
    certified = read_statement(canonical(statement(run)))["predicate"]["model"]["manifest"]
    small = [name for name, entry in certified.items() if entry["size"] < 100]
    assert len(small) == 3
    for name in small:
        data = (run / "model" / name).read_bytes()
        for place, byte in enumerate(data):
            for other in set(range(256)) - {byte}:
                entry = {"sha256": hashlib.sha256(with_byte(data, place, other)).hexdigest(), "size": len(data)}
                assert exit_code(compare(certified, {**certified, name: entry})) == 1


def digests(data: bytes, changes: list[tuple[int, int]]) -> Iterator[str]:
    """SHA-256 of ``data`` with one byte changed, for each of ``changes`` in the order of their places.

    What comes before the change is hashed once: the state of SHA-256 after it is the same.
    """
    state, done = hashlib.sha256(), 0
    for place, other in changes:
        state.update(data[done:place])
        done = place
        changed = state.copy()
        changed.update(bytes([other]))
        changed.update(memoryview(data)[place + 1 :])
        yield changed.hexdigest()


def test_ten_thousand_places_of_large_weights(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", size=200_000)
    certificate, model = sign(statement(run)), run / "model"
    path = model / "model.safetensors"
    data, certified = path.read_bytes(), manifest_of(model)
    chance = random.Random(4)
    places = sorted(chance.sample(range(len(data)), 10_000))
    changes = [(place, data[place] ^ chance.randrange(1, 256)) for place in places]
    assert not rejected(certificate, model)
    for digest in digests(data, changes):
        found = {**certified, path.name: {"sha256": digest, "size": len(data)}}
        assert exit_code(compare(certified, found)) == 1
    for place, other in [changes[0], changes[-1], *chance.sample(changes, 20)]:  # and from the disk, all the way
        path.write_bytes(with_byte(data, place, other))
        assert rejected(certificate, model)
        assert manifest_of(model)[path.name]["sha256"] == next(digests(data, [(place, other)]))
    path.write_bytes(data)
    assert not rejected(certificate, model)


def test_sizes_names_and_places_of_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    certificate, model = sign(statement(run)), run / "model"
    path = model / "config.json"
    data = path.read_bytes()
    for changed in (b"", data[:-1], data + b"\n", data + data):
        path.write_bytes(changed)
        assert rejected(certificate, model)
    path.write_bytes(data)
    assert not rejected(certificate, model)
    for name in ("Config.json", "config.json ", "nested/config.json", ".config.json"):
        path.rename(model / name)
        assert rejected(certificate, model)
        (model / name).rename(path)
    assert not rejected(certificate, model)
