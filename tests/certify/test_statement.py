"""The statement: no personal data, only what the run shows, and nothing that the verifier would not read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.certify.certificate_cases import (
    CLAIMS,
    KEYS,
    LATER,
    NOW,
    PEOPLE,
    claim,
    samples,
    statement,
    write_model,
    write_run,
)

from expunge.certify.commitments import Keys
from expunge.certify.evidence import figures, read_run
from expunge.certify.issue import certify
from expunge.certify.page import page
from expunge.certify.privacy import refuse_personal
from expunge.certify.signing import keygen
from expunge.certify.statement import Request, build
from expunge.certify.vendored import (
    LEVELS,
    PREDICATE,
    STATEMENT,
    Unreadable,
    canonical,
    check_statement,
    manifest_digest,
    overall,
    read_statement,
)
from expunge.errors import UserError
from expunge.files import digest_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A statement; copy it before changing it."""
    return statement(write_run(tmp_path_factory.mktemp("ready") / "run"))


def test_what_stands_in_it(run: Path) -> None:
    found = statement(run, regime="gdpr", id="r-81", received=NOW, disposal={"original": ("sealed", NOW)})
    predicate = found["predicate"]
    assert found["_type"] == STATEMENT and found["predicateType"] == PREDICATE
    assert found["subject"] == [
        {"name": "model", "digest": {"sha256": manifest_digest(predicate["model"]["manifest"])}}
    ]
    assert set(predicate["model"]["manifest"]) == {
        "config.json", "model.safetensors", "tokenizer.json", "nested/zone.json",
    }  # fmt: skip
    assert predicate["request"] | {"commitment": ""} == {
        "id": "r-81", "regime": "gdpr", "received": "2026-11-23T15:00:00Z", "due": None, "samples": 4, "subjects": 3,
        "commitment": "",
    }  # fmt: skip
    assert predicate["lineage"]["original"] == digest_folder(run.parent / "run-original")
    assert predicate["lineage"]["references"] == ["e" * 64]
    assert predicate["lineage"]["disposal"]["original"] == {"state": "sealed", "when": "2026-11-23T15:00:00Z"}
    assert predicate["lineage"]["disposal"]["caches"] == {"state": "unknown", "when": None}
    method = predicate["method"]
    assert (method["name"], method["kind"], method["seeds"], method["parameters_changed"]) == ("npo", "edit", [3], 1234)
    assert method["helpers_held_data"] is True
    assert [m["name"] for m in predicate["evidence"]["measures"]] == ["loss.forget", "model_utility", "prob.forget"]
    assert predicate["evidence"]["measures"] == figures(run)
    assert predicate["verdict"] == "evidence-only" and predicate["claims"] == CLAIMS
    assert len(predicate["not_claimed"]) >= 4 and len(predicate["assumptions"]) >= 3


def test_nothing_of_the_data_stands_in_certificate_page_and_lines(run: Path, tmp_path: Path) -> None:
    made = certify(run, key=keygen(tmp_path / "k.pem").private)
    assert made.certificate is not None and made.page is not None
    from expunge.certify.vendored import read_envelope

    texts = [
        read_envelope(made.certificate.read_bytes()).payload.decode(),
        made.page.read_text(),
        (run / "certificate.keys.json").read_text(),
    ]
    words = {
        "Jamika",
        "Rosadell",
        "Dellis",
        "Garohart",
        "Kerguelen",
        "Bexley",
        "Unter",
        "1963",
        "alice",
        "p000",
        "home",
    }
    words |= {str(value) for row in samples() for key, value in row.items() if key != "role" and value != "7"}
    for text in texts:
        assert [w for w in sorted(words) if w in text] == []
    assert str(tmp_path) not in "".join(texts)


def test_no_plain_hash_of_personal_data_either(run: Path) -> None:
    """Names and configurations can be guessed, so that their plain digests would give them away."""
    import hashlib

    from expunge.files import digest_file
    from expunge.record import read_record

    text = json.dumps(statement(run))
    digests = read_record(run).digests
    guesses = [digests["data"], digests["config"], *(digest_file(f) for f in run.iterdir() if f.is_file())]
    for row in PEOPLE:
        for value in row:
            guesses += [hashlib.sha256(value.encode()).hexdigest(), hashlib.md5(value.encode()).hexdigest()]
    assert [g for g in guesses if g in text] == []
    assert digests["output.model"] in text  # a model is no person: its digest must be there to be found


def test_other_keys_give_other_commitments_and_nothing_else(run: Path) -> None:
    facts = read_run(run)
    first, second, again = (
        read_statement(build(facts, CLAIMS, keys, Request(), NOW, LATER))["predicate"] for keys in (KEYS, Keys(), KEYS)
    )
    assert first == again
    assert first["request"]["commitment"] != second["request"]["commitment"]
    assert first["evidence"]["data_commitment"] != second["evidence"]["data_commitment"]
    differing = [key for key in first if first[key] != second[key]]
    assert sorted(differing) == ["evidence", "method", "request"]


@pytest.mark.parametrize(
    "place",
    [
        {"a": "Erasure of Jamika Rosadell, done"},
        {"a": [{"b": "p00004/birth"}]},
        {"Jamika Rosadell": 1},
        {"a": "see jamika.rosadell@example.org"},
        {"a": "alice"},
        {"a": "x In Unter-Öd, Haus 7 y"},
    ],
)
def test_the_last_look_finds_personal_data(place: Any) -> None:
    with pytest.raises(UserError, match="personal data") as refused:
        refuse_personal(place, samples())
    assert not any(str(value) in str(refused.value) for person in PEOPLE for value in person)


def test_the_last_look_lets_plain_words_pass() -> None:
    rows = [
        {"id": "7", "subject": "3", "prompt": "accuracy", "target": "negative"},
        {"id": "1", "subject": "0", "prompt": "", "target": 5},
    ]
    content = {"a": "7 of 3: negative accuracy, malice 5", "b": 7}
    refuse_personal(content, [*rows, *samples()])
    with pytest.raises(UserError, match="personal data"):  # the same sentence with a name in it
        refuse_personal({**content, "c": PEOPLE[0][0]}, [*rows, *samples()])


def test_short_phrases_of_weak_models_do_not_block_our_own_sentences(ready: dict[str, Any]) -> None:
    rows = [
        {"id": "1", "subject": "0", "prompt": text, "target": text, "generated": text} for text in ("in the", "That")
    ]
    refuse_personal(ready, rows)
    with pytest.raises(UserError, match=r"personal data would stand in the certificate, at predicate\.method\.name:"):
        refuse_personal({"predicate": {"method": {"name": "That"}}}, rows)
    long = {"generated": "a signature binds the signer"}
    with pytest.raises(UserError, match=r"at predicate\.assumptions\[0\]:"):
        refuse_personal(ready, [long])


def test_a_file_name_with_a_name_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "model" / "zone").mkdir()
    (run / "model" / "zone" / "Jamika Rosadell.bin").write_text("x")  # no file that the run's digest covers
    with pytest.raises(UserError, match="personal data would stand"):
        certify(run, key=keygen(tmp_path / "k.pem").private)
    assert not (run / "certificate.json").exists() and not (run / "certificate.keys.json").exists()


# -- what is read: never guessed -----------------------------------------------------------------------------------


def test_an_in_toto_library_takes_it(run: Path) -> None:
    theirs = pytest.importorskip("in_toto_attestation.v1.statement")
    protobuf = pytest.importorskip("google.protobuf.json_format")
    found = statement(run)
    message = theirs.Statement([], "", {}).pb
    message.Clear()
    protobuf.ParseDict(found, message)
    taken = theirs.Statement.copy_from_pb(message)
    taken.validate()
    assert taken.pb.predicate_type == found["predicateType"]
    assert [dict(s.digest) for s in taken.pb.subject] == [s["digest"] for s in found["subject"]]


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], Any]:
    def apply(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return apply


UNREADABLE = {
    "statement-version": put("_type", value="https://in-toto.io/Statement/v2"),
    "statement-old": put("_type", value="https://in-toto.io/Statement/v0.1"),
    "predicate-version": put("predicateType", value="https://expunge.dev/unlearning-evidence/v2"),
    "predicate-other": put("predicateType", value="https://slsa.dev/provenance/v1"),
    "predicate-number": put("predicateType", value=1),
    "level": put("predicate", "claims", 0, "level", value="L6"),
    "level-number": put("predicate", "claims", 0, "level", value=0),
    "level-case": put("predicate", "claims", 0, "level", value="l0"),
    "claim-verdict": put("predicate", "claims", 0, "verdict", value="proven"),
    "claim-field": put("predicate", "claims", 0, "epsilon", value=1),
    "claim-text": put("predicate", "claims", 0, "claim", value=None),
    "verdict": put("predicate", "verdict", value="approved"),
    "field": put("predicate", "note", value="x"),
    "no-field": lambda content: content["predicate"].pop("not_claimed"),
    "no-subject": put("subject", value=[]),
    "two-subjects": lambda content: content["subject"].append(content["subject"][0]),
    "subject-digest": put("subject", 0, "digest", value={"sha512": "0" * 128}),
    "digest-case": put("subject", 0, "digest", "sha256", value="A" * 64),
    "digest-short": put("predicate", "model", "oms_root", value="0" * 63),
    "time": put("predicate", "valid_until", value="2027-11-23"),
    "time-zone": put("predicate", "valid_until", value="2027-11-23T15:00:00+01:00"),
    "no-day": put("predicate", "valid_until", value="2027-02-31T15:00:00Z"),
    "count": put("predicate", "request", "samples", value=-1),
    "count-true": put("predicate", "request", "samples", value=True),
    "seed": put("predicate", "method", "seeds", value=["3"]),
    "state": put("predicate", "lineage", "disposal", "original", value={"state": "gone", "when": None}),
    "artefact": put("predicate", "lineage", "disposal", "backups", value={"state": "unknown", "when": None}),
    "outside": put("predicate", "model", "manifest", "../a", value={"sha256": "0" * 64, "size": 1}),
    "absolute": put("predicate", "model", "manifest", "/a", value={"sha256": "0" * 64, "size": 1}),
    "file-field": put("predicate", "model", "manifest", "a", value={"sha256": "0" * 64}),
    "list": lambda content: content.update(predicate=[]),
}


@pytest.mark.parametrize("change", UNREADABLE.values(), ids=UNREADABLE)
def test_what_this_version_does_not_know_is_refused(
    change: Callable[[dict[str, Any]], Any], ready: dict[str, Any]
) -> None:
    content = copy.deepcopy(ready)
    change(content)
    with pytest.raises(Unreadable):
        found = read_statement(canonical(content))
        check_statement(found, NOW)


INCONSISTENT = {
    "subject": put("subject", 0, "digest", "sha256", value="0" * 64),
    "manifest": put("predicate", "model", "manifest", "config.json", "size", value=7),
    "extra-file": put("predicate", "model", "manifest", "a", value={"sha256": "0" * 64, "size": 1}),
    "oms": put("predicate", "model", "oms_root", value="0" * 64),
    "verdict-up": put("predicate", "verdict", value="certified"),
    "verdict-down": put("predicate", "verdict", value="refused"),
    "claim-up": put("predicate", "claims", 0, "verdict", value="certified"),  # L0 for an edited model
    "ran-out": put("predicate", "valid_until", value="2026-11-23T15:00:00Z"),
    "to-come": put("predicate", "created", value="2026-11-23T15:00:01Z"),
    "identity": lambda c: put("predicate", "lineage", "original", value=c["predicate"]["model"]["recorded"])(c),
}


@pytest.mark.parametrize("change", INCONSISTENT.values(), ids=INCONSISTENT)
def test_what_contradicts_itself_is_refuted(change: Callable[[dict[str, Any]], Any], ready: dict[str, Any]) -> None:
    content = copy.deepcopy(ready)
    assert [f.state for f in check_statement(content, NOW)] == ["holds"]
    before = copy.deepcopy(content)
    change(content)
    assert content != before
    assert {f.state for f in check_statement(read_statement(canonical(content)), NOW)} == {"refuted"}


# -- verdicts, disposal, runs that are not fit ----------------------------------------------------------------------


def test_the_verdict_follows_from_the_claims() -> None:
    assert overall([]) == "refused"
    assert overall([claim(level, "unsupported") for level in LEVELS]) == "refused"
    assert overall([claim("L4"), claim("L2", "unsupported")]) == "evidence-only"
    assert overall([claim("L0"), claim("L4", "unsupported")]) == "certified"
    assert overall([claim("L0"), claim("L4", "refuted")]) == "refused"
    assert overall([claim("L0", "refuted"), claim("L4")]) == "refused"


def test_an_edited_or_unchanged_model_gets_no_formal_claim(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="L0 or L1 is certified, and the model came about by edit"):
        statement(write_run(tmp_path / "edit"), [claim("L0")])
    zone = statement(write_run(tmp_path / "zone", method="zone-store"), [claim("L0")])
    assert zone["predicate"]["verdict"] == "certified" and zone["predicate"]["method"]["kind"] == "zone"
    same = statement(write_run(tmp_path / "same", same=True))
    assert same["predicate"]["verdict"] == "refused"
    assert "unchanged" in page(same, "certificate.json")


def test_disposal(run: Path) -> None:
    original = run.parent / "run-original"
    for given, word in {
        ("original", "destroyed", NOW): "is there",
        ("original", "sealed", None): "have a date",
        ("original", "unknown", NOW): "have a date",
        ("orignal", "unknown", None): "did you mean 'original'",
        ("original", "deleted", NOW): "unknown state",
    }.items():
        with pytest.raises(UserError, match=word):
            statement(run, disposal={given[0]: given[1:]})
    for path in sorted(original.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    original.rmdir()
    found = statement(run, disposal={"original": ("destroyed", NOW)})
    assert found["predicate"]["lineage"]["disposal"]["original"]["state"] == "destroyed"


def test_what_is_no_time_stamp_is_refused(run: Path) -> None:
    for token in (b"", b"\x30\x03abc", b"text", b"\x30" + bytes(2**17)):
        with pytest.raises(UserError, match=r"RFC 3161|cut off"):
            statement(run, timestamp=token)


def test_runs_that_are_not_fit(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="its files have changed since"):
        read_run(run)
    with pytest.raises(UserError, match="is not the model that"):
        read_run(run, write_model(tmp_path / "other", seed=5))
    with pytest.raises(UserError, match="is not there"):
        read_run(run, tmp_path / "nowhere")
    with pytest.raises(UserError, match="no run folder"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="is failed, not done"):
        read_run(write_run(tmp_path / "failed", done=False))
    bare = write_run(tmp_path / "bare")
    (bare / "samples.jsonl").unlink()
    with pytest.raises(UserError, match="keeps no forget sample"):
        statement(bare)
    (bare / "samples.jsonl").write_text('{"id": 1}\n[]\n')
    with pytest.raises(UserError, match="line 2"):
        statement(bare)
    (bare / "results.json").write_text('{"schema": "expunge.results/9"}')
    with pytest.raises(UserError, match=r"schema 'expunge\.results/9'"):
        read_run(bare)
    (bare / "results.json").unlink()
    with pytest.raises(UserError, match=r"no results\.json"):
        read_run(bare)


def test_the_page_shows_what_is_said_and_not_said(run: Path) -> None:
    found = statement(run, [claim("L4", claim="<b>Bold & sure</b>"), claim("L2", "unsupported")])
    text = page(found, "certificate.json")
    assert "&lt;b&gt;Bold &amp; sure" in text and "<b>Bold" not in text
    assert "There is evidence, and no guarantee." in text and "What it does not say" in text
    assert all(line in text.replace("&#39;", "'") for line in ("0.02 [0.01, 0.031]", "evidence-only", "4 files"[2:]))
    assert "<script" not in text and "http://" not in text and "src=" not in text


def test_times_of_the_certificate(run: Path) -> None:
    found = statement(run)
    assert found["predicate"]["created"] == "2026-11-23T15:00:00Z"
    late = [f.text for f in check_statement(found, LATER + timedelta(seconds=1))]
    assert late == ["the certificate ran out on 2027-11-23: certify the model again."]
