"""Helpers that read option values and print results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import typer

from expunge.cli import common
from expunge.cli.common import commas, emit, existing, key_values, pairs, table
from expunge.cli.main import invoke
from expunge.errors import UserError
from expunge.models.lora import LoraOptions
from expunge.options import configure


def test_key_values_keep_what_stands_behind_the_first_equals_sign() -> None:
    assert key_values(["a=1", "learning-rate = 1e-5", "t={prompt} = {target}", "e="]) == {
        "a": "1",
        "learning_rate": "1e-5",
        "t": "{prompt} = {target}",
        "e": "",
    }
    assert key_values(None) == {} == key_values([])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["beta"], "--set 'beta' is not key=value: write for example --set beta=1."),
        (["=3"], "--set '=3' is not key=value"),
        (["a=1", "a=2"], r"--set gives 'a' twice \(1 and 2\)"),
        (["learning-rate=1", "learning_rate=2"], "gives 'learning_rate' twice"),
    ],
)
def test_key_values_refuse(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        key_values(given)


def test_lora_text_gives_lora_options() -> None:
    read = configure(LoraOptions, pairs("r=4,alpha=8,targets=q_proj,v_proj", "--lora"), "option of --lora")
    assert read == LoraOptions(r=4, alpha=8.0, targets="q_proj,v_proj")
    assert pairs(None, "--lora") == {}
    with pytest.raises(UserError, match="--lora 'all' is not key=value"):
        pairs("all", "--lora")


def test_commas() -> None:
    assert commas(" npo, ga,,") == ["npo", "ga"] and commas(None) == []


def test_existing(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").touch()
    assert existing(tmp_path / "f.jsonl", "--forget") == tmp_path / "f.jsonl" and existing(None, "--forget") is None
    with pytest.raises(UserError, match=r"--forget '.*gone\.jsonl' is no file"):
        existing(tmp_path / "gone.jsonl", "--forget")


def test_emit_is_one_json_object_or_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"a": np.float32(0.5), "b": float("nan")}, "text\n", True)
    assert json.loads(capsys.readouterr().out) == {"a": 0.5, "b": None}
    emit({}, "text\n\n", False)
    assert capsys.readouterr().out == "text\n"


def test_table_aligns_and_wraps_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = table([("a", "word " * 12), ("long", "")], header=("name", "what"), indent=2)
    lines = text.splitlines()
    assert lines[0] == "  name  what" and lines[1].startswith("  a     word word") and lines[-1] == "  long"
    assert all(len(line) <= 40 and line == line.rstrip() for line in lines)
    assert " ".join(text.split()).count("word") == 12, "nothing is cut"
    assert table([]) == ""


def test_every_shared_option_is_described_and_reads_its_type(capsys: pytest.CaptureFixture[str]) -> None:
    def command(  # all of them at once: names and letters must not collide
        model: common.Model,
        out: common.Out,
        original: common.Original = None,
        reference: common.Reference = None,
        data: common.Data = None,
        data_dir: common.DataDir = None,
        data_option: common.DataOption = None,
        forget: common.Forget = None,
        retain: common.Retain = None,
        holdout: common.Holdout = None,
        utility: common.Utility = None,
        device: common.Device = "auto",
        dtype: common.Dtype = "auto",
        lora: common.Lora = None,
        seed: common.Seed = 0,
        batch_size: common.BatchSize = None,
        epochs: common.Epochs = None,
        learning_rate: common.LearningRate = None,
        template: common.Template = None,
        set_: common.Set = None,
        json: common.Json = False,
        quiet: common.Quiet = False,
        dry_run: common.DryRun = False,
    ) -> int:
        seen.update(locals())
        return 0

    # The annotations are strings in this file and name the module, which stands in the function's globals.
    seen: dict[str, object] = {}
    line = "-m M -o runs/x --reference A --reference B --data-option n=3 --set b=1 --epochs 0.5 --seed 7 -q --dry-run"
    assert invoke("all", command, line.split()) == 0
    assert seen["reference"] == ["A", "B"] and seen["data_option"] == ["n=3"] and seen["set_"] == ["b=1"]
    assert seen["out"] == Path("runs/x") and seen["epochs"] == 0.5 and seen["seed"] == 7
    assert seen["quiet"] is True and seen["dry_run"] is True and seen["json"] is False
    capsys.readouterr()
    with pytest.raises(UserError, match=r"'--seed'.*See expunge all --help\."):
        invoke("all", command, ["-m", "M", "-o", "x", "--seed", "minus"])
    with pytest.raises(UserError, match="--seed"):
        invoke("all", command, ["-m", "M", "-o", "x", "--seed", "-1"])


def test_docstring_examples_keep_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def command(name: Annotated[str, typer.Argument(help="Any.")] = "") -> None:
        """Do it.

        A paragraph that goes
        over two lines.

        Examples:
          expunge do a
          expunge do b
        """

    assert invoke("do", command, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert "  A paragraph that goes over two lines.\n" in shown
    assert "  Examples:\n    expunge do a\n    expunge do b\n" in shown


def test_doctests() -> None:
    code = "import doctest, expunge.cli.common as m; r = doctest.testmod(m); print(r.failed, r.attempted > 2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("0 True\n")
