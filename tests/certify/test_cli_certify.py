"""keygen, certify and verify as a user meets them: files, exit codes, one sentence for what is wrong."""

from __future__ import annotations

import base64
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from tests.certify.certificate_cases import CLAIMS, sign, write_model, write_run

from expunge.certify import issue
from expunge.certify.vendored import read_envelope, read_statement
from expunge.cli.main import main

Captured = pytest.CaptureFixture[str]


def expunge(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def place(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, whose claims are those of the cases, and two key pairs."""
    monkeypatch.setattr(issue, "claims_of", lambda run: CLAIMS)
    write_run(tmp_path / "run")
    assert expunge("keygen", "--out", tmp_path / "signing.pem", "--days", "30") == 0
    assert expunge("keygen", "--out", tmp_path / "auditor.pem") == 0
    capsys.readouterr()
    return tmp_path


def statement(path: Path) -> dict[str, Any]:
    return read_statement(read_envelope(path.read_bytes()).payload)


def test_the_whole_way(place: Path, capsys: Captured) -> None:
    run, key = place / "run", place / "signing.pem"
    assert expunge("certify", run, "--key", key, "--regime", "gdpr", "--disposal", "original=sealed@2026-11-20") == 0
    said = capsys.readouterr().out
    assert "verdict: evidence-only" in said and "The sentence of L4." in said and "certificate.html" in said
    assert expunge("verify", run / "certificate.json", "--pub", place / "signing.pub.pem", "--require", "L4") == 0
    said = capsys.readouterr().out
    assert "the model is the certified one" in said and "Nothing is refuted: 4 holds" in said
    assert expunge("verify", run / "certificate.json") == 0
    assert "who signed: the key lies beside the certificate" in capsys.readouterr().out
    assert expunge("verify", run / "certificate.json", "--pub", place / "auditor.pub.pem") == 1
    assert "REFUTED" in capsys.readouterr().out
    (run / "model" / "config.json").write_text("{}")
    assert expunge("verify", run / "certificate.json", "--pub", place / "signing.pub.pem", "--json") == 1
    record = json.loads(capsys.readouterr().out)
    assert record["refuted"] and any("changed: config.json" in f["text"] for f in record["findings"])


def test_secrets_are_for_their_owner(place: Path) -> None:
    expunge("certify", place / "run", "--key", place / "signing.pem")
    if os.name != "posix":
        pytest.skip("file modes of POSIX")
    for path in (place / "signing.pem", place / "run" / "certificate.keys.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_a_key_it_only_shows(place: Path, capsys: Captured) -> None:
    before = sorted(p.name for p in (place / "run").iterdir())
    assert expunge("certify", place / "run") == 0
    said = capsys.readouterr().out
    assert "Nothing was signed" in said and "digest of the manifest:" in said
    assert sorted(p.name for p in (place / "run").iterdir()) == before


def test_again_is_the_same_and_something_else_is_refused(place: Path, capsys: Captured) -> None:
    run, key = place / "run", place / "signing.pem"
    assert expunge("certify", run, "--key", key) == 0
    files = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert expunge("certify", run, "--key", key) == 0
    assert "was there, byte for byte" in capsys.readouterr().out
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file()} == files
    for other in (["--regime", "ccpa"], ["--received", "2026-11-01"]):
        assert expunge("certify", run, "--key", key, *other) == 2
    assert expunge("certify", run, "--key", place / "auditor.pem") == 2
    assert capsys.readouterr().err.count("is another certificate, and none is overwritten: choose a new --out.") == 3
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file()} == files
    assert expunge("certify", run, "--key", key, "--regime", "ccpa", "--out", place / "second.json") == 0
    assert statement(place / "second.json")["predicate"]["request"]["regime"] == "ccpa"
    (run / "certificate.keys.json").unlink()  # destroyed, as it may be
    assert expunge("certify", run, "--key", key) == 2
    assert expunge("verify", run / "certificate.json", "--pub", place / "signing.pub.pem") == 0


def test_a_stopped_call_is_finished_by_the_next(place: Path) -> None:
    run = place / "run"
    expunge("certify", run, "--key", place / "signing.pem")
    keys = (run / "certificate.keys.json").read_bytes()
    (run / "certificate.json").unlink()
    (run / "certificate.html").unlink()
    assert expunge("certify", run, "--key", place / "signing.pem") == 0
    assert (run / "certificate.keys.json").read_bytes() == keys and (run / "certificate.html").is_file()
    assert not list(run.glob(".*.tmp"))


def test_an_auditor_signs_too(place: Path, capsys: Captured) -> None:
    run, both = place / "run", place / "both.json"
    expunge("certify", run, "--key", place / "signing.pem")
    assert expunge("certify", run / "certificate.json", "--key", place / "auditor.pem", "--out", both) == 0
    keys = ["--pub", place / "signing.pub.pem", "--pub", place / "auditor.pub.pem"]
    assert expunge("verify", both, *keys, "--model", run / "model") == 0
    assert expunge("verify", run / "certificate.json", *keys) == 1
    assert expunge("verify", run / "certificate.json", *keys, "--threshold", "1") == 0
    assert expunge("certify", both, "--key", place / "auditor.pem", "--out", place / "three.json") == 2
    old = statement(run / "certificate.json")
    old["predicate"]["valid_until"] = old["predicate"]["created"]
    (place / "old.json").write_bytes(sign(old))
    assert expunge("certify", place / "old.json", "--key", place / "auditor.pem", "--out", place / "three.json") == 2
    assert "cannot be signed: the certificate ran out" in capsys.readouterr().err
    assert expunge("certify", run / "certificate.json", "--key", place / "auditor.pem") == 2
    assert expunge("certify", run / "certificate.json", "--key", place / "auditor.pem", "--out", both) == 2


def test_the_certificate_ends_with_its_key(place: Path) -> None:
    expunge("certify", place / "run", "--key", place / "signing.pem", "--out", place / "a.json")
    expunge("certify", place / "run", "--key", place / "auditor.pem", "--out", place / "b.json", "--days", "7")
    a, b = statement(place / "a.json")["predicate"], statement(place / "b.json")["predicate"]
    expires = (place / "signing.pem").read_text().split("\n")[0].removeprefix("Expires: ")
    assert a["valid_until"] == expires
    assert a["created"] <= b["created"] < b["valid_until"] < expires


def test_an_audit_of_the_model_knows_who_made_it(place: Path) -> None:
    from expunge.files import digest_folder
    from expunge.runs import Run

    run, audit = place / "run", place / "audit"
    model, original = run / "model", place / "run-original"
    config = {"model": str(model), "original": str(original), "device": "cpu"}
    digests = {"data": "d" * 64, "model": digest_folder(model), "original": digest_folder(original)}
    with Run.open(audit, "audit", config, digests) as opened:
        for name in ("results.json", "samples.jsonl"):
            shutil.copy(run / name, audit / name)
        interval = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 8, "definition": "loss-auc/1"}
        opened.write_json(
            "audit.json",
            {
                "schema": "expunge.audit/1",
                "vector": [{"axis": "privacy", "verdict": "passed", "sentence": "Jamika Rosadell", "tests": 1}],
                "scores": [{"score": "loss", "statistic": "auc", "models": {"audited": interval}, "gap": None}],
                "subjects": [{"subject": "Jamika Rosadell"}],
                "completeness": {"form": "text", "n": 4, "counts": {"adequate": 4}, "notes": ["Jamika Rosadell"]},
            },
        )
        opened.finish()
    assert expunge("certify", audit, "--key", place / "signing.pem") == 0
    found = statement(audit / "certificate.json")["predicate"]
    assert found["method"]["name"] == "npo" and found["lineage"]["original"] == digest_folder(original)
    assert found["evidence"]["axes"] == [{"axis": "privacy", "tests": 1, "verdict": "passed"}]
    assert found["evidence"]["completeness"] == {"counts": {"adequate": 4}, "form": "text", "n": 4}
    assert {"name": "audit.loss.auc", **interval} in found["evidence"]["measures"]
    assert expunge("verify", audit / "certificate.json", "--pub", place / "signing.pub.pem", "--model", model) == 0


def test_the_real_claims_of_a_bare_run_are_refused_with_exit_code_1(tmp_path: Path, capsys: Captured) -> None:
    assert expunge("keygen", "--out", tmp_path / "k.pem") == 0
    assert expunge("certify", write_run(tmp_path / "run"), "--key", tmp_path / "k.pem") == 1
    assert "verdict: refused" in capsys.readouterr().out
    assert [c["level"] for c in statement(tmp_path / "run" / "certificate.json")["predicate"]["claims"]] == [
        "L0", "L1", "L2", "L3", "L4", "L5",
    ]  # fmt: skip
    assert expunge("verify", tmp_path / "run" / "certificate.json", "--pub", tmp_path / "k.pub.pem") == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("certify nowhere --key signing.pem", "no run folder"),
        ("certify run --key nowhere.pem", "cannot be read"),
        ("certify run --key signing.pub.pem", "is a public key"),
        ("certify run --key signing.pem --model other", "is not the model that"),
        ("certify run --key signing.pem --received tomorrow", "is no date"),
        ("certify run --key signing.pem --disposal original", "is not key=value"),
        ("certify run --key signing.pem --disposal original=sealed", "have a date"),
        ("certify run --key signing.pem --disposal backups=unknown", "unknown artefact"),
        ("certify run --key signing.pem --disposal original=gone@2026-01-01", "unknown state"),
        ("certify run --key signing.pem --timestamp nowhere.tsr", "cannot be read"),
        ("certify run --key signing.pem --timestamp run/run.json", "no RFC 3161 token"),
        ("certify run --key signing.pem --days 0", "at least 1"),
        ("certify run --key signing.pem --out certificate", "must end in .json"),
        ("certify signing.pem --key signing.pem --out x.json", "cannot be signed"),
        ("verify nowhere.json --pub signing.pub.pem", "cannot be read"),
        ("verify run/run.json --pub signing.pub.pem", "canonical"),
        ("verify alone.json", "without a public key"),
        ("verify run/certificate.json --pub signing.pem", "is a private key"),
        ("verify run/certificate.json --pub signing.pub.pem --model nowhere", "is no folder"),
        ("verify run/certificate.json --pub signing.pub.pem --require L6", "unknown level"),
        ("verify run/certificate.json --pub signing.pub.pem --threshold 2", "allowed is 1 to 1"),
        ("verify run/certificate.json --pub signing.pub.pem --run run", "belong together"),
        ("keygen --out signing.pem", "never overwritten"),
        ("keygen --out new.pem --days -1", "at least 1"),
        ("keygen --out run/run.json/new.pem", "cannot be written"),
    ],
)
def test_wrong_input(arguments: str, word: str, place: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    write_model(place / "other", seed=9)
    if arguments.startswith("verify"):
        expunge("certify", "run", "--key", "signing.pem")
        shutil.copy("run/certificate.json", "alone.json")
        capsys.readouterr()
    before = sorted(place.rglob("*"))
    assert expunge(*arguments.split()) == 2
    said = capsys.readouterr()
    assert word in said.err and said.err.count("\n") == 1 and said.err.startswith("expunge: ") and not said.out
    assert sorted(place.rglob("*")) == before


def test_model_signing_reads_the_detached_signature(place: Path, capsys: Captured) -> None:
    verifying = pytest.importorskip("model_signing.verifying")
    for curve in (ec.SECP256R1(), ec.SECP384R1()):
        key, folder = ec.generate_private_key(curve), place / curve.name
        folder.mkdir()
        private, public, out = folder / "oms.pem", folder / "oms.pub.pem", folder / "c.json"
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        signed = ["certify", place / "run", "--key", place / "signing.pem", "--oms-key", private, "--out", out]
        assert expunge(*signed) == 0 and "c.sig" in capsys.readouterr().out
        before = (folder / "c.sig").read_bytes()
        assert expunge(*signed) == 0 and (folder / "c.sig").read_bytes() == before
        theirs = verifying.Config().use_elliptic_key_verifier(public_key=public)
        theirs.verify(place / "run" / "model", folder / "c.sig")
        theirs.verify(shutil.copytree(place / "run" / "model", folder / "released"), folder / "c.sig")
        root = json.loads(base64.b64decode(json.loads(before)["dsseEnvelope"]["payload"]))["subject"][0]["digest"]
        assert root == {"sha256": statement(out)["predicate"]["model"]["oms_root"]}
    config = place / "run" / "model" / "config.json"
    config.write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json"):
        theirs.verify(place / "run" / "model", folder / "c.sig")


def test_a_detached_signature_is_not_overwritten(place: Path, capsys: Captured) -> None:
    for name, curve in (("a", ec.SECP256R1()), ("b", ec.SECP256R1()), ("k1", ec.SECP256K1())):
        key = ec.generate_private_key(curve).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (place / f"{name}.pem").write_bytes(key)
    signed = ["certify", place / "run", "--key", place / "signing.pem", "--oms-key"]
    assert expunge(*signed, place / "a.pem") == 0
    assert expunge(*signed, place / "b.pem") == 2
    assert "is another signature" in capsys.readouterr().err
    for other in ("k1.pem", "signing.pem", "auditor.pub.pem", "nowhere.pem"):
        assert expunge(*signed, place / other) == 2
        assert "P-256" in (said := capsys.readouterr().err) or "cannot be read" in said
