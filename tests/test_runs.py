"""The run folder: whole at every moment, continued by the same command, refused to another one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from expunge import files
from expunge.errors import UserError
from expunge.record import digest_code
from expunge.runs import Run, RunRecord, differences, digest_file, digest_folder, json_schema, read_record

CONFIG = {"model": "m", "seed": 0, "learning_rate": 1e-5, "lora": {"r": 8}, "name": "café", "day": "2024-01-01"}


def opened(folder: Path, config: dict[str, Any] | None = None, **more: Any) -> Run:
    return Run.open(folder, "unlearn", CONFIG if config is None else config, {"model": "a" * 64}, **more)


def finished(folder: Path) -> Path:
    with opened(folder) as run:
        run.finish()
    return folder


def child(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


# -- files -------------------------------------------------------------------------------------------------------


def test_numbers_of_every_kind_become_json() -> None:
    class Colour(Enum):
        RED = "red"

    @dataclass
    class Pair:
        left: np.float32
        right: Path

    given = {
        "scalar": np.float32(0.5),
        "integer": np.int64(7),
        "flag": np.bool_(True),
        "array": np.arange(4).reshape(2, 2),
        "tensor": torch.tensor([[1.5]]),
        "zero_d": torch.tensor(2),
        "nan": [math.nan, np.float64("nan"), np.array([np.inf, 1.0]), -math.inf],
        "set": {"b", "a"},
        "pair": Pair(np.float32(1), Path("a/b")),
        "enum": Colour.RED,
        "rows": (i for i in range(2)),
        3: None,
    }
    assert json.loads(files.to_json(given)) == {
        "scalar": 0.5,
        "integer": 7,
        "flag": True,
        "array": [[0, 1], [2, 3]],
        "tensor": [[1.5]],
        "zero_d": 2,
        "nan": [None, None, [None, 1.0], None],
        "set": ["a", "b"],
        "pair": {"left": 1.0, "right": "a/b"},
        "enum": "red",
        "rows": [0, 1],
        "3": None,
    }
    with pytest.raises(TypeError, match="object has no JSON form"):
        files.to_json(object())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = files.write_jsonl(tmp_path / "rows.jsonl", [1, 2])
    with pytest.raises(TypeError):
        files.write_jsonl(path, [3, object()])
    assert list(files.read_jsonl(path)) == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


KILLED_WRITER = """
import sys, time
from expunge.runs import Run
run = Run.open(sys.argv[1], "unlearn", {"seed": 0})
run.write_jsonl("samples.jsonl", [{"n": 1}])
def rows():
    for n in range(20000):
        yield {"n": n, "pad": "x" * 200}
    print("half", flush=True)
    time.sleep(60)
run.write_jsonl("samples.jsonl", rows())
"""


def test_kill_during_a_write_leaves_the_old_file_and_the_run_continues(tmp_path: Path) -> None:
    process = child(KILLED_WRITER, tmp_path / "run")
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    scratch = list((tmp_path / "run").glob(f"*{files.SCRATCH}")) + list((tmp_path / "run").glob(f".*{files.SCRATCH}"))
    assert scratch and scratch[0].stat().st_size > 1_000_000, "the kill must fall into the write"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [row["n"] for row in files.read_jsonl(tmp_path / "run/samples.jsonl")] == [1]
    assert read_record(tmp_path / "run").status == "running"

    with Run.open(tmp_path / "run", "unlearn", {"seed": 0}) as run:
        assert run.resumed and not run.done
        assert not list(run.folder.glob(f".*{files.SCRATCH}"))
        assert [a.status for a in run.record.attempts] == ["interrupted", "running"]
        assert run.record.attempts[0].finished is not None
        run.finish()
    assert read_record(tmp_path / "run").status == "done"


def test_new_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = files.write_text(tmp_path / "atomic", "x")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_torn_last_line_is_skipped_and_any_other_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": ')
    assert list(files.read_jsonl(path)) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": \n{"a": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        list(files.read_jsonl(path))


# -- digests -----------------------------------------------------------------------------------------------------


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    for name, content in {"model.safetensors": "w", "config.json": "{}", "tokenizer.json": "[]"}.items():
        (folder / name).write_text(content)
    return folder


def test_digests_are_those_of_the_standard_and_of_content_alone(tmp_path: Path) -> None:
    (tmp_path / "abc").write_text("abc")
    # FIPS 180-4, example of SHA-256 on "abc"
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert digest_file(tmp_path / "abc") == expected

    one, two = model_folder(tmp_path / "one"), model_folder(tmp_path / "two")
    os.utime(two / "config.json", (0, 0))
    (two / "README.md").write_text("not part of the model")
    (two / "optimizer.pt").write_text("neither")
    (two / ".cache").mkdir()
    (two / ".cache/config.json").write_text("nor this")
    assert digest_folder(one) == digest_folder(two)
    (two / "model.safetensors").write_text("W")
    assert digest_folder(one) != digest_folder(two)
    (one / "model.safetensors").rename(one / "other.safetensors")
    assert digest_folder(one) != digest_folder(model_folder(tmp_path / "three")), "names count"


def test_a_folder_without_a_model_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(FileNotFoundError, match="no file to digest"):
        digest_folder(tmp_path)


# -- open, continue, refuse --------------------------------------------------------------------------------------


def test_record_is_complete_and_matches_its_schema(tmp_path: Path) -> None:
    with opened(tmp_path / "run", seeds=[3]) as run:
        busy = time.process_time() + 0.05
        while time.process_time() < busy:
            pass
        run.finish(
            flops=2e9,
            parameters_changed=12,
            outputs={"model": "b" * 64},
            notes=["once", "once"],
            figures={"clusters": np.int64(3), "gap": math.nan},
        )
    content = json.loads((tmp_path / "run/run.json").read_text())
    assert content["schema"] == "expunge.run/1" and content["status"] == "done"
    assert content["digests"]["model"] == "a" * 64 and content["digests"]["output.model"] == "b" * 64
    assert content["digests"]["code"] == digest_code() and len(content["digests"]["config"]) == 64
    assert content["environment"]["packages"]["torch"] == torch.__version__
    assert content["environment"]["threads"] == torch.get_num_threads()
    assert content["seeds"] == [3] and content["notes"] == ["once"] and content["parameters_changed"] == 12
    assert content["figures"] == {"clusters": 3, "gap": None}
    assert content["flops"] == 2e9 and content["peak_mib"] > 10
    assert content["cpu_s"] >= 0.03 and 0.05 <= content["wall_s"] < 30
    assert RunRecord.model_validate(content) == run.record

    properties = json_schema()["properties"]
    assert set(properties) == set(content), "every key of the file is in the published schema, and the reverse"
    assert properties["schema"]["const"] == "expunge.run/1"

    written = yaml.safe_load((tmp_path / "run/run.yaml").read_text())
    assert written == {"command": "unlearn", "options": CONFIG}
    kinds = [event["kind"] for event in run.read_jsonl("events.jsonl")]
    assert kinds == ["started", "done"]


def test_the_same_configuration_continues_and_costs_add_up(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), opened(tmp_path / "run") as run:
        run.write_json("half.json", {"step": 1})
        raise KeyboardInterrupt
    assert read_record(tmp_path / "run").status == "interrupted"
    assert not (tmp_path / "run/error.log").exists()

    with opened(tmp_path / "run") as run:
        assert run.resumed and not run.done and run.read_json("half.json") == {"step": 1}
        run.finish(flops=5.0)
    with opened(tmp_path / "run") as run:
        assert run.done and run.resumed
    record = read_record(tmp_path / "run")
    assert record.status == "done" and [a.status for a in record.attempts] == ["interrupted", "done"]
    assert record.wall_s == pytest.approx(sum(a.wall_s for a in record.attempts)) and record.flops == 5.0


def test_another_configuration_is_refused_with_its_differences(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    before = (folder / "run.json").read_bytes()
    with pytest.raises(UserError) as refusal:
        opened(folder, {**CONFIG, "learning_rate": 2e-5, "lora": {"r": 16}, "epochs": 3})
    text = str(refusal.value)
    for difference in ("learning_rate: 1e-05 -> 2e-05", "lora.r: 8 -> 16", "epochs: (unset) -> 3"):
        assert difference in text
    assert "seed" not in text and "choose a new --out" in text and "\n" not in text
    assert (folder / "run.json").read_bytes() == before
    with opened(folder) as run:  # and the refusal has let the folder go
        assert run.done


def test_a_list_may_grow_where_it_is_allowed_and_nothing_else_may_change(tmp_path: Path) -> None:
    folder, methods = tmp_path / "run", {**CONFIG, "methods": ["npo"]}
    with Run.open(folder, "bench", methods, grows=("methods",)) as run:
        run.finish()
    longer = {**CONFIG, "methods": ["ga", "npo"]}
    with pytest.raises(UserError, match="methods"):
        Run.open(folder, "bench", longer)  # not without leave
    with pytest.raises(UserError, match="seed: "):
        Run.open(folder, "bench", {**longer, "seed": 1}, grows=("methods",))
    with pytest.raises(UserError, match="methods"):
        Run.open(folder, "bench", {**CONFIG, "methods": ["ga"]}, grows=("methods",))  # another one, not one more
    assert read_record(folder).status == "done"
    with Run.open(folder, "bench", longer, grows=("methods",)) as run:
        assert run.resumed and not run.done
        run.finish()
    with Run.open(folder, "bench", longer, grows=("methods",)) as run:  # and is now the configuration
        assert run.done


def test_changed_input_or_command_is_refused(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    with pytest.raises(UserError, match=r"model has other content \(aaaaaaaaaaaa -> bbbbbbbbbbbb\)"):
        Run.open(folder, "unlearn", CONFIG, {"model": "b" * 64})
    with pytest.raises(UserError, match="holds a run of 'unlearn', not of 'audit'"):
        Run.open(folder, "audit", CONFIG, {"model": "a" * 64})


def test_differences_name_every_leaf_once() -> None:
    there, given = {"a": {"b": 1, "c": [1, 2]}, "d": None}, {"a": {"b": 1, "c": [1, 3]}, "e": "x" * 100}
    assert differences(there, given) == [
        "a.c: [1, 2] -> [1, 3]",
        "d: null -> (unset)",
        "e: (unset) -> " + ('"' + "x" * 100)[:57] + "...",
    ]
    assert differences(there, there) == []


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"is no run folder: choose a new --out"):
        opened(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match=r"is no run folder: choose a new --out"):
        opened(tmp_path / "thesis.tex")
    with pytest.raises(UserError, match="cannot be written"):
        opened(tmp_path / "thesis.tex/run")
    (tmp_path / "empty").mkdir()
    assert not opened(tmp_path / "empty").resumed


def test_a_damaged_record_is_said_to_be_damaged(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**content, "status": "perfect"}))
    with pytest.raises(UserError, match=r"cannot be read as expunge\.run/1: status"):
        opened(folder)
    with pytest.raises(UserError, match="no run folder"):
        read_record(tmp_path)


def test_two_processes_do_not_work_in_one_folder(tmp_path: Path) -> None:
    code = "import sys, time; from expunge.runs import Run; r = Run.open(sys.argv[1], 'unlearn', {'seed': 0}); "
    process = child(code + "print('open', flush=True); time.sleep(60)", tmp_path / "run")
    try:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another process is working in"):
            Run.open(tmp_path / "run", "unlearn", {"seed": 0})
    finally:
        process.kill()
        process.wait()
    assert Run.open(tmp_path / "run", "unlearn", {"seed": 0}).resumed


# -- what a run says about its end -------------------------------------------------------------------------------


def test_an_exception_is_recorded_and_its_traceback_kept(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught, opened(tmp_path / "run"):
        _ = 1 / 0
    record = read_record(tmp_path / "run")
    assert (record.status, record.error) == ("failed", "ZeroDivisionError")
    assert "_ = 1 / 0" in (tmp_path / "run/error.log").read_text()
    assert str(tmp_path / "run/error.log") in caught.value.__notes__[0]
    with opened(tmp_path / "run") as run:
        assert run.resumed and run.record.error is None
        run.finish()


def test_leaving_without_finish_is_not_done(tmp_path: Path) -> None:
    with opened(tmp_path / "run"):
        pass
    assert read_record(tmp_path / "run").status == "interrupted"


def test_events_hold_no_personal_data_and_survive_a_torn_line(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        with pytest.raises(AssertionError, match="personal"):
            run.event("sample", id="s1", prompt="Where does Ada live?")
        run.event("step", loss=np.float32(0.25))
    with (tmp_path / "run/events.jsonl").open("a") as file:
        file.write('{"time": "20')  # a kill in the middle of a line
    with opened(tmp_path / "run") as run:
        run.finish()
        kinds = [event["kind"] for event in run.read_jsonl("events.jsonl")]
    assert kinds == ["started", "step", "interrupted", "continued", "done"]


def test_names_stay_inside_the_run_folder(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as run:
        run.write_text("figures/a.svg", "<svg/>")
        with pytest.raises(AssertionError, match="leads out"):
            run.write_text("../elsewhere.txt", "x")
        run.finish()
    assert (tmp_path / "run/figures/a.svg").read_text() == "<svg/>"
    assert not (tmp_path / "elsewhere.txt").exists()


def test_opening_a_run_imports_no_torch() -> None:
    code = "import sys, expunge.runs; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b"False False\n"
