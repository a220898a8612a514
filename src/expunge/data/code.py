"""``code``: small programming tasks with their solutions (MBPP, Austin et al. 2021; HumanEval, Chen et al. 2021)."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expunge.data.carve import Sizes, carve
from expunge.data.hub import hub_rows, local_file
from expunge.data.registry import dataset
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.options import option

HUBS = {"mbpp": "google-research-datasets/mbpp", "humaneval": "openai/openai_humaneval"}
FILES = {"mbpp": ("mbpp.jsonl",), "humaneval": ("HumanEval.jsonl.gz", "HumanEval.jsonl")}
MBPP_SPLITS = ("train", "test", "validation", "prompt")
FUNCTION = re.compile(r"^\s*def\s+(\w+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class CodeOptions(Sizes):
    """Sizes count tasks: mbpp has 974, humaneval 164."""

    source: str = option("mbpp", "mbpp or humaneval", choices=("mbpp", "humaneval"))
    form: str = option(
        "answer", "answer: the task and its solution; document: the solution only", choices=("answer", "document")
    )
    private: int = option(80, "tasks that the original is trained on (forget and retain together)")
    holdout: int = option(40, "tasks that are never trained on")
    utility: int = option(40, "public tasks, for training a base and measuring utility")


def read_tasks(source: str, data_dir: Path | None) -> list[Mapping[str, Any]]:
    """Rows with ``task``, ``solution`` and ``id``.

    Raises:
        UserError: the file or the hub is missing, or a line lacks a field.
    """
    if data_dir is None:
        splits = MBPP_SPLITS if source == "mbpp" else ("test",)
        rows = [row for split in splits for row in hub_rows(HUBS[source], None, split)]
        where = f"hub dataset '{HUBS[source]}'"
    else:
        path = local_file(data_dir, FILES[source], "code")
        raw = path.read_bytes()
        where = f"'{path}'"
        try:
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{where} is not a file of JSON lines ({error}).") from None
    task, solution = ("text", "code") if source == "mbpp" else ("prompt", "canonical_solution")
    try:
        # Line ends of Windows and trailing blanks are artefacts of how the tasks were collected.
        return [{"id": row["task_id"], "task": _clean(row[task]), "solution": _clean(row[solution])} for row in rows]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: expected {task}, {solution} and task_id in every row.") from None


def _clean(code: str) -> str:
    lines = code.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip("\n")


@dataset(
    name="code",
    options=CodeOptions,
    summary="small Python tasks with their solutions",
    origin=f"local mbpp.jsonl or HumanEval.jsonl.gz; hub: {HUBS['mbpp']}, {HUBS['humaneval']}",
    licence="MBPP: CC BY 4.0; HumanEval: MIT",
)
def load(options: CodeOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """Tasks in roles; ``names`` is the name of the function. ``seed`` is not used; ``split_seed`` chooses the tasks."""
    samples = []
    seen: set[tuple[str, str]] = set()
    for row in read_tasks(options.source, data_dir):
        key = (row["task"], row["solution"]) if options.form == "answer" else ("", row["solution"])
        if key in seen:
            continue
        seen.add(key)
        # The last function is the one asked for; those before it help. HumanEval has the header in its task.
        functions = FUNCTION.findall(row["solution"] if options.source == "mbpp" else row["task"])
        answer = options.form == "answer"
        whole = row["solution"] if options.source == "mbpp" else f"{row['task']}\n{row['solution']}"
        samples.append(
            Sample(
                id=f"{options.source}-{str(row['id']).rpartition('/')[2]}",
                subject=f"{options.source} {str(row['id']).rpartition('/')[2]}",
                prompt=row["task"] if answer else "",
                target=row["solution"] if answer else whole,
                names=tuple(functions[-1:]),
            )
        )
    source = str(data_dir) if data_dir else f"hub: {HUBS[options.source]}"
    return Dataset(name="code", roles=carve(samples, options, "code", options.source), source=source)
