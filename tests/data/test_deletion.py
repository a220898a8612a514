from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.data.deletion import by_kind, by_sample, by_size, by_subject, by_wishes, sequence
from expunge.data.registry import load_dataset
from expunge.data.samples import Dataset, Sample, subjects
from expunge.errors import UserError

DATA = load_dataset(
    "people", options={"people": 12, "forget": 5, "holdout": 3, "utility": 2, "questions": 4, "perturbed": 3}
)
TOTAL = 48


def ids(samples: tuple[Sample, ...]) -> set[str]:
    return {sample.id for sample in samples}


def sound(data: Dataset) -> bool:
    """The private samples are the same, and each stands in exactly one of the two roles."""
    same = ids(data.private) == ids(DATA.private) and len(data.private) == TOTAL
    return same and data["holdout"] == DATA["holdout"] and data["utility"] == DATA["utility"]


@given(st.integers(1, 11), st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_by_subject_takes_whole_subjects_and_nests(n: int, seed: int) -> None:
    less, more = by_subject(DATA, n, seed), by_subject(DATA, n + 1, seed)
    assert sound(less) and len(subjects(less["forget"])) == n
    assert not set(subjects(less["forget"])) & set(subjects(less["retain"]))
    assert ids(less["forget"]) < ids(more["forget"])
    assert by_subject(DATA, n, seed).digest() == less.digest()


@given(st.integers(1, TOTAL - 1), st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_sizes_are_exact_and_nested(n: int, seed: int) -> None:
    for choose in (by_size, by_sample):
        less, more = choose(DATA, n, seed), choose(DATA, n + 1, seed)
        assert sound(less) and len(less["forget"]) == n and len(more["forget"]) == n + 1
        assert ids(less["forget"]) < ids(more["forget"])


def test_by_size_takes_subjects_one_after_another() -> None:
    assert ids(by_size(DATA, 12, 4)["forget"]) == ids(by_subject(DATA, 3, 4)["forget"])
    assert len(subjects(by_size(DATA, 13, 4)["forget"])) == 4
    assert len(subjects(by_sample(DATA, 12, 4)["forget"])) > 3


def test_by_name_and_id() -> None:
    wanted = DATA["retain"][0]
    assert subjects(by_subject(DATA, [wanted.subject])["forget"]) == [wanted.subject]
    assert subjects(by_subject(DATA, wanted.subject)["forget"]) == [wanted.subject]
    assert by_sample(DATA, [wanted.id])["forget"] == (wanted,)


@given(st.integers(1, 5), st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_sequence_covers_the_forget_set_once(k: int, seed: int) -> None:
    requests = sequence(DATA, k, seed)
    assert len(requests) == k
    asked = [sample.id for request in requests for sample in request["forget"]]
    assert sorted(asked) == sorted(ids(DATA["forget"]))
    gone: set[str] = set()
    for request in requests:
        gone |= ids(request["forget"])
        assert ids(request["retain"]) == ids(DATA.private) - gone
    assert ids(requests[-1]["retain"]) == ids(DATA["retain"])
    sizes = [len(subjects(request["forget"])) for request in requests]
    assert max(sizes) - min(sizes) <= 1


def test_sequence_of_one_subject_goes_by_sample() -> None:
    one = by_subject(DATA, 1)
    assert [len(request["forget"]) for request in sequence(one, 4)] == [1, 1, 1, 1]


def test_refusals() -> None:
    for n in (0, -1, 13):
        with pytest.raises(UserError, match="1 to 12"):
            by_subject(DATA, n)
    for n in (0, TOTAL + 1):
        with pytest.raises(UserError, match="1 to 48"):
            by_size(DATA, n)
        with pytest.raises(UserError, match="1 to 48"):
            by_sample(DATA, n)
    for k in (0, 6):
        with pytest.raises(UserError, match="1 to 5"):
            sequence(DATA, k)
    with pytest.raises(UserError, match="at least one"):
        by_subject(DATA, [])
    name = DATA["retain"][0].subject
    with pytest.raises(UserError, match=f"did you mean '{name}'"):
        by_subject(DATA, [name + "x"])
    with pytest.raises(UserError, match="unknown sample"):
        by_sample(DATA, ["nobody"])
    with pytest.raises(UserError, match="unknown subject"):  # holdout people were never trained on
        by_subject(DATA, [DATA["holdout"][0].subject])


def test_wishes_of_the_command_line() -> None:
    dataset = load_dataset("people", options={"people": 6, "forget": 1, "holdout": 2, "utility": 0, "questions": 3})
    person = dataset["retain"][0].subject
    named = by_wishes(dataset, [f"subject={person}"])
    assert {s.subject for s in named["forget"]} == {person} and len(named.private) == len(dataset.private)
    ids = [s.id for s in dataset["retain"][:2]]
    assert [s.id for s in by_wishes(dataset, [f"sample={i}" for i in ids])["forget"]] == ids
    assert len({s.subject for s in by_wishes(dataset, ["subjects=2"])["forget"]}) == 2
    assert len(by_wishes(dataset, ["samples=4"])["forget"]) == 4
    assert by_wishes(dataset, []) is dataset


@pytest.mark.parametrize("wishes", [["who=Ada"], ["subject="], ["subjects=2", "samples=1"], ["samples=many"], ["x"]])
def test_wishes_that_cannot_be_read(wishes: list[str]) -> None:
    dataset = load_dataset("people", options={"people": 4, "forget": 1, "holdout": 2, "utility": 0, "questions": 2})
    with pytest.raises(UserError, match="--delete"):
        by_wishes(dataset, wishes)


def test_only_the_images_or_only_the_texts_of_a_person() -> None:
    sizes = {"people": 4, "forget": 1, "holdout": 1, "utility": 0, "questions": 2, "portraits": 2, "size": 16}
    both = load_dataset("people-portraits", options=sizes)
    person = both["forget"][0].subject
    for wish, has_image in (("only=image", True), ("only=text", False)):
        cut = by_wishes(both, [wish])
        assert {s.image is not None for s in cut["forget"]} == {has_image}
        # The person's other samples stay: they are retained, and nothing is lost.
        assert {s.image is not None for s in cut["retain"] if s.subject == person} == {not has_image}
        assert ids(cut.private) == ids(both.private)
    other = both["retain"][0].subject
    chosen = by_wishes(both, [f"subject={other}", "only=text"])["forget"]
    assert chosen and all(s.subject == other and s.image is None for s in chosen)
    with pytest.raises(UserError, match="kind of sample 'sound'"):
        by_kind(both, "sound")
    with pytest.raises(UserError, match="no forget sample of 'people' comes with an image"):
        by_wishes(DATA, ["only=image"])
