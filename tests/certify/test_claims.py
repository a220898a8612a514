"""Each claim judges its own evidence: what certifies it, what refutes it, what leaves it open, what it says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import norm

from claim_cases import CLEAR, SEARCH, A, B, C, attacks, equivalence, removal, residual, score
from expunge.certify.claims import EPSILON, Case, Claim, Ruling, number
from expunge.certify.formal import Exact, Indistinguishable, reset_mu
from expunge.certify.gather import Interval
from expunge.certify.levels import CLAIMS
from expunge.certify.measured import Audited, Close, Equivalent, Robust, _widened
from expunge.certify.refusals import Refusal
from expunge.certify.sections import Arms, Change, Distance, Guesses, PrivateTraining, Reset, Sections, Trials
from expunge.errors import UserError
from expunge.privacy_accounting import gaussian_epsilon, gaussian_mu
from expunge.stats import auc_estimate, clopper_pearson

KNOWN: dict[str, Any] = {"provenance": CLEAR, "duplicates": SEARCH}


def exact(**changes: Any) -> Exact:
    return Exact(removal=removal(**changes), **KNOWN)


def test_exact_stands_and_says_one_sentence() -> None:
    record = exact().record()
    assert record["verdict"] == "certified" and "byte for byte" in record["claim"] and C[:16] in record["claim"]
    assert record["claim"].count(". ") == 0 and record["assumptions"] and record["not_claimed"]
    assert set(record) == {"level", "claim", "verdict", "assumptions", "evidence", "not_claimed"}


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"rebuilt": A}, "refuted"),
        ({"rebuilt": None}, "unsupported"),
        ({"deterministic": False}, "unsupported"),
        ({"rows": "unknown"}, "unsupported"),
        ({"statistics": "unknown"}, "unsupported"),
        ({"base_after": None}, "unsupported"),
    ],
)
def test_exact_falls(changes: dict[str, Any], verdict: str) -> None:
    assert exact(**changes).judged().verdict == verdict


def test_exact_needs_provenance_and_a_search() -> None:
    assert Exact(removal=removal(), duplicates=SEARCH).judged().verdict == "unsupported"
    assert Exact(removal=removal(), provenance=CLEAR).judged().verdict == "unsupported"
    unknown = CLEAR.model_copy(update={"finding": "unknown"})
    assert Exact(removal=removal(), provenance=unknown, duplicates=SEARCH).judged().verdict == "unsupported"


def test_residual_gives_the_published_epsilon() -> None:
    claim = Indistinguishable(residual=residual(), **KNOWN)
    found = claim.judged()
    assert found.verdict == "certified"
    assert found.figures["mu"] == pytest.approx(0.26805, abs=1e-5) and found.figures["epsilon"] == pytest.approx(1.0)
    assert "(1," in claim.said() and "1e-05" in claim.said()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residual": 6.8e-4}, "did not converge"),
        ({"reference_residual": 1e-8}, "did not converge"),
        ({"noise": 0.0}, "no noise"),
        ({"dtype": "float32"}, "single precision"),
        ({"logit_noise": 0.31}, "logits"),
        ({"logit_noise": None}, "logits"),
        ({"noise": 1e-9}, "promises nothing"),
    ],
)
def test_residual_falls(changes: dict[str, Any], words: str) -> None:
    found = Indistinguishable(residual=residual(**changes), **KNOWN).judged()
    assert found.verdict == "unsupported" and any(words in reason for reason in found.reasons)


def test_the_logistic_zone_of_the_measurements_is_refused() -> None:
    """Residual 6.8e-4 at λ = 1e-5: the noise for (1, 1e-5) would be 460 to 510 per weight."""
    sigma = 2 * 6.8e-4 / (1e-5 * gaussian_mu(1.0, 1e-5))
    assert 450 < sigma < 520
    claim = Indistinguishable(
        residual=residual(
            residual=6.8e-4, reference_residual=6.8e-4, tolerance=6.8e-4, reference_tolerance=6.8e-4,
            strong_convexity=1e-5, noise=sigma, logit_noise=sigma,
        ),
        **KNOWN,
    )  # fmt: skip
    assert claim.judged().figures["epsilon"] == pytest.approx(1) and claim.judged().verdict == "unsupported"


def test_releases_compose_as_roots_of_squares() -> None:
    found = Indistinguishable(residual=residual(earlier_mu=(0.3, 0.4)), **KNOWN).judged()
    assert (
        found.figures["mu"] == pytest.approx(math.sqrt(0.25 + gaussian_mu(1.0, 1e-5) ** 2))
        and found.figures["releases"] == 3
    )


def test_group_privacy_and_reset() -> None:
    training = PrivateTraining(mu=0.1, group=5, clipped=True)
    found = Indistinguishable(private_training=training, **KNOWN).judged()
    assert found.verdict == "certified" and found.figures["epsilon"] == pytest.approx(gaussian_epsilon(0.5, 1e-5))
    loose = Indistinguishable(private_training=training.model_copy(update={"clipped": False}), **KNOWN)
    assert loose.judged().verdict == "unsupported"
    reset = Reset(radius=1.0, clip=0.5, learning_rate=0.1, decay=1.0, steps=20, noise=0.4)
    # Without decay at T = C0/(η C1) = 20: total noise s√T = 4 C0/μ.
    assert reset_mu(reset) == pytest.approx(4 * 1.0 / (0.4 * math.sqrt(20)))
    slow = sum(0.99**j for j in range(20)), sum(0.99 ** (2 * j) for j in range(20))
    decayed = reset.model_copy(update={"decay": 0.99})
    assert reset_mu(decayed) == pytest.approx((2 * 0.99**20 + 0.1 * slow[0]) / (0.4 * math.sqrt(slow[1])))
    assert Indistinguishable(reset=reset, **KNOWN).judged().figures["mechanism"] == "Reset"


def test_canaries_that_show_more_refute_the_claim() -> None:
    guesses = Guesses(canaries=1000, guesses=1000, right=990, coins=True)
    assert Indistinguishable(residual=residual(), guesses=guesses, **KNOWN).judged().verdict == "refuted"
    quiet = Guesses(canaries=1000, guesses=1000, right=500, coins=True)
    assert Indistinguishable(residual=residual(), guesses=quiet, **KNOWN).judged().verdict == "certified"


# -- L2 to L5 ---------------------------------------------------------------------------------------------------------


def test_equivalence_is_certified_refuted_or_open() -> None:
    assert Equivalent(evidence=equivalence()).judged().verdict == "certified"
    far = Equivalent(evidence=equivalence(gap=0.2)).judged()
    assert far.verdict == "refuted" and "prob.forget differs" in far.reasons[0]
    assert Equivalent(evidence=equivalence(kept_gap=-0.5)).judged().verdict == "refuted"
    few = Equivalent(evidence=equivalence(runs=2)).judged()
    assert few.verdict == "unsupported" and "are needed" in few.reasons[0]
    assert Equivalent().judged().verdict == "unsupported"


def test_equivalence_needs_a_plan_that_came_first_and_covers_both_sides() -> None:
    assert "after the runs began" in Equivalent(evidence=equivalence(fixed=3)).judged().reasons[0]
    one = equivalence()
    only = one.model_copy(update={"arms": {"prob.forget": one.arms["prob.forget"]}})
    found = Equivalent(evidence=only).judged()
    assert found.verdict == "unsupported" and len(found.reasons) == 2  # not as planned, and nothing of what stays
    copies = Arms(unlearned=(0.1, 0.1, 0.1), retrained=(0.1, 0.11, 0.09))
    same = one.model_copy(update={"arms": {**one.arms, "prob.forget": copies}})
    assert "copies of one run" in Equivalent(evidence=same).judged().reasons[0]


def test_an_exact_removal_is_zero_zero_and_nothing_less_is() -> None:
    def ruled(**changes: Any) -> Indistinguishable:
        return Indistinguishable(removal=removal(**changes), provenance=CLEAR, duplicates=SEARCH)

    found = ruled().judged()
    assert found.verdict == "certified" and (found.figures["epsilon"], found.figures["delta"]) == (0.0, 0.0)
    assert "(0, 0)-indistinguishable" in ruled().said()
    for gap in ({"rebuilt": None}, {"rebuilt": A}, {"rows": "unknown"}, {"statistics": "unknown"}):
        assert ruled(**gap).judged().verdict == "unsupported"
    measured = Indistinguishable(removal=removal(), residual=residual(), provenance=CLEAR, duplicates=SEARCH)
    assert measured.judged().figures["epsilon"] == pytest.approx(1.0)  # noise is what was released


def test_divergence() -> None:
    near = Distance(subjects=(0.1,) * 100 + (0.12,) * 100, floor=0.1)
    assert Close(distance=near).judged().verdict == "certified"
    assert Close(distance=near.model_copy(update={"floor": 0.01})).judged().verdict == "refuted"
    assert Close(distance=near.model_copy(update={"floor": None})).judged().verdict == "refuted"
    assert Close(distance=Distance(subjects=(0.1, 0.12), floor=0.1)).judged().verdict == "unsupported"
    # The original itself: far from the retrained one everywhere.
    assert Close(distance=Distance(subjects=(0.9,) * 20, floor=0.1)).judged().verdict == "refuted"


def test_collateral_is_judged_by_the_direct_divergence_and_says_if_the_second_order_explains_it() -> None:
    near = Distance(subjects=(0.1,) * 300, floor=0.1)

    def close(**changes: float) -> Ruling:
        numbers = {"quadratic": 0.0101, "direct": 0.01, "high": 0.02} | changes
        return Close(distance=near, change=Change(role="retain", n=50, **numbers)).judged()

    assert close().verdict == "certified" and "collateral" in close().figures
    missed = close(quadratic=0.02)  # a large step that ends nearby, as a retraining is
    assert missed.verdict == "certified" and missed.figures["collateral"]["second_order_explains"] is False
    assert close().figures["collateral"]["second_order_explains"] is True
    assert close(high=0.08).verdict == "unsupported"
    assert close(quadratic=0.5, direct=0.5, high=0.6).verdict == "refuted"


def test_audit_is_two_sided_and_pays_for_the_number_of_attacks() -> None:
    assert Audited(scores=attacks()).judged().verdict == "certified"
    for gap in (0.3, -0.3):
        assert Audited(scores=(*attacks(), score("zlib", gap=gap))).judged().verdict == "refuted"
    left = score("recall", "effectiveness", statistic="mean", verdict="more is left")
    assert Audited(scores=(*attacks(), left)).judged().verdict == "refuted"
    assert Audited(scores=(score(half=0.3),)).judged().verdict == "unsupported"
    one = Audited(scores=(score(half=0.08),)).judged().figures["advantage_at_most"]
    many = Audited(scores=tuple(score(f"a{i}", half=0.08) for i in range(20))).judged().figures["advantage_at_most"]
    assert one == pytest.approx(0.08) and many == pytest.approx(0.08 * 3.0233 / 1.96, rel=1e-3)


def test_all_attacks_together_are_covered() -> None:
    """Six attacks whose true AUC is .6: the widened intervals hold all of them at once in 95 % of the audits."""
    rng, trials, tests, missed = np.random.default_rng(0), 300, 6, 0
    shift = math.sqrt(2) * float(norm.ppf(0.6))
    for _ in range(trials):
        found = [auc_estimate(rng.normal(shift, 1, 120), rng.normal(0, 1, 120)) for _ in range(tests)]
        ends = [_widened(Interval(e.value, e.low, e.high, e.n), tests, bounded=True) for e in found]
        missed += not all(low <= 0.6 <= high for low, high in ends)
    assert missed / trials <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / trials)


def test_widening_an_exact_interval_is_clopper_pearson_at_the_smaller_level() -> None:
    one = clopper_pearson(30, 30)
    low, high = _widened(Interval(1.0, one.low, 1.0, 60), 10, bounded=True)
    exact = clopper_pearson(30, 30, level=1 - 0.05 / 10)
    assert (low, high) == (pytest.approx(exact.low), 1.0)
    mirrored = _widened(Interval(0.0, 0.0, 1 - one.low, 60), 10, bounded=True)
    assert mirrored == (0.0, pytest.approx(1 - exact.low))


def test_audit_without_references_stands_against_chance() -> None:
    blank = dict.fromkeys(("value", "low", "high"), math.nan)
    plain = score(gap=0.0)
    alone = type(plain)(**{f: getattr(plain, f) for f in plain.__slots__} | {"gap": type(plain.gap)(**blank)})
    found = Audited(scores=(alone,)).judged()
    assert found.verdict == "certified" and "over chance" in Audited(scores=(alone,)).said()
    assert found.figures["advantage_at_most"] == pytest.approx(0.08)


def test_audit_prints_lower_bounds_beside_their_ceilings() -> None:
    guesses = Guesses(canaries=100, guesses=100, right=52, coins=True)
    trials = Trials(true_positives=8, positives=10, false_positives=1, negatives=10, delta=0)
    claim = Audited(scores=attacks(), guesses=guesses, trials=trials)
    assert claim.judged().figures["loss_ceiling"] == pytest.approx(0.807, abs=1e-3)
    assert "could have shown at most 1.74" in claim.said() and not EPSILON.search(json.dumps(claim.record()))
    sharp = Guesses(canaries=100, guesses=100, right=90, coins=True)
    assert Audited(scores=attacks(), guesses=sharp).judged().verdict == "refuted"
    planted = guesses.model_copy(update={"coins": False})
    assert Audited(scores=attacks(), guesses=planted).judged().verdict == "unsupported"


def test_robustness_needs_relearning_and_quantization() -> None:
    assert Robust(scores=attacks()).judged().verdict == "certified"
    assert "no quantization" in Robust(scores=attacks()[:3]).judged().reasons[0]
    back = score("relearn-topical", "robustness", statistic="mean", verdict="more is left")
    assert Robust(scores=(*attacks(), back)).judged().verdict == "refuted"
    alone = tuple(score(s.name, s.axis, verdict="no reference") for s in attacks())
    assert Robust(scores=alone).judged().verdict == "unsupported"


def test_robustness_is_bounded_against_what_the_attack_finds_in_the_original() -> None:
    """gap ± .04 of a way of .49; an attack that shows no difference because it has few samples certifies nothing."""
    found = Robust(scores=attacks()).judged()
    assert found.figures["came_back_at_most"] == pytest.approx(0.04 / 0.49)
    assert "at most 0.0817 of the way to the original" in Robust(scores=attacks()).said()
    relearn, quantization = attacks()[2:]
    for spoiled, words in (
        (score("relearn-forget", "robustness", half=0.3), "up to 0.613 of what was removed"),
        (replace(relearn, original=None), "not made on the original too"),
        (replace(relearn, gap=Interval(0.0)), "have no interval"),
        (replace(relearn, original=Interval(0.5, 0.4, 0.6, 9)), "no relearning attack was run that finds the data"),
    ):
        claim = Robust(scores=(spoiled, quantization))
        assert claim.judged().verdict == "unsupported" and words in claim.said()
    powerless = replace(relearn, attack="many-shot", name="many-shot", original=Interval(0.5, 0.4, 0.6, 9))
    assert Robust(scores=(*attacks(), powerless)).judged().verdict == "certified"


# -- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", list(CLAIMS.values()))
def test_without_evidence_no_level_says_anything(build: type[Claim]) -> None:
    record = build().record()
    assert record["verdict"] == "unsupported" and record["claim"].startswith("No claim") and not record["assumptions"]
    assert build.needs and build.assumes and build.never and (build.__doc__ or "").startswith(build.level)


def test_claims_are_immutable() -> None:
    with pytest.raises(AttributeError):
        exact().removal = None  # type: ignore[misc]
    with pytest.raises(ValidationError):
        removal().after = A  # type: ignore[misc]


def test_refusals_only_lower() -> None:
    flag = Refusal("x", ("L0",), "flagged", "look here.")
    stop, gap = Refusal("y", ("L0",), "refuted", "no."), Refusal("z", ("L0",), "unsupported", "not known.")

    def with_case(*refusals: Refusal, formal: bool = True, **changes: Any) -> Exact:
        return Exact(removal=removal(**changes), case=Case(refusals=refusals, formal=formal), **KNOWN)

    assert with_case(flag).judged().verdict == "certified" and "look here." in with_case(flag).record()["not_claimed"]
    assert with_case(gap).judged().verdict == "unsupported"
    assert with_case(gap, rebuilt=B).judged().verdict == "refuted"
    assert with_case(stop, gap).judged().verdict == "refuted"
    assert with_case(stop, formal=False).judged().verdict == "unsupported"
    other = Exact(removal=removal(), case=Case(refusals=(Refusal("w", ("L4",), "refuted", "no."),)), **KNOWN)
    assert other.judged().verdict == "certified"


def test_epsilon_is_never_written_below_l1() -> None:
    """Even if somebody passes it in: the record refuses to be made."""
    case = Case(refusals=(Refusal("x", ("L4",), "flagged", "epsilon is 3."),))
    with pytest.raises(UserError, match="speaks of epsilon"):
        Audited(scores=attacks(), case=case).record()


def test_numbers_in_sentences_are_never_too_small() -> None:
    assert [number(x) for x in (0.12345, 0.1, 2.0, 0.0, 1234.5)] == ["0.124", "0.1", "2", "0", "1.24e+03"]
    assert number(math.nan) == "an unknown amount"


def test_impossible_sections_are_refused() -> None:
    for wrong in (
        {"guesses": {"canaries": 5, "guesses": 6, "right": 1, "coins": True}},
        {"trials": {"true_positives": 9, "positives": 5, "false_positives": 0, "negatives": 5}},
        {"distance": {"subjects": [1.5]}},
        {"removal": {"requested": ["x"], "removed": [], "before": A, "after": B}},
        {"unheard_of": {}},
    ):
        with pytest.raises(ValidationError):
            Sections.model_validate(wrong)
