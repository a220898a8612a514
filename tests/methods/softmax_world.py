"""Softmax regression with a ridge: the model whose Hessian, Fisher matrix and retrained optimum are known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.samples import Modality, Sample
from expunge.models.adapter import Adapter, Batch, Head

WIDTH, CLASSES = 4, 3


class Regression(nn.Module):
    """logits = x Wᵀ, 12 weights."""

    def __init__(self, weight: Tensor | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, CLASSES, bias=False)
        start = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(3)) if weight is None else weight
        with torch.no_grad():
            self.linear.weight.copy_(start)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out


@dataclass
class RegressionAdapter(Adapter):
    """A sample's ``image`` is its vector of features, its target the class."""

    modality: Modality = "classifier"
    num_classes: int = CLASSES

    def encode(self, sample: Sample) -> Any:
        return np.asarray(sample.image, dtype=np.float32).reshape(-1)

    def label(self, sample: Sample) -> int:
        return int(sample.target)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        rows = torch.from_numpy(np.stack([self.encode(s) for s in samples]))
        order = torch.arange(len(samples))
        targets = torch.tensor([int(s.target) for s in samples])
        return Batch({"x": rows}, targets, order, torch.zeros_like(order), len(samples), len(samples))

    def hidden_and_head(self, model: Any, batch: Batch) -> tuple[Tensor, Head]:
        return batch.inputs["x"], Head(model.linear)

    def num_tokens(self, sample: Sample) -> int:
        return 1

    def num_targets(self, sample: Sample) -> int:
        return 1

    def save(self, folder: Any) -> None:
        raise AssertionError("not saved")


def points(count: int, seed: int = 0) -> tuple[Sample, ...]:
    """Features from a normal distribution, classes from a softmax regression over them."""
    rng = np.random.default_rng(seed)
    true = np.random.default_rng(77).normal(size=(CLASSES, WIDTH))
    made = []
    for i in range(count):
        x = rng.normal(size=WIDTH)
        z = true @ x
        p = np.exp(z - z.max())
        label = int(rng.choice(CLASSES, p=p / p.sum()))
        made.append(Sample(id=f"{seed}-{i}", subject=str(label), target=label, image=x.astype(np.float32)))
    return tuple(made)


def features(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([np.asarray(s.image, dtype=np.float64) for s in samples]), np.array(
        [int(s.target) for s in samples]
    )


def probabilities(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    z = weight @ x
    e = np.exp(z - z.max())
    return np.asarray(e / e.sum())


def gradient(weight: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
    """Of the summed negative log-likelihood, (P,), sample by sample."""
    total = np.zeros_like(weight)
    for x, y in zip(*features(samples), strict=True):
        p = probabilities(weight, x)
        p[y] -= 1
        total += np.outer(p, x)
    return total.reshape(-1)


def hessian(weight: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
    """Of the summed negative log-likelihood, (P, P): (diag p − ppᵀ) ⊗ xxᵀ; also the Fisher matrix."""
    total = np.zeros((weight.size, weight.size))
    for x, _ in zip(*features(samples), strict=True):
        p = probabilities(weight, x)
        total += np.kron(np.diag(p) - np.outer(p, p), np.outer(x, x))
    return total


def optimum(samples: Sequence[Sample], ridge: float) -> np.ndarray:
    """argmin of Σ nll + ridge/2 ‖W‖², by Newton's method to rounding."""
    weight = np.zeros((CLASSES, WIDTH))
    for _ in range(50):
        g = gradient(weight, samples) + ridge * weight.reshape(-1)
        h = hessian(weight, samples) + ridge * np.eye(weight.size)
        weight = weight - np.linalg.solve(h, g).reshape(weight.shape)
    return weight


def model_at(weight: np.ndarray) -> Regression:
    return Regression(torch.tensor(weight, dtype=torch.float32))


def weight_of(model: Any) -> np.ndarray:
    return np.asarray(model.linear.weight.detach().double().numpy())
