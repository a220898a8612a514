"""The gate: its fit against scikit-learn, its surrogates, and its calibration."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from expunge.data.samples import subjects
from expunge.errors import UserError
from expunge.zones.gate import RIDGE, fit_logistic
from expunge.zones.surrogates import rename, surrogates
from expunge.zones.text_stats import inverse_frequency, spread, spreads
from zone_cases import adapter, base, public, world

torch.set_num_threads(1)


def test_the_fit_is_ridge_logistic_regression() -> None:
    rng = np.random.default_rng(0)
    here, others = rng.normal(1.0, 1, (80, 3)), rng.normal(0, 1, (200, 3))
    found = fit_logistic(here, others)
    x, y = np.vstack([here, others]), np.r_[np.ones(80), np.zeros(200)]
    weight = np.where(y == 1, 0.5 / 80, 0.5 / 200)
    slow = LogisticRegression(C=1 / RIDGE, tol=1e-10, max_iter=10_000).fit(x, y, sample_weight=weight)
    assert found[:3] == pytest.approx(slow.coef_[0], rel=1e-3)
    assert found[3] == pytest.approx(slow.intercept_[0], abs=1e-3)


def test_a_feature_that_speaks_against_the_subject_is_left_out() -> None:
    rng = np.random.default_rng(1)
    here, others = rng.normal([1, -1], 1, (100, 2)), rng.normal([0, 0], 1, (100, 2))
    found = fit_logistic(here, others)
    assert found[0] > 0 and found[1] == 0
    alone = fit_logistic(here[:, :1], others[:, :1])
    assert found[[0, 2]] == pytest.approx(alone, rel=1e-4)


def test_surrogates_are_called_as_nobody_is() -> None:
    utility = world()[1]["utility"]
    made = surrogates(utility)
    true_names = {s.names[0] for s in utility}
    assert made.renamed and not {s.names[0] for s in made.stored} & true_names
    for s in made.stored:
        texts = [s.prompt, str(s.target), *(p.prompt for p in s.probes_of("paraphrase"))]
        assert not any(name in text for name in true_names for text in texts)
        assert s.subject in s.prompt
    assert not set(subjects(made.fit)) & set(subjects(made.calibrate))
    assert set(subjects(made.fit)) | set(subjects(made.calibrate)) == set(subjects(utility))


def test_renaming_changes_whole_names_alone() -> None:
    s = replace(world()[1]["utility"][0], prompt="Did Ada Ash know Ash's ashes, Adas?", names=("Ada Ash", "Ash", "Ada"))
    assert rename(s, s.names, "Bo Elm").prompt == "Did Bo Elm know Elm's ashes, Adas?"


def test_a_question_that_names_nobody_is_not_asked_from_both_sides() -> None:
    utility = list(world()[1]["utility"])
    who = sorted(subjects(utility))[0]
    place = next(i for i, s in enumerate(utility) if s.subject == who)
    utility[place] = replace(utility[place], prompt="Who was born in Lima on a Sunday?")
    made = surrogates(utility)
    prompts = [s.prompt for s in (*made.fit, *made.calibrate)]
    assert utility[place].prompt in [s.prompt for s in made.stored] and utility[place].prompt not in prompts
    assert len(prompts) == len(utility) - 1


def test_a_made_up_name_is_no_shorter_form_of_a_true_one() -> None:
    utility = list(world()[1]["utility"])
    people = sorted(subjects(utility))
    first, last = people[0].split()[0], people[1].split()[-1]  # the name that would be made of them
    longer = [
        replace(s, subject=f"{first} Maria {last}", names=(f"{first} Maria {last}",)) if s.subject == people[2] else s
        for s in utility
    ]
    assert f"{first} {last}" in subjects(surrogates(utility).stored)
    assert f"{first} {last}" not in subjects(surrogates(longer).stored)


def test_who_has_no_name_does_not_keep_others_from_being_renamed() -> None:
    utility = list(world()[1]["utility"])
    facts = [replace(s, id=f"w/{s.id}", subject="aa facts", names=()) for s in utility[:3]]
    made = surrogates([*utility, *facts])
    assert made.renamed and "aa facts" not in subjects(made.stored)
    assert "aa facts" in subjects((*made.fit, *made.calibrate))


def test_surrogates_without_names_are_people_as_they_are() -> None:
    bare = [replace(s, names=()) for s in world()[1]["utility"]]
    made = surrogates(bare)
    assert not made.renamed
    assert not set(subjects(made.stored)) & (set(subjects(made.fit)) | set(subjects(made.calibrate)))


def test_too_few_public_subjects_are_refused() -> None:
    utility = world()[1]["utility"]
    few = [s for s in utility if s.subject in subjects(utility)[:3]]
    with pytest.raises(UserError, match="at least 4 subjects, and 3 were given"):
        surrogates(few)


def test_calibration_keeps_its_promise_on_the_texts_that_it_saw() -> None:
    constants = public().constants
    assert constants["false_open"] <= 0.01
    assert constants["false_open"] < constants["false_open_high"] < 0.2
    assert constants["calibrated"] >= 20
    assert constants["open_stored"] >= 0.95


def test_public_artefacts_are_the_same_again_and_in_another_order() -> None:
    from expunge.zones.zone import get_zone

    found = get_zone("store")
    utility = list(world()[1]["utility"])
    again = found.build.prepare(base(), utility, found.options(), 0)
    assert again.digest() == public().digest()


def test_inverse_frequency_of_a_token_of_every_text_is_nought() -> None:
    idf_V = inverse_frequency([[1, 1, 2], [1, 3], [1]], 5)
    assert idf_V.tolist() == pytest.approx([np.log(4), 0, np.log(2), np.log(2), np.log(4)], rel=1e-6)


def test_spread_is_mean_and_deviation_over_real_positions() -> None:
    samples = world()[1]["utility"][:5]
    model = world()[0].model
    states = []
    with torch.no_grad():
        for s in samples:
            ids = torch.tensor([adapter().cached(s).ids])
            states.append(model(input_ids=ids, output_hidden_states=True).hidden_states[2][0])
    all_ND = torch.cat(states).double()
    mean_D, deviation_D = spread(samples, base(), 2)
    assert mean_D == pytest.approx(all_ND.mean(0).numpy(), abs=1e-5)
    assert deviation_D == pytest.approx(all_ND.std(0, correction=0).numpy(), rel=1e-4)
    assert np.array_equal(spreads(samples, base(), [1, 2])[0][1], mean_D)
