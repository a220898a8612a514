"""Forward-mode Fisher against an explicit Jacobian, the direct KL, and its own remainder."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from expunge.certify.fisher import collateral
from expunge.certify.sections import explains
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.tiny import init_classifier
from tiny_text import tiny_adapter, tiny_dataset, tiny_model

torch.set_num_threads(1)
SAMPLES = list(tiny_dataset()["retain"][:6])


def moved(scale: float, seed: int = 1) -> tuple[torch.nn.Module, torch.nn.Module]:
    original = tiny_model(0, width=16, layers=1).eval()
    other = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return original, other


def test_quadratic_form_is_half_delta_fisher_delta() -> None:
    """Against ½ Δᵀ F Δ with the explicit Jacobian of every logit of one sample."""
    original, other = moved(1e-3)
    adapter, sample = tiny_adapter(), SAMPLES[0]
    found = collateral(original, other, adapter, [sample])
    names, old = zip(*original.named_parameters(), strict=True)
    new = dict(other.named_parameters())
    positions = adapter.positions(original, [sample])
    logits_NV = positions.head(positions.hidden_ND)
    total = 0.0
    for row in logits_NV:
        p_V = row.detach().double().softmax(0)
        slope_V = torch.zeros(len(row), dtype=torch.float64)
        for v in range(len(row)):
            grads = torch.autograd.grad(row[v], old, retain_graph=True)
            slope_V[v] = sum(
                float((g.double() * (new[n] - w).detach().double()).sum())
                for g, w, n in zip(grads, old, names, strict=True)
            )
        total += 0.5 * float((p_V * (slope_V - (p_V * slope_V).sum()) ** 2).sum())
    assert found.quadratic.value == pytest.approx(total / len(logits_NV), rel=1e-4)


def test_remainder_vanishes_with_the_step_and_large_steps_are_not_claimed() -> None:
    gaps = [collateral(*moved(s), tiny_adapter(), SAMPLES).remainder for s in (1e-2, 1e-3)]
    assert gaps[1] < gaps[0] / 3 and gaps[1] < 0.01
    assert collateral(*moved(1e-3), tiny_adapter(), SAMPLES).small
    large = collateral(*moved(0.5), tiny_adapter(), SAMPLES)
    assert not large.small and not explains(large.quadratic.value, large.direct.value)


def test_same_model_has_changed_nothing_and_models_stay_as_they_are() -> None:
    original, other = moved(1e-3)
    before = {n: p.clone() for n, p in original.named_parameters()}
    found = collateral(original, copy.deepcopy(original), tiny_adapter(), SAMPLES)
    assert found.quadratic.value == 0 and found.direct.value == pytest.approx(0, abs=1e-12) and found.small
    collateral(original, other, tiny_adapter(), SAMPLES)
    assert all(torch.equal(p, before[n]) for n, p in original.named_parameters())


def test_batches_do_not_matter() -> None:
    original, other = moved(1e-2)
    whole = collateral(original, other, tiny_adapter(), SAMPLES, max_tokens=4096)
    alone = collateral(original, other, tiny_adapter(), SAMPLES, max_tokens=1)
    np.testing.assert_allclose(whole.quadratic_S, alone.quadratic_S, rtol=1e-3)
    np.testing.assert_allclose(whole.direct_S, alone.direct_S, rtol=1e-3)
    assert whole.quadratic.n == len(SAMPLES)


def test_images_go_through_the_same_seam() -> None:
    """A classifier: one position per sample, V classes, buffers that are no parameters."""
    loaded = init_classifier(4, seed=0)
    rng = np.random.default_rng(0)
    samples = [
        Sample(id=str(i), subject=str(i), target=i % 4, image=rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        for i in range(6)
    ]
    other = copy.deepcopy(loaded.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1e-4 * torch.randn(p.shape, generator=generator))
    found = collateral(loaded.model, other, loaded.adapter, samples)
    assert found.small and found.direct.value > 0 and found.quadratic.n == 6


def test_sections_and_bad_input() -> None:
    original, other = moved(1e-3)
    with pytest.raises(UserError, match="needs samples"):
        collateral(original, other, tiny_adapter(), [])
    with pytest.raises(UserError, match="two subjects"):
        collateral(original, other, tiny_adapter(), SAMPLES[:1]).section("retain")
    section = collateral(original, other, tiny_adapter(), SAMPLES).section("retain")
    assert section.direct <= section.high and section.n == len(SAMPLES)
    with pytest.raises(UserError, match="one architecture"):
        collateral(original, tiny_model(0, width=32), tiny_adapter(), SAMPLES)
