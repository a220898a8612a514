"""Protocols on tiny worlds: who learns what, sharing and resuming, statistics against closed forms, end to end."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from conftest import shared
from expunge.attacks.exam import Checkpoint
from expunge.completeness.protocols import PROTOCOLS, ProtocolOptions, get_protocol, run_protocol, store
from expunge.completeness.protocols.approximate import BOUNDED, ORIGINAL, RETRAINED, unlearned
from expunge.completeness.protocols.binui import shifted
from expunge.completeness.protocols.fake import NEUTRAL, REFUSAL, guard, noisy, prefix_check, prefixed
from expunge.completeness.protocols.scores import Case, losses, posteriors, rmia_offset, scores_of
from expunge.completeness.protocols.store import Store, between, content_key, start_at
from expunge.completeness.protocols.tables import (
    BINARY,
    GRADED,
    LEVELS,
    Cell,
    crossed,
    margins,
    member_tpr,
    rank_correlation,
    scaled_error,
)
from expunge.completeness.protocols.world import World, make_world
from expunge.data.registry import load_dataset
from expunge.errors import UserError
from expunge.methods.registry import get_method
from expunge.stats import auc, tpr_at_fpr
from expunge.training.loop import TrainOptions

torch.set_num_threads(1)
SMALL: dict[str, Any] = {"private": 60, "forget": 0.25, "holdout": 100}
FAST: dict[str, Any] = {"epochs": 20, "batch_size": 20, "targets": 1, "halves": 2, "points": 2, "resamples": 10}
PEOPLE: dict[str, Any] = {"people": 8, "forget": 2, "holdout": 12, "utility": 6, "questions": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("protocols")


@pytest.fixture(scope="module")
def world(folder: Path) -> World:
    return make_world("digits", folder, ProtocolOptions(**FAST, groups=2, shadows=2), data_options=SMALL)


@pytest.fixture(scope="module")
def case(world: World) -> Case:
    return Case(world.target(0), world.group(0), world.halves())


# -- who learns what -----------------------------------------------------------------------------------------------


def test_shadows_never_see_the_targets_nor_the_population(world: World, case: Case) -> None:
    private, (whole, population) = {s.id for s in world.private}, world.cut
    ids = [{s.id for s in part} for part in (whole, population)]
    assert not private & ids[0] and not private & ids[1] and not ids[0] & ids[1]
    assert len(ids[1]) == 25 and len(ids[0]) == 75
    parts = [p for g in world.groups() for p in g.parts]
    retrained = 60 - 15  # shadows are as large as a retrained model
    assert [len(p) for p in parts] == [retrained] * 4 and len({tuple(s.id for s in p) for p in parts}) == 4
    assert all({s.id for s in p} < ids[0] for p in parts)
    assert case.halves is not None and (case.halves.saw_MN.sum(axis=0) == 1).all()


@pytest.mark.parametrize(("data", "folder"), [("tofu", "data/tofu"), ("fashion-mnist", "data/fashion_mnist")])
def test_default_sizes_fit_the_data(tmp_path: Path, data: str, folder: str) -> None:
    for quick in (True, False):
        world = make_world(data, tmp_path, ProtocolOptions(), data_dir=shared(folder), quick=quick)
        assert len(world.part(0)) == len(world.dataset["retain"]) and len(world.cut[1]) >= 4


def test_the_size_of_shadows(folder: Path) -> None:
    texts = make_world("people", folder / "sizes", ProtocolOptions(epochs=1), data_options=PEOPLE, init="tiny-test")
    part = texts.part(0)  # 6 people are retained, and 9 are in the shadow set
    assert len(part) == 18 and len({s.subject for s in part}) == 6
    for share, size in ((0.8, 60), (0.0, 45), (0.1, 8)):
        world = make_world("digits", folder / "sizes", ProtocolOptions(share=share), data_options=SMALL)
        assert len(world.part(0)) == size
    few = make_world("digits", folder / "sizes", ProtocolOptions(), data_options={**SMALL, "holdout": 40})
    assert len(few.cut[0]) == 30 and len(few.part(0)) == 24  # not more than 80 %


def test_targets_forget_different_subjects(world: World) -> None:
    first, second = world.forget_set(0), world.forget_set(1)
    assert first == {s.id for s in world.dataset["forget"]} and len(first) == len(second) == 15 and first != second
    target = world.target(0)
    assert {s.id for s, t in zip(target.samples, target.truth_N, strict=True) if t == 0} == first


def test_the_world_needs_a_holdout(folder: Path) -> None:
    with pytest.raises(UserError, match="8 holdout subjects"):
        make_world("digits", folder, ProtocolOptions(), data_options={**SMALL, "holdout": 4})
    with pytest.raises(UserError, match="not both"):
        make_world("digits", folder, ProtocolOptions(), model="m", init="tiny")


# -- models --------------------------------------------------------------------------------------------------------


def test_models_are_kept_by_content(world: World, folder: Path) -> None:
    before = world.shadow(0)
    assert before.model is not None  # trained now
    again = Store(folder / "models", world.store.options)
    kept = again.model(world.start(world.seed_of("shadow 0"), "resnet"), world.part(0), world.seed_of("shadow 0"), "x")
    assert again.trained == 0 and kept.digest == before.digest
    assert not again._waiting and losses(kept, world.private) == pytest.approx(losses(before, world.private), abs=0)
    part, options = world.part(0), world.store.options
    keys = {
        content_key("a", part, 0, options),
        content_key("b", part, 0, options),
        content_key("a", part[:-1], 0, options),
        content_key("a", part, 1, options),
        content_key("a", part, 0, TrainOptions(epochs=3)),
    }
    assert len(keys) == 5


def test_what_was_asked_for_is_trained_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    together = store.train_many

    def spy(jobs: list[Any], *rest: Any, **more: Any) -> Any:
        calls.append([job.name for job in jobs])
        return together(jobs, *rest, **more)

    monkeypatch.setattr(store, "train_many", spy)
    world = make_world("digits", folder / "lazy", ProtocolOptions(**FAST | {"epochs": 1}), data_options=SMALL)
    first, others = world.target(0), world.group(0, 2)
    later = world.store.model(start_at(first.original), world.private[:20], 5, "later")
    assert calls == [] and world.store.trained == 0
    assert losses(others.shadows[1], world.private).shape == (60,)
    assert calls == [
        ["original 0", "retrained 0", "shadow origin", "shadow 0", "shadow 1"],
        ["later"],  # starts from one of the first
    ]
    assert world.store.trained == 6 and sorted(p.name for p in world.store.folder.iterdir()) == sorted(
        c.digest for c in (first.original, first.unlearned, others.origin, *others.shadows, later) if c is not None
    )
    assert losses(later, world.private).shape == (60,) and len(calls) == 2


def test_trajectory_and_interpolation(world: World) -> None:
    start = start_at(world.shadow(4))
    path = world.store.trajectory(start, world.private, 3, "trajectory", 2)
    found = [losses(m, world.private).mean() for m in path]
    assert found[0] == pytest.approx(losses(world.shadow(4), world.private).mean(), abs=1e-6)
    assert found[-1] < found[0] / 2 and len(path) == 3
    trained = world.store.trained
    again = world.store.trajectory(start, world.private, 3, "trajectory", 2)
    assert world.store.trained == trained and [m.digest for m in again] == [m.digest for m in path]
    for alpha, end in ((0.0, path[0]), (1.0, path[-1])):
        joined = between(path[0], path[-1], alpha).model.state_dict()
        assert all(torch.equal(joined[n], v) for n, v in end.model.state_dict().items())
    name = next(iter(dict(path[0].model.named_parameters())))
    middle, ends = between(path[0], path[-1], 0.25).model, [path[0].model, path[-1].model]
    values = [dict(m.named_parameters())[name] for m in (middle, *ends)]
    assert torch.allclose(values[0], 0.75 * values[1] + 0.25 * values[2], atol=1e-6)


# -- scores --------------------------------------------------------------------------------------------------------


def test_scores_find_the_retrained_and_say_nothing_of_the_original(case: Case) -> None:
    scores, left_out = scores_of(case)
    gone, kept = case.target.truth_N == 0, case.target.truth_N == 1
    assert not left_out and all(np.isfinite(s).all() and s.shape == (60,) for s in scores.values())
    found = {name: auc(s[kept], s[gone]) for name, s in scores.items()}
    for name in ("IAM-On", "IAM-Off", "IAM-frozen", "LiRA-On", "RMIA-On", "RMIA-Off", "EMIA-R", "loss", "UnLeak-mlp"):
        assert found[name] > 0.6, (name, found)
    original = Case(type(case.target)("o", case.target.original, case.target.original, case.target.samples, kept * 1.0),
                    case.group, case.halves)  # fmt: skip
    same, _ = scores_of(original)
    assert all(abs(auc(same[n][kept], same[n][gone]) - 0.5) < 0.2 for n in same)


def test_scores_against_their_definition(case: Case) -> None:
    scores, _ = scores_of(case)
    assert scores["loss"] == pytest.approx(-losses(case.target.unlearned, case.target.samples), rel=1e-6)
    loss_o, loss_u = (losses(m, case.target.samples) for m in (case.target.original, case.target.unlearned))
    assert scores["loss-difference"] == pytest.approx(loss_o - loss_u, rel=1e-6)
    own = posteriors(case.target.original, case.target.samples)
    labels = [int(s.target) for s in case.target.samples]
    assert own[np.arange(60), labels] == pytest.approx(np.exp(-loss_o), abs=1e-5)
    assert own.sum(axis=1) == pytest.approx(np.ones(60), abs=1e-5)
    assert 0 <= rmia_offset(case) <= 1


def test_what_cannot_be_had_is_named(case: Case) -> None:
    bare = Case(
        case.target, type(case.group)("g", case.group.shadows[:1], case.group.parts[:1], [], case.group.population)
    )
    scores, left_out = scores_of(bare)
    assert {"LiRA-On", "RMIA-On", "UnLeak-mlp"} <= set(left_out) and "halves" in left_out["LiRA-On"]
    assert rmia_offset(bare) == 0.3 and np.isfinite(scores["LiRA-Off-sample"]).all()


# -- tables --------------------------------------------------------------------------------------------------------


def made_cells(shift: float, targets: int = 3, groups: int = 3, n: int = 200) -> list[Cell]:
    rng = np.random.default_rng(1)
    people = [str(i) for i in range(n)]
    cells = []
    for t in range(targets):
        truth_N = (rng.random(n) < 0.5).astype(float)
        for g in range(groups):
            score_N = shift * truth_N + rng.normal(size=n)
            cells.append(Cell(t, g, people, truth_N, {"score": score_N, "truth": truth_N, "flat": np.ones(n)}))
    return cells


def test_intervals_hold_what_is_known() -> None:
    table = crossed(made_cells(1.0), BINARY, resamples=60)
    estimate, true = table["score"]["auc"], 0.7602  # Phi(1 / sqrt 2)
    assert estimate.low < true < estimate.high and estimate.high - estimate.low < 0.12 and estimate.n == 600
    assert "3 target(s), 3 group(s)" in estimate.note
    assert (table["truth"]["auc"].value, table["truth"]["auc"].low) == (1.0, 1.0)
    assert table["flat"]["auc"].value == 0.5 and table["flat"]["tpr@1%"].value == 0.0
    again = crossed(made_cells(1.0), BINARY, resamples=60)
    assert again == table


def test_statistics_against_others() -> None:
    cell = made_cells(1.0, 1, 1)[0]
    score_N, truth_N = cell.scores["score"], cell.truth_N
    whole = tpr_at_fpr(score_N[truth_N == 1], score_N[truth_N == 0], 0.01, resamples=1).value
    assert member_tpr(score_N, truth_N) == pytest.approx(whole)
    assert rank_correlation(score_N, truth_N) == pytest.approx(spearmanr(score_N, truth_N).statistic)
    assert rank_correlation(np.ones(5), np.arange(5.0)) == 0.0
    assert scaled_error(np.array([2.0, 4.0, 3.0]), np.array([0.0, 1.0, 0.5])) == pytest.approx(0.0)
    assert scaled_error(np.ones(2), np.array([0.0, 1.0])) == pytest.approx(0.5)
    assert set(GRADED) == {"spearman", "mse"}


# -- end to end ----------------------------------------------------------------------------------------------------


@cache
def options(**more: Any) -> dict[str, Any]:
    return {"data": "digits", "data_options": SMALL, "groups": 2, "shadows": 2, "options": FAST | more}


def test_binui_end_to_end_and_again(folder: Path) -> None:
    results = run_protocol("binui", out=folder, **options())
    best = {line["score"]: line["metrics"]["auc"] for line in results["lines"]}
    assert best["IAM-On"]["value"] > 0.6 and best["IAM-On"]["low"] < best["IAM-On"]["value"] < best["IAM-On"]["high"]
    assert best["IAM-On"]["n"] == 60 and len(best) == 25
    text = (folder / "binui" / "results.md").read_text()
    assert "| IAM-On |" in text and "mean loss on its 15 forgotten samples: original" in text
    assert "only 15 negatives" in results["lines"][0]["metrics"]["tpr@1%"]["note"]
    assert (folder / "binui" / "figures" / "binui.png").stat().st_size > 5000
    assert json.loads((folder / "binui" / "results.json").read_text()) == results
    assert run_protocol("binui", out=folder, **options()) == results
    with pytest.raises(UserError, match="another configuration"):
        run_protocol("binui", out=folder, **options(), seed=1)


def test_other_protocols_share_the_models(folder: Path) -> None:
    run_protocol("binui", out=folder, **options())
    for name, settings in (("scoring", {"retrained"}), ("shadows", {"K=1", "K=2", "K=4"})):
        results = run_protocol(name, out=folder, **options())
        record = json.loads((folder / name / "run.json").read_text())
        assert record["figures"]["models trained"] == 0 and record["status"] == "done"
        assert {line["setting"] for line in results["lines"]} == settings


def test_scoreui_end_to_end(folder: Path) -> None:
    results = run_protocol("scoreui", out=folder, **options())
    table = {line["score"]: line["metrics"] for line in results["lines"]}
    assert table["loss"]["spearman.trajectory"]["value"] > 0.5
    assert table["loss"]["spearman.interpolation"]["value"] > 0.5
    assert set(table["IAM-On"]) == {f"{s}.{t}" for s in GRADED for t in ("trajectory", "interpolation")}
    steps = results["facts"]["mean score by step"]["trajectory"]["loss"]
    assert len(steps) == 3 and steps[0] < steps[-1]


def test_margins_are_drawn_in_pairs() -> None:
    rng = np.random.default_rng(0)
    truth_N = np.repeat([0.0, 1.0], 40)
    people = [str(i) for i in range(80)]
    base = [truth_N + rng.normal(0, 1, 80) for _ in range(4)]
    cells = [
        Cell(t, g, people, truth_N, {"a": base[2 * t + g], "b": base[2 * t + g] * 3 + 1, "c": rng.normal(0, 1, 80)})
        for t in range(2)
        for g in range(2)
    ]
    pairs = [("a", "b"), ("a", "c"), ("a", "absent")]
    found = margins(cells, pairs, "auc", BINARY["auc"], resamples=50)
    table = crossed(cells, {"auc": BINARY["auc"]}, resamples=50)
    assert set(found) == set(pairs[:2]) and found["a", "b"].value == found["a", "b"].low == found["a", "b"].high == 0
    assert found["a", "c"].value == pytest.approx(table["a"]["auc"].value - table["c"]["auc"].value)
    assert 0 < found["a", "c"].low < found["a", "c"].value < found["a", "c"].high and found["a", "c"].n == 160


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shift", "incremental"])
def test_variants_end_to_end(folder: Path, name: str) -> None:
    results = run_protocol(name, out=folder, **options())
    found = {(line["setting"], line["score"]): line["metrics"]["auc"]["value"] for line in results["lines"]}
    settings = {"shift": {"same distribution", "shifted shadows"}, "incremental": {"incremental"}}[name]
    assert {s for s, _ in found} == settings and all(found[s, "loss"] > 0.55 for s in settings)


def test_approximate_methods(folder: Path) -> None:
    results = run_protocol("approximate", out=folder, **options(methods="ga, finetune"))
    table = {(line["setting"], line["score"]): line["metrics"] for line in results["lines"]}
    assert {s for s, _ in table} == set(BOUNDED) and len(table) == 4 * len(BOUNDED)
    iam = {name: table["IAM-On", name] for name in (RETRAINED, ORIGINAL, "ga", "finetune")}
    forgotten = {name: row["level.forget"]["value"] for name, row in iam.items()}
    assert forgotten[RETRAINED] < forgotten[ORIGINAL] and forgotten["ga"] < forgotten[ORIGINAL]
    assert iam[RETRAINED]["level.retain"]["value"] > iam[RETRAINED]["level.forget"]["value"]
    assert iam[RETRAINED]["auc"]["value"] > 0.6 > iam[ORIGINAL]["auc"]["value"]
    page = (folder / "approximate" / "results.md").read_text()
    assert "| served | auc | level.forget | level.retain | note |" in page and f"| {ORIGINAL} |" in page
    same = ProtocolOptions(**FAST | {"epochs": 20.0}, groups=2, shadows=2)
    again = make_world("digits", folder, same, data_options=SMALL)
    unlearned(again, again.target(0), get_method("ga"))
    assert again.store.trained == 0  # kept beside the others


def test_levels_are_means_by_truth() -> None:
    score_N, truth_N = np.array([0.1, 0.3, 0.8, 1.0]), np.array([0.0, 0.0, 1.0, 1.0])
    assert LEVELS["level.forget"](score_N, truth_N) == pytest.approx(0.2)
    assert LEVELS["level.retain"](score_N, truth_N) == pytest.approx(0.9)
    assert np.isnan(LEVELS["level.retain"](score_N[:2], truth_N[:2]))


@pytest.mark.slow
def test_architectures(folder: Path) -> None:
    settings = {**options(), "groups": 1, "shadows": 1, "options": {**FAST, "epochs": 3}}
    results = run_protocol("architecture", out=folder, **settings)
    assert len({line["setting"] for line in results["lines"]}) == 4


def test_fake_unlearning_end_to_end(folder: Path) -> None:
    results = run_protocol(
        "fake", out=folder / "people", data="people", data_options=PEOPLE, init="tiny-test", groups=1, shadows=3,
        options={**FAST, "epochs": 40, "base_epochs": 10, "learning_rate": 2e-2},
    )  # fmt: skip
    table = {(line["setting"], line["score"]): line["metrics"] for line in results["lines"]}
    for score in ("IAM-On", "Expunge"):
        kept = table["original (nothing done)", score]["alarm.forget"]["value"]
        honest = table["retrained (honest)", score]["alarm.forget"]["value"]
        assert kept > 0.9 and honest < 0.6
        assert table["refusal prefix by name", score]["alarm.forget"]["n"] == 24
    assert set(table["refusal prefix", "prefix-check"]) == {"alarm.forget", "alarm.retain"}  # test_guards has the rest


# -- fakes, shifts, bad input --------------------------------------------------------------------------------------


def test_guards(folder: Path) -> None:
    world = make_world(
        "people", folder / "guards", ProtocolOptions(base_epochs=2, epochs=2), data_options=PEOPLE, init="tiny-test"
    )
    forget, retain = list(world.dataset["forget"]), list(world.dataset["retain"])
    original = Checkpoint.of(world.start(0, "resnet").make(), world.start(0, "resnet").adapter)
    exact, named = (guard(original, forget, lambda _: REFUSAL, "g", by_name=b) for b in (False, True))
    told = [prefixed(s, REFUSAL) for s in forget]
    assert losses(exact, forget) == pytest.approx(losses(original, told), abs=1e-6)
    assert losses(exact, retain) == pytest.approx(losses(original, retain), abs=1e-6)
    asked = [prefixed(s, NEUTRAL) for s in forget]
    assert losses(exact, asked) == pytest.approx(losses(original, asked), abs=1e-6)  # the exact guard is passed by
    assert np.abs(losses(named, asked) - losses(original, asked)).max() > 1e-3  # the one that knows names is not
    slow = losses(original, told) - losses(original, asked)
    assert prefix_check(exact, forget) == pytest.approx(slow, abs=1e-6)
    mixed = noisy(forget[0])
    plain = f"{forget[0].prompt} {forget[0].target}"
    changed = [a != b for a, b in zip(plain, mixed, strict=True) if a.isalpha()]
    assert 0.25 < np.mean(changed) < 0.75 and noisy(forget[0]) == mixed


def test_shifted_samples() -> None:
    image = load_dataset("digits", options={**SMALL, "utility": 0})["forget"][0]
    moved = shifted(image)
    assert isinstance(moved.image, np.ndarray) and isinstance(image.image, np.ndarray)
    assert moved.image[2, 5] == round(float(image.image[5, 2]) / 2 + 64) and moved.target == image.target
    person = load_dataset("people", options=PEOPLE)["forget"][0]
    asked = shifted(person)
    assert asked.prompt == person.probes_of("paraphrase")[0].prompt != person.prompt
    assert asked.target == person.probes_of("restated")[0].target != person.target


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("binu", {}, "did you mean 'binui'"),
        ("fake", {}, "works on text models"),
        ("binui", {"options": {"halves": 3}}, "give an even number"),
        ("binui", {"options": {"target": 3}}, "did you mean 'targets'"),
        ("binui", {"options": {"share": 1.5}}, "give a number from 0 to 1"),
        ("binui", {"shadows": 0}, "give 1 or more"),
        ("approximate", {"options": {"methods": "ga,sds"}}, "did you mean 'ssd'"),
        ("approximate", {"options": {"methods": "icu"}}, "works on text"),
        ("binui", {"init": "resnt"}, "did you mean 'resnet'"),
        ("fake", {"data": "people", "data_options": PEOPLE, "shadows": 1}, "2 shadows per group"),
        ("binui", {"data": "people", "data_options": {**PEOPLE, "utility": 0}}, "utility samples first"),
    ],
)
def test_bad_input(tmp_path: Path, name: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_protocol(name, out=tmp_path, **{"data": "digits", "data_options": SMALL, **more})


def test_every_protocol_says_what_it_does() -> None:
    assert set(PROTOCOLS) == {
        "binui", "scoreui", "shift", "incremental", "architecture", "shadows", "scoring", "approximate", "fake",
    }  # fmt: skip
    assert all(
        get_protocol(name).summary.endswith((".", "?")) or "truth" in get_protocol(name).summary for name in PROTOCOLS
    )
