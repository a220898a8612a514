"""The run folder: one folder with everything that a command did, whole at every moment, readable without Expunge.

``run.yaml`` holds the resolved configuration, ``run.json`` the record (:class:`RunRecord`), ``events.jsonl`` what
happened when. The same command on the same folder continues; another configuration is refused with a diff.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import yaml

import expunge
from expunge import files
from expunge.errors import UserError
from expunge.files import SCRATCH, digest_file, digest_folder, plain, read_jsonl, to_json
from expunge.record import (
    RECORD,
    Attempt,
    RunRecord,
    Status,
    cpu_seconds,
    digest_code,
    digest_config,
    environment,
    gpus,
    json_schema,
    now,
    peak_mib,
    read_record,
)

__all__ = [
    "Run",
    "RunRecord",
    "differences",
    "digest_file",
    "digest_folder",
    "json_schema",
    "read_config",
    "read_record",
]

CONFIG, EVENTS, LOCK, ERROR = "run.yaml", "events.jsonl", ".lock", "error.log"
# Fields of a sample: events are kept and shared freely, so nobody's data may ever stand in them.
PERSONAL = frozenset({"prompt", "target", "generated", "answer", "subject", "names"})
SHOWN = 8  # differences that a refusal spells out


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved configuration in ``run.yaml``, without the command."""
    path = Path(folder) / CONFIG
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        options = content["options"]
        assert isinstance(options, dict)
    except (OSError, yaml.YAMLError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"'{path}' cannot be read: restore it, or choose a new --out.") from error
    return options


class Run:
    """An open run folder; see :meth:`open`. Use it as a context manager, and call :meth:`finish` at the end.

    Leaving the ``with`` block by an exception records ``failed`` (``interrupted`` for Ctrl-C); leaving it without
    having called :meth:`finish` records ``interrupted`` too, for then nobody said that the work is done.
    """

    def __init__(self, folder: Path, record: RunRecord, config: dict[str, Any], resumed: bool, lock: IO[str]) -> None:
        self.folder = folder
        self.record = record
        self.config = config
        self.resumed = resumed
        self._lock = lock
        self._clock = (time.monotonic(), cpu_seconds())
        self._attempt: Attempt | None = None

    @classmethod
    def open(
        cls,
        out: Path | str,
        command: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str] | None = None,
        *,
        seeds: Sequence[int] = (),
        device: str = "cpu",
        grows: Sequence[str] = (),
    ) -> Self:
        """Create the folder ``out``, or continue the run in it.

        ``config`` is the resolved configuration without ``out`` itself, ``inputs`` the digests of model and data by
        name. A run that is already done is opened with :attr:`done` true, and its record stays as it is; unless one of
        the lists ``grows`` has become longer: then it goes on with what is new.

        Raises:
            UserError: ``out`` holds other files, a run of another command, configuration or input, or a run that
                another process works on; or it cannot be written.
        """
        folder = Path(out)
        options, digests = plain(config), dict(inputs or {})
        known = (folder / RECORD).is_file()
        try:
            if not known and folder.exists() and (not folder.is_dir() or _foreign(folder)):
                raise UserError(f"'{folder}' exists and is no run folder: choose a new --out.")
            folder.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
            try:
                for scratch in folder.glob(f".*{SCRATCH}"):  # left by a killed process; nobody else works here
                    scratch.unlink(missing_ok=True)
                if known:
                    record = _known(folder, command, options, digests, grows)
                    _mend_events(folder / EVENTS)
                else:
                    record = _fresh(command, options, digests, device)
                    files.write_text(folder / CONFIG, _yaml({"command": command, "options": options}))
            except BaseException:
                lock.close()
                raise
        except OSError as error:
            raise UserError(f"'{folder}' cannot be written ({error.strerror}): choose another --out.") from error
        run = cls(folder, record, options, known, lock)
        if not run.done:
            run._begin(seeds, device)
        return run

    def _begin(self, seeds: Sequence[int], device: str) -> None:
        record = self.record
        if record.attempts and record.attempts[-1].status == "running":  # its process was killed
            last = record.attempts[-1]
            last.status, last.finished = "interrupted", self._last_event(last.started)
            last.wall_s = max(0.0, (last.finished - last.started).total_seconds())
        if record.digests["code"] != digest_code():
            self.note(f"Continued with other code: {record.digests['code'][:12]} -> {digest_code()[:12]}.")
            record.digests["code"] = digest_code()
        self._attempt = Attempt(started=now())
        record.attempts.append(self._attempt)
        record.environment, record.expunge = environment(device), expunge.__version__
        record.status, record.error, record.finished = "running", None, None
        record.seeds = record.seeds or [int(seed) for seed in seeds]
        self._save()
        self.event("continued" if self.resumed else "started", command=record.command)

    @property
    def done(self) -> bool:
        return self.record.status == "done"

    # -- files ---------------------------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """A file of the run; its folder exists afterwards.

        Raises:
            AssertionError: ``name`` leads out of the run folder.
        """
        path = self.folder / name
        assert path.resolve().is_relative_to(self.folder.resolve()), f"{name} leads out of the run folder"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def event(self, kind: str, **fields: Any) -> None:
        """Append to ``events.jsonl``. Never give it anything of a sample but its id."""
        personal = {key for key in PERSONAL & fields.keys() if not isinstance(fields[key], (int, float))}
        assert not personal, f"events hold no personal data: {sorted(personal)}"
        line = to_json({"time": now().isoformat(), "kind": kind, **fields}) + "\n"
        with (self.folder / EVENTS).open("a", encoding="utf-8", newline="\n") as file:
            file.write(line)

    def write_json(self, name: str, obj: Any) -> Path:
        """Atomic; numbers of numpy and torch are taken, NaN becomes null."""
        return files.write_json(self.path(name), obj)

    def write_text(self, name: str, text: str) -> Path:
        return files.write_text(self.path(name), text)

    def write_jsonl(self, name: str, rows: Iterable[Any]) -> Path:
        """Atomic, streamed: ``rows`` may be a generator."""
        return files.write_jsonl(self.path(name), rows)

    def read_json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def read_jsonl(self, name: str) -> Iterator[Any]:
        return read_jsonl(self.folder / name)

    # -- record --------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Something that the reader of the record must know; said twice it is kept once."""
        if text not in self.record.notes:
            self.record.notes.append(text)

    def finish(
        self,
        status: Status = "done",
        *,
        flops: float = 0.0,
        parameters_changed: int | None = None,
        outputs: Mapping[str, str] | None = None,
        notes: Iterable[str] = (),
        figures: Mapping[str, Any] | None = None,
        error: str | None = None,
    ) -> RunRecord:
        """Write the final record and let the folder go.

        Args:
            flops: of this process; the record adds up all of them.
            outputs: digests by name, kept as ``digests["output.<name>"]``.
            figures: anything that :func:`expunge.files.plain` takes.
        """
        record, attempt = self.record, self._attempt
        if attempt is not None:
            wall, cpu = self._clock
            attempt.finished, attempt.status = now(), status
            attempt.wall_s, attempt.cpu_s = time.monotonic() - wall, cpu_seconds() - cpu
            attempt.flops = float(flops)
            attempt.peak_mib = peak_mib()
            count, attempt.gpu_peak_mib = gpus()
            attempt.gpu_s = attempt.wall_s * count
            record.status, record.error, record.finished = status, error, attempt.finished
            record.total()
        if parameters_changed is not None:
            record.parameters_changed = int(parameters_changed)
        record.digests |= {f"output.{name}": digest for name, digest in (outputs or {}).items()}
        record.figures |= plain(figures or {})
        for text in notes:
            self.note(text)
        self._save()
        if attempt is not None:
            self.event(status, wall_s=round(attempt.wall_s, 3))
            self._attempt = None
        self._lock.close()
        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None and self._attempt is not None:
            stopped = isinstance(error, (KeyboardInterrupt, GeneratorExit))
            self.finish("interrupted" if stopped else "failed", error=type(error).__name__)
            if not stopped and not isinstance(error, (UserError, SystemExit)):
                log = self.write_text(ERROR, "".join(traceback.format_exception(error)))
                error.add_note(f"The full traceback is in {log}")
        elif self._attempt is not None:
            self.finish("interrupted")
        self._lock.close()

    def _save(self) -> None:
        files.write_json(self.folder / RECORD, self.record.model_dump(mode="json"))

    def _last_event(self, otherwise: datetime) -> datetime:
        last = otherwise
        if (self.folder / EVENTS).is_file():
            for event in self.read_jsonl(EVENTS):
                last = max(last, datetime.fromisoformat(event["time"]))
        return last


# -- opening -----------------------------------------------------------------------------------------------------


def _foreign(folder: Path) -> bool:
    """Whether ``folder`` holds anything but what a process killed at its very start leaves behind."""
    return any(p.name not in (LOCK, CONFIG) and not p.name.endswith(SCRATCH) for p in folder.iterdir())


def _fresh(command: str, options: dict[str, Any], inputs: dict[str, str], device: str) -> RunRecord:
    return RunRecord(
        command=command,
        expunge=expunge.__version__,
        digests={"code": digest_code(), "config": digest_config(command, options), **inputs},
        environment=environment(device),
        started=now(),
    )


def _known(
    folder: Path, command: str, options: dict[str, Any], inputs: dict[str, str], grows: Sequence[str]
) -> RunRecord:
    record, there = read_record(folder), read_config(folder)
    if record.command != command:
        raise UserError(f"'{folder}' holds a run of '{record.command}', not of '{command}': choose a new --out.")
    own = {name: d for name, d in record.digests.items() if name not in ("code", "config") and "output." not in name}
    grown = [key for key in grows if set(there.get(key, ())) < set(options.get(key, ()))]
    kept = {key: value for key, value in options.items() if key not in grown}
    changes = differences({key: value for key, value in there.items() if key not in grown}, kept) + [
        f"{name} has other content ({'' if then is None else then[:12]} -> {'' if given is None else given[:12]})"
        for name in sorted(own.keys() | inputs.keys())
        if (then := own.get(name)) != (given := inputs.get(name))
    ]
    if changes:
        more = f"; and {len(changes) - SHOWN} more" if len(changes) > SHOWN else ""
        raise UserError(
            f"'{folder}' holds a run with another configuration (there -> given): "
            f"{'; '.join(changes[:SHOWN])}{more}: choose a new --out, or give the old values to continue it."
        )
    if grown:
        record.status, record.digests["config"] = "interrupted", digest_config(command, options)
        files.write_text(folder / CONFIG, _yaml({"command": command, "options": options}))
    return record


def differences(there: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One entry ``key: old -> new`` per leaf that differs; nested mappings get dotted keys.

    >>> differences({"seed": 0, "lora": {"r": 8}}, {"seed": 0, "lora": {"r": 16}, "epochs": 2})
    ['epochs: (unset) -> 2', 'lora.r: 8 -> 16']
    """
    found: list[str] = []
    for key in sorted(there.keys() | given.keys()):
        old, new = there.get(key, _UNSET), given.get(key, _UNSET)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {_brief(old)} -> {_brief(new)}")
    return found


_UNSET = object()


def _brief(value: Any) -> str:
    text = "(unset)" if value is _UNSET else to_json(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _lock(folder: Path) -> IO[str]:
    """Hold the folder for this process; the system lets it go when the process ends, however it ends."""
    file = (folder / LOCK).open("a")
    try:
        import fcntl
    except ImportError:  # Windows: two commands in one folder are not told apart there
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(f"another process is working in '{folder}': wait for it, or choose a new --out.") from error
    except OSError:  # a file system without locks
        pass
    return file


def _mend_events(path: Path) -> None:
    """Cut off the last line if a kill left it unfinished, so that the next event starts on a line of its own."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _yaml(content: Any) -> str:
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text
