"""Verification: what holds, what is refuted, what was not checked, and what is wrong with the input."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.certify.certificate_cases import CLAIMS, KEY, KEYS, LATER, NOW, OTHER, claim, sign, statement, write_run

from expunge.certify import replay
from expunge.certify.canonical import canonical
from expunge.certify.signing import SigningKey
from expunge.certify.verify import Verification, verify
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError


def public(folder: Path, key: SigningKey, name: str, head: str = "") -> Path:
    pem = key.public.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / name).write_text(head + pem.decode())
    return folder / name


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A run with its certificate and the public keys of two signers."""
    run = write_run(tmp_path / "run")
    (run / "certificate.json").write_bytes(sign(statement(run)))
    monkeypatch.setattr(replay, "claims_of", lambda folder: CLAIMS)
    KEYS.write(run / "certificate.keys.json")
    return {
        "run": run,
        "certificate": run / "certificate.json",
        "keys": run / "certificate.keys.json",
        "pub": public(tmp_path, KEY, "a.pub.pem"),
        "other": public(tmp_path, OTHER, "b.pub.pem"),
    }


def checked(case: dict[str, Path], **more: Any) -> Verification:
    return verify(case["certificate"], **{"pub": [case["pub"]], "now": NOW + timedelta(days=1), **more})


def refuted(found: Verification) -> str:
    assert found.code == 1
    return " ".join(f.text for f in found.findings if f.state == "refuted")


def test_all_holds(case: dict[str, Path]) -> None:
    found = checked(case)
    assert found.code == 0 and [f.state for f in found.findings].count("holds") == 3
    assert "the model is the certified one: 4 files" in found.text() and found.text().endswith("read.")
    assert found.statement is not None and found.record()["findings"][0]["state"] == "holds"
    read = [f.text for f in found.findings if f.state == "read"]
    assert "verdict: evidence-only." in read and "L3 certified: The sentence of L3." in read


def test_the_model_is_looked_for_beside_the_certificate_or_where_told(case: dict[str, Path], tmp_path: Path) -> None:
    lone = tmp_path / "certificate.json"
    shutil.copy(case["certificate"], lone)
    found = checked({**case, "certificate": lone})
    assert found.code == 0 and any(f.state == "not checked" and "model's files" in f.text for f in found.findings)
    assert checked({**case, "certificate": lone}, model=case["run"] / "model").code == 0
    with pytest.raises(UserError, match="no folder"):
        checked(case, model=tmp_path / "nowhere")


def test_a_changed_model_is_refuted(case: dict[str, Path]) -> None:
    model = case["run"] / "model"
    (model / "extra.py").write_text("")
    assert "1 file(s) of the model not in the certificate: extra.py" in refuted(checked(case))
    (model / "extra.py").unlink()
    (model / "extra").symlink_to("config.json")
    assert "symbolic link" in refuted(checked(case))
    (model / "extra").unlink()
    (model / "config.json").unlink()
    assert "missing: config.json" in refuted(checked(case))
    (model / "config.json").symlink_to("tokenizer.json")
    assert "symbolic link" in refuted(checked(case))


def test_wrong_and_expired_keys(case: dict[str, Path], tmp_path: Path) -> None:
    found = checked(case, pub=[case["other"]])
    assert "no signature is by key" in refuted(found)
    assert found.statement is None and "evidence-only" not in found.text()  # nothing of it is repeated
    assert "no signature is by key" in refuted(checked(case, pub=[case["pub"], case["other"]]))
    assert checked(case, pub=[case["pub"], case["other"]], threshold=1).code == 0
    old = public(tmp_path, KEY, "old.pub.pem", "Expires: 2026-11-24T00:00:00Z\n")
    assert checked(case, pub=[old], now=NOW).code == 0
    assert "has expired (valid until 2026-11-24)" in refuted(checked(case, pub=[old]))
    for threshold in (0, 2, -1):
        with pytest.raises(UserError, match="allowed is 1 to 1"):
            checked(case, threshold=threshold)
    with pytest.raises(UserError, match="give --pub"):
        checked(case, pub=[])


def test_the_key_beside_the_certificate_shows_damage_and_not_who_signed(case: dict[str, Path]) -> None:
    beside = public(case["run"], KEY, "certificate.pub.pem")
    found = checked(case, pub=[])
    assert found.code == 0 and [f.state for f in found.findings][:2] == ["holds", "not checked"]
    assert "who signed: the key lies beside the certificate" in found.text()
    assert "who signed" not in checked(case).text()
    beside.write_bytes(case["other"].read_bytes())
    assert "no signature is by key" in refuted(checked(case, pub=[]))


def test_several_signatures(case: dict[str, Path]) -> None:
    content = statement(case["run"])
    case["certificate"].write_bytes(sign(content, KEY, OTHER))
    both = [case["pub"], case["other"]]
    assert checked(case, pub=both).code == checked(case, pub=both, threshold=2).code == 0
    assert any("1 more signature" in f.text for f in checked(case).findings)


def test_time(case: dict[str, Path]) -> None:
    assert checked(case, now=NOW).code == 0
    assert "ran out" in refuted(checked(case, now=LATER))
    assert "still to come" in refuted(checked(case, now=NOW - timedelta(seconds=1)))


def test_required_levels(case: dict[str, Path]) -> None:
    assert checked(case, require="L4").code == 0
    assert "L0 is required, and is unsupported" in refuted(checked(case, require="L0"))
    content = statement(case["run"], [claim("L4")])
    case["certificate"].write_bytes(sign(content))
    assert "L3 is required, and is not claimed" in refuted(checked(case, require="L3"))
    with pytest.raises(UserError, match=r"unknown level 'l4': did you mean 'L4'"):
        checked(case, require="l4")


def test_the_run_against_its_commitments(case: dict[str, Path]) -> None:
    told = {"run": case["run"], "commitments": case["keys"]}
    found = checked(case, **told)
    assert found.code == 0
    holds = [f.text for f in found.findings if f.state == "holds"]
    assert "the request is about the 4 forget sample(s) of the run." in holds
    assert "all 3 figures stand so in the run's files." in holds
    assert "all 6 claims come out the same from the run's files." in holds
    assert [t.split()[0] for t in holds if "certified run" in t] == [
        "results.json", "run.json", "run.yaml", "samples.jsonl",
    ]  # fmt: skip
    destroyed = case["keys"].read_text().replace(KEYS.request, "")
    case["keys"].write_text(destroyed)
    states = {f.text: f.state for f in checked(case, **told).findings}
    assert states["whose data it was: the key of the request has been destroyed."] == "not checked"
    case["keys"].write_text(destroyed.replace(KEYS.record, ""))
    assert sum(f.state == "not checked" for f in checked(case, **told).findings) == 5
    case["keys"].write_text(destroyed.replace(KEYS.record, "33" * 32))
    assert "is not the one of the certified run" in refuted(checked(case, **told))


def test_claims_that_do_not_follow(case: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"run": case["run"], "commitments": case["keys"]}
    monkeypatch.setattr(replay, "claims_of", lambda folder: [*CLAIMS[:4], claim("L4", "refuted"), CLAIMS[5]])
    assert "L4: comes out differently from the run's files." in refuted(checked(case, **told))
    monkeypatch.setattr(replay, "claims_of", lambda folder: CLAIMS[:5])
    assert "the number of claims: comes out differently" in refuted(checked(case, **told))
    monkeypatch.setattr(replay, "digest_code", lambda: "0" * 64)
    found = checked(case, **told)
    assert found.code == 0 and "with another version of the code" in found.text()


def test_other_data_is_refuted(case: dict[str, Path]) -> None:
    sample = Sample(id="1", subject="1", prompt="a", target="b")
    found = checked(
        case, run=case["run"], commitments=case["keys"], dataset=Dataset(name="x", roles={"forget": (sample,)})
    )
    assert "the data is not the data of the certificate." in refuted(found)


def test_a_run_that_was_changed(case: dict[str, Path], tmp_path: Path) -> None:
    path = case["run"] / "results.json"
    path.write_text(path.read_text().replace("0.02", "0.01"))
    told = {"run": case["run"], "commitments": case["keys"]}
    assert "results.json is not the one" in refuted(checked(case, **told))
    path.unlink()
    states = {f.text: f.state for f in checked(case, run=tmp_path, commitments=case["keys"]).findings}
    assert states["results.json: not in the run folder."] == "not checked"
    for given, word in (
        ({"run": case["run"]}, "belong together"),
        ({"commitments": case["keys"]}, "belong together"),
        ({"run": tmp_path / "no", "commitments": case["keys"]}, "no run folder"),
        ({"run": case["run"], "commitments": case["pub"]}, "certify wrote"),
    ):
        with pytest.raises(UserError, match=word):
            checked(case, **given)


def test_figures_and_requests_that_the_run_does_not_bear_out(case: dict[str, Path]) -> None:
    told = {"run": case["run"], "commitments": case["keys"]}
    content = statement(case["run"])
    content["predicate"]["evidence"]["measures"][0]["value"] = 0.5
    case["certificate"].write_bytes(sign(content))
    assert "the figures differ" in refuted(checked(case, **told))
    content = statement(case["run"])
    content["predicate"]["request"]["commitment"] = "0" * 64
    case["certificate"].write_bytes(sign(content))
    assert "about other samples" in refuted(checked(case, **told))


def test_unreadable_certificates(case: dict[str, Path]) -> None:
    whole = case["certificate"].read_bytes()
    content = json.loads(whole)
    later = {**statement(case["run"]), "predicateType": "https://expunge.dev/unlearning-evidence/v2"}
    contents = {
        "cut off": whole[:-20],
        "canonical": json.dumps(content, indent=2).encode(),
        "twice": whole[:-1] + b',"payload":""}',
        "NaN": b'{"payload":NaN}',
        "at most 16777216": whole + b" " * (16 * 2**20),
        "no DSSE envelope": canonical({"mediaType": "sigstore", "dsseEnvelope": content}),
        "only 'application/vnd": canonical({**content, "payloadType": "application/json"}),
        "only 'https://expunge": sign(later),
        "knows L0, L1": sign(_levelled(statement(case["run"]))),
        "no JSON": b"\x00\x01",
        "statement is no JSON": sign(b"{"),
        "statement is no object": sign([]),
    }
    for word, data in contents.items():
        case["certificate"].write_bytes(data)
        with pytest.raises(UserError, match=word):
            checked(case)
    with pytest.raises(UserError, match="cannot be read"):
        checked({**case, "certificate": case["run"] / "no.json"})


def _levelled(content: dict[str, Any]) -> dict[str, Any]:
    content["predicate"]["claims"][0]["level"] = "L9"
    return content


def test_terminal_codes_are_not_printed(case: dict[str, Path]) -> None:
    content = statement(case["run"], [claim("L4", claim="fine\x1b[2J\nholds        forged")])
    case["certificate"].write_bytes(sign(content))
    text = checked(case).text()
    assert "\x1b" not in text and "\nholds        forged" not in text
