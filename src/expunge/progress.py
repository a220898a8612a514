"""Progress on standard error: a rich bar on a terminal, plain lines otherwise; every event also to the run."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PLAIN_EVERY_S = 10.0  # without a terminal, one line per task at most this often


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss.

    >>> clock(75), clock(3700)
    ('1:15', '1:01:40')
    """
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class Progress:
    """What a long job says while it runs. ``event`` is called with (kind, fields), e.g. by a run's event log."""

    quiet: bool = True
    event: Callable[..., None] | None = None
    every: float = PLAIN_EVERY_S  # seconds between plain lines of one task
    _bar: Any = field(default=None, repr=False)
    _task: Any = field(default=None, repr=False)
    _started: float = 0.0
    _printed: float = 0.0
    _name: str = ""
    _total: int = 0

    def say(self, text: str) -> None:
        """One line on standard error, and an event."""
        if not self.quiet:
            if self._bar is not None:
                self._bar.console.print(text, highlight=False, markup=False)
            else:
                print(text, file=sys.stderr, flush=True)
        self.log("message", text=text)

    def log(self, kind: str, **fields: Any) -> None:
        """An event for the run record only."""
        if self.event is not None:
            self.event(kind, **fields)

    def start(self, name: str, total: int) -> None:
        """Begin a counted task of ``total`` steps."""
        self.stop()
        self._name, self._total = name, total
        self._started = self._printed = time.monotonic()
        if self.quiet:
            return
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Rich

            self._bar = Rich(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(name, total=total, note="")

    def step(self, done: int, note: str = "") -> None:
        """``done`` steps are finished."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._printed >= self.every:
            self._printed = now
            left = (now - self._started) / max(1, done) * (self._total - done)
            print(f"{self._name}: {done}/{self._total}, {clock(left)} left. {note}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        """End the current task."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
