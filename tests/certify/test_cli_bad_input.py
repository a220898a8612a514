"""Whatever an auditor is handed: one sentence, exit code 1 for refuted and 2 for unreadable, and nothing written."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.certify.certificate_cases import (
    CLAIMS,
    KEY,
    NOW,
    OTHER,
    sign,
    statement,
    write_run,
)  # fmt: skip
from tests.certify.test_cli_certify import expunge

from expunge.certify.canonical import canonical
from expunge.certify.signing import SigningKey, envelope, public_pem
from expunge.certify.vendored import LIMIT, PublicKey

Captured = pytest.CaptureFixture[str]
Spoil = Callable[[Path], Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate, its model and three public keys."""
    folder = tmp_path_factory.mktemp("made")
    run = write_run(folder / "run")
    (folder / "content.json").write_text(json.dumps(statement(run)))
    (folder / "certificate.json").write_bytes(sign(statement(run)))
    shutil.copytree(run / "model", folder / "model")
    (folder / "key.pub.pem").write_bytes(public_pem(KEY.public))
    (folder / "other.pub.pem").write_bytes(public_pem(OTHER.public))
    expired = PublicKey(KEY.key.public_key(), NOW - timedelta(days=1))
    (folder / "expired.pub.pem").write_bytes(public_pem(expired))
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to be spoiled, as working folder."""
    copied = shutil.copytree(made, tmp_path / "place")
    monkeypatch.chdir(copied)
    return copied


def content(place: Path, **changes: Any) -> dict[str, Any]:
    found = json.loads((place / "content.json").read_text())
    found["predicate"] |= changes
    return dict(found)


def resign(place: Path, found: Any, *keys: SigningKey) -> None:
    (place / "certificate.json").write_bytes(sign(found, *keys))


def other_envelope(place: Path) -> None:
    found = json.loads((place / "certificate.json").read_text())
    (place / "certificate.json").write_bytes(canonical(found | {"payloadType": "text/plain"}))


def no_signature(place: Path) -> None:
    found = json.loads((place / "certificate.json").read_text())
    (place / "certificate.json").write_bytes(canonical(found | {"signatures": []}))


def many_signatures(place: Path) -> None:
    found = json.loads((place / "certificate.json").read_text())
    (place / "certificate.json").write_bytes(canonical(found | {"signatures": found["signatures"] * 17}))


def cut(name: str) -> Spoil:
    def spoil(place: Path) -> None:
        data = (place / name).read_bytes()
        (place / name).write_bytes(data[: len(data) // 2])

    return spoil


def link(place: Path) -> None:
    (place / "model" / "config.json").unlink()
    (place / "model" / "config.json").symlink_to(place / "content.json")


def fifo(place: Path) -> None:
    os.mkfifo(place / "model" / "pipe")


def deep(place: Path) -> None:
    (place / "certificate.json").write_bytes(b"[" * 100_000 + b"]" * 100_000)


def oversized(place: Path) -> None:
    (place / "certificate.json").write_bytes(b'"' + b"a" * LIMIT + b'"')


REFUTED: list[tuple[str, Spoil, str, str]] = [
    ("wrong key", lambda p: None, "--pub other.pub.pem", "no signature is by key"),
    ("expired key", lambda p: None, "--pub expired.pub.pem", "has expired"),
    ("one of two signatures", lambda p: None, "--pub key.pub.pem --pub other.pub.pem", "no signature is by key"),
    ("truncated weights", cut("model/model.safetensors"), "--pub key.pub.pem", "1 file(s) of the model changed"),
    ("missing file", lambda p: (p / "model/tokenizer.json").unlink(), "--pub key.pub.pem", "missing: tokenizer.json"),
    ("extra file", lambda p: (p / "model/new.bin").write_bytes(b"x"), "--pub key.pub.pem", "not in the certificate"),
    ("hidden extra file", lambda p: (p / "model/.x").write_bytes(b"x"), "--pub key.pub.pem", "not in the certificate"),
    ("symbolic link", link, "--pub key.pub.pem", "is a symbolic link"),
    ("named pipe", fifo, "--pub key.pub.pem", "no plain file"),
    ("level not certified", lambda p: None, "--pub key.pub.pem --require L0", "L0 is required"),
    ("verdict that does not follow", lambda p: resign(p, content(p, verdict="certified")), "--pub key.pub.pem",
     "'evidence-only' follows from the claims"),
    ("formal claim on an edit", lambda p: resign(p, content(p, verdict="certified", claims=[
        c | {"verdict": "certified"} if c["level"] == "L0" else c for c in CLAIMS])), "--pub key.pub.pem",
     "the model came about by edit"),
    ("run out", lambda p: resign(p, content(p, valid_until="2026-11-23T15:00:00Z", created="2026-11-01T00:00:00Z")),
     "--pub key.pub.pem", "ran out"),
    ("bad time stamp", lambda p: resign(p, content(p, timestamp=base64.b64encode(b"0\x03abc").decode())),
     "--pub key.pub.pem", "the RFC 3161 time stamp: the time stamp"),
]  # fmt: skip

UNREADABLE: list[tuple[str, Spoil, str]] = [
    ("truncated certificate", cut("certificate.json"), "is no JSON"),
    ("empty certificate", lambda p: (p / "certificate.json").write_bytes(b""), "is no JSON"),
    ("another envelope type", other_envelope, "only 'application/vnd.in-toto+json' is read"),
    ("no signature", no_signature, "1 to 16 signatures"),
    ("17 signatures", many_signatures, "1 to 16 signatures"),
    ("another statement", lambda p: resign(p, content(p) | {"_type": "https://in-toto.io/Statement/v9"}), "_type"),
    ("another predicate version", lambda p: resign(p, content(p) | {
        "predicateType": "https://expunge.dev/unlearning-evidence/v2"}), "unlearning-evidence/v2"),
    ("unknown level", lambda p: resign(p, content(p, claims=[CLAIMS[0] | {"level": "L6"}])), "is 'L6'"),
    ("unknown verdict", lambda p: resign(p, content(p, verdict="perfect")), "is 'perfect'"),
    ("unknown field", lambda p: resign(p, content(p, more=1)), "unknown or missing fields: more"),
    ("oversized JSON", oversized, f"at most {LIMIT} are read"),
    ("deep JSON", deep, "nested too deeply"),
    ("other spelling", lambda p: (p / "certificate.json").write_text(json.dumps(json.loads(
        (p / "certificate.json").read_text()), indent=1)), "canonical spelling"),
    ("truncated key", cut("key.pub.pem"), "holds no PEM public key"),
    ("empty model", lambda p: (shutil.rmtree(p / "model"), (p / "model").mkdir()), "holds no file"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "keys", "words"), REFUTED, ids=[r[0] for r in REFUTED])
def test_refuted_with_exit_code_1(
    name: str, spoil: Spoil, keys: str, words: str, place: Path, capsys: Captured
) -> None:
    assert expunge("verify", "certificate.json", "--pub", "key.pub.pem") == 0
    spoil(place)
    capsys.readouterr()
    assert expunge("verify", "certificate.json", *keys.split()) == 1
    said = capsys.readouterr()
    lines = [line for line in said.out.splitlines() if line.startswith("refuted")]
    assert any(words in line for line in lines) and "REFUTED" in said.out and not said.err


@pytest.mark.parametrize(("name", "spoil", "words"), UNREADABLE, ids=[u[0] for u in UNREADABLE])
def test_unreadable_with_exit_code_2(name: str, spoil: Spoil, words: str, place: Path, capsys: Captured) -> None:
    spoil(place)
    before = sorted(place.rglob("*"))
    assert expunge("verify", "certificate.json", "--pub", "key.pub.pem") == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and said.err.startswith("expunge: ") and not said.out
    assert sorted(place.rglob("*")) == before


def test_several_signatures_and_a_threshold(place: Path, capsys: Captured) -> None:
    resign(place, content(place), KEY, OTHER)
    both = ["--pub", "key.pub.pem", "--pub", "other.pub.pem"]
    assert expunge("verify", "certificate.json", *both) == 0
    assert capsys.readouterr().out.count("signed by key") == 2
    assert expunge("verify", "certificate.json", "--pub", "key.pub.pem") == 0
    assert "1 more signature(s), by none of the given keys" in capsys.readouterr().out
    (place / "certificate.json").write_bytes(envelope(canonical(content(place)), [KEY]))
    assert expunge("verify", "certificate.json", *both, "--threshold", "1") == 0
    assert expunge("verify", "certificate.json", *both, "--threshold", "2") == 1


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("evidence.json", '{"schema": "expunge.evidence/9"}', "this version reads"),
        ("evidence.json", '{"schema": "expunge.evidence/1", "L9": {}}', "field 'L9' is wrong"),
        ("evidence.json", "{", "is no evidence file"),
        ("run.json", "{", "run.json"),
        ("results.json", '{"schema": "expunge.results/9"}', "schema 'expunge.results/9'"),
        ("samples.jsonl", "{\n{}\n", "line"),
        ("run.yaml", "a: [", "cannot be read"),
    ],
)
def test_a_damaged_run_is_not_certified(
    file: str, text: str, words: str, place: Path, tmp_path: Path, capsys: Captured
) -> None:
    assert expunge("keygen", "--out", tmp_path / "k.pem") == 0
    capsys.readouterr()
    (place / "run" / file).write_text(text)
    assert expunge("certify", "run", "--key", tmp_path / "k.pem") == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1
    assert not (place / "run" / "certificate.json").exists()
