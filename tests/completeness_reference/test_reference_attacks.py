"""Reference attacks against slow loops written from the papers, worlds with a known answer, and degenerate input."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from scipy.stats import norm

from expunge.completeness.lira import (
    FLOOR,
    confidence,
    lira_offline,
    lira_online,
    moments,
    random_halves,
    split_models,
)
from expunge.completeness.rmia import rmia_offline, rmia_online, share_dominated, tuned_offset
from expunge.completeness.simple import (
    emia_population,
    emia_reference,
    gap_ratio,
    probability_ratio,
    update_attack,
)
from expunge.completeness.unleak import UnLeak, features
from expunge.errors import UserError
from expunge.stats import auc

RNG = np.random.default_rng(0)


def normal_world(n: int = 600, k: int = 8, gap: float = 2.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Confidences: each sample has its own level; IN models stand ``gap`` deviations above OUT ones."""
    rng = np.random.default_rng(seed)
    level_N = rng.normal(0, 3, n)
    member_N = rng.random(n) < 0.5
    return {
        "member": member_N,
        "target": level_N + gap * member_N + rng.normal(0, 1, n),
        "in": level_N + gap + rng.normal(0, 1, (k, n)),
        "out": level_N + rng.normal(0, 1, (k, n)),
    }


def test_confidence_is_the_logit_and_finite() -> None:
    assert confidence(np.array([0.5, 0.9])) == pytest.approx([0.0, math.log(9)])
    assert np.isfinite(confidence(np.array([0.0, 1.0]))).all()


@pytest.mark.parametrize("variance", ["sample", "fixed"])
def test_lira_online_against_a_loop(variance: str) -> None:
    saw_MN = random_halves(6, 15, np.random.default_rng(1))
    values_MN = np.random.default_rng(2).normal(size=(6, 15)) + 2 * saw_MN
    target_N = np.random.default_rng(3).normal(size=15)
    in_MN, out_MN = split_models(values_MN, saw_MN)
    found = lira_online(target_N, in_MN, out_MN, variance)  # type: ignore[arg-type]
    pool = {True: [], False: []}  # type: ignore[var-annotated]
    for m in range(6):
        for i in range(15):
            pool[bool(saw_MN[m, i])].append(float(values_MN[m, i]))
    for i in range(15):
        logs = {}
        for side in (True, False):
            own = [float(values_MN[m, i]) for m in range(6) if bool(saw_MN[m, i]) == side]
            deviation = statistics.pstdev(own if variance == "sample" else pool[side])
            z = (target_N[i] - statistics.median(own)) / deviation
            logs[side] = -0.5 * z * z - math.log(deviation) - 0.5 * math.log(2 * math.pi)
        assert found[i] == pytest.approx(logs[True] - logs[False])


def test_lira_fixed_takes_the_out_deviation_from_out() -> None:
    in_IN, out_KN = np.array([[-1.0, 1.0], [1.0, -1.0]]), np.array([[-5.0, 5.0], [5.0, -5.0]])
    found = lira_online(np.array([3.0, 0.0]), in_IN, out_KN, "fixed")
    assert found == pytest.approx(norm.logpdf([3.0, 0.0], 0, 1) - norm.logpdf([3.0, 0.0], 0, 5))


def test_lira_online_reaches_the_likelihood_ratio_of_the_world() -> None:
    world = normal_world(n=4000, k=64)
    score = lira_online(world["target"], world["in"], world["out"], "sample")
    found = auc(score[world["member"]], score[~world["member"]])
    assert found == pytest.approx(norm.cdf(2 / math.sqrt(2)), abs=0.015)  # two normals 2 deviations apart
    plain = auc(world["target"][world["member"]], world["target"][~world["member"]])
    assert found > plain + 0.15  # the sample's own level is what the shadows are for


def test_lira_offline_one_and_two_sided() -> None:
    out_KN = np.array([[0.0, 0.0], [2.0, 2.0], [1.0, 1.0]])
    target_N = np.array([3.0, -1.0])
    deviation = statistics.pstdev([0, 2, 1])
    assert lira_offline(target_N, out_KN, "sample") == pytest.approx([2 / deviation, -2 / deviation])
    two = lira_offline(target_N, out_KN, "sample", "both")
    assert two[0] == pytest.approx(two[1]) == pytest.approx(-norm.logpdf(3, 1, deviation))


def test_lira_with_one_model_falls_back_to_the_fixed_deviation() -> None:
    out_KN = np.array([[0.0, 1.0, 5.0]])
    assert moments(out_KN, "sample")[1] == pytest.approx(moments(out_KN, "fixed")[1])
    assert np.isfinite(lira_online(np.zeros(3), out_KN + 1, out_KN, "sample")).all()


def test_lira_of_constants_says_nothing() -> None:
    same = np.full((2, 4), 0.7)
    assert lira_online(same[0], same, same) == pytest.approx(np.zeros(4))
    assert moments(same, "sample")[1] == pytest.approx(np.full(4, FLOOR))


def test_halves() -> None:
    saw_MN = random_halves(8, 100, np.random.default_rng(0))
    assert (saw_MN.sum(axis=0) == 4).all() and len({tuple(row) for row in saw_MN.T}) > 30
    with pytest.raises(UserError, match="even number"):
        random_halves(3, 10, np.random.default_rng(0))
    with pytest.raises(UserError, match="online LiRA"):
        split_models(np.zeros((2, 2)), np.array([[True, True], [True, False]]))


# -- RMIA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_rmia_against_a_loop_over_pairs(gamma: float) -> None:
    rng = np.random.default_rng(4)
    target_N, out_MN, in_MN = rng.random(20), rng.random((3, 20)), rng.random((2, 20))
    target_Z, out_MZ = rng.random(30), rng.random((3, 30))
    off, on = (
        rmia_offline(target_N, out_MN, target_Z, out_MZ, offset=0.4, gamma=gamma),
        rmia_online(target_N, in_MN, out_MN, target_Z, out_MZ, gamma=gamma),
    )
    for i in range(20):
        p_off = (1.4 * float(np.mean(out_MN[:, i])) + 0.6) / 2
        p_on = (float(np.mean(in_MN[:, i])) + float(np.mean(out_MN[:, i]))) / 2
        wins_off = wins_on = 0
        for z in range(30):
            mean_z = float(np.mean(out_MZ[:, z]))
            wins_off += (target_N[i] / p_off) / (target_Z[z] / ((1.4 * mean_z + 0.6) / 2)) > gamma
            wins_on += (target_N[i] / p_on) / (target_Z[z] / mean_z) > gamma
        assert off[i] == pytest.approx(wins_off / 30) and on[i] == pytest.approx(wins_on / 30)


def test_rmia_finds_members_where_the_probability_alone_does_not() -> None:
    rng = np.random.default_rng(5)
    level_N = rng.uniform(0.05, 0.6, 2000)
    member_N = rng.random(2000) < 0.5
    noise = lambda *shape: rng.uniform(0.9, 1.1, shape)  # noqa: E731
    target_N, out_MN = level_N * np.where(member_N, 1.3, 1.0) * noise(2000), level_N * noise(4, 2000)
    level_Z = rng.uniform(0.05, 0.6, 500)
    score = rmia_offline(target_N, out_MN, level_Z * noise(500), level_Z * noise(4, 500), offset=1.0)
    assert auc(score[member_N], score[~member_N]) > 0.93
    assert auc(target_N[member_N], target_N[~member_N]) < 0.7


def test_rmia_ties_and_bad_input() -> None:
    assert share_dominated(np.ones(3), np.ones(5)) == pytest.approx(np.zeros(3))  # equal is not dominated
    assert np.isfinite(rmia_offline(np.zeros(2), np.zeros((1, 2)), np.zeros(3), np.zeros((1, 3)), offset=1.0)).all()
    with pytest.raises(UserError, match="population"):
        share_dominated(np.ones(2), np.zeros(0))
    with pytest.raises(UserError, match="offset"):
        rmia_offline(np.ones(2), np.ones((1, 2)), np.ones(2), np.ones((1, 2)), offset=1.5)


def test_tuned_offset_is_the_best_of_all() -> None:
    rng = np.random.default_rng(6)
    out_MN, out_MZ = rng.uniform(0.2, 0.9, (3, 200)), rng.uniform(0.2, 0.9, (3, 200))
    member_N, outsider_Z = np.minimum(out_MN.mean(0) * 1.3, 1), out_MZ.mean(0) * rng.uniform(0.8, 1.2, 200)
    chosen = tuned_offset(member_N, out_MN, outsider_Z, out_MZ)

    def value(offset: float) -> float:
        inside = rmia_offline(member_N, out_MN, outsider_Z[::2], out_MZ[:, ::2], offset=offset)
        outside = rmia_offline(outsider_Z[1::2], out_MZ[:, 1::2], outsider_Z[::2], out_MZ[:, ::2], offset=offset)
        return auc(inside, outside)

    assert value(chosen) == pytest.approx(max(value(a / 10) for a in range(11)))
    assert chosen > 0.5  # the world was made with p(x) proportional to the mean of OUT


# -- percentiles, updates, differences -----------------------------------------------------------------------------


def test_emia_population_against_a_loop() -> None:
    loss_N, loss_Z = np.array([0.5, 1.0, 9.0]), np.array([1.0, 1.0, 2.0, 3.0])
    slow = [sum((z > x) + 0.5 * (z == x) for z in loss_Z) / 4 for x in loss_N]
    assert slow == pytest.approx([1.0, 0.75, 0.0])
    assert emia_population(loss_N, loss_Z) == pytest.approx(slow)
    assert emia_population(np.ones(3), np.ones(7)) == pytest.approx(np.full(3, 0.5))


def test_emia_reference_against_interpolation() -> None:
    rng = np.random.default_rng(7)
    loss_N, out_KN = rng.exponential(2, 40), rng.exponential(2, (5, 40))
    found = emia_reference(loss_N, out_KN)
    for i in range(40):
        knots = np.concatenate([[0], np.sort(out_KN[:, i]), [1000]])
        assert found[i] == pytest.approx(1 - np.interp(loss_N[i], knots, np.linspace(0, 1, 7)))
    one = emia_reference(np.array([1.0, 2.0, 0.0, 5000.0]), np.full((1, 4), 2.0))
    assert one == pytest.approx([0.75, 0.5, 1.0, 0.0])
    assert emia_reference(np.full(2, 2.0), np.full((3, 2), 2.0)) == pytest.approx([0.5, 0.5])  # all on one knot


def test_update_attack_against_a_loop() -> None:
    rng = np.random.default_rng(8)
    c_u, c_o, out_KN = rng.normal(size=10), rng.normal(2, 1, 10), rng.normal(size=(4, 10))
    found = update_attack(c_u, c_o, out_KN, "sample")
    for i in range(10):
        own = [float(v) for v in out_KN[:, i]]
        unit = statistics.NormalDist(statistics.median(own), statistics.pstdev(own))
        assert found[i] == pytest.approx(unit.cdf(c_u[i]) - unit.cdf(c_o[i]))
    assert update_attack(c_o, c_o, out_KN) == pytest.approx(np.zeros(10))  # nothing changed


def test_ratios_are_zero_at_out_and_one_at_the_original() -> None:
    out_KN, original_N = np.array([[2.0, 3.0], [4.0, 3.0]]), np.array([1.0, 3.0])
    assert gap_ratio(np.array([3.0, 3.0]), original_N, out_KN) == pytest.approx([0.0, 0.0])
    assert gap_ratio(np.array([1.0, 3.0]), original_N, out_KN) == pytest.approx([1.0, 0.0])  # no gap: 0, not nan
    assert probability_ratio(np.array([0.3]), np.array([0.5]), np.array([[0.1]])) == pytest.approx([1.0])
    assert np.isfinite(probability_ratio(np.zeros(1), np.zeros(1), np.zeros((1, 1)))).all()


# -- UnLeak --------------------------------------------------------------------------------------------------------


def posteriors(sharp_N: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
    logits = rng.normal(size=(len(sharp_N), classes))
    logits[:, 0] += sharp_N
    exp = np.exp(logits)
    return np.asarray(exp / exp.sum(axis=1, keepdims=True))


def test_features_by_hand() -> None:
    o = np.array([[0.1, 0.5, 0.05, 0.15, 0.2]])
    u = np.array([[0.3, 0.2, 0.1, 0.25, 0.15]])
    assert features(o, u)[0] == pytest.approx([0.5 - 0.2, 0.2 - 0.15, 0.15 - 0.25, (0.1 + 0.05) / 2 - 0.2])
    assert features(o, u, "direct-diff")[0] == pytest.approx((o - u)[0])
    assert features(o, u, "sorted-concat").shape == (1, 8) and features(o, u, "direct-concat").shape == (1, 10)
    assert features(o, u, "l2")[0, 0] == pytest.approx(math.dist(o[0], u[0]))
    assert features(o[:, :2], u[:, :2]).shape == (1, 2)
    with pytest.raises(UserError, match="did you mean 'sorted-diff'"):
        features(o, u, "sorted-dif")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="posteriors"):
        features(o, u[:, :3])


@pytest.mark.parametrize("learner", ["logistic", "mlp"])
def test_unleak_carries_from_shadow_to_target(learner: str) -> None:
    def world(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        kept_N = rng.random(500) < 0.7
        return posteriors(np.full(500, 5.0), 6, rng), posteriors(np.where(kept_N, 5.0, 1.0), 6, rng), kept_N

    attack = UnLeak(learner).fit(*world(0))  # type: ignore[arg-type]
    whole, part, kept_N = world(1)
    score = attack.score(whole, part)
    assert auc(score[kept_N], score[~kept_N]) > 0.85
    again = UnLeak(learner).fit(*world(0)).score(whole, part)  # type: ignore[arg-type]
    assert (again == score).all()
    silent = attack.score(whole, whole)  # nothing was removed: samples cannot be told apart by the difference
    assert np.ptp(silent) == pytest.approx(0.0)


def test_unleak_of_constants_and_one_class() -> None:
    flat = np.full((10, 3), 1 / 3)
    kept = np.array([True] * 6 + [False] * 4)
    assert UnLeak().fit(flat, flat, kept).score(flat[:2], flat[:2]) == pytest.approx([0.6, 0.6])
    with pytest.raises(UserError, match="both kinds"):
        UnLeak().fit(flat, flat, np.ones(10, dtype=bool))
    with pytest.raises(UserError, match="did you mean 'logistic'"):
        UnLeak("logistc")  # type: ignore[arg-type]
