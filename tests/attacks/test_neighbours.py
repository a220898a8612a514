"""Neighbours against TF-IDF and edit distance written out, and what may never be among them."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from dataclasses import replace

import pytest

from attack_cases import exam
from expunge.attacks.neighbours import SLOT, frame_similarity, frames, pool, syntactic, topical
from expunge.data.samples import Sample

WORDS = ["river", "boat", "the", "of", "market", "storm", "seven", "lamp"]


def made(count: int, seed: int) -> list[Sample]:
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 7))) for _ in range(count)]
    return [Sample(id=str(i), subject=str(i), prompt=t, target=rng.choice(WORDS)) for i, t in enumerate(texts)]


def cosine(first: str, second: str, corpus: list[str]) -> float:
    """(1 + ln tf) (1 + ln((1 + n) / (1 + df))), as scikit-learn documents it, term by term."""
    texts = [re.findall(r"\w+|[^\w\s]", t.lower()) for t in corpus]

    def vector(text: str) -> dict[str, float]:
        counts = Counter(re.findall(r"\w+|[^\w\s]", text.lower()))
        df = {w: sum(w in t for t in texts) for w in counts}
        return {w: (1 + math.log(c)) * (1 + math.log((1 + len(texts)) / (1 + df[w]))) for w, c in counts.items()}

    a, b = vector(first), vector(second)
    norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
    return sum(a[w] * b.get(w, 0.0) for w in a) / norm


def edits(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """Insertions and deletions that turn one into the other."""
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, 1):
        before, row = row, [i] + [0] * len(second)
        for j, other in enumerate(second, 1):
            row[j] = before[j - 1] if word == other else 1 + min(before[j], row[j - 1])
    return row[-1]


@pytest.mark.parametrize("seed", range(5))
def test_topical_is_the_largest_cosine(seed: int) -> None:
    forget, others = made(3, seed), made(25, 100 + seed)
    corpus = [f"{s.prompt} {s.target}" for s in (*forget, *others)]
    best = [max(cosine(corpus[f], c, corpus) for f in range(3)) for c in corpus[3:]]
    order = sorted(range(25), key=lambda i: (-round(best[i], 9), i))
    assert topical(forget, others, 8) == [others[i] for i in order[:8]]


@pytest.mark.parametrize("seed", range(5))
def test_frame_similarity_is_one_minus_the_normalized_insert_delete_distance(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(20):
        a, b = (tuple(rng.choices("abcd", k=rng.randint(1, 9))) for _ in range(2))
        assert frame_similarity(a, b) == pytest.approx(1 - edits(a, b) / (len(a) + len(b)))
    assert frame_similarity((), ()) == 1.0


def test_frames_mask_names_numbers_and_rare_words() -> None:
    ask = "Where was {} born in {}?"
    who = ["Ada Ash", "Bo Birch", "Cy Cedar"]
    samples = [
        Sample(id=n, subject=n, names=(n,), prompt=ask.format(n, 1900 + i), target="x") for i, n in enumerate(who)
    ]
    # "was" and "born" are the frame's own words even where a name holds one of them: it is masked there alone.
    samples.append(Sample(id="d", subject="d", names=("Born Was",), prompt="Where was Born Was?", target="x"))
    assert frames(samples)[:3] == [("where", "was", SLOT, "born", "in", SLOT, "?")] * 3
    assert frames(samples)[3] == ("where", SLOT, "?")


def test_syntactic_finds_the_question_form_and_topical_the_words() -> None:
    def sample(name: str, prompt: str, target: str = "x") -> Sample:
        return Sample(id=name + prompt, subject=name, names=(name,), prompt=prompt.format(name), target=target)

    forget = [sample("Ada", "Where was {} born?", "in a mill by the violet lake")]
    same_form = [sample(n, "Where was {} born?", "in a town") for n in ("Bo", "Cy", "Dee")]
    same_topic = [sample(n, "Tell the story of {}.", "a mill by the violet lake") for n in ("Eli", "Fay")]
    others = [*same_topic, *same_form]
    assert syntactic(forget, others, 3) == same_form
    assert topical(forget, others, 2) == same_topic
    assert syntactic(forget, [], 3) == topical(forget, [], 3) == []


def test_the_pool_holds_nothing_of_the_forget_subjects_and_nothing_measured() -> None:
    world = exam()
    ada = world.forget[0]
    smuggled = [
        replace(ada, id="other subject, same text", subject="someone"),
        Sample(id="names it", subject="someone", prompt="a friend of", target=ada.names[0].upper()),
        replace(world.holdout[0], id="measured"),
        Sample(id="fine", subject="someone", prompt="who", target="red"),
    ]
    found = pool(replace(world, aux=[*world.aux, *smuggled], shared={}))
    ids = {s.id for s in found}
    assert "fine" in ids and not ids & {s.id for s in smuggled[:3]}
    assert ids - {"fine"} == {s.id for s in (*world.samples["retain"], *world.trained, *world.aux)}
    shuffled = replace(world, aux=world.aux[::-1], trained=world.trained[::-1], shared={})
    assert [s.id for s in pool(shuffled)] == [s.id for s in pool(world)]
