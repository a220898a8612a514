"""Every sample once per epoch, whatever the step one starts from; padding shrinks; groups respect the token limit."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expunge.training.batching import WINDOW, EpochPlan, Stream, epoch_batches, group_by_tokens

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=90)


@given(LENGTHS, st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_has_every_sample_once(lengths: list[int], size: int, seed: int) -> None:
    batches = epoch_batches(lengths, size, np.random.default_rng(seed))
    assert sorted(itertools.chain(*batches)) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= size for batch in batches)
    assert len(batches) == -(-len(lengths) // size)


@pytest.mark.parametrize(("forget", "retain", "size"), [(7, 40, 3), (16, 5, 4), (1, 1, 8)])
def test_the_leading_role_is_seen_epochs_times_and_the_others_run_beside_it(
    forget: int, retain: int, size: int
) -> None:
    lengths = {"forget": [3] * forget, "retain": list(range(1, retain + 1))}
    plan = EpochPlan(lengths, {"forget": size, "retain": 2}, 3, "forget", seed=4)
    seen: list[list[int]] = [plan.batch(step)["forget"] for step in range(plan.steps)]
    per_epoch = -(-forget // size)
    assert plan.steps == 3 * per_epoch
    for epoch in range(3):
        assert sorted(itertools.chain(*seen[epoch * per_epoch : (epoch + 1) * per_epoch])) == list(range(forget))
    beside = [plan.batch(step)["retain"] for step in range(-(-retain // 2))]
    assert sorted(itertools.chain(*beside)) == list(range(retain))


def test_a_step_is_a_function_of_seed_and_number_alone() -> None:
    def plan(seed: int) -> EpochPlan:
        return EpochPlan({"train": list(range(1, 50))}, {"train": 4}, 5, "train", seed)

    forward = [plan(1).batch(step) for step in range(plan(1).steps)]
    asked, order = plan(1), list(range(plan(1).steps))
    random.Random(0).shuffle(order)
    anyhow = {step: asked.batch(step) for step in order}
    assert [anyhow[step] for step in range(len(order))] == forward
    assert [plan(2).batch(step) for step in range(len(order))] != forward
    per_epoch = Stream(list(range(1, 50)), 4, [1, 0]).per_epoch
    assert forward[:per_epoch] != forward[per_epoch : 2 * per_epoch], "epochs are shuffled anew"


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 1), (0.5, 5), (1.05, 11), (2, 20)])
def test_parts_of_an_epoch(epochs: float, steps: int) -> None:
    assert EpochPlan({"train": [5] * 40}, {"train": 4}, epochs, "train").steps == steps


def test_bucketing_saves_padding_and_stays_random() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 200, size=WINDOW * 8 * 3).tolist()

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    bucketed = epoch_batches(lengths, 8, np.random.default_rng(1))
    plain = rng.permutation(len(lengths)).reshape(-1, 8).tolist()
    assert padded(bucketed) < 0.75 * padded(plain)
    order = [max(lengths[i] for i in batch) for batch in bucketed]
    assert abs(float(np.corrcoef(order, np.arange(len(order)))[0, 1])) < 0.4, "long batches are not all at one end"


@given(LENGTHS, st.integers(1, 200))
def test_groups_hold_every_item_once_and_keep_the_limit(lengths: list[int], limit: int) -> None:
    groups = group_by_tokens(list(range(len(lengths))), lengths, limit)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= limit
