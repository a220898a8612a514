"""Signals and total variation need the seam only: a classifier, and an adapter that does not group its positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from expunge.data.samples import Sample
from expunge.models.adapter import Adapter, Batch, Head
from expunge.models.classifier import ClassifierAdapter
from expunge.models.images import Preprocess
from expunge.models.snapshot import snapshot
from expunge.signals.distribution import tv_per_token
from expunge.signals.forward import collect


def resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=5
    )
    model: nn.Module = ResNetForImageClassification(config)
    return model.eval()


def test_a_classifier_is_the_case_of_one_position() -> None:
    rng = np.random.default_rng(0)
    samples = [
        Sample(id=str(i), subject=str(i % 3), target=i % 5, image=rng.integers(0, 256, (12, 12, 1), dtype=np.uint8))
        for i in range(9)
    ]
    adapter = ClassifierAdapter(preprocess=Preprocess(height=12, width=12, channels=1), num_classes=5)
    model, reference = resnet(0), resnet(1)
    pixels = adapter.collate(samples).inputs["pixel_values"]
    with torch.no_grad():
        ours, theirs = (m(pixel_values=pixels).logits.double().softmax(1).numpy() for m in (model, reference))
    found = collect(model, adapter, samples, max_tokens=1000)
    for i, signals in enumerate(found):
        assert len(signals) == 1
        assert signals.prob == pytest.approx(ours[i, i % 5], rel=1e-4)
        assert bool(signals.hit_L[0]) == (ours[i].argmax() == i % 5)
    distances = tv_per_token(model, adapter, samples, snapshot(reference, adapter, samples))
    np.testing.assert_allclose(np.concatenate(distances), 0.5 * np.abs(ours - theirs).sum(1), atol=1e-5)


@dataclass
class Interleaved(Adapter):
    """Sample "i" has i + 1 targets; positions go round the samples instead of one sample after the other."""

    def encode(self, sample: Sample) -> int:
        return int(sample.id)

    def num_tokens(self, sample: Sample) -> int:
        return int(sample.id) + 1

    num_targets = num_tokens

    def collate(self, samples: Sequence[Sample]) -> Batch:
        places = [(t, row) for row, s in enumerate(samples) for t in range(self.num_targets(s))]
        order = sorted(places)
        numbers = torch.tensor([[int(samples[row].id), t] for t, row in order], dtype=torch.float32)
        targets = torch.tensor([(int(samples[row].id) + t) % 4 for t, row in order])
        rows = torch.tensor([row for _, row in order])
        return Batch({"x": numbers}, targets, rows, torch.zeros_like(rows), len(samples), len(order))

    def hidden_and_head(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Head]:
        inner: Any = model
        return torch.tanh(inner[0](batch.inputs["x"])), Head(inner[1])

    def save(self, folder: Any) -> None:
        raise AssertionError("not used here")


def test_positions_need_not_be_grouped_by_sample() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 4)) for _ in range(2)]
    samples = [Sample(id=str(i), subject="s", target="") for i in (2, 0, 3)]
    found = collect(models[0], Interleaved(), samples)
    distances = tv_per_token(
        models[0], Interleaved(), samples, snapshot(models[1], Interleaved(), samples, max_tokens=1)
    )
    for sample, signals, distance in zip(samples, found, distances, strict=True):
        number = int(sample.id)
        points = torch.tensor([[number, t] for t in range(number + 1)], dtype=torch.float32)
        with torch.no_grad():
            ours, theirs = (m[1](torch.tanh(m[0](points))).softmax(1) for m in models)
        expected = [float(ours[t, (number + t) % 4].log()) for t in range(number + 1)]
        assert signals.log_prob_L.tolist() == pytest.approx(expected, abs=1e-5)
        np.testing.assert_allclose(distance, 0.5 * (ours - theirs).abs().sum(1).numpy(), atol=1e-6)
