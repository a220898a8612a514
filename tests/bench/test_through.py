"""Forgetting a person through pictures, texts or both: what the method is shown, and that all is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from expunge.api import bench, unlearn
from expunge.bench.plan import parse_methods
from expunge.data.registry import load_dataset
from expunge.errors import UserError

SIZES = {"people": 4, "forget": 1, "holdout": 2, "utility": 2, "questions": 2, "portraits": 2, "size": 16}
DATA = load_dataset("people-portraits", options=SIZES)

SPY = """
from dataclasses import dataclass
from expunge.methods.registry import Outcome, method

@dataclass(frozen=True)
class Options:
    pass

@method(name="spy", options=Options, paper="none", summary="says what it was shown")
def spy(context, options):
    kinds = sorted("text" if s.image is None else "image" for s in context.forget)
    return Outcome(context.model, record={"shown": kinds, "retained": len(context.retain)})
"""


def test_a_method_is_shown_one_kind_and_the_rest_is_measured(tmp_path: Path) -> None:
    (tmp_path / "spy.py").write_text(SPY)
    name = f"{tmp_path}/spy.py:spy"
    found = bench(
        tmp_path / "run", data="people-portraits", data_options=SIZES, init="tiny-test", methods="graddiff:epochs=1",
        seeds=1, references=2, epochs=1, base_epochs=1, suite="quick",
    )  # fmt: skip
    model = found.folder / "models" / "original-0"
    kinds = ["image" if s.image is not None else "text" for s in DATA["forget"]]
    for through, expected in (("all", sorted(kinds)), ("image", ["image"] * 4), ("text", ["text"] * 2)):
        out = tmp_path / through
        unlearn(model, out, data="people-portraits", data_options=SIZES, method=name, through=through, suite="quick")
        record = json.loads((out / "run.json").read_text())
        assert record["figures"]["shown"] == expected
        assert record["figures"]["retained"] == len(DATA["retain"])
        # Everything about the person is measured, whatever the method was shown.
        rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        assert {row["id"] for row in rows} >= {s.id for s in DATA["forget"]}


def test_ways_are_read_before_anything_is_loaded() -> None:
    (entry,) = parse_methods("npo:through=image;beta=0.2")
    assert {s.image is None for s in entry.forget(DATA["forget"])} == {False}
    assert entry.configured().beta == 0.2
    with pytest.raises(UserError, match="way to forget through 'picture'"):
        parse_methods("npo:through=picture")
    text = load_dataset("people", options={"people": 4, "forget": 1, "holdout": 1, "utility": 0, "questions": 2})
    with pytest.raises(UserError, match="no forget sample comes with an image"):
        entry.forget(text["forget"])
