"""The fully connected classifier: the seam, learning, folders, vectors of a wrong length, the model that fits data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import evaluating
from expunge.models.classifier import ClassifierAdapter
from expunge.models.load import load_model, save_model
from expunge.models.lora import LoraOptions, apply_lora
from expunge.models.tiny import classifier_for, init_classifier

torch.set_num_threads(1)


def vectors(number: int, width: int = 40) -> list[Sample]:
    rng = np.random.default_rng(1)
    return [
        Sample(id=str(i), subject=str(i), target=i % 5,
               image=(255 * rng.integers(0, 2, (1, width, 1))).astype(np.uint8))
        for i in range(number)
    ]  # fmt: skip


def test_the_seam_is_the_formula() -> None:
    loaded = classifier_for(vectors(20), seed=3)
    model: Any = loaded.model
    assert isinstance(loaded.adapter, ClassifierAdapter) and not loaded.adapter.whole_logits
    assert sum(p.numel() for p in model.parameters()) == 40 * 128 + 128 + 128 * 64 + 64 + 64 * 5 + 5
    inputs = torch.stack([torch.from_numpy(np.asarray(s.image)).flatten() / 255 for s in vectors(20)])
    assert set(inputs.unique().tolist()) == {0.0, 1.0}
    hidden = inputs
    for block in model.blocks:
        hidden = torch.tanh(hidden @ block.dense.weight.T + block.dense.bias)
    logits = hidden @ model.classifier.weight.T + model.classifier.bias
    with evaluating(model):
        seam = loaded.adapter.positions(model, vectors(20))
        own = model(**loaded.adapter.collate(vectors(20)).inputs, labels=seam.targets_N)
    expected = cross_entropy(logits, seam.targets_N).detach()
    assert -seam.log_prob_N().mean().item() == pytest.approx(expected.item(), abs=1e-5)
    assert float(own.loss) == pytest.approx(expected.item(), abs=1e-5)
    assert loaded.adapter.blocks(model) == list(model.blocks)


def test_it_learns_and_goes_through_a_folder(tmp_path: Path) -> None:
    samples = vectors(20)
    loaded = classifier_for(samples, seed=0)
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = -loaded.adapter.positions(loaded.model, samples).log_prob_N().mean()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.05
    again = load_model(save_model(loaded, tmp_path / "m"), device="cpu")
    with torch.no_grad():
        before, after = (x.adapter.positions(x.model, samples).log_prob_N() for x in (loaded, again))
    assert torch.equal(before, after)
    with pytest.raises(UserError, match="is 1 x 41, and this model reads 1 x 40 without resizing"):
        again.adapter.collate(vectors(1, 41))
    small = load_model(tmp_path / "m", device="cpu", lora=LoraOptions(r=2))
    assert "lora" in "".join(n for n, _ in small.model.named_parameters())


def test_same_seed_same_weights() -> None:
    one, same, other = (classifier_for(vectors(9), seed=s).model for s in (1, 1, 2))
    for a, b, c in zip(one.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and (a.ndim == 1 or not torch.equal(a, c))


def test_lora_fits(tmp_path: Path) -> None:
    loaded = classifier_for(vectors(9))
    wrapped = apply_lora(loaded.model, LoraOptions(r=2), seed=0)
    with evaluating(wrapped):
        assert torch.isfinite(loaded.adapter.positions(wrapped, vectors(9)).log_prob_N()).all()


def picture(shape: tuple[int, ...], target: Any = 1) -> Sample:
    return Sample(id="x", subject="x", target=target, image=np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ("samples", "size", "kind"),
    [
        ([picture((28, 28), 9)] * 2, (28, 28, 1), "SmallResNet"),
        ([picture((32, 32, 3))], (32, 32, 3), "SmallResNet"),
        ([picture((33, 20, 1))], (32, 32, 3), "SmallResNet"),
        ([picture((9, 12, 4))], (9, 12, 3), "SmallResNet"),
        ([picture((9, 12)), picture((12, 9))], (32, 32, 3), "SmallResNet"),
        ([Sample(id="x", subject="x", target=3, image=Path("a.png"))], (32, 32, 3), "SmallResNet"),
        ([picture((1, 7, 1), 4)], (1, 7, 1), "Mlp"),
    ],
)
def test_the_model_that_fits(samples: list[Sample], size: tuple[int, int, int], kind: str) -> None:
    made = classifier_for(samples)
    rules = made.adapter.preprocess  # type: ignore[attr-defined]
    assert (rules.height, rules.width, rules.channels) == size
    assert type(made.model).__name__ == f"{kind}ForImageClassification"
    assert made.adapter.num_classes == 1 + int(samples[0].target)  # type: ignore[attr-defined]


def test_samples_that_no_classifier_fits() -> None:
    for samples, words in (([], "none were given"), ([picture((9, 9), "cat")], "'x' has the target 'cat'")):
        with pytest.raises(UserError, match=words):
            classifier_for(samples)
    with pytest.raises(UserError, match="resnet"):
        init_classifier(3, 8, arch="nlp")  # type: ignore[arg-type]
    assert init_classifier(3, (1, 4), 1, arch="mlp", hidden_sizes=(6,)).model.classifier.in_features == 6  # type: ignore[union-attr]
