"""What every verb does before and after its work: the run folder, bound to data and models, and the result."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.data.samples import Dataset
from expunge.errors import UserError
from expunge.files import digest_folder
from expunge.models.folder import inspect, resolve
from expunge.models.load import device_of
from expunge.progress import Progress
from expunge.report import write_report
from expunge.runs import Run

Text = str | Path
BOOKKEEPING = frozenset({"run.yaml", "run.json", "events.jsonl", ".lock"})


@dataclass(frozen=True)
class Result:
    """Where everything is. ``results`` is the content of results.json; empty after a dry run, which has a ``plan``."""

    folder: Path
    model: Path | None = None
    report: Path | None = None
    results: Mapping[str, Any] = field(default_factory=dict, repr=False)
    plan: Mapping[str, Any] | None = None
    failures: Sequence[str] = ()

    def record(self) -> dict[str, Any]:
        """For ``--json``."""
        if self.plan is not None:
            return dict(self.plan)
        more = {"summary": self.results["summary"]} if "summary" in self.results else dict(self.results)
        places = {"run": self.folder, "model": self.model, "report": self.report}
        return {k: str(v) for k, v in places.items() if v is not None} | more


@contextmanager
def open_run(
    out: Text,
    command: str,
    config: Mapping[str, Any],
    dataset: Dataset,
    models: Mapping[str, Text | None],
    seeds: Sequence[int],
    grows: Sequence[str] = (),
) -> Iterator[Run]:
    """The run folder, bound to the content of data and models: other content is another configuration.

    A new run that is refused before it made anything leaves no folder, so that the mended command can use the name.
    """
    digests = {"data": dataset.digest()}
    for name, folder in models.items():
        if folder is not None and Path(folder).is_dir():
            digests[name] = digest_folder(Path(folder))
    device = str(device_of(str(config["device"])))
    run = Run.open(out, command, config, digests, seeds=seeds, device=device, grows=grows)
    try:
        with run:
            yield run
    except UserError:
        if not run.resumed:
            discard(run.folder)
        raise


def discard(folder: Path) -> None:
    """Remove a run folder that holds nothing but the record of its own beginning."""
    made = [p for p in folder.rglob("*") if p.is_file() and p.relative_to(folder).as_posix() not in BOOKKEEPING]
    if not made:
        shutil.rmtree(folder, ignore_errors=True)


def check_models(*names: Text | None) -> None:
    """Refuse a model that is not there before any other is loaded.

    Raises:
        UserError: see :func:`expunge.models.folder.inspect`.
    """
    for name in names:
        if name is not None:
            inspect(resolve(name))


def finished(run: Run, model: Path | None = None) -> Result:
    """The result of a run that has results.json: its report is written again."""
    return Result(run.folder, model, write_report(run.folder), run.read_json("results.json"))


def numbered(folders: Sequence[str]) -> dict[str, Text | None]:
    """References under the names that run.json has for their digests."""
    return {f"reference.{number}": folder for number, folder in enumerate(folders)}


def shown(quiet: bool, run: Run) -> Progress:
    return Progress(quiet=quiet, event=run.event)
