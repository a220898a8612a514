"""The coefficient of conditional dependence against its definition, and on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge.methods.dependence import dependence, foci, ranks, standard


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def slow(y: list[float], z: list[float], x: list[float] | None) -> float:
    """Azadkia and Chatterjee 2021, section 3, observation by observation."""
    n = len(y)
    rank = [sum(b <= a for b in y) for a in y]

    def nearest(i: int, places: list[list[float]]) -> int:
        return min((j for j in range(n) if j != i), key=lambda j: sum((p[i] - p[j]) ** 2 for p in places))

    if x is None:
        top = bottom = 0.0
        for i in range(n):
            above = sum(b >= y[i] for b in y)
            top += n * min(rank[i], rank[nearest(i, [z])]) - above**2
            bottom += above * (n - above)
        return top / bottom
    both = [min(rank[i], rank[nearest(i, [x, z])]) for i in range(n)]
    alone = [min(rank[i], rank[nearest(i, [x])]) for i in range(n)]
    return sum(b - a for b, a in zip(both, alone, strict=True)) / sum(r - a for r, a in zip(rank, alone, strict=True))


@pytest.mark.parametrize("conditional", [False, True])
def test_every_candidate_as_defined(conditional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expunge.methods.dependence.CHUNK", 2 * 30**2)  # two candidates at a time
    y, z, x = drawn(30, seed=1), drawn(30, 5, seed=2), drawn(30, seed=3)
    given = (x[:, None] - x[None]).square() if conditional else None
    wanted = [slow(y.tolist(), z[:, k].tolist(), x.tolist() if conditional else None) for k in range(5)]
    assert np.allclose(dependence(y, z, given), wanted)


def test_known_answers() -> None:
    """y = x₁ + x₂ mod 1: neither says anything, the two together all of it."""
    x = drawn(1500, 2)
    y = (x[:, 0] + x[:, 1]) % 1.0
    assert dependence(y, x).abs().max() < 0.1
    given = (x[:, 1, None] - x[None, :, 1]).square()
    assert float(dependence(y, x[:, :1], given)[0]) > 0.8
    assert float(dependence(x[:, 0], (2 * x[:, :1]).exp())[0]) > 0.98
    assert abs(float(dependence(drawn(1500, seed=9), x[:, :1], given)[0])) < 0.1
    assert ranks(torch.tensor([3.0, 1.0, 3.0])).tolist() == [3, 1, 3]


def test_foci_finds_what_matters_and_stops() -> None:
    z = drawn(400, 12, seed=4)
    y = z[:, 3] + z[:, 7] + 0.01 * drawn(400, seed=5)
    chosen = foci(y, z, 12, torch.Generator().manual_seed(0))
    assert set(chosen[:2]) == {3, 7} and len(chosen) < 12
    assert foci(y, z, 1, torch.Generator().manual_seed(0)) == chosen[:1]
    y = (3 * z[:, 5]).exp()
    assert foci(y, z, 12, torch.Generator().manual_seed(0))[0] == 5


def test_constant_candidates_are_never_chosen_and_ties_are_broken() -> None:
    z = drawn(60, 3, seed=4)
    z[:, 0] = 2.0
    z[:, 1] = (z[:, 1] > 0.5).float()
    assert not standard(z, torch.Generator()).isnan().any() and not standard(z, torch.Generator())[:, 0].any()
    assert len(standard(z, torch.Generator().manual_seed(0))[:, 1].unique()) == 60
    assert foci(z[:, 1], z, 3, torch.Generator().manual_seed(0))[0] == 1
    assert foci(drawn(60), torch.ones(60, 3), 3, torch.Generator()) == []
