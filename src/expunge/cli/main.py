"""The command line: finds the verb, imports only that one, and turns what goes wrong into messages and exit codes.

Exit codes: 0 done, 1 measured and negative (or an unexpected error), 2 the input is wrong, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from expunge import __version__
from expunge.errors import UserError

DONE, NEGATIVE, WRONG, INTERRUPTED = 0, 1, 2, 130
OPTIONS = ("--help", "--version")  # of the program itself


@dataclass(frozen=True)
class Verb:
    """One row of ``expunge --help``. ``help`` is the first line of the docstring of ``expunge.cli.<module>.command``;
    it stands here too, so that the help of all verbs needs the import of none. A test compares the two."""

    name: str
    help: str
    module: str = ""

    def command(self) -> Callable[..., Any]:
        found: Callable[..., Any] = importlib.import_module(f"expunge.cli.{self.module or self.name}").command
        return found


VERBS: tuple[Verb, ...] = (
    Verb("demo", "Train, unlearn, attack, measure and certify on invented people, offline, in one to two minutes."),
    Verb("unlearn", "Make a model forget samples; the unlearned model, its measurement and a report go to --out."),
    Verb(
        "audit",
        "Attack a model beside its original, retrained references and shadows, and say for each sample if it is gone.",
    ),
    Verb(
        "completeness",
        "Say for each sample of a table of readings whether it is gone, with calibrated verdicts.",
    ),
    Verb(
        "bench",
        "Compare methods over seeds with retrained references: who comes closest, at what cost.",
    ),
    Verb("train", "Train an original, a reference or a base; a killed training goes on where it stopped."),
    Verb("certify", "Sign what a run shows about its model: claims, evidence, and what is not claimed."),
    Verb("verify", "Check a certificate offline: what holds, what is refuted, what could not be checked."),
    Verb("keygen", "Make a key pair to sign certificates with: Ed25519, in PEM files; no key is ever overwritten."),
    Verb("report", "Rebuild results.md and report.html of run folders from the per-sample record."),
    Verb("ls", "List the methods, scopes, attacks, metrics, datasets or models that can be named."),
    Verb("show", "Show one method, scope, attack, metric, dataset or model: properties, formula, options, paper."),
    Verb("doctor", "Show versions, devices, free memory and disk, and what is installed."),
)

INTRO = """Usage: expunge VERB [OPTIONS] [ARGUMENTS]

Make a trained model forget, measure whether it did, and put a name under the answer.
"""

OUTRO = """
'expunge VERB --help' shows the options of a verb, with examples; 'expunge --version' the version.
Exit codes: 0 done, 1 measured and negative, 2 the input is wrong, 130 interrupted (run again to resume).
"""


def overview() -> str:
    """The text of ``expunge --help``."""
    width = max(len(verb.name) for verb in VERBS)
    rows = "\n".join(f"  {verb.name:<{width}}  {verb.help}" for verb in VERBS)
    return f"{INTRO}\nVerbs:\n{rows}\n{OUTRO}"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the ``expunge`` command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    signal.signal(signal.SIGTERM, _terminated)  # a scheduler's stop is recorded like Ctrl-C
    try:
        code = run(arguments)
        sys.stdout.flush()
    except UserError as error:
        code = _say(str(error), WRONG)
    except KeyboardInterrupt:
        code = _say("interrupted: run the same command again to resume.", INTERRUPTED)
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough; nothing is left to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = DONE
    except Exception as error:
        if os.environ.get("EXPUNGE_DEBUG") == "1":
            raise
        code = _unexpected(error)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; exceptions go through, except those of parsing."""
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        sys.stdout.write(overview())
        return DONE if arguments else WRONG
    if arguments[0] == "--version":
        print(f"expunge {__version__}")
        return DONE
    name, *rest = arguments
    verbs = {verb.name: verb for verb in VERBS}
    if name not in verbs:
        from expunge.errors import unknown

        error = unknown("option", name, OPTIONS) if name.startswith("-") else unknown("verb", name, verbs)
        raise UserError(f"{error} See expunge --help.")
    return invoke(name, verbs[name].command(), rest)


def invoke(name: str, function: Callable[..., Any], arguments: Sequence[str]) -> int:
    """Parse ``arguments`` for one verb and call it; what it returns, if a number, is the exit code.

    Raises:
        UserError: an option or argument is unknown, missing or has a wrong value.
    """
    import typer

    from expunge.cli.common import command_of

    command = command_of(name, function)
    try:
        with command.make_context(f"expunge {name}", list(arguments)) as context:
            code = command.invoke(context)
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except Exception as error:
        # The class of usage errors moved between releases of typer; what it can do did not.
        if getattr(error, "exit_code", None) != WRONG or not hasattr(error, "format_message"):
            raise
        raise UserError(f"{error.format_message().rstrip('.')}. See expunge {name} --help.") from None
    return code if isinstance(code, int) else DONE


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _say(text: str, code: int) -> int:
    print(f"expunge: {text}", file=sys.stderr, flush=True)
    return code


def _unexpected(error: Exception) -> int:
    """One sentence, and a place where the traceback is: in the run folder, if the run wrote it, else a log file."""
    notes = getattr(error, "__notes__", [])
    if not notes:
        import tempfile
        import traceback

        with tempfile.NamedTemporaryFile("w", prefix="expunge-", suffix=".log", delete=False, encoding="utf-8") as log:
            log.write(f"expunge {__version__}, Python {sys.version}\n{''.join(traceback.format_exception(error))}")
        notes = [f"The full traceback is in {log.name}"]
    first = (str(error).strip().splitlines() or ["no message"])[0][:300]
    hint = " Try a smaller --batch-size." if type(error).__name__ in ("OutOfMemoryError", "MemoryError") else ""
    return _say(
        f"unexpected {type(error).__name__}: {first}.{hint} {'. '.join(notes)} (EXPUNGE_DEBUG=1 prints it).", NEGATIVE
    )
