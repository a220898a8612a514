"""Near-duplicates: MinHash against exact Jaccard, the search against a slow double loop, and planted copies."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from expunge.data.duplicates import (
    DuplicateOptions,
    estimated_jaccard,
    jaccard,
    minhash,
    near_duplicates,
    shingles,
    words,
)
from expunge.data.registry import load_dataset
from expunge.data.samples import Sample
from expunge.errors import UserError

VOCABULARY = [f"word{i}" for i in range(400)]


def text(rng: random.Random, length: int) -> str:
    return " ".join(rng.choices(VOCABULARY, k=length))


def sample(identity: str, target: str, prompt: str = "", subject: str = "", names: tuple[str, ...] = ()) -> Sample:
    return Sample(id=identity, subject=subject or identity, target=target, prompt=prompt, names=names)


def kinds(forget: Sample, kept: Sample) -> list[str]:
    return [p.kind for p in near_duplicates([forget], [kept]).pairs]


def test_words_fold_case_punctuation_spacing_and_unicode() -> None:
    assert words("  Émile’s\u00a0CAFÉ,\tﬁve  ½ ") == words("emile's cafe five 1⁄2")
    assert words("e\u0301") == words("é") == ["e"]
    assert words("STRASSE") == words("straße")
    assert shingles("a b c d") == {"a b c", "b c d"} and shingles("a b") == {"a b"} and shingles("?!") == set()


@pytest.mark.parametrize("shared", [0, 10, 50, 90, 100])
def test_minhash_estimates_the_exact_jaccard(shared: int) -> None:
    """Over 2,000 hash functions the estimate lies within 4 standard deviations of the exact similarity."""
    first = {f"a{i}" for i in range(100)}
    second = {f"a{i}" for i in range(shared)} | {f"b{i}" for i in range(100 - shared)}
    exact = jaccard(first, second)
    found = estimated_jaccard(minhash(first, 2000), minhash(second, 2000))
    assert abs(found - exact) <= 4 * np.sqrt(exact * (1 - exact) / 2000) + 1e-12


def test_minhash_is_a_function_of_the_set_and_the_seed() -> None:
    assert (minhash(["x", "y"]) == minhash(["y", "x", "x"])).all()
    assert (minhash(["x", "y"], seed=1) != minhash(["x", "y"])).any()
    assert estimated_jaccard(minhash([]), minhash(["x"])) == 0


def test_search_finds_what_a_double_loop_finds() -> None:
    """Copies with a growing share of other words: MinHash with banding loses none of the pairs above the threshold."""
    rng = random.Random(0)
    forget = [sample(f"f{i}", text(rng, 30)) for i in range(40)]
    kept = [sample(f"r{i}", text(rng, 30)) for i in range(100)]
    for i, one in enumerate(forget):
        changed = str(one.target).split()
        for place in rng.sample(range(30), i // 4):
            changed[place] = rng.choice(VOCABULARY)
        kept.append(sample(f"copy{i}", " ".join(changed)))
    slow = {
        (a.id, b.id): round(similarity, 9)
        for a in forget
        for b in kept
        if (similarity := jaccard(shingles(str(a.target)), shingles(str(b.target)))) >= 0.5
    }
    fast = near_duplicates(forget, kept, DuplicateOptions(quoted=1.0)).pairs
    assert {(p.forget, p.kept): round(p.similarity, 9) for p in fast} == slow
    assert 10 < len(slow) < 40


def test_kinds_of_copies() -> None:
    one = sample("f", "Ada Ash was born in Rome on a cold day of May", "Where was Ada Ash born?", "Ada", ("Ada Ash",))
    assert kinds(one, replace(one, id="r")) == ["exact"]
    assert kinds(one, replace(one, id="r", target="ADA ASH was born, in Rome: on a cold day of May!")) == ["normalised"]
    assert kinds(one, replace(one, id="r", prompt="And in which place did she see the light?")) == ["near"]
    wrapped = sample("r", f"{text(random.Random(1), 80)} {one.target} {text(random.Random(2), 80)}")
    assert kinds(one, wrapped) == ["quoted"]
    assert kinds(one, sample("r", "He married Ada Ash in spring", subject="Bo")) == ["mention"]
    assert kinds(one, sample("r", "He met Ada in spring", subject="Bo")) == []
    # A copy of the facts under another name, the case that the zones of the measurements kept by mistake.
    other = sample("r", "Bo Elm was born in Rome on a cold day of May", "Where was Bo Elm born?", "Bo", ("Bo Elm",))
    assert kinds(one, other) == ["near"]
    assert kinds(one, sample("r", "Cy Fir lives far away in the north", "Who is Cy Fir?", "Cy", ("Cy Fir",))) == []


def test_short_answers_and_images_are_no_duplicates_by_themselves() -> None:
    assert kinds(sample("f", "red", "what colour does ada like"), sample("r", "red", "which paint did bo buy")) == []
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    image = Sample(id="f", subject="s", target=1, image=pixels)
    assert kinds(image, replace(image, id="r", image=pixels.copy())) == ["exact"]
    assert kinds(image, replace(image, id="r", image=pixels + 1)) == []


def test_handling_needs_reasons() -> None:
    one = sample("f", "some words that stand here twice")
    report = near_duplicates([one], [replace(one, id="r")])
    assert len(report.open) == 1 and report.record()["open"] == 1
    done = report.handle({("f", "r"): "the second copy is public and was asked to stay"})
    assert done.open == () and done.record()["pairs"] == 1 and done.record()["kinds"]["exact"] == 1
    with pytest.raises(UserError, match="needs a reason"):
        report.handle({("f", "r"): " "})
    with pytest.raises(UserError, match="no pair"):
        report.handle({("f", "x"): "because"})


def test_record_names_nobody() -> None:
    one = sample("ada ash/1", "some words about ada ash that stand here twice", names=("ada ash",))
    assert "ada" not in str(near_duplicates([one], [replace(one, id="ada ash/2")]).record())


def test_people_who_share_templates_are_not_called_duplicates() -> None:
    data = load_dataset("people")
    found = near_duplicates(data["forget"], data["retain"])
    near = [p for p in found.pairs if p.kind != "mention"]
    assert len(near) <= 0.01 * len(data["forget"])


@pytest.mark.parametrize("values", [{"threshold": 0.0}, {"bands": 5}, {"shingle": 0}, {"quoted": 1.5}])
def test_bad_options(values: dict[str, float]) -> None:
    with pytest.raises(UserError):
        DuplicateOptions(**values)  # type: ignore[arg-type]
