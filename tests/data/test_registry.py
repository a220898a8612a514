from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import expunge.data
from expunge import extensions
from expunge.data import registry
from expunge.data.hub import hub_rows
from expunge.data.registry import all_datasets, get_dataset, load_dataset
from expunge.errors import UserError

ONE_FILE = """
from __future__ import annotations
from dataclasses import dataclass
from expunge.data.registry import dataset
from expunge.data.samples import Dataset, Sample
from expunge.options import option

@dataclass(frozen=True, kw_only=True)
class Options:
    size: int = option(2, "samples to forget")

@dataset(name="{name}", options=Options, summary="s", origin="o", licence="l")
def load(options, *, data_dir, seed):
    forget = tuple(Sample(id=f"f{{i}}", subject="s", target=f"text {{i}}") for i in range(options.size))
    return Dataset(name="{name}", roles={{"forget": forget}}, source=f"seed {{seed}} of {{data_dir}}")
"""


@pytest.fixture(autouse=True)
def _restore(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_SOURCES", dict(all_datasets()))


def test_the_shipped_datasets_are_described() -> None:
    sources = all_datasets()
    assert {"people", "tofu", "webtext", "medical", "legal", "code"} <= set(sources)
    for source in sources.values():
        assert source.summary and source.origin and source.licence
        source.options()  # every option has a default


def test_one_new_file_adds_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "newcomer.py").write_text(ONE_FILE.format(name="newcomer"))
    monkeypatch.setattr(expunge.data, "__path__", [*expunge.data.__path__, str(tmp_path)])
    data = load_dataset("newcomer", data_dir=tmp_path, seed=3, options={"size": "4"})
    assert len(data["forget"]) == 4 and data.source == f"seed 3 of {tmp_path}"
    sys.modules.pop("expunge.data.newcomer")


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    plugin = ModuleType("plugin")
    monkeypatch.setitem(sys.modules, "plugin", plugin)

    class Entry:
        def load(self) -> None:
            loaded.append(True)
            exec(ONE_FILE.format(name="plugged"), plugin.__dict__)

    def points(group: str) -> list[Any]:
        return [Entry()] if group == "expunge.datasets" else []

    monkeypatch.setattr(extensions, "entry_points", points)
    assert len(load_dataset("plugged")["forget"]) == 2 and loaded


def test_dataset_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(ONE_FILE.format(name="mine"))
    for _ in range(2):  # again is no clash
        assert load_dataset(f"{path}:mine", options={"size": 1})["forget"][0].target == "text 0"
    with pytest.raises(UserError, match="no dataset called 'other'"):
        get_dataset(f"{path}:other")
    with pytest.raises(UserError, match="does not exist"):
        get_dataset(f"{tmp_path}/none.py:mine")


def test_two_datasets_of_one_name_are_a_mistake_of_ours() -> None:
    @dataclass(frozen=True)
    class None_:
        pass

    def load(options: Any, *, data_dir: Path | None, seed: int) -> Any:
        raise RuntimeError

    with pytest.raises(AssertionError, match="people"):
        registry.dataset(name="people", options=None_, summary="", origin="", licence="")(load)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'people'"):
        load_dataset("poeple")
    with pytest.raises(UserError, match="did you mean 'holdout'"):
        load_dataset("people", options={"hold-out": 3})
    with pytest.raises(UserError, match="does not exist"):
        load_dataset("tofu", data_dir=tmp_path / "nowhere")
    with pytest.raises(UserError, match="0 or more"):
        load_dataset("people", seed=-1)
    with pytest.raises(UserError, match=r"full\.json"):
        load_dataset("tofu", data_dir=tmp_path)


def test_result_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text(ONE_FILE.format(name="empty"))
    with pytest.raises(UserError, match="forget set of 'empty' is empty"):
        load_dataset(f"{path}:empty", options={"size": 0})


def test_hub_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"expunge\[hub\]"):
        load_dataset("tofu")


def fake_hub(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route\nto host")

    fake_hub(monkeypatch, load)
    with pytest.raises(UserError, match=r"ConnectionError: no route to host.*check the network"):
        hub_rows("some/name", "config", "train")


def test_hub_limit_streams_and_scripts_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def load(name: str, config: str | None, **given: Any) -> Any:
        calls.append(given)
        if "revision" not in given:
            raise RuntimeError("Dataset scripts are no longer supported")
        return ({"text": str(i)} for i in range(1000))

    fake_hub(monkeypatch, load)
    assert [row["text"] for row in hub_rows("some/name", None, "train", limit=3)] == ["0", "1", "2"]
    assert calls == [
        {"split": "train", "streaming": True},
        {"split": "train", "streaming": True, "revision": "refs/convert/parquet"},
    ]
