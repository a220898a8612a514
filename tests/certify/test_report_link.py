"""The report shows the certificate of its run, of the runs inside it, or says that there is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from audit_synthetic import write_audit
from report_synthetic import write_run as write_study
from tests.certify.certificate_cases import CLAIMS, statement, write_run
from tests.certify.test_cli_certify import expunge

from expunge.certify import issue
from expunge.report import write_report
from expunge.report.certificates import certificates


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a certificate, an audit and a report from before."""
    monkeypatch.setattr(issue, "claims_of", lambda run: CLAIMS)
    run = write_run(tmp_path / "run")
    write_report(write_audit(run / "audit"))
    for name in ("audit.json", "drill.jsonl"):
        shutil.move(run / "audit" / name, run / name)
    shutil.rmtree(run / "audit")
    (run / "report.html").write_text("from before")
    assert expunge("keygen", "--out", tmp_path / "k.pem") == 0
    return run


def test_certify_writes_the_report_anew(signed: Path, tmp_path: Path) -> None:
    assert expunge("certify", signed, "--key", tmp_path / "k.pem") == 0
    page = (signed / "report.html").read_text()
    assert 'href="certificate.html"' in page and 'href="certificate.json"' in page and 'href="#certificate"' in page
    assert "The sentence of L4." in page and "evidence-only" in page and "No certificate" not in page
    assert "This page has not checked the signature" in page
    assert expunge("verify", signed / "certificate.json", "--pub", tmp_path / "k.pub.pem") == 0


def test_without_a_key_the_report_stays(signed: Path) -> None:
    assert expunge("certify", signed) == 0
    assert (signed / "report.html").read_text() == "from before"


def test_an_audit_without_a_certificate_says_so(tmp_path: Path) -> None:
    page = write_report(write_audit(tmp_path / "audit")).read_text()
    assert "No certificate: nobody has signed what this run shows." in page


def test_what_cannot_be_read_is_said_and_never_believed(tmp_path: Path) -> None:
    folder = write_audit(tmp_path / "audit")
    (folder / "certificate.json").write_text('{"verdict": "<script>alert(1)</script>"}')
    page = write_report(folder).read_text()
    assert "It cannot be read: the certificate is no" in page and "alert(1)" not in page


def test_a_study_shows_the_certificates_of_runs_inside_it_and_nothing_where_there_are_none(tmp_path: Path) -> None:
    from tests.certify.certificate_cases import sign

    study = write_study(tmp_path / "study")
    assert 'id="certificate"' not in write_report(study).read_text()
    place = study / "a b" / "run"
    place.mkdir(parents=True)
    (place / "certificate.json").write_bytes(sign(statement(write_run(tmp_path / "run"))))
    (found,) = certificates(study)
    assert found.file == "a%20b/run/certificate.json" and found.page is None and found.verdict == "evidence-only"
    page = write_report(study).read_text()
    assert 'href="a%20b/run/certificate.json"' in page and 'id="certificate"' in page
    assert [level for level, *_ in found.claims] == ["L0", "L1", "L2", "L3", "L4", "L5"]
