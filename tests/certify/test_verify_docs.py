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


SMALL = {
    "--init tiny ": "--init tiny-test ",
    "--data people": "--data people --data-option people=6 --data-option forget=2 --data-option holdout=6 "
    "--data-option utility=10 --data-option questions=2 --quiet",
    "--data canaries": "--data canaries --data-option count=12 --data-option people=2 --data-option utility=4 "
    "--data-option questions=2 --quiet",
    "--seeds 7 --references 7": "--seeds 2 --references 2 --epochs 2 --base-epochs 1",
    "--method npo": "--method npo --suite quick",
    "epsilon=8,group=4": "epsilon=8,group=4,steps=3",
    "--reference runs/seeds/models/reference-1": "--reference runs/seeds/models/reference-1 --suite quick",
}


@pytest.mark.slow
def test_the_way_to_each_level_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of the page on smaller models; the exact one is certified, what is too small is refused."""
    monkeypatch.chdir(tmp_path)
    part = PAGE.partition("## How each level is reached")[2].partition("\n## ")[0]
    blocks = dict(re.findall(r"\*\*(.*?)[.*].*?```sh\n(.*?)^```", part, re.MULTILINE | re.DOTALL))
    assert len(blocks) == 7
    (plan,) = re.findall(r"```yaml\n(.*?)```", part, re.DOTALL)
    (tmp_path / "plan.yaml").write_text(plan)
    run("expunge keygen --out signing.pem")
    for name, block in blocks.items():
        for written in block.replace("\\\n", " ").strip().splitlines():
            line = written
            for given, small in SMALL.items():
                if given != "--method npo" or "--suite" not in line:
                    line = line.replace(given, small)
            code = run(line)
            refusal = line.startswith("expunge certify") and not name.startswith(("L0", "L1 by"))
            assert code in ((0, 1) if refusal else (0,)), (code, line)


def run(line: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line)[1:])
    return int(ended.value.code or 0)
