"""Every membership attack that reads signals: the original is found, an exact retrain is not; SURP and DC-PDD."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attack_cases import adapter, audited, exam, retrain
from expunge.attacks.frequency import Frequencies, count_tokens, dc_pdd_score, read_frequencies
from expunge.attacks.membership import surp_score
from expunge.attacks.registry import Finding, get_attack
from expunge.errors import UserError
from expunge.signals.record import Signals
from expunge.stats import auc

FINDS = (
    "loss", "zlib", "min_k", "min_k++", "surp", "dc_pdd", "camia", "reference_ratio", "reference_difference", "ez_mia",
    "wbc", "dataset_inference",
)  # fmt: skip
TRACES = ("update_loss", "update_logit")


def signals(log_probs: list[float], entropies: list[float] | None = None, ids: list[int] | None = None) -> Signals:
    num = len(log_probs)
    values = np.array(log_probs, dtype=np.float32)
    return Signals(
        id="a", subject="s", log_prob_L=values, hit_L=values > -0.5,
        mean_L=-np.array(entropies if entropies is not None else [1.0] * num, dtype=np.float32),
        std_L=np.ones(num, dtype=np.float32), rank_L=np.zeros(num, dtype=np.int32), text_bytes=10, zlib_bytes=18,
        ids_L=np.array(ids if ids is not None else range(num), dtype=np.int32),
    )  # fmt: skip


def run(name: str, original: bool) -> Finding:
    at = exam() if original else audited(retrain())
    attack = get_attack(name)
    assert attack.missing(at) is None and attack.family == "membership" and attack.doc and attack.summary
    return attack.run(at, at.audited, attack.options())


def area(finding: Finding, name: str) -> float:
    return auc(finding.scores[name]["forget"], finding.scores[name]["holdout"])


@pytest.mark.parametrize("name", FINDS)
def test_the_original_is_found_and_an_exact_retrain_is_not(name: str) -> None:
    found, nothing = run(name, True), run(name, False)
    for finding in (found, nothing):
        assert set(finding.scores) == {name} and set(finding.scores[name]) == {"forget", "retain", "holdout"}
        for role, scores in finding.scores[name].items():
            assert len(scores) == len(exam().samples[role]) and np.isfinite(scores).all()
    assert area(found, name) > 0.7
    assert area(nothing, name) < 0.6
    # What both were trained on looks like a member in both.
    assert auc(nothing.scores[name]["retain"], nothing.scores[name]["holdout"]) > 0.6


@pytest.mark.parametrize("name", TRACES)
def test_update_attacks_see_the_request_in_a_retrain_and_nothing_in_the_original(name: str) -> None:
    unchanged, retrained = run(name, True), run(name, False)
    assert set(unchanged.scores[name]["forget"]) == {0.0}
    assert area(retrained, name) > 0.8
    assert auc(retrained.scores[name]["forget"], retrained.scores[name]["retain"]) > 0.8
    assert any("an exact retrain shows it too" in note for note in retrained.notes)


def test_a_classifier_gets_only_what_has_a_meaning_there() -> None:
    works = {n for n in (*FINDS, *TRACES) if "classifier" in get_attack(n).modalities}
    assert works == {"loss", "min_k++", "reference_ratio", "reference_difference", *TRACES}


def test_options_change_the_score() -> None:
    attack = get_attack("min_k")
    whole = attack.run(exam(), exam().audited, attack.configure({"percent": "100"}))
    np.testing.assert_allclose(whole.scores["min_k"]["forget"], run("loss", True).scores["loss"]["forget"])
    with pytest.raises(UserError, match="percent"):
        attack.run(exam(), exam().audited, attack.configure({"percent": 0}))


# -- SURP ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-20, 0, width=32), st.floats(0, 5, width=32)), min_size=1, max_size=25))
def test_surp_equals_the_formula(tokens: list[tuple[float, float]]) -> None:
    count = max(1, math.floor(len(tokens) * 0.4 + 1e-9))
    lowest = sorted(range(len(tokens)), key=lambda i: (tokens[i][0], i))[:count]
    sure = [tokens[i][0] for i in lowest if tokens[i][1] < 2.0]
    if not sure:
        sure = [tokens[min(lowest, key=lambda i: tokens[i][1])][0]]
    # Ties in entropy may pick either token; both are then of the lowest ones.
    found = surp_score(signals([t[0] for t in tokens], [t[1] for t in tokens]))
    if len({t[1] for t in tokens}) == len(tokens):
        assert found == pytest.approx(sum(sure) / len(sure), abs=1e-4)
    assert min(t[0] for t in tokens) - 1e-4 <= found <= max(tokens[i][0] for i in lowest) + 1e-4


def test_surp_leaves_unsure_tokens_out() -> None:
    assert surp_score(signals([-9.0, -8.0, -0.1, -0.1, -0.1], [5.0, 0.5, 0.1, 0.1, 0.1])) == -8.0
    assert surp_score(signals([-9.0, -8.0, -0.1, -0.1, -0.1], [5.0, 4.0, 0.1, 0.1, 0.1])) == -8.0
    assert math.isnan(surp_score(signals([])))
    with pytest.raises(UserError, match="percent"):
        surp_score(signals([-1.0]), percent=200)


# -- DC-PDD --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(-9, 0, width=32), st.integers(0, 6)), min_size=1, max_size=20))
def test_dc_pdd_equals_the_formula(tokens: list[tuple[float, int]]) -> None:
    counts, vocab, cap = {0: 5, 3: 1, 6: 40}, 9, 0.3
    seen: dict[int, float] = {}
    for log_p, token in tokens:
        if token not in seen:
            share = (counts.get(token, 0) + 1) / (46 + vocab)
            seen[token] = min(math.exp(log_p) * -math.log(share), cap)
    found = dc_pdd_score(signals([t[0] for t in tokens], ids=[t[1] for t in tokens]), Frequencies(counts, vocab), cap)
    assert found == pytest.approx(sum(seen.values()) / len(seen), rel=1e-5, abs=1e-9)


def test_frequencies_are_those_of_texts_outside_of_the_evaluation() -> None:
    texts = [*exam().aux, *exam().trained]
    slow = Counter(t for s in texts for t in adapter().encode(s).ids[adapter().encode(s).first :])
    counted = count_tokens(adapter(), texts)
    assert counted.counts == slow and counted.total == sum(slow.values())
    assert counted.vocab == len(adapter().tokenizer)
    evaluated = {s.id for role in exam().samples.values() for s in role}
    assert not evaluated & {s.id for s in texts}


def test_a_table_of_frequencies_is_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"3": 10, "4": 0}))
    read = read_frequencies(str(path), adapter())
    assert read.counts == {3: 10, 4: 0} and read.surprise_V[3] == pytest.approx(-math.log(11 / (10 + read.vocab)))
    attack = get_attack("dc_pdd")
    scores = [
        attack.run(exam(), exam().audited, attack.configure({"cap": 10, **table})).scores["dc_pdd"]["forget"]
        for table in ({"table": str(path)}, {})
    ]
    assert scores[0] != scores[1]
    for content, words in (("[1, 2]", "no token table"), ('{"a": 1}', "no token table"), ("{", "no token table"),
                           ('{"100000": 1}', "tokens are 0 to"), ('{"3": -1}', "not negative")):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=words):
            read_frequencies(str(path), adapter())
    with pytest.raises(UserError, match="cannot be read"):
        read_frequencies(str(tmp_path / "none.json"), adapter())
