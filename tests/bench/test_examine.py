"""An audit of the tiny exam: what is found in the original, nothing in a retrain, and what must not stop it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from attack_cases import adapter, exam, trained
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Attack, Finding, NoOptions, get_attack
from expunge.bench import examine as module
from expunge.bench.examine import Audit, Plan, completeness_readings, examine, plan
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.models.text import TextAdapter
from expunge.progress import Progress
from expunge.report.audit_schema import load_audit, load_drill
from expunge.runs import Run
from expunge.stats import Estimate
from tiny_text import tiny_dataset, tiny_tokenizer

CHEAP = ("blind", "loss", "zlib", "min_k++", "update_loss", "memorization", "reference_difference", "prompting")


def with_two_references(one: Exam) -> Exam:
    """Two retrained models give the spread between retrained models."""
    second = trained(tuple(exam().samples["retain"]) + tuple(exam().trained), 6)
    return replace(one, references=[*one.references, Checkpoint.of(second, adapter(), "reference", "reference-1")],
                   shared={})  # fmt: skip


@cache
def large() -> Exam:
    """Ten people to forget, sixteen never seen, three references: enough for the tests to show something."""
    data = tiny_dataset(people=22, forget=10, holdout=20, utility=4, seed=3)
    forget, retain, unseen = data["forget"], data["retain"], data["holdout"]
    samples: dict[Role, list[Sample]] = {
        "forget": list(forget),
        "retain": list(retain[:20]),
        "holdout": list(unseen[:32]),
    }
    samples["utility"] = list(data["utility"])
    original = trained((*forget, *retain), 0)
    return Exam(
        audited=Checkpoint.of(original, adapter(), "audited"),
        original=Checkpoint.of(original, adapter(), "original"),
        references=[Checkpoint.of(trained(retain, 1 + k), adapter(), "reference", f"reference-{k}") for k in range(3)],
        samples=samples,
        aux=list(unseen[32:]),
        trained=list(retain[20:]),
    )


@cache
def large_retrain() -> Exam:
    """The same with one more exact retrain under audit."""
    one = large()
    model = trained((*one.samples["retain"], *one.trained), 9)
    return replace(one, audited=Checkpoint.of(model, adapter(), "audited"), shared={})


def of(folder: Path, one: Exam, *names: str, wanted: Plan | None = None, **more: Any) -> Audit:
    run = Run.open(folder, "audit", {"names": names})
    with run:
        found = examine(one, wanted or plan(one, "quick", [(n, {}) for n in names]), run, **more)
        run.finish()
    return found


def content(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "audit.json").read_text())
    return found


def by_axis(folder: Path) -> dict[str, Any]:
    return {t["axis"]: t for t in content(folder)["vector"]}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    of(folder / "run", large(), *CHEAP)
    return folder / "run"


@pytest.fixture(scope="module")
def gone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gone")
    of(folder / "run", large_retrain(), *CHEAP)
    return folder / "run"


# -- what is found -------------------------------------------------------------------------------------------------


def test_the_original_fails_where_it_remembers(original: Path) -> None:
    found = by_axis(original)
    assert [found[a]["verdict"] for a in ("effectiveness", "privacy", "utility")] == ["failed", "failed", "passed"]
    left = {r["score"] for r in content(original)["scores"] if r["verdict"] == "more is left"}
    assert {"loss", "zlib", "min_k++"} <= left
    completeness = content(original)["completeness"]
    assert completeness["counts"]["under-unlearned"] >= 0.95 * completeness["auditable"] > 9
    trace = next(r for r in content(original)["scores"] if r["score"] == "update_loss")
    assert trace["verdict"] == "less than the reference", "and yet not among what speaks against the model"
    assert "3 of 5 scores speak against the model" in found["privacy"]["sentence"]


def test_nothing_is_found_in_a_retrain(gone: Path) -> None:
    found = by_axis(gone)
    assert [found[a]["verdict"] for a in ("effectiveness", "privacy", "utility")] == ["passed"] * 3
    counts = content(gone)["completeness"]["counts"]
    assert counts["under-unlearned"] == 0 and counts["over-unlearned"] == 0
    trace = next(r for r in content(gone)["scores"] if r["score"] == "update_loss")
    assert trace["models"]["audited"]["value"] > 0.7, "the trace of the request is there, and in the references too"


@pytest.mark.parametrize("which", ["original", "gone"])
def test_where_the_original_would_pass_nothing_is_passed(which: str, request: pytest.FixtureRequest) -> None:
    """The prompts tell these small models apart so badly that not even the original stands out."""
    found = by_axis(request.getfixturevalue(which))["robustness"]
    assert found["verdict"] == "not shown" and "but the original would pass as well" in found["sentence"]


def test_files_read_back_as_the_schema_has_them(original: Path) -> None:
    found = load_audit(original)
    assert found is not None and found.suite == "quick"
    kinds = ["audited", "original", "reference", "reference", "reference"]
    assert [c.kind for c in found.checkpoints] == kinds
    assert found.samples == {"forget": 20, "retain": 20, "holdout": 32, "utility": 8, "aux": 8}
    assert {r.score for r in found.scores} >= {"loss", "zlib", "kept.retain", "kept.utility", "prompting"}
    assert all(r.p is None or 0 <= r.p <= (r.p_adjusted or 0) <= 1 for r in found.scores)
    assert found.fitness is not None and found.fitness.blind_auc is not None
    assert found.cost.keys() == set(CHEAP) and found.failed == {}
    assert {s.subject for s in found.subjects} == {s.subject for s in large().forget}
    drill = load_drill(original, found)
    assert drill.total == 20 and drill.damaged == 0


def test_drill_says_what_the_models_say(original: Path) -> None:
    lines = [json.loads(line) for line in (original / "drill.jsonl").read_text().splitlines()]
    one = large()
    assert [line["id"] for line in lines] == [s.id for s in one.forget]
    signals = one.audited.signals(one.forget)
    other = one.references[0].signals(one.forget)
    for i, line in enumerate(lines):
        assert line["losses"]["audited"] == pytest.approx(signals[i].loss)
        assert line["losses"]["reference-0"] == pytest.approx(other[i].loss)
        assert line["tokens"]["audited"] == pytest.approx(signals[i].log_prob_L.tolist())
        assert " ".join(line["tokens"]["text"][:-1]) == one.forget[i].target
        assert line["answers"]["original"] == one.audited.answers([one.forget[i]])[0]
        assert line["scores"]["loss"]["audited"] == pytest.approx(-signals[i].loss)
        low, mean, high = (line["scores"]["loss"][k] for k in ("low", "reference", "high"))
        assert low <= mean <= high
        near = line["neighbours"]
        assert len(near) == 3 and near[0]["similarity"] >= near[1]["similarity"] > 0
        kept = next(s for s in one.samples["retain"] if s.id == near[0]["id"])
        assert near[0]["target"] == kept.target
        assert near[0]["loss_audited"] == pytest.approx(one.audited.signals([kept])[0].loss)


# -- interruption, failures ----------------------------------------------------------------------------------------


def test_the_worst_view_is_read_from_the_attacks(original: Path, gone: Path) -> None:
    for folder in (original, gone):
        found = content(folder)["under_attack"]
        assert set(found["views"]) == {"as served", "best prompt"}
        assert found["views"]["as served"]["counts"] == content(folder)["completeness"]["counts"]
        lines = [json.loads(line) for line in (folder / "drill.jsonl").read_text().splitlines()]
        assert all(line["completeness_attacked"] <= line["completeness"] for line in lines)
        assert "come back only under attack" in by_axis(folder)["robustness"]["sentence"]
    assert content(gone)["under_attack"]["counts"]["under-unlearned"] == 0


def fresh_exam() -> Exam:
    """As in another process: nothing is remembered."""
    return replace(large(), shared={})


def without_cost(folder: Path) -> dict[str, Any]:
    return {k: v for k, v in content(folder).items() if k != "cost"}


def test_an_interrupted_audit_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, original: Path
) -> None:
    ran: list[tuple[str, str]] = []
    limit, find = 12, module._find

    def counted(here: Exam, checkpoint: Checkpoint, entry: Attack, options: Any, run: Run) -> Finding | str:
        if len(ran) == limit:
            raise KeyboardInterrupt
        if not (run.folder / f"work/findings/{checkpoint.name}/{entry.name}.json").exists():
            ran.append((checkpoint.name, entry.name))
        return find(here, checkpoint, entry, options, run)

    monkeypatch.setattr(module, "_find", counted)
    with pytest.raises(KeyboardInterrupt):
        of(tmp_path / "run", fresh_exam(), *CHEAP)
    assert not (tmp_path / "run/audit.json").exists()
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "interrupted"
    limit = 999
    of(tmp_path / "run", fresh_exam(), *CHEAP)
    assert len(ran) == len(set(ran)) == 1 + 5 * (len(CHEAP) - 1), "each once on every checkpoint, the blind one once"
    assert without_cost(tmp_path / "run") == without_cost(original)
    assert (tmp_path / "run/drill.jsonl").read_text() == (original / "drill.jsonl").read_text()


def own_attack(
    run: Callable[..., Any], name: str = "own", family: Any = "extraction", **more: Any
) -> tuple[Attack, Any]:
    options = more.pop("options", NoOptions)
    return Attack(name, run, options, family, "quick", "text", "none", "none", **more), options()


def raising(error: Exception, on: str = "audited") -> Callable[..., Finding]:
    def run(exam: Exam, checkpoint: Checkpoint, options: Any) -> Finding:
        if checkpoint.name == on:
            raise error
        return Finding({"own": {"forget": [0.0] * len(exam.forget)}})

    return run


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (raising(UserError("the two models have different weights.")), "the two models have different weights."),
        (raising(RuntimeError("shapes\ndiffer " + "x" * 999), "reference-0"), "RuntimeError: shapes differ xx"),
        (raising(AttributeError("no head")), "AttributeError: no head"),
        (raising(AssertionError()), "AssertionError"),
        (raising(MemoryError("full")), "MemoryError: full"),
        (lambda e, c, o: Finding({"own": {"forget": [1.0]}}), "gave 1 values of own for 6 forget samples"),
        (
            lambda e, c, o: Finding({"own": cast(Any, {"forgotten": [1.0]})}),
            "gave 1 values of own for 0 forgotten samples",
        ),
        (lambda e, c, o: None, "AttributeError"),
        (lambda e, c, o: Finding(details={"x": {"model": object()}}), "TypeError"),
    ],
)
def test_a_failing_attack_is_recorded_and_costs_nothing_else(
    run: Callable[..., Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = replace(exam(), progress=Progress(quiet=False), shared={})
    wanted = Plan("quick", [own_attack(run), (get_attack("loss"), NoOptions())])
    of(tmp_path / "run", one, wanted=wanted)
    found = content(tmp_path / "run")
    assert found["failed"].keys() == {"own"} and says in found["failed"]["own"]
    assert len(found["failed"]["own"]) < 400 and "\n" not in found["failed"]["own"]
    assert {r["attack"] for r in found["scores"]} == {"loss", "kept"}
    assert load_audit(tmp_path / "run") is not None
    assert "attack own failed on" in capsys.readouterr().err


def test_ctrl_c_is_no_failed_attack(tmp_path: Path) -> None:
    def stop(*_: Any) -> Finding:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        of(tmp_path / "run", exam(), wanted=Plan("quick", [own_attack(stop)]))


def test_findings_without_scores_and_scores_of_some_models(tmp_path: Path) -> None:
    def figures(here: Exam, checkpoint: Checkpoint, options: Any) -> Finding:
        return Finding(figures={"own.size": Estimate(3.0, n=1)}, notes=["own counts", "and says so"])

    def partly(here: Exam, checkpoint: Checkpoint, options: Any) -> Finding:
        names = ["both", "mine"] if checkpoint.name == "audited" else ["both"]
        scores: dict[str, Any] = {f"partly.{n}": {"forget": [math.nan] * 6} for n in names}
        return Finding(scores | {"partly.empty": {}})

    of(tmp_path / "run", exam(), wanted=Plan("quick", [own_attack(figures), own_attack(partly, "partly")]))
    found = content(tmp_path / "run")
    assert found["figures"]["own.size"]["reference-0"]["value"] == 3.0
    assert [r["score"] for r in found["scores"]] == ["partly.both", "kept.retain", "kept.utility"]
    assert found["scores"][0]["verdict"] == "not shown"
    assert {"own counts", "own: and says so"} <= set(found["notes"])
    assert any("partly.mine could not be had under every model" in note for note in found["notes"])


def test_progress_counts_attacks_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inner: list[bool] = []

    def noisy(here: Exam, checkpoint: Checkpoint, options: Any) -> Finding:
        here.progress.start("mine", 3)
        here.progress.step(1)
        here.progress.stop()
        inner.append(here.progress.quiet)
        return Finding()

    one = replace(exam(), progress=Progress(quiet=False, every=0.0), shared={})
    of(tmp_path / "run", one, wanted=Plan("quick", [own_attack(noisy, passes=6.5), own_attack(noisy, "two")]))
    said = capsys.readouterr().err
    assert "audit: 2 attacks on 3 model(s), about 22 passes over the forget and holdout samples, about" in said
    assert "audit, in passes: 8/27" in said and "two on audited" in said and "mine" not in said
    assert "audit, in passes: 27/27, 0:00 left." in said and inner == [True] * 6


# -- what is missing -----------------------------------------------------------------------------------------------


def test_no_reference_shows_nothing_and_says_why(tmp_path: Path) -> None:
    of(tmp_path / "run", replace(exam(), references=[], shadows=[], shared={}), "loss", "memorization")
    assert {t["verdict"] for t in by_axis(tmp_path / "run").values()} == {"not shown"}
    assert "no retrained model to compare with" in by_axis(tmp_path / "run")["privacy"]["sentence"].lower()
    found = content(tmp_path / "run")
    assert found["completeness"] is None and found["subjects"] == []
    assert any("completeness was not judged: give a --reference or a --shadow" in note for note in found["notes"])
    assert all("verdict" not in json.loads(x) for x in (tmp_path / "run/drill.jsonl").read_text().splitlines())


def test_shadows_alone_judge_completeness_and_nothing_else(tmp_path: Path) -> None:
    one = large()
    shadows = [replace(c, kind="shadow", name=f"shadow-{k}") for k, c in enumerate(one.references)]
    of(tmp_path / "run", replace(one, references=[], shadows=shadows, shared={}), "loss")
    found = by_axis(tmp_path / "run")
    assert found["effectiveness"]["verdict"] == "failed" and found["privacy"]["verdict"] == "not shown"
    assert content(tmp_path / "run")["completeness"]["shadows"] == 3
    assert [c["kind"] for c in content(tmp_path / "run")["checkpoints"]] == ["audited", "original", *["shadow"] * 3]


def test_two_references_are_the_null_distribution_and_one_is_joined_by_shadows() -> None:
    one, two = completeness_readings(exam())[0], completeness_readings(with_two_references(exam()))[0]
    assert one is not None and two is not None and (one.num_shadows, two.num_shadows) == (3, 2)


@pytest.mark.parametrize("role", ["holdout", "retain", "utility"])
def test_a_role_may_be_missing(role: Any, tmp_path: Path) -> None:
    samples = {r: own for r, own in large().samples.items() if r != role}
    of(tmp_path / "run", replace(large(), samples=samples, shared={}), *(n for n in CHEAP if n != "prompting"))
    found = content(tmp_path / "run")
    assert found["failed"] == {} and by_axis(tmp_path / "run")["effectiveness"]["verdict"] == "failed"
    if role == "holdout":
        assert found["skipped"] == {"blind": "needs holdout"} and found["fitness"] is None
        assert found["completeness"]["calibration"] == "shadows"
        assert all(r["statistic"] == "mean" for r in found["scores"])
    assert load_audit(tmp_path / "run") is not None


def test_one_forget_sample(tmp_path: Path) -> None:
    samples = {**exam().samples, "forget": exam().forget[:1]}
    of(tmp_path / "run", with_two_references(replace(exam(), samples=samples, shared={})), *CHEAP)
    found = by_axis(tmp_path / "run")
    assert found["privacy"]["verdict"] == found["robustness"]["verdict"] == "not shown"
    assert "too few samples" in found["robustness"]["sentence"].lower()
    assert found["utility"]["tests"] == 2 and content(tmp_path / "run")["failed"] == {}


def test_texts_of_one_token(tmp_path: Path) -> None:
    def short(role: Any) -> list[Any]:
        return [replace(s, target=str(s.target).split()[-1], probes=()) for s in exam().samples[role]]

    one = replace(exam(), samples={r: short(r) for r in exam().samples}, shared={})
    of(tmp_path / "run", with_two_references(one), *CHEAP)
    found = content(tmp_path / "run")
    assert found["failed"] == {} and load_audit(tmp_path / "run") is not None
    lines = [json.loads(line) for line in (tmp_path / "run/drill.jsonl").read_text().splitlines()]
    assert all(len(line["tokens"]["text"]) == 2 for line in lines), "the word and the end"


def test_other_tokenizers_are_compared_in_bits_per_byte_and_it_is_said(tmp_path: Path) -> None:
    def shuffled() -> TextAdapter:
        """The same words under the same ids, but another template: texts read otherwise."""
        return TextAdapter(tokenizer=tiny_tokenizer(), context=64, template="{prompt} is {target}")

    one = with_two_references(exam())
    stranger = Checkpoint.of(one.references[0].model, shuffled(), "reference", "reference-0")
    mixed = replace(one, references=[stranger, one.references[1]], shared={})
    of(tmp_path / "run", mixed, "loss", "memorization")
    found = content(tmp_path / "run")
    assert "audited model: reference-0; losses are compared in bits per byte" in found["notes"][0]
    rows = {r["score"]: r for r in found["scores"]}
    assert "one reference" in rows["memorization.exact"]["gap"]["note"], "token shares of the stranger are not compared"
    assert "note" not in rows["loss"]["gap"], "ranks within each model are"
    readings, beside = completeness_readings(mixed)
    assert readings is not None and beside is not None
    expected = [s.bits_per_byte for s in one.audited.signals(one.forget)]
    assert readings.unlearned_N.tolist() == pytest.approx(expected)
    kept = rows["kept.retain"]["models"]["audited"]["value"]
    own = one.audited.signals(one.samples["retain"])
    assert kept == pytest.approx(-np.mean([s.bits_per_byte for s in own]))


# -- the exam itself -----------------------------------------------------------------------------------------------


def test_answers_never_push_their_prompt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    short = TextAdapter(tokenizer=tiny_tokenizer(), context=24)

    def generate(self: TextAdapter, model: Any, samples: list[Sample], new: int) -> list[str]:
        asked.extend([new] * len(samples))
        return ["x"] * len(samples)

    monkeypatch.setattr(TextAdapter, "generate", generate)
    checkpoint = Checkpoint.of(exam().audited.model, short)
    assert checkpoint.answers(exam().forget[:2]) == ["x", "x"] and checkpoint.answers(exam().forget[:2], 4)
    assert asked == [12, 12, 4, 4]
    checkpoint.answers(exam().forget[:2], 999)
    assert len(asked) == 4, "as long as before: nothing is generated twice"


def test_an_exam_without_forget_samples_is_refused() -> None:
    with pytest.raises(UserError, match="at least one forget sample"):
        replace(exam(), samples={"forget": [], "holdout": exam().holdout})
