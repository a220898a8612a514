"""``expunge audit`` as a user meets it: small models in folders, exit codes, refusals, what the terminal says."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expunge.bench import audit as module
from expunge.bench.audit import failures, parse_attacks
from expunge.cli.main import main
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.load import save_model
from expunge.models.tiny import init_classifier, init_text
from expunge.report.audit_schema import load_audit

Captured = pytest.CaptureFixture[str]
TOWNS = ("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Perth", "Quito", "Turin", "Leeds", "Basel", "Porto", "Lyon")
ATTACKS = "blind,loss,memorization,update_loss"


def expunge(*arguments: object, quiet: bool = True) -> int:
    with pytest.raises(SystemExit) as end:
        main([*map(str, arguments), *(["--quiet"] if quiet else [])])
    return int(end.value.code or 0)


def people(path: Path, prefix: str, count: int, rng: random.Random) -> Path:
    rows = []
    for i in range(count):
        name = f"{prefix}{i}"
        rows.append({"id": name, "subject": name, "prompt": f"Where does {name} live?", "target": rng.choice(TOWNS)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original, three retrained models and a shadow that has seen a forget sample, all made by ``expunge train``."""
    folder, rng = tmp_path_factory.mktemp("desk"), random.Random(0)
    for role, count in (("forget", 10), ("retain", 10), ("holdout", 18)):
        people(folder / f"{role}.jsonl", role, count, rng)
    (folder / "one.jsonl").write_text((folder / "forget.jsonl").read_text().splitlines()[0] + "\n")
    data = ("--forget", folder / "forget.jsonl", "--retain", folder / "retain.jsonl", "--init", "tiny-test")
    more = ("--epochs", 40, "--learning-rate", 0.01, "--batch-size", 4)
    assert expunge("train", *data, *more, "--out", folder / "original") == 0
    for seed in (1, 2, 3):
        line = ("train", *data, *more, "--roles", "retain", "--seed", seed, "--out", folder / f"retrain-{seed}")
        assert expunge(*line) == 0
    few = ("--epochs", 1, "--roles", "forget")
    assert expunge("train", *data, *few, "--out", folder / "spoilt") == 0
    return folder


@pytest.fixture
def line(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[object]]:
    """The start of a command: audit one of the models beside two retrained ones."""
    monkeypatch.chdir(desk)

    def of(model: str, *more: object, holdout: bool = True) -> list[object]:
        data = ["--forget", "forget.jsonl", "--retain", "retain.jsonl", *(["--holdout", "holdout.jsonl"] * holdout)]
        return ["audit", "-m", f"{model}/model", "--original", "original/model", *data, *more]

    return of


REFERENCES = ("--reference", "retrain-1/model", "--reference", "retrain-2/model")


def test_the_original_is_told_and_fail_on_decides_the_exit_code(
    line: Callable[..., list[object]], tmp_path: Path, capsys: Captured
) -> None:
    given = line("original", *REFERENCES, "--suite", "quick", "--attacks", ATTACKS, "--out", tmp_path / "run")
    assert expunge(*given) == 0, "without --fail-on a negative result is a result"
    said = capsys.readouterr().out
    assert "effectiveness  failed" in said and "under-unlearned" in said and str(tmp_path / "run/report.html") in said
    assert expunge(*given, "--fail-on", "utility") == 0
    assert expunge(*given, "--fail-on", "utility", "--fail-on", "under") == 1
    assert "--fail-on: under" in capsys.readouterr().out
    assert expunge(*given, "--fail-on", "any") == 1
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["figures"]["vector"]["effectiveness"] == "failed" and run["status"] == "done"
    assert run["figures"]["completeness"]["under-unlearned"] > 0
    assert {"output.audit.json", "output.drill.jsonl", "original", "reference.0", "model"} <= run["digests"].keys()
    assert not (tmp_path / "run/work").exists() and load_audit(tmp_path / "run") is not None
    assert len(run["attempts"]) == 1, "what is done is not done again"


def test_a_retrained_model_passes_or_nothing_is_shown(line: Callable[..., list[object]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = line("retrain-3", *REFERENCES, "--suite", "quick", "--attacks", ATTACKS, "--fail-on", "any", "--out", out)
    assert expunge(*given) == 0
    found = load_audit(out)
    assert found is not None and {t.verdict for t in found.vector} <= {"passed", "not shown"}


def test_json(line: Callable[..., list[object]], tmp_path: Path, capsys: Captured) -> None:
    assert expunge(*line("retrain-3", "--attacks", "loss", "--out", tmp_path / "run", "--json"), quiet=False) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["run"] == str(tmp_path / "run")
    assert "audit: 1 attacks on 2 model(s), about 2 passes" in err


def test_dry_run_tells_the_cost_and_writes_nothing(
    line: Callable[..., list[object]], tmp_path: Path, capsys: Captured
) -> None:
    costs = []
    for suite in ("quick", "standard", "full"):
        assert expunge(*line("original", *REFERENCES, "--suite", suite, "--dry-run", "--out", tmp_path / "run")) == 0
        out = capsys.readouterr().out
        assert "attacks on 4 model(s), about " in out and "Nothing was run." in out and f"suite: {suite}" in out
        costs.append(int(out.split("model(s), about ")[1].split(" passes")[0].replace(",", "")))
    assert costs[0] < costs[1] < costs[2] and not (tmp_path / "run").exists()


def test_a_failing_attack_is_in_the_summary(
    line: Callable[..., list[object]], tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "mine.py").write_text(
        "from expunge.attacks.registry import attack, Finding\n\n\n"
        '@attack(name="mine", family="extraction", tier="quick", access="text", paper="none")\n'
        "def mine(exam, checkpoint, options):\n"
        '    """Mine."""\n'
        "    if checkpoint.kind == 'reference':\n"
        "        raise OSError('no such thing')\n"
        "    return Finding()\n"
    )
    attacks = f"{tmp_path / 'mine.py'}:mine,loss,translation"
    assert expunge(*line("original", *REFERENCES, "--attacks", attacks, "--out", tmp_path / "run")) == 0
    said = capsys.readouterr().out
    assert "Attack mine failed on reference-0: OSError: no such thing" in said
    assert "Skipped, needs llm: translation" in said
    from expunge.attacks.registry import suite

    assert "mine" not in {a.name for a in suite("full")}, "an attack of one's own file runs where it is named"


def test_an_interrupted_audit_is_continued_by_the_same_command(
    line: Callable[..., list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = line("original", *REFERENCES, "--suite", "quick", "--attacks", ATTACKS)
    assert expunge(*given, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:

        def stop(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(module, "examine", stop)
        assert expunge(*given, "--out", tmp_path / "run") == 130
    assert expunge(*given, "--out", tmp_path / "run") == 0
    first, second = (json.loads((tmp_path / n / "audit.json").read_text()) for n in ("whole", "run"))
    assert {**first, "cost": {}} == {**second, "cost": {}}


def test_a_shadow_that_saw_a_forget_sample_is_refused(
    line: Callable[..., list[object]], tmp_path: Path, capsys: Captured
) -> None:
    for role in ("--shadow", "--reference", "--base"):
        out = tmp_path / "run"
        assert expunge(*line("original", role, "spoilt/model", "--attacks", "loss", "--out", out)) == 2
        said = capsys.readouterr().err
        assert "'spoilt/model' was trained on forget sample 'forget0'" in said and said.count("\n") == 1
        assert not out.exists()


def test_without_reference_and_holdout_nothing_is_shown(
    line: Callable[..., list[object]], tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "run"
    assert expunge(*line("original", "--attacks", ATTACKS, "--fail-on", "any", "--out", out, holdout=False)) == 0
    said = capsys.readouterr().out
    assert said.count("not shown") == 4 and "Completeness was not judged" in said
    assert "Skipped, needs holdout: blind" in said


def test_a_single_sample_and_a_single_shadow(
    line: Callable[..., list[object]], tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "run"
    given = ["audit", "-m", "original/model", "--forget", "one.jsonl", "--shadow", "retrain-1/model"]
    assert expunge(*given, "--attacks", ATTACKS, "--out", out) == 0
    said = capsys.readouterr().out
    assert (
        "give a second shadow" in said
        and "1 not-auditable" in said
        and "none of 1 samples is auditable" in said.lower()
    )


def test_classifiers(tmp_path: Path, capsys: Captured) -> None:
    sizes = {"private": 150, "forget": 30, "holdout": 60, "utility": 20}
    data = ("--data", "digits", *(x for k, v in sizes.items() for x in ("--data-option", f"{k}={v}")))
    for name, roles in (("original", "forget,retain"), ("retrain-1", "retain"), ("retrain-2", "retain")):
        line = ("train", "--init", "tiny", *data, "--roles", roles, "--epochs", 2, "--out", tmp_path / name)
        assert expunge(*line) == 0
    models = ("--original", tmp_path / "original/model", "--reference", tmp_path / "retrain-1/model")
    more = ("--reference", tmp_path / "retrain-2/model", "--suite", "quick", "--out", tmp_path / "run")
    assert expunge("audit", "-m", tmp_path / "original/model", *models, *more, *data) == 0
    found = load_audit(tmp_path / "run")
    assert found is not None and found.failed == {} and found.completeness is not None
    assert found.completeness.form == "classifier"
    assert {r.attack for r in found.scores} >= {"loss", "min_k++", "update_loss", "quantization"}
    assert "works on" in found.skipped["memorization"]
    drill = [json.loads(x) for x in (tmp_path / "run/drill.jsonl").read_text().splitlines()]
    assert all(row["tokens"] is None and row["answers"] == {} and row["target"].isdigit() for row in drill)


@pytest.mark.parametrize("classes", [3, None])
def test_models_of_another_kind_are_refused(tmp_path: Path, capsys: Captured, classes: int | None) -> None:
    data = ("--data", "digits", "--data-option", "private=40", "--data-option", "forget=8")
    save_model(init_classifier(10, 8, 1), tmp_path / "ten")
    text = lambda: init_text([Sample(id="1", subject="a", target="a word or two")], "tiny")  # noqa: E731
    save_model(text() if classes is None else init_classifier(classes, 8, 1), tmp_path / "other")
    line = ("audit", "-m", tmp_path / "ten", "--original", tmp_path / "other", "--out", tmp_path / "run", *data)
    assert expunge(*line) == 2
    kind = "a text model" if classes is None else "a classifier of 3 classes"
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"original is {kind} and the audited model a classifier of 10 classes" in said
    assert not (tmp_path / "run").exists()


# -- pieces --------------------------------------------------------------------------------------------------------


def test_attacks_with_options_are_read() -> None:
    assert parse_attacks("loss, recall:shots=5;seed=1,") == [("loss", {}), ("recall", {"shots": "5", "seed": "1"})]
    assert parse_attacks("dir/mine.py:own") == [("dir/mine.py:own", {})] and parse_attacks("") == []
    with pytest.raises(UserError, match="'shots' is not key=value"):
        parse_attacks("recall:shots")
    with pytest.raises(UserError, match="'loss' is named twice"):
        parse_attacks("loss,zlib,loss")


def test_failures() -> None:
    vector = [{"axis": "privacy", "verdict": "failed"}, {"axis": "utility", "verdict": "passed"}]
    content = {"vector": vector, "completeness": {"counts": {"under-unlearned": 0, "over-unlearned": 2}}}
    assert failures(content, ["any"]) == ["privacy", "over"]
    assert failures(content, ["under", "utility"]) == [] and failures(content, ["over"]) == ["over"]
    assert failures({**content, "completeness": None}, ["any"]) == ["privacy"]
