"""Costs are differences over a block: of the meter, of the clocks, of the weights."""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import torch

from expunge.bench.cost import Cost, changed, measure
from expunge.signals.forward import collect
from expunge.training.loop import TrainOptions, fit
from tiny_text import tiny_adapter, tiny_dataset, tiny_model

SAMPLES = tiny_dataset()["retain"]


def test_counts_the_work_of_the_block_alone() -> None:
    model, adapter = tiny_model(), tiny_adapter()
    collect(model, adapter, SAMPLES)
    with measure(adapter, model) as forward:
        collect(model, adapter, SAMPLES)
    parameters = sum(p.numel() for p in model.parameters())
    assert forward.flops == 2 * parameters * forward.tokens and forward.tokens_backward == 0
    assert forward.tokens >= sum(adapter.num_tokens(s) for s in SAMPLES)
    assert forward.parameters_changed == 0
    with measure(adapter, model) as training:
        fit(model, adapter, SAMPLES, TrainOptions(epochs=1, batch_size=len(SAMPLES), clip=0.0))
    assert training.flops == 6 * parameters * training.tokens and training.tokens_backward == training.tokens
    assert training.parameters_changed is not None and 0 < training.parameters_changed <= parameters
    assert training.wall_s > 0 and training.cpu_s > 0


def test_a_new_model_is_compared_when_it_is_named() -> None:
    model = tiny_model()
    with measure(tiny_adapter(), model) as cost:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.model.norm.weight[:5] += 1
        cost.model = other
    assert cost.parameters_changed == 5
    with measure(tiny_adapter()) as nothing:
        pass
    assert nothing.parameters_changed is None and nothing.flops == 0


def test_weights_that_exist_on_one_side_count() -> None:
    one, two = torch.zeros(3), torch.zeros(4)
    assert changed({"a": one, "b": two}, {"a": one, "c": two}) == 8
    assert changed({"a": one}, {"a": two}) == 4


def test_memory_of_the_block_is_seen_and_not_that_of_an_earlier_one() -> None:
    with measure(tiny_adapter()) as large:
        block = np.ones(40 << 20, dtype=np.float64)  # 320 MiB
        time.sleep(0.15)
    del block
    with measure(tiny_adapter()) as small:
        time.sleep(0.15)
    assert large.peak_mib > small.peak_mib + 250


def test_share_and_record() -> None:
    part, whole = Cost(flops=2.0, wall_s=9.0), Cost(flops=8.0, wall_s=3.0)
    assert part.share_of(whole) == 0.25
    assert Cost(wall_s=1.0).share_of(Cost(wall_s=4.0)) == 0.25
    assert np.isnan(part.share_of(Cost()))
    assert part.record(whole)["share_of_retraining"] == 0.25
    assert part.record()["share_of_retraining"] is None


def test_costs_are_kept_when_the_block_fails() -> None:
    adapter, kept = tiny_adapter(), []
    with pytest.raises(RuntimeError, match="broken"), measure(adapter) as cost:
        kept.append(cost)
        collect(tiny_model(), adapter, SAMPLES)
        raise RuntimeError("broken")
    assert kept[0].flops > 0
