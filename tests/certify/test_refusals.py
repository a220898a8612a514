"""What must be refused is refused, at every level that it touches: rule by rule, and on real tiny models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attack_cases import adapter, audited, blank_copy, exam, retrain
from claim_cases import CLEAR, SEARCH, A, B, C, D, edit, removal, residual, score, staying, zone
from expunge.attacks.exam import Checkpoint
from expunge.bench.examine import examine, plan
from expunge.certify.gather import Evidence, Losses, Verdicts
from expunge.certify.levels import assess
from expunge.certify.refusals import EVIDENCE_LEVELS, FORMAL, LEVELS, RULES, find
from expunge.certify.sections import PrivateTraining, Reset, Sections
from expunge.runs import Run


def verdicts(evidence: Evidence) -> dict[str, str]:
    return {claim.level: claim.judged().verdict for claim in assess(evidence)}


def names(evidence: Evidence) -> set[str]:
    return {refusal.name for refusal in find(evidence)}


def test_what_did_everything_right_stands() -> None:
    assert verdicts(edit()) == dict.fromkeys(FORMAL, "unsupported") | dict.fromkeys(EVIDENCE_LEVELS, "certified")
    assert names(edit()) == {"edited", "no-provenance", "no-duplicate-search"}
    found = verdicts(zone())
    assert {found["L0"], found["L1"]} == {"certified"} and names(zone()) == {"utility-unknown"}


def test_an_edit_never_gets_l0_or_l1_whatever_it_brings() -> None:
    """Every formal section, all perfect, and still no claim; and nothing that could refute the rest."""
    sections = edit().sections.model_copy(
        update={"removal": removal(), "provenance": CLEAR, "duplicates": SEARCH, "residual": residual()}
    )
    for kind in ("edit", "unknown"):
        found = verdicts(edit(kind=kind, sections=sections))
        assert {found["L0"], found["L1"]} == {"unsupported"} and found["L2"] == "certified"
    said = assess(edit(sections=sections))[0].said()
    assert said.startswith("No claim at L0") and "weights of a trained model were edited" in said


SPOILED: list[tuple[str, Callable[[], Evidence], tuple[str, ...]]] = [
    ("identity", lambda: edit(after=A), EVIDENCE_LEVELS),
    ("identity", lambda: edit(parameters_changed=0), EVIDENCE_LEVELS),
    ("identity", lambda: edit(losses=Losses(0.1, 0.1, 0.0, (2.0,))), EVIDENCE_LEVELS),
    ("identity", lambda: edit(losses=Losses(0.11, 0.1, 0.01, (2.0,))), EVIDENCE_LEVELS),
    ("identity", lambda: zone(removal=removal(before=C)), LEVELS),
    ("utility-lost", lambda: edit(staying=(staying(-3.0),)), EVIDENCE_LEVELS),
    ("over-unlearned", lambda: edit(verdicts=Verdicts(0, 20, 20)), EVIDENCE_LEVELS),
    ("over-unlearned", lambda: edit(losses=Losses(9.0, 0.1, 8.9, (2.0, 2.5))), EVIDENCE_LEVELS),
    ("under-unlearned", lambda: edit(verdicts=Verdicts(20, 20, 0)), EVIDENCE_LEVELS),
    ("under-unlearned", lambda: edit(losses=Losses(0.5, 0.1, 0.4, (2.0, 2.5))), EVIDENCE_LEVELS),
    ("wrong-records", lambda: zone(removal=removal(removed=(B, C))), LEVELS),
    ("wrong-records", lambda: zone(removal=removal(removed=(A, B, C))), LEVELS),
    ("wrong-records", lambda: zone(removal=removal(requested=())), LEVELS),
    ("other-artefact", lambda: replace(zone(), zone_digest=A), FORMAL),
    ("other-artefact", lambda: replace(zone(), after=C), FORMAL),
    ("other-artefact", lambda: zone(residual=residual(artefact=D)), FORMAL),
    ("private-statistics", lambda: zone(removal=removal(statistics="private")), FORMAL),
    ("batched-rows", lambda: zone(removal=removal(rows="batched")), FORMAL),
    ("base-changed", lambda: zone(removal=removal(base_after=A)), FORMAL),
    ("base-saw-records", lambda: zone(provenance=CLEAR.model_copy(update={"finding": "saw"})), FORMAL),
    ("near-duplicates", lambda: zone(duplicates=SEARCH.model_copy(update={"pairs": 5, "open": 5})), FORMAL),
    ("not-converged", lambda: zone(residual=residual(residual=6.8e-4)), ("L1",)),
    ("other-bytes", lambda: private(replayed=A), ("L1",)),
    ("other-bytes", lambda: reset(replayed=A), ("L1",)),
    ("other-artefact", lambda: private(artefact=A, replayed=A), ("L1",)),
    ("hidden-only", lambda: edit(removes_from_weights=False), ("L5",)),
]


@pytest.mark.parametrize(("name", "build", "levels"), SPOILED, ids=[f"{i}-{s[0]}" for i, s in enumerate(SPOILED)])
def test_each_mistake_is_refuted_where_it_touches(
    name: str, build: Callable[[], Evidence], levels: tuple[str, ...]
) -> None:
    evidence = build()
    found = verdicts(evidence)
    assert name in names(evidence)
    assert {found[level] for level in levels} == {"refuted"}
    assert "certified" not in {found[level] for level in levels}


def repeated(section: PrivateTraining) -> PrivateTraining:
    return section.model_copy(update={"replayed": section.artefact})


def zone_unfinished() -> Evidence:
    return replace(zone(), finished=False)


RESET = Reset(artefact=residual().artefact, radius=1.0, clip=0.5, learning_rate=0.1, decay=1.0, steps=400, noise=2.0)
TRAINED = PrivateTraining(artefact=residual().artefact, mu=0.1, group=2, clipped=True)


def private(**changes: Any) -> Evidence:
    """A privately trained model that was trained again with the same bytes: L1 stands, on the original itself."""
    given = {"artefact": B, "replayed": B, "mu": 0.1, "group": 2, "hides": 3, "clipped": True}
    section = PrivateTraining(**(given | changes))  # type: ignore[arg-type]
    sections = Sections(private_training=section, provenance=CLEAR, duplicates=SEARCH)
    return Evidence(kind="private", method="private", before=B, after=B, sections=sections)


def reset(**changes: Any) -> Evidence:
    section = RESET.model_copy(update={"artefact": B, "replayed": B} | changes)
    sections = Sections(reset=section, provenance=CLEAR, duplicates=SEARCH)
    return Evidence(kind="reset", method="reset", before=A, after=B, sections=sections)


DOUBTFUL: list[tuple[str, Callable[[], Evidence], tuple[str, ...]]] = [
    ("unfinished", lambda: edit(finished=False), LEVELS),
    ("unfinished", zone_unfinished, LEVELS),
    ("unbound", lambda: replace(zone(residual=None), zone_digest=None), FORMAL),
    ("unbound", lambda: zone(provenance=CLEAR.model_copy(update={"artefact": ""})), FORMAL),
    ("unbound", lambda: zone(residual=residual(artefact=None)), FORMAL),
    ("statistics-unknown", lambda: zone(removal=removal(statistics="unknown")), FORMAL),
    ("no-provenance", lambda: zone(provenance=None), FORMAL),
    ("no-provenance", lambda: zone(provenance=CLEAR.model_copy(update={"finding": "unknown"})), FORMAL),
    ("no-duplicate-search", lambda: zone(duplicates=None), FORMAL),
    ("utility-unknown", lambda: edit(staying=(), sections=Sections()), EVIDENCE_LEVELS),
    ("unfit-split", lambda: edit(split_unfit=True), ("L4",)),
    ("brought-in", lambda: zone(residual=None, reset=RESET), ("L1",)),
    ("brought-in", lambda: zone(residual=None, private_training=TRAINED), ("L1",)),
    ("brought-in", lambda: zone(residual=None, private_training=repeated(TRAINED)), ("L1",)),
    ("brought-in", lambda: private(replayed=None), FORMAL),
    ("brought-in", lambda: reset(replayed=None), FORMAL),
    ("brought-in", lambda: replace(private(), kind="reset", before=A), FORMAL),
    ("brought-in", lambda: replace(reset(), kind="private"), FORMAL),
    ("brought-in", lambda: replace(zone(), kind="private"), FORMAL),
]


@pytest.mark.parametrize(("name", "build", "levels"), DOUBTFUL, ids=[f"{i}-{s[0]}" for i, s in enumerate(DOUBTFUL)])
def test_each_gap_leaves_the_claim_open(name: str, build: Callable[[], Evidence], levels: tuple[str, ...]) -> None:
    evidence = build()
    found = verdicts(evidence)
    assert name in names(evidence) and {found[level] for level in levels} == {"unsupported"}


def test_what_was_made_with_noise_and_made_again_gets_l1_and_never_l0() -> None:
    for evidence in (private(), reset()):
        found = verdicts(evidence)
        assert found["L1"] == "certified" and found["L0"] == "unsupported" and names(evidence) == {"utility-unknown"}
        exact = evidence.sections.model_copy(update={"removal": removal(after=B, rebuilt=B)})
        assert verdicts(replace(evidence, sections=exact))["L0"] == "unsupported"
    assert "nothing was removed, noise on clipped gradients hid them from the start" in assess(private())[1].said()
    assert "noise drowned what was learnt" in assess(reset())[1].said()
    few = assess(private(group=4))[1]
    assert few.judged().verdict == "unsupported" and "promised to hide 3 record(s), and 4 are" in few.said()


def test_the_same_figures_are_nothing_for_an_edit() -> None:
    for kind in ("edit", "unknown"):
        for evidence in (private(), reset()):
            found = verdicts(replace(evidence, kind=kind, before=A))
            assert {found["L0"], found["L1"]} == {"unsupported"}


def test_a_private_original_is_not_held_against_itself() -> None:
    """The distance from an original to itself is 0 whatever was learnt; one to another original still counts."""
    near = replace(private(), losses=Losses(0.1, 0.1, 0.0, (2.0,)))
    assert names(near) == {"utility-unknown"} and verdicts(near)["L1"] == "certified"
    assert "under-unlearned" in names(replace(near, before=A))


def test_every_rule_is_covered_here() -> None:
    assert {rule[0] for rule in RULES} - {"edited"} == {s[0] for s in (*SPOILED, *DOUBTFUL)}


def test_flags_reach_the_reader_of_an_edit() -> None:
    sections = edit().sections.model_copy(update={"duplicates": SEARCH.model_copy(update={"pairs": 1, "open": 1})})
    for claim in assess(edit(sections=sections))[2:]:
        assert claim.judged().verdict == "certified"
        assert any("near-duplicate" in text for text in claim.record()["not_claimed"])


def test_a_zone_never_put_the_data_into_weights() -> None:
    assert names(replace(zone(), removes_from_weights=False)) == names(zone())


def test_few_calls_are_what_the_error_rate_explains() -> None:
    assert "over-unlearned" not in names(edit(verdicts=Verdicts(1, 38, 1)))
    assert "utility-lost" not in names(edit(staying=(staying(-1.2),)))


# -- real models -------------------------------------------------------------------------------------------------------


def over_forgotten() -> Checkpoint:
    """Ascent on what is to be forgotten, with what stays held in place: utility is fine, the losses are absurd."""
    given = exam()
    assert given.original is not None
    model = copy.deepcopy(given.original.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    kept = [*given.samples["retain"], *given.trained]
    for _ in range(80):
        lost = adapter().positions(model, list(given.samples["forget"])).log_prob_N().mean()
        held = -adapter().positions(model, kept).log_prob_N().mean()
        (lost.clamp(min=-40) + 8 * held).backward()
        optimizer.step()
        optimizer.zero_grad()
    return Checkpoint.of(model.eval(), adapter(), "audited")


def audit(folder: Path, checkpoint: Checkpoint | None) -> Evidence:
    """A real audit of the checkpoint (None: of the original itself), written to disk and read back."""
    given = exam() if checkpoint is None else audited(checkpoint)
    with Run.open(folder / "run", "audit", {"model": "m"}) as run:
        examine(given, plan(given, "quick", [("loss", {}), ("min_k", {}), ("quantization", {})]), run)
        run.finish()
    return Evidence.of_run(folder / "run")


@pytest.mark.parametrize(
    ("build", "name"),
    [(lambda: None, "identity"), (blank_copy, "utility-lost"), (over_forgotten, "over-unlearned")],
    ids=["identity", "random", "over-forgotten"],
)
def test_real_models_that_must_be_refused_at_every_level(
    tmp_path: Path, build: Callable[[], Checkpoint | None], name: str
) -> None:
    evidence = audit(tmp_path, build())
    assert name in names(evidence)
    found = verdicts(evidence)
    assert {found[level] for level in EVIDENCE_LEVELS} == {"refuted"}
    assert {found[level] for level in FORMAL} == {"unsupported"}


def test_an_exact_retrain_is_not_refused(tmp_path: Path) -> None:
    """Six samples are too few to certify an audit, and nothing may be held against the model."""
    evidence = audit(tmp_path, retrain())
    assert "refuted" not in verdicts(evidence).values()
    assert names(evidence) == {"edited", "no-provenance", "no-duplicate-search"}
    assert "too few samples" in assess(evidence)[4].said()


def test_scores_against_the_same_model_are_not_misread(tmp_path: Path) -> None:
    evidence: Any = audit(tmp_path, retrain())
    assert evidence.references == 1 and len(evidence.losses.never) == 3
    assert {s.attack for s in evidence.scores} == {"loss", "min_k", "quantization"}
    assert {k.name for k in evidence.staying} >= {"kept.retain"} and score().attack == "loss"
