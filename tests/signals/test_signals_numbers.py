"""Token numbers against whole distributions in double precision, however the rows fall into blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from expunge.signals import forward
from expunge.signals.forward import token_numbers


def slow(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """One position after another, over the tokens of positive probability."""
    rows = []
    for row, target in zip(logits.double(), targets.tolist(), strict=True):
        log_p = (row - row.max()) - (row - row.max()).exp().sum().log()
        kept = log_p[torch.isfinite(log_p)]
        mean = float((kept.exp() * kept).sum())
        deviation = math.sqrt(float((kept.exp() * (kept - mean) ** 2).sum()))
        first_best = next(i for i, x in enumerate(row.tolist()) if x == float(row.max()))
        rank = sum(x > float(row[target]) for x in row.tolist())
        rows.append([float(log_p[target]), float(first_best == target), mean, deviation, rank])
    return np.array(rows)


@pytest.mark.parametrize(
    ("vocab", "scale", "offset"), [(7, 1.0, 0.0), (512, 3.0, 0.0), (512, 0.01, 300.0), (5000, 8.0, -40.0)]
)
@pytest.mark.parametrize("block", [1, 4000, 1 << 18])
def test_equals_double_precision(
    vocab: int, scale: float, offset: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "BLOCK_ELEMENTS", block)
    chance = torch.Generator().manual_seed(vocab)
    logits = torch.randn(9, vocab, generator=chance) * scale + offset
    logits[0, ::3] = -math.inf
    targets = torch.randint(0, vocab, (9,), generator=chance)
    targets[:2] = logits[:2].argmax(1)
    targets[2] = 0
    before = logits.clone()
    numbers = token_numbers(logits, targets)
    assert torch.equal(logits, before) and numbers.dtype == torch.float32
    expected = slow(logits, targets)
    np.testing.assert_allclose(numbers.numpy(), expected, rtol=3e-6, atol=5e-6)
    assert numbers[:, [1, 4]].tolist() == expected[:, [1, 4]].tolist()


def test_a_target_of_probability_zero_has_no_finite_log_probability_and_spoils_nothing_else() -> None:
    logits = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, 2.0, -math.inf]])
    numbers = token_numbers(logits, torch.tensor([1, 1]))
    assert numbers[0, 0] == -math.inf and numbers[0, 4] == 2
    assert numbers[1].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert torch.isfinite(numbers[:, 1:]).all()


def test_of_equal_largest_logits_the_first_is_the_hit() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0], [1.0, 5.0, 5.0], [3.0, 3.0, 3.0], [9.0, 3.0, 3.0]])
    numbers = token_numbers(logits, torch.tensor([1, 2, 0, 0]))
    assert numbers[:, 1].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert numbers[:, 4].tolist() == [0.0] * 4


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.randn(5, 30_000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(5)
    exact = slow(logits.float(), targets)
    np.testing.assert_allclose(token_numbers(logits, targets).numpy(), exact, rtol=3e-6, atol=5e-6)


def test_gradients_are_neither_needed_nor_kept() -> None:
    logits = torch.randn(3, 11, requires_grad=True)
    assert not token_numbers(logits, torch.tensor([0, 1, 2])).requires_grad
    assert token_numbers(logits[:0], torch.zeros(0, dtype=torch.long)).shape == (0, 5)
