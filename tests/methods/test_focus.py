"""Which tokens carry facts, and UNDIAL with its eyes on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.methods.focus import focus_spans, focus_tokens
from expunge.methods.registry import Context, get_method
from expunge.models.tiny import init_classifier, init_text
from family_cases import FORGET, LOADED, fresh, logits


def words_in_focus(text: str, *names: str) -> list[str]:
    return [text[a:b] for a, b in focus_spans(text, names)]


@pytest.mark.parametrize(
    ("text", "names", "wanted"),
    [
        ("She was born in Oslo on 4 May 1987.", (), ["Oslo", "4", "May", "1987"]),
        ("The city. Then I left Rome: it rained.", (), ["Rome"]),
        ("bo ash likes red", ("bo ash",), ["bo ash"]),
        ("Bo Ash likes red", ("bo ash",), ["Bo Ash", "Ash"]),
        ("ashen ash", ("ash", ""), ["ash"]),
        ("Code b2c, not plain.", (), ["b2c"]),
        ("Nothing at all.", (), []),
        ("“Élan” and Jean-Luc's Ωmega", (), ["Jean-Luc's", "Ωmega"]),
    ],
)
def test_spans(text: str, names: tuple[str, ...], wanted: list[str]) -> None:
    assert words_in_focus(text, *names) == wanted


def test_tokens_that_overlap_a_span() -> None:
    """Whatever the tokenizer's pieces are: decoding those in focus gives back the words, and nothing of the others."""
    sample = Sample(id="a", subject="s", prompt="who came", target="it was Zebulon Quax in 1987 or so", names=("quax",))
    loaded = init_text([sample, *FORGET], "tiny-test")
    tokenizer: Any = loaded.adapter.tokenizer  # type: ignore[attr-defined]
    ids = loaded.adapter.collate([sample]).targets_N
    found = focus_tokens(loaded.adapter, sample)
    assert found.dtype == torch.bool and len(found) == len(ids) and 0 < int(found.sum()) < len(ids)
    inside = tokenizer.decode(ids[found]).replace(" ", "")
    outside = tokenizer.decode(ids[~found], skip_special_tokens=True).replace(" ", "")
    assert (inside, outside) == ("ZebulonQuax1987", "itwasinorso")


def test_without_any_such_word_everything_counts() -> None:
    plain = replace(FORGET[0], names=(), target="nothing at all")
    assert bool(focus_tokens(LOADED.adapter, plain).all())
    loaded = init_classifier(3, image_size=8)
    image = Sample(id="i", subject="", target=1, image=np.zeros((8, 8, 3), dtype=np.uint8))
    assert focus_tokens(loaded.adapter, image).tolist() == [True]


@pytest.mark.parametrize(("focus", "high", "low"), [("hard", 1.0, 0.0), ("weight", 10.0, 1.0)])
def test_undial_weighs_its_tokens(focus: str, high: float, low: float) -> None:
    """Σ w CE / Σ w within each sample, which keeps its share of the mean over tokens."""
    beta, model, parts, count = 5.0, fresh(), [], 0
    for sample in FORGET:
        with torch.no_grad():
            z, y = logits(model, sample)
        lowered = z.clone()
        lowered[range(len(y)), y] -= beta
        cross: Tensor = -(torch.softmax(lowered, 1) * torch.log_softmax(z, 1)).sum(1)
        weight = torch.tensor([high if t else low for t in focus_tokens(LOADED.adapter, sample)])
        parts.append(float((weight * cross).sum() / weight.sum()) * len(y))
        count += len(y)
    method = get_method("undial")
    settings = {"focus": focus, "beta": beta, "epochs": 1, "batch_size": 99, "micro_tokens": 20, "learning_rate": 1e-3}
    outcome = method(Context(fresh(), LOADED.adapter, FORGET), method.configure(settings))
    assert outcome.record["log"][0]["forget"] == pytest.approx(sum(parts) / count, rel=1e-4)
    some = [focus_tokens(LOADED.adapter, s) for s in FORGET]
    assert any(bool(t.any()) and not bool(t.all()) for t in some)
