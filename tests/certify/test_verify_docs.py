"""docs/certificates.md says what the code does: fields, verdicts, commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tests.certify.certificate_cases import write_run

from expunge.certify.vendored import DISPOSALS, LEVELS, PREDICATE, SHAPE
from expunge.cli.main import main

PAGE = (Path(__file__).resolve().parents[2] / "docs/certificates.md").read_text(encoding="utf-8")


def test_every_field_stands_on_the_page() -> None:
    table = PAGE.partition("| field | content |")[2].partition("\n\n")[0]
    named = {name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert named == set(SHAPE)
    for field in (*SHAPE["request"], *SHAPE["lineage"], *SHAPE["method"], *SHAPE["claims"][0], *DISPOSALS):
        assert f"`{field}`" in table, field
    assert all(f"| {level} |" in PAGE for level in LEVELS) and PREDICATE in PAGE
    assert all(f"`{verdict}`" in PAGE for verdict in SHAPE["verdict"])


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "runs" / "erase-17")
    (tmp_path / "released").symlink_to(run / "model", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    block = re.findall(r"^```sh\n(expunge .*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0]
    codes = []
    for line in block.strip().splitlines():
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(line)[1:])
        codes.append(ended.value.code)
    assert codes == [0, 1, 0]  # the run has no evidence: a certificate of the refusal, which holds
