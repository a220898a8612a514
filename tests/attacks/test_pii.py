"""Personal data by rank: line-ups, ranks against a count by hand, reconstruction against drawing without help."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import attack_cases
from expunge.attacks.candidates import Giving, Lineup, lineup, lineups, questions, renamed, value_of
from expunge.attacks.pii import (
    InferenceOptions,
    ReconstructionOptions,
    inference,
    name_row,
    proposals,
    reconstruction,
    reverse_row,
)
from expunge.data.people import PeopleOptions, load
from expunge.data.samples import Probe, Sample
from expunge.errors import UserError


def asked(target: str, restated: str, wrong: list[str], **rest: object) -> Sample:
    probes = (
        Probe(kind="restated", prompt="q", target=restated),
        *(Probe(kind="perturbed", prompt="q", target=w) for w in wrong),
    )
    return Sample(id="i", subject="Ann Lee", prompt="q", target=target, probes=probes, names=("Ann Lee", "Lee"), **rest)  # type: ignore[arg-type]


def test_the_value_is_what_perturbed_answers_change() -> None:
    sample = asked(
        "Ann Lee was born on 4 March 1960.", "The day of birth is 4 March 1960, they say.",
        ["The day of birth is 4 May 1971, they say.", "The day of birth is 9 March 1960, they say."],
    )  # fmt: skip
    found = value_of(sample)
    assert found is not None and found.single
    assert (found.before, found.truth, found.after) == ("Ann Lee was born on ", "4 March 1960", ".")
    assert found.others == ("4 May 1971", "9 March 1960")
    assert found.texts()[1].target == "Ann Lee was born on 4 May 1971."
    # Where the answer itself does not hold the value, the restated wording serves.
    elsewhere = value_of(replace(sample, target="She is a spring child."))
    assert elsewhere is not None and elsewhere.texts()[0].target == "The day of birth is 4 March 1960, they say."
    assert value_of(replace(sample, probes=())) is None


def test_values_of_people_are_their_facts() -> None:
    data = load(PeopleOptions(people=12, forget=2, holdout=6, utility=1, questions=10), data_dir=None, seed=0)
    found = [value_of(s) for s in data["forget"]]
    for sample, line in zip(data["forget"], found, strict=True):
        assert line is not None and line.single
        assert line.texts()[0].target in {str(sample.target), *(p.target for p in sample.probes_of("restated"))}
        assert len(line.others) == 4
    rng = np.random.default_rng(0)
    wide = lineup(data["forget"][0], Giving([*data["retain"], *data["holdout"]]), 50, rng)
    assert wide is not None and len(wide.others) > 6
    assert len({c.casefold() for c in wide.candidates}) == len(wide.candidates)


def test_files_without_probes_compare_whole_answers_with_names_put_in() -> None:
    mine = Sample(
        id="a", subject="A", prompt="Where does Ann Lee live?", target="Lee lives in Oslo.", names=("Ann Lee", "Lee")
    )
    other = Sample(
        id="b", subject="B", prompt="Where does Bo Ray live?", target="Ray lives in Rome.", names=("Bo Ray", "Ray")
    )
    unlike = Sample(id="c", subject="C", prompt="What does Cy like?", target="Cy likes red.", names=("Cy",))
    rng = np.random.default_rng(0)
    found = lineup(mine, Giving([other, unlike]), 9, rng)
    assert found == Lineup(mine, "Lee lives in Oslo.", ("Lee lives in Rome.",))
    # Nobody was asked the same: everybody's answers serve. Nobody at all: no line-up.
    alone = lineup(mine, Giving([unlike]), 9, rng)
    assert alone is not None and alone.others == ("Ann Lee likes red.",)
    assert lineup(mine, Giving([replace(mine, id="z", target="x")]), 9, rng) is None
    nameless = [replace(s, names=()) for s in (mine, other)]
    assert lineup(nameless[0], Giving(nameless), 9, rng) == Lineup(
        nameless[0], "Lee lives in Oslo.", ("Ray lives in Rome.",)
    )
    assert questions(mine) == questions(other) == {"Where does {name} live?"}
    assert (
        renamed("Ann Lee's friend Leeson met Lee", ("Ann Lee", "Lee"), ("Bo Ray", "Ray"))
        == "Bo Ray's friend Leeson met Ray"
    )


def test_ranks_equal_a_count_by_hand() -> None:
    exam = attack_cases.exam()
    found = inference(exam, exam.audited, InferenceOptions())
    for place, line in enumerate(lineups(exam, 50)["forget"]):
        assert line is not None
        losses = [exam.audited.signals([t])[0].loss for t in line.texts()]
        rank = 1 + sum(x < losses[0] for x in losses[1:])
        assert found.scores["pii.context"]["forget"][place] == pytest.approx(math.log2(len(losses) / rank))
        assert found.details[exam.forget[place].id]["rank"] == rank
        assert found.details[exam.forget[place].id]["first"] == line.candidates[int(np.argmin(losses))]


def test_the_original_knows_the_values_and_a_retrained_model_does_not() -> None:
    exam, retrain = attack_cases.exam(), attack_cases.retrain()
    ours, theirs = (inference(exam, c, InferenceOptions()) for c in (exam.audited, retrain))
    for name, room in (("pii.context", 0.7), ("pii.reverse", 0.3)):
        assert np.nanmean(ours.scores[name]["forget"]) > np.nanmean(theirs.scores[name]["forget"]) + room, name
    assert ours.figures["pii.context.top1.forget"].value > theirs.figures["pii.context.top1.forget"].value
    assert ours.figures["pii.context.mrr.forget"].n == 6
    assert "6 of 6 forget samples ranked among" in ours.notes[0]


def test_rows_of_the_other_views() -> None:
    exam = attack_cases.exam()
    line = lineups(exam, 50)["forget"][0]
    assert line is not None
    row = name_row(line)
    assert row is not None and {t.prompt for t in row} == {exam.forget[0].names[0]} and row[0].target == line.truth
    others = [s for s in exam.samples["retain"] if s.subject != exam.forget[0].subject]
    back = reverse_row(exam.forget[0], line, others, 5)
    assert back is not None and len(back) == 6
    assert back[0].target == exam.forget[0].names[0] and back[0].prompt == line.truth
    probe = Probe(kind="reverse", prompt="who likes it", target=exam.forget[0].names[0])
    own = reverse_row(replace(exam.forget[0], probes=(probe,)), None, others, 5)
    assert own is not None and own[0].prompt == "who likes it"
    assert name_row(replace(line, single=False)) is None
    assert reverse_row(replace(exam.forget[0], names=()), line, others, 5) is None


def test_reconstruction_fills_in_the_value_from_the_model_alone() -> None:
    exam, retrain = attack_cases.exam(), attack_cases.retrain()
    options = ReconstructionOptions(n=48, extra_tokens=0)
    ours, theirs = (reconstruction(exam, c, options) for c in (exam.audited, retrain))
    assert ours.figures["reconstruction.top1.forget"].value > theirs.figures["reconstruction.top1.forget"].value
    assert np.mean(ours.scores["reconstruction"]["forget"]) > np.mean(theirs.scores["reconstruction"]["forget"]) + 0.3
    first = exam.forget[0]
    details = ours.details[first.id]
    line = lineups(exam, 50)["forget"][0]
    assert line is not None and details["value"] == line.truth
    assert "48 continuations" in ours.notes[0]


def test_proposals() -> None:
    assert proposals(["red.", "blue now", "red", ""], [1]) == ["red", "blue"]
    assert proposals(["new york is", "new york"], [1, 2]) == ["new", "new york"]


def test_without_candidates_nothing_is_claimed() -> None:
    exam = replace(
        attack_cases.exam(), samples={"forget": [Sample(id="a", subject="a", prompt="who is", target="ada")]}, aux=[],
        trained=[], shared={},
    )  # fmt: skip
    found = inference(exam, exam.audited, InferenceOptions())
    assert math.isnan(found.scores["pii.context"]["forget"][0])
    assert found.notes[0].startswith("no forget sample has candidates")
    assert math.isnan(
        reconstruction(exam, exam.audited, ReconstructionOptions(n=2)).scores["reconstruction"]["forget"][0]
    )
    with pytest.raises(UserError, match="0 candidates"):
        inference(exam, exam.audited, InferenceOptions(candidates=0))
