"""Wrong input: one clear sentence, exit code 2, no traceback, and nothing is written or overwritten."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from expunge.cli.main import main
from expunge.models import memory

GIB = 1 << 30
Captured = pytest.CaptureFixture[str]


def rows(count: int, prefix: str) -> str:
    return "".join(
        json.dumps(
            {"id": f"{prefix}-{i}", "subject": f"{prefix} {i}", "prompt": f"Who is {prefix} {i}?", "target": "x y"}
        )
        + "\n"
        for i in range(count)
    )


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, good files, and everything that can be wrong with them."""
    from expunge.data.files import load_files
    from expunge.models.load import save_model
    from expunge.models.tiny import init_text

    folder = tmp_path_factory.mktemp("desk")
    (folder / "forget.jsonl").write_text(rows(4, "forget"))
    (folder / "retain.jsonl").write_text(rows(8, "retain"))
    data = load_files(forget=folder / "forget.jsonl", retain=folder / "retain.jsonl")
    save_model(init_text(data.private, "tiny-test"), folder / "model")
    (folder / "malformed.jsonl").write_text(rows(2, "a") + '{"prompt": "Who?", "target": \n')
    (folder / "fieldless.jsonl").write_text(rows(1, "a") + '{"prompt": "Who?"}\n')
    (folder / "list.jsonl").write_text('["Who?", "Me."]\n')
    (folder / "empty.jsonl").write_text("")
    (folder / "blank.jsonl").write_text("\n\n")
    (folder / "twice.jsonl").write_text(rows(1, "a") + rows(1, "a"))
    (folder / "both.jsonl").write_text(rows(2, "forget") + rows(4, "retain"))
    (folder / "same.jsonl").write_text('{"id": "other", "prompt": "Who is forget 1?", "target": "x y"}\n')
    (folder / "long.jsonl").write_text(json.dumps({"id": "long-1", "text": "word " * 4000}) + "\n")
    for name in ("weightless", "pickled", "broken", "unknown-type"):
        shutil.copytree(folder / "model", folder / name)
        (folder / name / "model.safetensors").unlink()
    (folder / "pickled/pytorch_model.bin").write_bytes(b"\x80\x04.")
    (folder / "broken/model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json")
    shutil.copy(folder / "model/model.safetensors", folder / "unknown-type")
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "unknown-type/config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    (folder / "notes").mkdir()
    (folder / "notes/diary.txt").write_text("mine")
    return folder


@dataclass(frozen=True)
class Case:
    """A command line, and what its refusal has to say."""

    line: str
    says: tuple[str, ...]


UNLEARN = "unlearn --model model --out out --method ga"
BENCH = "bench --model model --forget forget.jsonl --retain retain.jsonl --methods ga --out out"
AUDIT = "audit --model model --forget forget.jsonl --out out"
CASES = {
    "no data": Case(UNLEARN, ("name the data", "--forget")),
    "two kinds of data": Case(f"{UNLEARN} --data people --forget forget.jsonl", ("either --data NAME, or --forget",)),
    "missing file": Case(f"{UNLEARN} --forget gone.jsonl", ("'gone.jsonl' does not exist", "JSONL")),
    "malformed line": Case(f"{UNLEARN} --forget malformed.jsonl", ("'malformed.jsonl' line 3", "not JSON")),
    "line without answer": Case(f"{UNLEARN} --forget fieldless.jsonl", ("line 2", "neither text nor target")),
    "line that is a list": Case(f"{UNLEARN} --forget list.jsonl", ("'list.jsonl' line 1",)),
    "empty forget set": Case(f"{UNLEARN} --forget empty.jsonl", ("'empty.jsonl' is empty",)),
    "blank forget set": Case(f"{UNLEARN} --forget blank.jsonl", ("'blank.jsonl'", "empty")),
    "id twice": Case(f"{UNLEARN} --forget twice.jsonl", ("'a-0'", "twice")),
    "overlap by id": Case(
        f"{UNLEARN} --forget forget.jsonl --retain both.jsonl", ("2 sample(s)", "forget-0, forget-1")
    ),
    "overlap by content": Case(f"{UNLEARN} --forget forget.jsonl --retain same.jsonl", ("1 sample(s)", "forget-1")),
    "unknown method": Case("unlearn -m model -o out --forget forget.jsonl --method nop", ("did you mean 'npo'?",)),
    "unknown option of method": Case(f"{UNLEARN} --forget forget.jsonl --set gama=2", ("did you mean 'gamma'?",)),
    "method option of wrong type": Case(f"{UNLEARN} --forget forget.jsonl --set gamma=big", ("'big' is not a number",)),
    "impossible number": Case(f"{UNLEARN} --forget forget.jsonl --epochs 0", ("epochs = 0.0 cannot be",)),
    "unknown option": Case(f"{UNLEARN} --forgte forget.jsonl", ("--forgte", "--forget", "expunge unlearn --help")),
    "unknown dataset": Case("unlearn -m model -o out --data peple", ("did you mean 'people'?",)),
    "unknown option of dataset": Case("unlearn -m model -o out --data people --data-option forgt=1", ("'forget'?",)),
    "unknown suite": Case(f"{UNLEARN} --forget forget.jsonl --suite ful", ("'ful'", "full")),
    "unknown number type": Case(f"{UNLEARN} --forget forget.jsonl --dtype float31", ("did you mean 'float32'?",)),
    "unknown device": Case(f"{UNLEARN} --forget forget.jsonl --device cdua", ("unknown device 'cdua'",)),
    "template without a place": Case(f"{UNLEARN} --forget forget.jsonl --template Q:{{prompt}}", ("{target}",)),
    "option of LoRA": Case(f"{UNLEARN} --forget forget.jsonl --lora rank=8", ("'rank'", "Allowed:", "r, ")),
    "no such model": Case("unlearn -m ./modle -o out --forget forget.jsonl", ("did you mean", "model'?")),
    "model without weights": Case(
        "unlearn -m weightless -o out --forget forget.jsonl", ("no weights", "model.safetensors")
    ),
    "pickled weights": Case("unlearn -m pickled -o out --forget forget.jsonl", ("pickle", "safetensors")),
    "broken weights": Case("unlearn -m broken -o out --forget forget.jsonl", ("model.safetensors",)),
    "model of an unknown type": Case("unlearn -m unknown-type -o out --forget forget.jsonl", ("lama",)),
    "no such base": Case(f"{UNLEARN} --forget forget.jsonl --base ./gone", ("'./gone' does not exist",)),
    "no such reference": Case(f"{UNLEARN} --forget forget.jsonl --reference ./gone", ("'./gone' does not exist",)),
    "no such original": Case("audit -m model -o out --forget forget.jsonl --original ./gone", ("'./gone'",)),
    "unknown suite of an audit": Case(f"{AUDIT} --suite quik", ("unknown suite 'quik'", "did you mean 'quick'?")),
    "unknown attack": Case(f"{AUDIT} --attacks zlip", ("unknown attack 'zlip'", "did you mean 'zlib'?")),
    "unknown option of attack": Case(f"{AUDIT} --attacks blind:fold=3", ("option of attack blind", "'folds'?")),
    "attack option without =": Case(f"{AUDIT} --attacks blind:folds", ("'folds' is not key=value",)),
    "attack option of wrong type": Case(f"{AUDIT} --attacks blind:folds=few", ("'few' is not a whole number",)),
    "attack named twice": Case(f"{AUDIT} --attacks loss,zlib,loss", ("'loss' is named twice",)),
    "no such attack file": Case(
        f"{AUDIT} --attacks gone.py:mine", ("'gone.py' does not exist", "path/to/file.py:name")
    ),
    "unknown axis": Case(f"{AUDIT} --fail-on privac", ("unknown --fail-on 'privac'", "did you mean 'privacy'?")),
    "impossible level": Case(f"{AUDIT} --level 5", ("--level 5.0 is not between 0 and 1",)),
    "impossible fdr": Case(f"{AUDIT} --fdr 0", ("--fdr 0.0 is not between 0 and 1",)),
    "no such shadow": Case(f"{AUDIT} --shadow ./gone", ("'./gone' does not exist",)),
    "folder with something else": Case(f"{UNLEARN} --forget forget.jsonl --out notes", ("no run folder", "new --out")),
    "bench without retain": Case("bench -m model --forget forget.jsonl --methods ga -o out", ("--retain",)),
    "bench without a model": Case("bench --data people -o out", ("--model", "--init")),
    "unknown preset": Case("bench --init tinny --data people -o out", ("did you mean 'tiny'?",)),
    "size beyond the data": Case(f"{BENCH} --size-impact 3,999", ("--size-impact 999", "1 to 11")),
    "size that is no number": Case(f"{BENCH} --size-impact ten", ("'ten' is not a number",)),
    "more requests than subjects": Case(f"{BENCH} --sequential 9", ("9 requests", "1 to 4")),
    "method listed twice": Case(f"{BENCH} --methods ga,npo,ga", ("listed twice",)),
    "method setting without =": Case(f"{BENCH} --methods ga:gamma", ("not key=value",)),
    "unknown role": Case("train -m model --forget forget.jsonl --roles forgte -o out", ("did you mean 'forget'?",)),
    "role without samples": Case(
        "train -m model --forget forget.jsonl --roles retain -o out", ("nothing to train on",)
    ),
    "report of no run": Case("report notes", ("'notes/results.json' does not exist", "folder of a run")),
}


def content(folder: Path) -> dict[str, str]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def refused(line: str, capsys: Captured) -> str:
    """Run it as the program does; the one sentence that it ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*line.split(), *([] if line.startswith("report") else ["--quiet"])])
    out, err = capsys.readouterr()
    assert end.value.code == 2, err
    assert out == "" and err.startswith("expunge: ") and err.count("\n") == 1 and "Traceback" not in err
    assert err.endswith((".\n", "?\n")), "a whole sentence"
    return err


@pytest.fixture
def here(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(desk)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return desk


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_and_nothing_is_written(name: str, here: Path, capsys: Captured) -> None:
    case, before = CASES[name], content(here)
    message = refused(case.line, capsys)
    for words in case.says:
        assert words in message
    assert content(here) == before and not (here / "out").exists()


def test_what_was_refused_can_be_mended_under_the_same_name(here: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "run"
    line = f"unlearn -m model --forget forget.jsonl --method ga --epochs 1 --suite none --out {out}"
    refused(f"{line} --template Q:{{prompt}}", capsys)
    assert not out.exists()
    with pytest.raises(SystemExit) as end:
        main([*line.split(), "--quiet"])
    assert end.value.code == 0 and (out / "model/model.safetensors").is_file()


def test_a_run_of_another_configuration_is_refused_with_the_difference(
    here: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "run"
    line = f"unlearn -m model --forget forget.jsonl --method ga --suite none --out {out}"
    with pytest.raises(SystemExit) as end:
        main([*line.split(), "--epochs", "1", "--quiet"])
    assert end.value.code == 0
    before = content(out)
    message = refused(f"{line} --epochs 2 --retain retain.jsonl", capsys)
    assert 'retain: null -> "retain.jsonl"' in message and 'set.epochs: "1.0" -> "2.0"' in message
    assert "choose a new --out" in message
    other = refused(f"train -m model --forget forget.jsonl --roles forget --out {out}", capsys)
    assert "holds a run of 'unlearn', not of 'train'" in other
    assert content(out) == before


def test_changed_data_under_the_same_name_is_another_configuration(
    here: Path, tmp_path: Path, capsys: Captured
) -> None:
    mine, out = tmp_path / "mine.jsonl", tmp_path / "run"
    mine.write_text(rows(2, "mine"))
    line = f"unlearn -m model --forget {mine} --method ga --epochs 1 --suite none --out {out}"
    with pytest.raises(SystemExit):
        main([*line.split(), "--quiet"])
    mine.write_text(rows(3, "mine"))
    assert "data has other content" in refused(line, capsys)


@pytest.mark.parametrize(
    ("what", "patch", "says"),
    [
        ("memory", lambda m: m.setattr(memory, "available_memory", lambda device: GIB // 8), "of memory are needed"),
        (
            "disk",
            lambda m: m.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1)),
            "of disk are needed",
        ),
    ],
)
@pytest.mark.parametrize("line", ["unlearn --method ga", "bench --methods ga", "train --roles forget", "audit"])
def test_too_little_memory_or_disk_is_said_before_the_start(
    what: str,
    patch: Callable[[pytest.MonkeyPatch], None],
    says: str,
    line: str,
    here: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patch(monkeypatch)
    verb, *more = line.split()
    data = "--forget forget.jsonl --retain retain.jsonl"
    message = refused(f"{verb} --model model {data} --out out {' '.join(more)}", capsys)
    assert says in message and "free" in message
    assert not (here / "out").exists()


def test_a_sample_that_is_too_long_is_cut_and_counted(here: Path, tmp_path: Path, capsys: Captured) -> None:
    line = f"unlearn -m model --forget long.jsonl --method ga --epochs 1 --suite none --out {tmp_path / 'run'}"
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 0
    said = "1 sample(s) were longer than the context and cut: long-1."
    assert said in capsys.readouterr().err
    assert said in json.loads((tmp_path / "run/run.json").read_text())["notes"]


def test_refusals_repeat_no_answer(here: Path, capsys: Captured) -> None:
    """What is printed may be pasted anywhere, so it names ids and never the texts."""
    for name in ("overlap by id", "overlap by content", "id twice"):
        assert "x y" not in refused(CASES[name].line, capsys)
