"""TOFU's metrics: the authors' own logs, their formulas written out slowly, closed forms, edges."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from conftest import shared
from expunge.data.samples import Probe, Sample
from expunge.errors import UserError
from expunge.metrics import tofu
from expunge.metrics.tofu import TofuSet
from expunge.signals.record import Signals

MODELS = ("full", "retain90", "retain95", "retain99")
KEPT = ("retain", "real_authors", "world_facts")
LOSSES = st.lists(st.floats(0, 30), min_size=1, max_size=4)


def raw_log(model: str) -> dict[str, Any]:
    path = shared(f"data/tofu_eval_logs/llama2-7b_{model}_wd0.01_eval_log_aggregated.json")
    log: dict[str, Any] = json.loads(path.read_text())
    return log


def small_set(**changes: Any) -> TofuSet:
    fields: dict[str, Any] = {
        "loss_N": np.array([0.1, 0.2, 0.3]),
        "paraphrased_N": np.array([0.5, 1.0, 2.0]),
        "perturbed": (np.array([1.0, 2.0]), np.array([1.0]), np.array([1.0, 1.0, 4.0])),
        "rouge_N": np.array([1.0, 0.5, 0.9]),
        "groups": ("a", "b", "c"),
    }
    return TofuSet(**(fields | changes))


# -- the authors' logs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_stored_truth_ratio_is_the_geometric_one(model: str) -> None:
    """The logs' field is float32; 4e-6 relative is its rounding. The arithmetic mean is far off."""
    log = raw_log(model)
    sets = tofu.read_log(log)
    for name, (key, _) in tofu.LOG_SETS.items():
        order = sorted(log[key]["truth_ratio"], key=int)
        stored = np.array([log[key]["truth_ratio"][i] for i in order])
        np.testing.assert_allclose(np.exp(sets[name].log_ratios("geometric")), stored, rtol=4e-6)
        assert np.max(np.abs(sets[name].log_ratios("arithmetic") - np.log(stored))) > 0.1


@pytest.mark.parametrize("model", MODELS)
def test_the_stored_normalised_loss_is_the_option_probability(model: str) -> None:
    log = raw_log(model)
    sets = tofu.read_log(log)
    for name in ("real_authors", "world_facts"):
        key = tofu.LOG_SETS[name][0]
        stored = [log[key]["normalized_gt_loss"][i] for i in sorted(log[key]["normalized_gt_loss"], key=int)]
        np.testing.assert_allclose(-np.log(sets[name].probabilities()), stored, atol=1e-12)


def slow_utility(log: dict[str, Any], arithmetic: bool) -> float:
    """Model utility item by item, as the authors' two scripts define it."""
    terms = []
    for name in KEPT:
        key, options = tofu.LOG_SETS[name]
        entry = log[key]
        prob, rouge, truth = [], [], []
        for item, loss in entry["avg_gt_loss"].items():
            right, wrong = math.exp(-loss), [math.exp(-x) for x in entry["average_perturb_loss"][item]]
            prob.append(right / (right + sum(wrong)) if options else right)
            rouge.append(entry["rougeL_recall"][item])
            paraphrased = entry["avg_paraphrased_loss"][item]
            if arithmetic:
                ratio = sum(wrong) / len(wrong) / math.exp(-paraphrased)
            else:
                losses = entry["average_perturb_loss"][item]
                ratio = math.exp(paraphrased - sum(losses) / len(losses))
            truth.append(max(0.0, 1 - ratio))
        terms += [sum(x) / len(x) for x in (prob, rouge, truth)]
    return len(terms) / sum(1 / t for t in terms)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ratio", ["geometric", "arithmetic"])
def test_model_utility_of_the_authors_models(model: str, ratio: tofu.Ratio) -> None:
    log = raw_log(model)
    sets = tofu.read_log(log)
    found = tofu.model_utility({k: sets[k] for k in KEPT}, ratio, resamples=200)
    assert found.value == pytest.approx(slow_utility(log, ratio == "arithmetic"), abs=1e-12)
    assert found.low < found.value < found.high and found.n == 517
    assert found.definition == f"model_utility-{ratio}-9/1"


def test_published_figures_of_llama_2_7b() -> None:
    """OpenUnlearning's docs/repro.md: finetuned MU .63, TR .52; retain90 MU .61, TR .68 (their own training)."""
    for model, utility, ratio in (("full", 0.63, 0.52), ("retain90", 0.61, 0.68)):
        sets = tofu.read_log(raw_log(model))
        assert tofu.model_utility({k: sets[k] for k in KEPT}, resamples=50).value == pytest.approx(utility, abs=0.01)
        assert tofu.truth_ratio(sets["forget"]).value == pytest.approx(ratio, abs=0.01)


@pytest.mark.parametrize("model", MODELS[1:])
def test_forget_quality_of_the_full_model(model: str) -> None:
    """KS on paraphrased-over-perturbed ratios, as in aggregate_eval_stat.py: the reciprocal gives the same test.

    Only retain90's log has the full model's questions; the other two forget sets are smaller, and the note says so.
    """
    logs = [raw_log("full"), raw_log(model)]
    ratios = []
    for log in logs:
        entry = log["eval_log_forget.json"]
        perturbed = np.array(list(entry["average_perturb_loss"].values())).mean(-1)
        ratios.append(np.exp(perturbed - np.array(list(entry["avg_paraphrased_loss"].values()))))
    expected = scipy_stats.ks_2samp(*ratios)
    full, reference = (tofu.read_log(log)["forget"] for log in logs)
    found = tofu.forget_quality(full, reference)
    assert found.p_value.value == pytest.approx(expected.pvalue, rel=1e-6)
    assert found.ks_distance.value == pytest.approx(expected.statistic, abs=1e-12)
    assert found.ks_distance.low <= expected.statistic <= found.ks_distance.high
    assert bool(found.ks_distance.note) == (model != "retain90")


def test_the_full_model_has_not_forgotten_and_a_retrained_one_equals_itself() -> None:
    full, retrained = (tofu.read_log(raw_log(m))["forget"] for m in ("full", "retain90"))
    worst = tofu.forget_quality(full, retrained)
    assert worst.p_value.value < 1e-15 and worst.ks_distance.low > 0.2
    best = tofu.forget_quality(retrained, retrained)
    assert best.p_value.value == 1.0 and best.ks_distance.value == 0.0
    assert best.ks_distance.high == pytest.approx(2 * math.sqrt(math.log(80) / 600))  # not 0: n = 300 shows no more


# -- closed forms --------------------------------------------------------------------------------------------------


@given(st.floats(0, 30), LOSSES)
def test_ratios_and_scores_equal_the_plain_formulas(paraphrased: float, perturbed: list[float]) -> None:
    def log_ratio(ratio: tofu.Ratio) -> float:
        return float(tofu.log_truth_ratio([paraphrased], [perturbed], ratio)[0])

    geometric = math.exp(-np.mean(perturbed)) / math.exp(-paraphrased)
    arithmetic = np.mean(np.exp(-np.array(perturbed))) / math.exp(-paraphrased)
    shifted = math.exp(-np.mean(perturbed)) / (math.exp(-paraphrased) + 1e-10)
    assert math.exp(log_ratio("geometric")) == pytest.approx(geometric, rel=1e-9)
    assert math.exp(log_ratio("arithmetic")) == pytest.approx(arithmetic, rel=1e-9)
    assert math.exp(log_ratio("openunlearning")) == pytest.approx(shifted, rel=1e-9)
    assert arithmetic >= geometric * (1 - 1e-12)  # arithmetic mean is never below the geometric
    logs = np.array([log_ratio("geometric")])
    assert tofu.truth_scores(logs, "closer_to_1_better")[0] == pytest.approx(min(geometric, 1 / geometric), rel=1e-9)
    assert tofu.truth_scores(logs, "true_better")[0] == pytest.approx(max(0.0, 1 - geometric), abs=1e-9)
    right, wrong = math.exp(-paraphrased), math.exp(-np.mean(perturbed))
    assert tofu.truth_scores(logs, "prob_mean")[0] == pytest.approx(right / (right + wrong), rel=1e-9)
    inverse = 1 / (geometric + 1e-10)
    assert tofu.truth_scores(logs, "closer_to_1_better", 1e-10)[0] == pytest.approx(min(geometric, inverse), rel=1e-9)


def test_losses_of_a_destroyed_model_do_not_overflow() -> None:
    broken = small_set(paraphrased_N=np.array([1e4, 2e4, 0.0]), perturbed=(np.array([1.0]),) * 3)
    for score in ("closer_to_1_better", "true_better", "prob_mean"):
        found = tofu.truth_ratio(broken, score)  # type: ignore[arg-type]
        assert math.isfinite(found.value) and 0 <= found.value <= 1
    assert tofu.option_probability([1e5], [[1e5]])[0] == pytest.approx(0.5)


def test_one_dead_term_kills_utility() -> None:
    alive = small_set()
    assert tofu.model_utility({"retain": alive}, resamples=50).value > 0
    dead = tofu.model_utility({"retain": alive, "world_facts": small_set(rouge_N=np.zeros(3))}, resamples=50)
    assert dead.value == 0.0 and dead.high == 0.0 and dead.definition == "model_utility-geometric-6/1"


def test_what_was_not_measured_is_left_out() -> None:
    partly = small_set(perturbed=(np.array([1.0, 2.0]), np.array([]), np.array([1.0])))
    assert tofu.truth_ratio(partly).n == 2
    nothing = tofu.truth_ratio(small_set(loss_N=np.zeros(0), paraphrased_N=np.zeros(0), perturbed=(), groups=()))
    assert nothing.n == 0 and math.isnan(nothing.value)
    assert math.isnan(tofu.model_utility({"retain": small_set(rouge_N=np.full(3, np.nan))}, resamples=20).value)


def test_user_mistakes() -> None:
    with pytest.raises(UserError, match="did you mean 'geometric'"):
        tofu.log_truth_ratio([1.0], [[1.0]], "geometrical")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown truth ratio score"):
        tofu.truth_scores([1.0], "best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="2 paraphrased but 1 perturbed"):
        tofu.log_truth_ratio([1.0, 2.0], [[1.0]])
    with pytest.raises(UserError, match="at least one set"):
        tofu.model_utility({})
    with pytest.raises(UserError, match="no TOFU evaluation log"):
        tofu.read_log({"other.json": {}})


# -- from samples --------------------------------------------------------------------------------------------------


def signals_of(sample: Sample, loss: float) -> Signals:
    values = np.full(2, -loss, dtype=np.float32)
    return Signals(
        id=sample.id, subject=sample.subject, log_prob_L=values, hit_L=values > 0, mean_L=values, std_L=values,
        rank_L=values.astype(np.int32), text_bytes=1, zlib_bytes=9,
    )  # fmt: skip


def test_samples_with_probes_become_a_set() -> None:
    probes = (
        Probe(kind="restated", prompt="q", target="right again"),
        Probe(kind="perturbed", prompt="q", target="wrong"),
        Probe(kind="perturbed", prompt="q", target="false"),
        Probe(kind="reverse", prompt="r", target="unused"),
    )
    samples = [
        Sample(id="1", subject="a", prompt="q", target="right", probes=probes),
        Sample(id="2", subject="b", prompt="q", target="right"),
    ]
    texts = tofu.wanted(samples)
    assert [t.target for t in texts] == ["right", "right again", "wrong", "false", "right"]
    signals = [signals_of(text, loss) for text, loss in zip(texts, (0.5, 1.0, 2.0, 4.0, 0.25), strict=True)]
    found = tofu.tofu_set(samples, signals, rouge={"1": 0.75})
    assert found.loss_N.tolist() == [0.5, 0.25] and found.paraphrased_N.tolist() == [1.0, 0.25]
    assert [p.tolist() for p in found.perturbed] == [[2.0, 4.0], []]
    assert found.groups == ("a", "b") and found.rouge_N[0] == 0.75 and math.isnan(found.rouge_N[1])
    assert found.log_ratios()[0] == pytest.approx(1.0 - 3.0)
    with pytest.raises(UserError, match="no signals of '1/perturbed/1'"):
        tofu.tofu_set(samples, [s for s in signals if s.id != "1/perturbed/1"])
