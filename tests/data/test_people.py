from __future__ import annotations

from collections import Counter
from math import log

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.data.people import MOST, SERIES, PeopleOptions, Series, cast, people, person
from expunge.data.people_facts import FACT, FACTS
from expunge.data.people_words import FIRST, PARTNERS, SURNAMES, Pool
from expunge.data.registry import load_dataset
from expunge.data.samples import ROLES, Dataset, Role, Sample
from expunge.errors import UserError

POOLS = [fact.pool for fact in FACTS]


def small(seed: int = 0, **options: object) -> Dataset:
    sizes = {"people": 12, "forget": 3, "holdout": 5, "utility": 4, "questions": 15, **options}
    return load_dataset("people", seed=seed, options=sizes)


@given(st.integers(0, MOST - 1), st.integers(0, 50), st.sampled_from(SERIES))
@settings(max_examples=50, deadline=None)
def test_person_is_a_pure_function_of_its_number(index: int, seed: int, series: Series) -> None:
    assert person(index, seed, series) == person(index, seed, series)
    assert person(index, seed, series).appearance.seed != person(index, seed + 1, series).appearance.seed


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_person_does_not_depend_on_how_many_are_asked_for(n: int, more: int, seed: int) -> None:
    assert people(n, seed) == people(n + more, seed)[:n]


def test_population_is_pinned() -> None:
    # Digests stand in published records, so a change of the generator must be a decision.
    first = person(0)
    assert (first.name, first.facts["pet"], first.appearance.hair_style) == (
        "Liven Nevowick",
        "a donkey called Scamp",
        "long",
    )


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_nobody_shares_a_name(seed: int) -> None:
    everyone = [who for series in SERIES for who in people(700, seed, series)]
    assert len({who.name for who in everyone}) == len(everyone)
    assert len({who.id for who in everyone}) == len(everyone)
    near = [who for series in SERIES for who in people(300, seed, series)]
    assert len({who.surname for who in near}) == len(near) == 1800
    assert len({who.first for who in near}) > 300


def _familiarity(name: str, seen: Counter[str]) -> float:
    """Mean log frequency of a name's trigrams among names seen."""
    grams = _trigrams(name)
    return sum(log(1 + seen[gram]) for gram in grams) / len(grams)


def _trigrams(name: str) -> list[str]:
    padded = f"^^{name.lower()}$"
    return [padded[i : i + 3] for i in range(len(padded) - 2)]


def test_letters_do_not_tell_the_forgotten_from_those_never_seen() -> None:
    # A model that never met either must find them alike, or every membership figure against the holdout is off. The
    # walk over neighbouring surnames gave .35 here.
    wins = []
    for seed in range(60):
        who = cast(PeopleOptions(people=36, forget=6, holdout=30, utility=0), seed)
        seen = Counter(gram for one in who.roles["retain"] for gram in _trigrams(one.name))
        forget, holdout = (
            [_familiarity(p.name, seen) for p in group] for group in (who.roles["forget"], who.roles["holdout"])
        )
        wins += [(f > h) + (f == h) / 2 for f in forget for h in holdout]
    assert abs(sum(wins) / len(wins) - 0.5) < 0.05


def test_names_are_distinct_words() -> None:
    assert len(set(FIRST)) == len(FIRST) == 900
    assert len(set(SURNAMES)) == len(SURNAMES) == 1800
    assert not any(PARTNERS.at(i).split()[1] in set(SURNAMES) for i in range(0, PARTNERS.size, 97))


def test_thousands_of_people_are_different_people() -> None:
    crowd = people(2000)
    assert len({tuple(who.facts.values()) for who in crowd}) == len(crowd)
    for fact in FACTS:
        values = Counter(who.facts[fact.key] for who in crowd)
        # No value is so common that guessing it would pay: at most three times its fair share, or 10.
        assert values.most_common(1)[0][1] <= max(10, 3 * 2000 / fact.pool.size), fact.key


@pytest.mark.parametrize("pool", POOLS)
def test_pool_draws_only_its_own(pool: Pool) -> None:
    for index in range(0, pool.size, max(1, pool.size // 50)):
        assert pool.at(index) in pool
    assert "something else" not in pool
    drawn = pool.others(pool.at(0), 5, "key")
    assert len(set(drawn)) == 5 and pool.at(0) not in drawn and all(value in pool for value in drawn)


def test_pool_index_is_a_bijection() -> None:
    pool = FACT["pet"].pool
    assert len({pool.at(i) for i in range(pool.size)}) == pool.size


def values_in(text: str, sample: Sample) -> set[str]:
    """Which facts a text states about its subject, read back with the answer templates."""
    fact = FACT[sample.id.partition("/")[2]]
    found = set()
    for template in fact.answers:
        before, after = template.replace("{name}", sample.subject).split("{value}")
        if text.startswith(before) and text.endswith(after):
            found.add(text[len(before) : len(text) - len(after) or None])
    return found


@given(st.integers(0, 1000))
@settings(max_examples=5, deadline=None)
def test_probes_are_of_the_right_kind_and_type(seed: int) -> None:
    data = small(seed)
    crowd = {
        who.name: who
        for roles in cast(PeopleOptions(people=12, forget=3, holdout=5, utility=4), seed).roles.values()
        for who in roles
    }
    for role in ROLES:
        for sample in data[role]:
            fact = FACT[sample.id.partition("/")[2]]
            value = crowd[sample.subject].facts[fact.key]
            assert sample.names[0] == sample.subject and sample.subject in sample.prompt
            assert value in values_in(str(sample.target), sample)
            paraphrases, restated = sample.probes_of("paraphrase"), sample.probes_of("restated")
            assert len({p.prompt for p in paraphrases} - {sample.prompt}) == len(paraphrases) >= 2
            assert all(p.target == sample.target for p in paraphrases)
            assert restated and all(p.prompt == sample.prompt and p.target != sample.target for p in restated)
            assert all(value in values_in(p.target, sample) for p in restated)
            wrong = sample.probes_of("perturbed")
            assert len({p.target for p in wrong}) == len(wrong) >= 3
            for probe in wrong:
                stated = values_in(probe.target, sample)
                assert probe.prompt == sample.prompt and value not in stated
                assert any(other in fact.pool for other in stated), probe.target
            (reverse,) = sample.probes_of("reverse")
            assert (
                reverse.target == sample.subject
                and sample.subject not in reverse.prompt
                and value.split()[-1] in reverse.prompt
            )
            (twin,) = sample.probes_of("twin")
            assert sample.subject not in twin.prompt + twin.target and twin.prompt != sample.prompt


def test_twins_are_never_trained() -> None:
    players = cast(PeopleOptions(people=50, holdout=50, utility=50))
    known = {who.name for crowd in players.roles.values() for who in crowd}
    assert not known & {twin.name for twin in players.twins.values()}
    assert set(players.twins) == {who.id for crowd in players.roles.values() for who in crowd}


@pytest.mark.parametrize("seed", [0, 5])
def test_reverse_questions_point_at_one_person(seed: int) -> None:
    data = small(seed, people=150, forget=10, holdout=100, utility=100)
    asked = Counter(probe.prompt for role in ROLES for sample in data[role] for probe in sample.probes_of("reverse"))
    assert asked.most_common(1)[0][1] == 1


@given(st.integers(0, 200), st.integers(1, 11), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_roles_are_disjoint_and_deterministic(seed: int, forget: int, split_seed: int) -> None:
    data = small(seed, forget=forget, split_seed=split_seed, questions=2)
    subjects = [{sample.subject for sample in data[role]} for role in ROLES]
    assert sum(map(len, subjects)) == len(set().union(*subjects)) == 12 + 5 + 4
    assert len(subjects[0]) == forget
    assert data.digest() == small(seed, forget=forget, split_seed=split_seed, questions=2).digest()
    if forget < 11:
        more = small(seed, forget=forget + 1, split_seed=split_seed, questions=2)
        assert subjects[0] < {sample.subject for sample in more["forget"]}


def test_split_seed_forgets_others_of_the_same_population() -> None:
    one, two = small(people=40), small(people=40, split_seed=1)
    assert {s.id for s in one.private} == {s.id for s in two.private}
    assert {s.subject for s in one["forget"]} != {s.subject for s in two["forget"]}


def test_other_seed_is_another_population() -> None:
    assert not {s.subject for s in small(0).private} & {s.subject for s in small(1).private}


def test_documents_state_every_fact() -> None:
    data = small(questions=0, documents=True)
    players = cast(PeopleOptions(people=12, forget=3, holdout=5, utility=4))
    for who in players.roles["forget"]:
        (sample,) = [sample for sample in data["forget"] if sample.subject == who.name]
        assert sample.prompt == "" and all(value in str(sample.target) for value in who.facts.values())
        (restated,) = sample.probes_of("restated")
        assert restated.target != sample.target and all(value in restated.target for value in who.facts.values())
        assert len(sample.probes_of("perturbed")) == 4
        for probe in sample.probes_of("perturbed"):
            assert who.name in probe.target and not any(
                value in probe.target for key, value in who.facts.items() if key not in ("home", "birth_place")
            )
        (twin,) = sample.probes_of("twin")
        assert players.twins[who.id].name in twin.target and who.surname not in twin.target


def test_appearance_is_stable_and_varied() -> None:
    crowd = people(200)
    assert len({who.appearance.seed for who in crowd}) == 200
    assert len({(a.skin, a.hair, a.hair_style, a.eyes, a.glasses) for a in (who.appearance for who in crowd)}) > 100
    for who in crowd:
        look = who.appearance
        assert 0.6 < look.face < 1 and 0.3 < look.eyes_apart < 0.5 and 20 < look.age < 90 and look.seed < 2**63
        assert all(0 <= part <= 255 for colour in (look.skin, look.hair, look.eyes, look.clothes) for part in colour)


@pytest.mark.parametrize(
    "options",
    [
        {"people": 0}, {"people": -1}, {"people": MOST + 1}, {"holdout": -1}, {"utility": -1}, {"forget": 13},
        {"forget": -1}, {"forget": 2.5}, {"forget": 0}, {"questions": 0}, {"questions": 16}, {"perturbed": 2},
        {"poeple": 3}, {"people": "many"},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UserError):
        small(**options)


def test_too_many_people() -> None:
    with pytest.raises(UserError, match="100001"):
        people(MOST + 1)


def test_strings_from_a_command_line() -> None:
    data = load_dataset("people", options={"people": "20", "forget": "0.25", "documents": "true", "questions": "1"})
    roles: dict[Role, int] = {"forget": 10, "retain": 30}
    assert {role: len(data[role]) for role in roles} == roles
