"""The modality matrix on tables that were worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.metrics.modality import Change, as_table, asked_modality, by_modality, modality_matrix

PICTURE = np.zeros((2, 2, 3), np.uint8)


def samples() -> list[Sample]:
    """Four people, each asked once in words and once with a picture."""
    return [
        Sample(id=f"{who}{kind}", subject=who, target="x", image=PICTURE if kind == "i" else None)
        for who in "abcd"
        for kind in "ti"
    ]


def test_cells_by_hand() -> None:
    """Forgotten in text: words fall from .8 to the reference's .2, pictures hardly: .9 to .8 with a reference of .1."""
    text, image = [0.8, 0.2, 0.2], [0.9, 0.8, 0.1]  # original, unlearned, reference
    columns = [np.array([text[k], image[k]] * 4) for k in range(3)]
    cells = modality_matrix({"text": by_modality(samples(), *columns)})
    assert [(c.forgotten, c.asked) for c in cells] == [("text", "text"), ("text", "image")]
    assert cells[0].forget.value == pytest.approx(-0.6) and cells[1].forget.value == pytest.approx(-0.1)
    assert cells[0].closed is not None and cells[1].closed is not None
    assert cells[0].closed.value == pytest.approx(1.0) and cells[1].closed.value == pytest.approx(0.125)
    assert cells[0].forget.n == 4 and cells[0].retain is None


def test_controls_stand_at_zero_and_one() -> None:
    rng = np.random.default_rng(0)
    original, gold = rng.uniform(0.6, 1.0, 8), rng.uniform(0.0, 0.3, 8)
    runs = {name: by_modality(samples(), original, after, gold) for name, after in (("both", gold), ("none", original))}
    found = {(c.forgotten, c.asked): c.closed for c in modality_matrix(runs)}
    assert [c.value for c in found.values() if c is not None] == [1.0, 1.0, 0.0, 0.0]
    assert all(c is not None and c.low == c.value == c.high for c in found.values())


def test_retain_stands_beside_forget_and_over_forgetting_is_above_one() -> None:
    ones = np.ones(8)
    forget = {"image": by_modality(samples(), 0.9 * ones, 0.0 * ones, 0.3 * ones)}
    retain = {"image": by_modality(samples(), 0.9 * ones, 0.7 * ones)}
    cells = modality_matrix(forget, retain)
    assert all(c.retain is not None and c.retain.value == pytest.approx(-0.2) for c in cells)
    assert all(c.closed is not None and c.closed.value == pytest.approx(1.5) for c in cells)
    rows = as_table(cells)
    assert rows[0]["forgotten"] == "image" and rows[0]["asked"] == "text" and rows[0]["forget"].startswith("-0.900")


def test_no_gap_is_no_share() -> None:
    ones = np.ones(8)
    cell = modality_matrix({"text": by_modality(samples(), 0.5 * ones, 0.4 * ones, 0.5 * ones)})[0]
    assert cell.closed is not None and math.isnan(cell.closed.value) and "no gap" in cell.closed.note
    assert as_table([cell])[0]["closed"] == "-"


def test_subjects_are_drawn_together_and_one_has_no_interval() -> None:
    rng = np.random.default_rng(1)
    values = [rng.uniform(size=40) + k for k in (2, 1, 0)]
    wide = Change(*values, groups=[f"p{i // 20}" for i in range(40)])
    narrow = Change(*values)
    cells = [modality_matrix({"text": {"text": change}})[0] for change in (wide, narrow)]
    assert cells[0].closed is not None and cells[1].closed is not None
    assert cells[0].closed.value == cells[1].closed.value
    alone = modality_matrix({"text": {"text": Change(*values, groups=["p"] * 40)}})[0]
    assert alone.closed is not None and math.isnan(alone.closed.low) and math.isnan(alone.forget.low)


def test_what_is_asked_and_what_does_not_fit() -> None:
    assert [asked_modality(s) for s in samples()[:2]] == ["text", "image"]
    words = [s for s in samples() if s.image is None]
    assert list(by_modality(words, np.ones(4), np.ones(4))) == ["text"]
    with pytest.raises(UserError, match="measure the same samples"):
        Change(np.ones(3), np.ones(2))
    with pytest.raises(UserError, match="at least one run"):
        modality_matrix({"text": {}})


def test_a_model_that_is_the_original_has_changed_nothing_for_certain() -> None:
    """No change of any sample is no share of successes: its bound is not that of 0 out of 4."""
    same = np.linspace(0.2, 0.9, 8)
    cells = modality_matrix({"both": by_modality(samples(), same, same, same - 0.1)})
    assert [(c.forget.value, c.forget.low, c.forget.high) for c in cells] == [(0.0, 0.0, 0.0)] * 2
    one = Change(same, same, groups=["a"] * 8)
    assert math.isnan(modality_matrix({"both": {"text": one}})[0].forget.low)
