"""Certified reset: projection and noisy steps against numpy, accounting, and that nothing but retain is read."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests.matrix.worlds import world

from expunge.certify.formal import reset_mu
from expunge.certify.sections import Reset
from expunge.errors import UserError
from expunge.methods.registry import get_method
from expunge.methods.reset import ResetOptions, difference, noisy_steps, norm, projected
from expunge.noise import derived, gaussian_noise
from expunge.privacy_accounting import gaussian_epsilon, gaussian_mu

torch.set_num_threads(1)
SEED = bytes(range(32))


def options(**more: Any) -> ResetOptions:
    given: dict[str, Any] = {"epochs": 1, "batch_size": 6, "reset_steps": 3, "noise_seed": SEED.hex()}
    return ResetOptions(**{**given, **more})


@pytest.mark.parametrize(("epsilon", "delta", "steps"), [(1, 1e-5, 10), (8, 1e-6, 1), (3, 1e-4, 40)])
def test_the_noise_gives_the_epsilon_that_was_asked_for(epsilon: float, delta: float, steps: int) -> None:
    """By the accountant of the certificates, which knows the section alone."""
    given = options(epsilon=epsilon, delta=delta, reset_steps=steps, radius=0.7, reset_clip=0.3)
    section = Reset(
        radius=0.7, clip=0.3, learning_rate=given.rate, decay=1.0, steps=steps, noise=given.noise, delta=delta
    )
    assert gaussian_epsilon(reset_mu(section), delta) == pytest.approx(epsilon, abs=1e-9)
    # Noise of all steps together: twice what output perturbation of a ball of that radius takes.
    assert given.noise * math.sqrt(steps) == pytest.approx(4 * 0.7 / gaussian_mu(epsilon, delta))


@pytest.mark.parametrize("radius", [1e-3, 0.5, 1e6])
def test_the_projection_is_the_nearest_point_of_the_ball(radius: float) -> None:
    here = world("text")
    away = difference(here.original, here.start)
    flat = np.concatenate([v.numpy().ravel() for v in away.values()])
    found = projected(away, radius)
    expected = flat * min(1.0, radius / np.linalg.norm(flat))
    np.testing.assert_allclose(np.concatenate([v.numpy().ravel() for v in found.values()]), expected, rtol=1e-11)
    assert norm(found) <= radius
    assert not norm(projected({"w": torch.full((2,), math.nan, dtype=torch.float64)}, radius))


@pytest.mark.parametrize("clip", [1e-3, 50.0])
def test_the_steps_are_those_of_the_formula(clip: float) -> None:
    """Against numpy, with gradients by plain ``backward`` over the whole batch."""
    here, given = world("resnet"), options(reset_clip=clip, radius=0.4, batch_size=100, reset_steps=2)
    retain = list(here.retain[:5])
    start = projected(difference(here.original, here.start), 0.4)
    model, twin = here.base(), here.base().eval()
    noisy_steps(model, here.adapter, retain, start, given, SEED, 0)
    centre = {n: p.detach().numpy().astype(np.float64) for n, p in here.start.named_parameters()}
    x = {n: v.numpy() for n, v in start.items()}
    for step in range(2):
        with torch.no_grad():
            for n, p in twin.named_parameters():
                p.copy_(torch.from_numpy(centre[n] + x[n]))
        twin.zero_grad()
        (-here.adapter.positions(twin, retain).log_prob_N().mean()).backward()
        gradient = {n: p.grad.numpy().astype(np.float64) for n, p in twin.named_parameters() if p.grad is not None}
        length = math.sqrt(sum(float((g**2).sum()) for g in gradient.values()))
        scale = given.rate * min(1.0, clip / length)
        drawn = {n: gaussian_noise(v.shape, given.noise, derived(SEED, f"{step}/{n}")) for n, v in x.items()}
        x = {n: v - scale * gradient[n] + drawn[n] for n, v in x.items()}
    for n, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), centre[n] + x[n], rtol=1e-4, atol=1e-6)


def test_two_originals_are_as_near_as_was_counted() -> None:
    """Worlds with and without the records, the same noise: never further apart than 2 C₀ + 2 η C₁ T."""
    here, given = world("text"), options(radius=0.05, reset_steps=4)
    ends = []
    for original in (here.original, here.start):
        model, start = here.base(), projected(difference(original, here.start), 0.05)
        noisy_steps(model, here.adapter, list(here.retain), start, given, SEED, 0)
        ends.append(difference(model, here.start))
    apart = norm({n: v - ends[1][n] for n, v in ends[0].items()})
    assert 0 < apart <= 2 * 0.05 + 2 * given.rate * given.reset_clip * 4 + 1e-4  # rounding to float32


def test_forget_samples_are_never_read() -> None:
    """Other forget samples, the same bits: nothing of the reset or the training after it can depend on them."""
    here = world("text")
    swapped = tuple(replace(s, prompt="Who?", target="Nobody.") for s in here.forget)
    first, second = (
        get_method("reset")(here.context(forget=forget), options()).model for forget in (here.forget, swapped)
    )
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_noise_is_fresh_without_a_seed_and_the_buffers_are_the_bases() -> None:
    here = world("resnet")
    fresh = options(noise_seed="", reset_steps=1, epochs=1)
    first, second = (get_method("reset")(here.context(), fresh).model for _ in range(2))
    assert any(not torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    model, start = here.base(), projected(difference(here.original, here.start), 0.1)
    noisy_steps(model, here.adapter, list(here.retain), start, fresh, SEED, 0)
    before = dict(here.start.named_buffers())
    assert before and all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_the_seed_of_the_noise_is_in_no_record_and_no_checkpoint(tmp_path: Any) -> None:
    here = world("text")
    told: list[str] = []
    context = here.context(work=tmp_path)
    outcome = get_method("reset")(context, options(checkpoint_every=1, epochs=2))
    told += [str(outcome.record), *map(str, outcome.notes)]
    assert not any(SEED.hex() in text for text in told)
    assert outcome.record["noise"] > 0 and not list(tmp_path.glob("*"))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epsilon": "0"}, "epsilon = 0.0 cannot be"),
        ({"radius": "inf"}, "radius = inf cannot be"),
        ({"delta": "0"}, "delta = 0.0 cannot be"),
        ({"reset_steps": "0"}, "reset_steps = 0 cannot be"),
        ({"noise_seed": "abc"}, "64 hexadecimal digits"),
        ({"epochs": "0"}, "epochs = 0.0 cannot be"),
    ],
)
def test_bad_options_are_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        get_method("reset").configure(given)


def test_a_base_of_another_shape_is_refused() -> None:
    here = world("text")
    config = copy.deepcopy(here.original.config)
    config.intermediate_size = 40
    other = type(here.original)(config)
    with pytest.raises(UserError, match="does not have the original's shape"):
        get_method("reset")(here.context(base=lambda: other), options())
