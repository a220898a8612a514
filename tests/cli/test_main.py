"""The program as a user meets it: in a process of its own."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expunge.cli.main import VERBS, invoke, overview, run
from expunge.errors import UserError


def expunge(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from expunge.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def with_verb(body: str, *arguments: str) -> list[str]:
    """A program whose only verb is called ``try`` and runs ``body``."""
    code = f"""
import sys, types
from expunge.cli import main
module = types.ModuleType("expunge.cli.trial")
def command() -> None:
    import time
    {body}
module.command = command
sys.modules["expunge.cli.trial"] = module
main.VERBS = (main.Verb("try", "Try.", "trial"),)
main.main(["try"])
"""
    return [sys.executable, "-c", code, *arguments]


def tried(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        with_verb(body), capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


# -- help --------------------------------------------------------------------------------------------------------


def test_help_lists_every_verb_and_imports_none() -> None:
    done = expunge("--help")
    assert done.returncode == 0 and done.stdout == overview() and done.stderr == ""
    for verb in VERBS:
        assert f"  {verb.name} " in done.stdout and verb.help in done.stdout
    code = (
        "import sys; from expunge.cli.main import run; run(['--help']); "
        "print(sorted({'torch', 'typer', 'rich', 'pydantic', 'numpy'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_every_file_of_a_verb_has_a_row_and_the_reverse() -> None:
    folder = Path(inspect.getfile(importlib.import_module("expunge.cli"))).parent
    files = {p.stem for p in folder.glob("*.py") if re.search(r"^def command\(", p.read_text(), re.MULTILINE)}
    assert files == {verb.module or verb.name for verb in VERBS}


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_help_of_a_verb(verb: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(verb, type(VERBS[0]))
    function = verb.command()
    doc = inspect.getdoc(function) or ""
    assert doc.split("\n", maxsplit=1)[0] == verb.help, "the table and the docstring say the same"
    assert invoke(verb.name, function, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search(rf"\n  Examples?:\n    expunge {verb.name}", shown), "an example, on a line of its own"
    assert "\b" not in shown and "\x1b" not in shown
    undescribed = [line for line in shown.splitlines() if re.fullmatch(r"  (-\w, )?--[\w-]+( <.*>)?", line)]
    following = [shown.splitlines()[shown.splitlines().index(line) + 1] for line in undescribed]
    assert all(line.startswith("    ") for line in following), "every option says what it is"


def test_examples_in_the_help_parse(capsys: pytest.CaptureFixture[str]) -> None:
    """Every example of every verb names options that exist: it is parsed, with --help at its end."""
    for verb in VERBS:
        doc = inspect.getdoc(verb.command()) or ""
        examples = re.findall(rf"^ +expunge ({verb.name}.*)$", doc, re.MULTILINE)
        assert examples
        for example in examples:
            words = example.split()
            for option in (w.split("=")[0] for w in words if w.startswith("--")):
                capsys.readouterr()
                invoke(verb.name, verb.command(), ["--help"])
                assert re.search(rf"{option}\b", capsys.readouterr().out), f"{example}: {option}"


def test_version_and_nothing_at_all() -> None:
    from expunge import __version__

    assert expunge("--version").stdout == f"expunge {__version__}\n"
    bare = expunge()
    assert bare.returncode == 2 and bare.stdout == overview()


# -- what goes wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shwo"], "unknown verb 'shwo': did you mean 'show'?"),
        (["--versoin"], "unknown option '--versoin': did you mean '--version'?"),
        (["ls", "metods"], "unknown kind 'metods': did you mean 'methods'?"),
        (["ls", "metrics", "--jsn"], "No such option: --jsn (Possible options: --json). See expunge ls --help."),
        (["ls"], "Missing argument 'kind'. See expunge ls --help."),
        (["ls", "metrics", "more"], "Got unexpected extra argument"),
    ],
)
def test_wrong_input_is_one_sentence_and_code_2(arguments: list[str], message: str) -> None:
    done = expunge(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"expunge: {message}") and done.stderr.count("\n") == 1


def test_user_error_has_no_traceback() -> None:
    done = tried("from expunge.errors import UserError; raise UserError('too few samples: give 2.')")
    assert (done.returncode, done.stderr) == (2, "expunge: too few samples: give 2.\n")


def test_unexpected_error_is_one_line_and_says_where_the_traceback_is(tmp_path: Path) -> None:
    done = tried("{}['gone']", TMPDIR=str(tmp_path))
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("expunge: unexpected KeyError: 'gone'.")
    (log,) = tmp_path.glob("expunge-*.log")
    assert str(log) in done.stderr and "Traceback" in log.read_text() and "{}['gone']" not in done.stderr
    assert "in command" in log.read_text()


def test_unexpected_error_inside_a_run_is_kept_in_the_run(tmp_path: Path) -> None:
    body = f"""from expunge.runs import Run
    with Run.open({str(tmp_path / "run")!r}, "try", {{}}):
        raise RuntimeError("lost")"""
    done = tried(body, TMPDIR=str(tmp_path))
    assert done.returncode == 1 and str(tmp_path / "run/error.log") in done.stderr
    assert "RuntimeError: lost" in (tmp_path / "run/error.log").read_text()
    assert not list(tmp_path.glob("expunge-*.log"))
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"


def test_debug_lets_the_traceback_through() -> None:
    done = tried("{}['gone']", EXPUNGE_DEBUG="1")
    assert done.returncode == 1 and "Traceback" in done.stderr and "KeyError: 'gone'" in done.stderr


def test_a_number_that_a_verb_returns_is_the_exit_code() -> None:
    assert tried("return 1").returncode == 1
    assert tried("return None").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_is_130_and_recorded(number: signal.Signals, tmp_path: Path) -> None:
    body = f"""from expunge.runs import Run
    with Run.open({str(tmp_path / "run")!r}, "try", {{}}):
        print("here", flush=True)
        time.sleep(60)"""
    process = subprocess.Popen(
        with_verb(body),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - background jobs ignore it
    )
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "expunge: interrupted: run the same command again to resume.\n"
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "interrupted"


def test_a_closed_pipe_is_no_error() -> None:
    body = "[print('x' * 1000) for _ in range(10000)]"
    process = subprocess.Popen(with_verb(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=30) == 0


def test_library_call_raises_and_does_not_exit() -> None:
    with pytest.raises(UserError, match="unknown verb"):
        run(["nothing"])


def test_no_escape_codes_with_no_color() -> None:
    for arguments in (["--help"], ["ls", "--help"], ["shwo"], ["doctor"]):
        done = expunge(*arguments, NO_COLOR="1", FORCE_COLOR="1", TERM="xterm-256color")
        assert "\x1b" not in done.stdout + done.stderr
