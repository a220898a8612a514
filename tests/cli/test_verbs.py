"""ls, show, doctor: what is there, as text and as one JSON object."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest
import torch

from expunge.attacks.registry import Family, Need, all_attacks
from expunge.cli.catalogue import HIGH, KINDS, NEEDS, catalogue
from expunge.cli.main import run
from expunge.data.registry import all_datasets
from expunge.errors import UserError
from expunge.methods.registry import all_methods

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize("kind", KINDS)
def test_ls_names_everything_with_a_summary(kind: str, capsys: Captured) -> None:
    assert run(["ls", kind]) == 0
    text = capsys.readouterr().out
    assert run(["ls", kind, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["schema"] == "expunge.ls/1" and listed["kind"] == kind and listed["items"]
    for item in listed["items"]:
        assert item["summary"], f"{kind}/{item['name']} says nothing about itself"
        assert any(line.startswith(f"{item['name']} ") for line in text.splitlines())
    assert f"{len(listed['items'])} {kind};" in text


def test_ls_agrees_with_the_registries(capsys: Captured) -> None:
    for kind, registry in (("methods", all_methods()), ("datasets", all_datasets()), ("attacks", all_attacks())):
        run(["ls", kind, "--json"])
        assert [item["name"] for item in json.loads(capsys.readouterr().out)["items"]] == list(registry)
    attacks = catalogue("attacks")
    assert {"loss", "min_k++", "wbc", "dataset_inference", "blind"} <= attacks.keys()
    assert not attacks.keys() & catalogue("metrics").keys()
    assert not {"copies", "exam", "registry"} & attacks.keys()  # rooms, not attacks


def test_show_tells_what_an_attack_costs_and_sees(capsys: Captured) -> None:
    assert run(["show", "attacks/min_k", "--json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)["items"]
    attack = all_attacks()["min_k"]
    assert (
        item["properties"] | {"family": "membership", "tier": "quick", "access": "log-probabilities"}
        == (item["properties"])
    )
    assert item["formula"] == attack.formula and item["source"] == attack.paper
    assert [option["name"] for option in item["options"]] == ["percent"]


def test_what_attacks_need_and_their_high_scores_are_said_in_words(capsys: Captured) -> None:
    assert set(NEEDS) == set(get_args(Need)) and set(HIGH) == set(get_args(Family))
    assert run(["show", "wbc"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"needs {NEEDS['other']}" in text and f"a high score {HIGH['membership']}" in text
    assert run(["ls", "attacks"]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("wbc "))
    assert row.split()[1:4] == ["membership", "quick", "1.0"]


def test_show_tells_properties_options_and_source(capsys: Captured) -> None:
    assert run(["show", "npo"]) == 0
    text = capsys.readouterr().out
    npo = all_methods()["npo"]
    assert text.startswith(f"npo (method): {npo.summary}") and npo.paper in " ".join(text.split())
    assert "removes from weights" in text and "learning_rate = " in text
    assert run(["show", "methods/npo", "--json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)["items"]
    assert item["properties"]["removes_from_weights"] is npo.removes_from_weights
    options = {option["name"]: option for option in item["options"]}
    assert options["learning_rate"]["default"] == npo.options().learning_rate
    assert set(options) == set(npo.options.__dataclass_fields__)


def test_everything_that_is_listed_can_be_shown(capsys: Captured) -> None:
    from expunge.cli.show import describe

    for kind in KINDS:
        for name, entry in catalogue(kind).items():
            assert describe(entry).startswith(f"{name} ({kind[:-1]}): ")


def test_show_suggests_the_nearest_name() -> None:
    with pytest.raises(UserError, match="unknown name 'grad_diff': did you mean 'graddiff'"):
        run(["show", "grad_diff"])
    with pytest.raises(UserError, match="unknown kind 'method': did you mean 'methods'"):
        run(["show", "method/npo"])


def test_doctor_tells_what_is_installed(capsys: Captured) -> None:
    code = run(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == (1 if report["problems"] else 0)
    packages = {(p["name"], p["extra"]): p for p in report["packages"]}
    assert packages["torch", None]["installed"] == version("torch") and packages["torch", None]["fits"]
    assert packages["pytest", "dev"]["installed"] == version("pytest")
    assert report["devices"][0]["name"] == "cpu" and report["devices"][0]["works"] is True
    assert report["threads"] == torch.get_num_threads()
    assert report["memory_free"] > 0 and report["disk_free"] > 0
    assert run(["doctor"]) == code
    text = capsys.readouterr().out
    assert re.search(rf"^torch +{re.escape(version('torch'))}", text, re.MULTILINE)


def test_doctor_names_a_package_that_is_too_old_and_one_that_is_missing(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    from expunge.cli import doctor

    needs = ["torch>=99", "no-such-package-anywhere>=1", "rare>=1; extra == 'hub'", 'other; sys_platform == "amiga"']
    monkeypatch.setattr(doctor, "requires", lambda _: needs)
    assert run(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [
        f"torch>=99 is needed, {version('torch')} is installed",
        "no-such-package-anywhere>=1 is needed, nothing is installed",
    ]
    assert [p["name"] for p in report["packages"]] == ["torch", "no-such-package-anywhere", "rare"]


def test_doctor_reads_offline(capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for value, offline in (("1", True), ("0", False)):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        run(["doctor", "--json"])
        assert json.loads(capsys.readouterr().out)["offline"] is offline


def test_the_training_seed_does_not_change_the_people() -> None:
    from expunge.bench.single import Request

    first, other = (Request(data="people", data_options={"people": 6}, seed=s).dataset() for s in (0, 1))
    assert first.digest() == other.digest()
    assert Request(data="people", data_options={"people": 6}, data_seed=1).dataset().digest() != first.digest()
