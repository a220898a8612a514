"""docs/data.md says what the code does: names, options, defaults, file examples, and code that runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from expunge.data import registry
from expunge.data.files import FIELDS, read_samples
from expunge.data.registry import all_datasets, load_dataset

DOC = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)


def test_every_dataset_and_option_is_documented() -> None:
    for source in all_datasets().values():
        if not source.load.__module__.startswith("expunge.data."):
            continue
        assert f"| `{source.name}` |" in DOC
        for field in dataclasses.fields(source.options):
            assert f"`{field.name}`" in DOC, f"option {field.name} of {source.name}"


@pytest.mark.parametrize("name", ["people", "people-portraits", "clear", "tofu"])
def test_defaults_are_the_documented_ones(name: str) -> None:
    section = DOC.split(f"### `{name}`")[1].split("###")[0]
    documented = dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", section, re.MULTILINE))
    actual = {f.name: str(f.default).lower() for f in dataclasses.fields(all_datasets()[name].options)}
    assert documented == actual


def test_file_examples(tmp_path: Path) -> None:
    for language, number in (("jsonl", 3), ("csv", 2)):
        (block,) = blocks(language)
        path = tmp_path / f"forget.{language}"
        path.write_text(block)
        assert len(read_samples(path)) == number
    assert all(f"`{field}`" in DOC for field in FIELDS)


def test_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_SOURCES", dict(all_datasets()))
    Path("forget.jsonl").write_text(blocks("jsonl")[0])
    Path("retain.jsonl").write_text("".join(f'{{"prompt": "q{i}", "target": "a{i}"}}\n' for i in range(60)))
    Path("unseen.csv").write_text("text\nSomething else.\n")
    first, files, deletion, own = blocks("python")
    exec(first, {})
    space: dict[str, object] = {}
    exec(files, space)
    Path("forget.jsonl").write_text("".join(f'{{"prompt": "p{i}", "target": "b{i}"}}\n' for i in range(5)))
    exec(files, space)
    exec(deletion.replace('["Ann Lee"]', '["forget-1"]'), space)
    exec(own, {"__name__": __name__})
    assert len(load_dataset("mine")["forget"]) == 10
