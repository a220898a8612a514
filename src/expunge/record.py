"""``run.json``: what a command records about itself, its environment and its cost; the schema is published."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

import expunge
from expunge.errors import UserError
from expunge.files import digest_folder, plain

Status = Literal["running", "done", "failed", "interrupted"]
RECORD = "run.json"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "numpy", "scipy", "scikit-learn")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True, serialize_by_alias=True)


class Environment(Strict):
    """What the run ran on. No host or user name: the record is meant to be shared."""

    python: str
    platform: str
    processors: int = Field(description="logical processors that this process may use")
    threads: int = Field(description="threads that PyTorch computes with")
    device: str
    packages: dict[str, str]


class Attempt(Strict):
    """One process that worked on the run, and what it cost."""

    started: datetime
    finished: datetime | None = None
    status: Status = "running"
    wall_s: float = Field(default=0.0, description="seconds; of a killed process, up to its last event")
    cpu_s: float = Field(default=0.0, description="processor seconds over all threads and ended child processes")
    gpu_s: float = Field(default=0.0, description="seconds for which GPUs were held: wall time x GPUs, 0 without")
    flops: float = Field(default=0.0, description="floating-point operations, estimated")
    peak_mib: float = Field(default=0.0, description="highest resident memory of the process so far, MiB")
    gpu_peak_mib: float = Field(default=0.0, description="highest memory allocated on GPUs, MiB, summed over GPUs")


class RunRecord(Strict):
    """``run.json``."""

    schema_: Literal["expunge.run/1"] = Field(default="expunge.run/1", alias="schema")
    command: str
    status: Status = "running"
    expunge: str = Field(description="version of Expunge that last worked on the run")
    digests: dict[str, str] = Field(description="SHA-256 of code, configuration, and every input and output by name")
    environment: Environment
    seeds: list[int] = []
    started: datetime
    finished: datetime | None = None
    wall_s: float = Field(default=0.0, description="sum over the attempts, like cpu_s, gpu_s and flops")
    cpu_s: float = 0.0
    gpu_s: float = 0.0
    flops: float = 0.0
    peak_mib: float = Field(default=0.0, description="maximum over the attempts, like gpu_peak_mib")
    gpu_peak_mib: float = 0.0
    parameters_changed: int | None = Field(
        default=None, description="weights whose value differs from the input model's"
    )
    error: str | None = Field(default=None, description="type of the exception that ended the run")
    notes: list[str] = []
    figures: dict[str, Any] = Field(
        default={}, description="what the command itself wants kept, e.g. figures of the method"
    )
    attempts: list[Attempt] = []

    def total(self) -> None:
        """Recompute the costs from the attempts."""
        for name in ("wall_s", "cpu_s", "gpu_s", "flops"):
            setattr(self, name, sum(getattr(a, name) for a in self.attempts))
        for name in ("peak_mib", "gpu_peak_mib"):
            setattr(self, name, max((getattr(a, name) for a in self.attempts), default=0.0))


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of ``run.json``."""
    schema = RunRecord.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "expunge.run/1", **schema}


def read_record(folder: Path) -> RunRecord:
    """The record of a run folder.

    Raises:
        UserError: ``folder`` is no run folder, or its record cannot be read.
    """
    path = Path(folder) / RECORD
    if not path.is_file():
        raise UserError(f"'{folder}' is no run folder ({RECORD} is missing): give the --out folder of a command.")
    try:
        return RunRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"'{path}' cannot be read as expunge.run/1: {where}: {first['msg']}.") from error


# -- measured ----------------------------------------------------------------------------------------------------


def now() -> datetime:
    return datetime.now(UTC)


def digest_config(command: str, options: Mapping[str, Any]) -> str:
    content = json.dumps([command, plain(options)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


@cache
def digest_code() -> str:
    """Digest of the sources of the installed package."""
    return digest_folder(Path(expunge.__file__).parent, ("*.py", "*.html", "*.css", "*.js", "*.yaml", "*.json"))


def environment(device: str = "cpu") -> Environment:
    """Versions, platform and threads, without importing anything heavy that is not imported already."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch is not None and device.startswith("cuda") and torch.cuda.is_available():
        device = f"{device} ({torch.cuda.get_device_name(device)})"
    return Environment(
        python=f"{platform.python_implementation()} {platform.python_version()}",
        platform=f"{platform.system()} {platform.machine()}",
        processors=processors,
        threads=torch.get_num_threads() if torch is not None else processors,
        device=device,
        packages=found,
    )


def cpu_seconds() -> float:
    """Of this process with all its threads, and of its ended children."""
    children = os.times()  # hundredths of a second; the process itself is known much finer
    return time.process_time() + children.children_user + children.children_system


def peak_mib() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def gpus() -> tuple[int, float]:
    """GPUs in use by this process, and the highest memory allocated on them in MiB."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0, 0.0
    peaks = [torch.cuda.max_memory_allocated(i) / 2**20 for i in range(torch.cuda.device_count())]
    return sum(peak > 0 for peak in peaks), sum(peaks)
