"""AM-softmax: the loss against its formula, margin only where it is learnt, folders, embeddings and faces."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.metrics.clear import Faces, face_centroid
from expunge.models.adapter import Head, Positions, evaluating
from expunge.models.am_softmax import CosineHead, embeddings
from expunge.models.classifier import ClassifierAdapter
from expunge.models.load import load_model, save_model
from expunge.models.lora import LoraOptions, apply_lora, merge_lora
from expunge.models.losses import mean_losses
from expunge.models.memory import estimate
from expunge.models.tiny import ARCHS, classifier_for, init_classifier
from expunge.training.loop import TrainOptions, fit
from expunge.training.stacked import obstacle
from expunge.training.terms import Teacher, View, nll_N

torch.set_num_threads(1)
KINDS = [arch for arch in ARCHS if arch.endswith("am-softmax")]


def people(number: int = 5, each: int = 6, seed: int = 0) -> list[Sample]:
    """Pictures of people: a texture that is the person's own, and noise."""
    rng = np.random.default_rng(seed)
    looks = np.random.default_rng(7).integers(0, 256, (number, 16, 16, 3))
    return [
        Sample(
            id=f"{seed}-{who}-{i}", subject=f"person {who}", target=who,
            image=(0.6 * looks[who] + 0.4 * rng.integers(0, 256, (16, 16, 3))).astype(np.uint8),
        )
        for who in range(number)
        for i in range(each)
    ]  # fmt: skip


def by_hand(model: Any, hidden_D: torch.Tensor, own: int, scale: float, margin: float) -> float:
    """Equation 6 for one picture, number by number, in double precision."""
    weight = next(m for m in model.modules() if isinstance(m, CosineHead)).weight.detach().double().numpy()
    h = hidden_D.detach().double().numpy()
    cosines = [sum(a * b for a, b in zip(h, w, strict=True)) / math.sqrt(h @ h) / math.sqrt(w @ w) for w in weight]
    right = math.exp(scale * (cosines[own] - margin))
    return -math.log(right / (right + sum(math.exp(scale * c) for j, c in enumerate(cosines) if j != own)))


@pytest.mark.parametrize("arch", KINDS)
def test_the_loss_is_the_papers_and_measured_is_without_margin(arch: Any) -> None:
    samples = people(4, 2)
    loaded = init_classifier(4, 16, arch=arch, seed=2)
    model, adapter = loaded.model, loaded.adapter
    assert isinstance(adapter, ClassifierAdapter) and not adapter.whole_logits
    model.eval()
    seen = adapter.positions(model, samples)
    assert seen.head.margin == pytest.approx(12)
    own = model(**adapter.collate(samples).inputs)
    torch.testing.assert_close(own.logits, seen.head(seen.hidden_ND))
    assert float(own.logits.detach().abs().max()) <= 30 + 1e-4
    for margin, losses in ((0.0, -seen.log_prob_N()), (0.4, nll_N(View(seen, samples)))):
        wanted = [by_hand(model, h, int(s.target), 30, margin) for h, s in zip(seen.hidden_ND, samples, strict=True)]
        assert losses.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    measured = mean_losses(model, adapter, samples)
    assert measured == pytest.approx((-seen.log_prob_N()).tolist())
    # The original's side of a preference has the margin too: both are alike before the first step.
    sums = Teacher.of(model, adapter, [], sums=samples).log_prob_sum
    assert [sums[s.id] for s in samples] == pytest.approx(View(seen, samples).log_prob_B().tolist())


def test_the_gradient_is_the_closed_form() -> None:
    """dL/dz = softmax(z − M·1[y]) − 1[y], and only the direction of an embedding matters."""
    head = CosineHead(6, 3, scale=5.0, margin=0.3)
    hidden = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.tensor([0, 2, 1, 1])
    positions = Positions(hidden, targets, torch.arange(4), 4, Head(head, margin=5.0 * 0.3))
    (found,) = torch.autograd.grad(-positions.learnt_log_prob_N().sum(), hidden)
    cosines = torch.cosine_similarity(hidden[:, None], head.weight[None], dim=2)
    lowered = 5.0 * (cosines - 0.3 * torch.nn.functional.one_hot(targets, 3))
    slope = (lowered.softmax(1) - torch.nn.functional.one_hot(targets, 3)).detach()
    (wanted,) = torch.autograd.grad((slope * 5.0 * cosines).sum(), hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert float((found * hidden.detach()).sum(1).abs().max()) < 1e-5
    torch.testing.assert_close(head(hidden.detach()), head(7 * hidden.detach()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", KINDS)
def test_margin_pulls_people_apart_and_faces_are_found(arch: Any) -> None:
    """Learnt with the margin, own centres are nearer than others by more; unseen pictures go to their person."""
    gaps = []
    for margin in (0.0, 0.4):
        loaded = init_classifier(5, 16, arch=arch, seed=1)
        next(m for m in loaded.model.modules() if isinstance(m, CosineHead)).margin = margin
        fit(loaded.model, loaded.adapter, people(), TrainOptions(epochs=12, batch_size=10, learning_rate=5e-3))
        with evaluating(loaded.model):
            logits = loaded.model(**loaded.adapter.collate(people()).inputs).logits / 30
        own = logits.gather(1, torch.tensor([[int(s.target)] for s in people()]))[:, 0]
        others = logits.scatter(1, torch.tensor([[int(s.target)] for s in people()]), -2.0).amax(1)
        gaps.append(float((own - others).mean()))
    assert gaps[1] > gaps[0] + 0.05 and gaps[1] > 0.4
    asked = people(each=2, seed=1)

    def faces(samples: list[Sample]) -> Faces:
        found = embeddings(loaded.model, loaded.adapter, samples)
        return Faces([s.id for s in samples], [s.subject for s in samples], found)

    assert embeddings(loaded.model, loaded.adapter, asked).shape == (10, 64 if "resnet" in arch else 48)
    assert face_centroid(faces(people()), faces(asked)).value >= 0.9


@pytest.mark.parametrize("arch", KINDS)
def test_folders_lora_and_estimates(arch: Any, tmp_path: Path) -> None:
    samples = people(3, 2)
    first = classifier_for(samples, arch, seed=3)
    save_model(first, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["am_softmax_scale"] == 30 and config["am_softmax_margin"] == 0.4
    again = load_model(tmp_path / "m", device="cpu")
    assert type(again.model) is type(first.model)
    before, after = first.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
    ours, theirs = (embeddings(x.model, x.adapter, samples) for x in (first, again))
    assert np.array_equal(ours, theirs)
    tuned = load_model(tmp_path / "m", device="cpu", lora=LoraOptions(r=2))
    assert not any("classifier" in n for n, p in tuned.model.named_parameters() if p.requires_grad)
    trained = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    assert estimate(tmp_path / "m", lora=LoraOptions(r=2)).trainable == trained
    fit(tuned.model, tuned.adapter, samples, TrainOptions(epochs=2, learning_rate=1e-2))
    moved = embeddings(tuned.model, tuned.adapter, samples)
    bare = merge_lora(tuned.model)
    np.testing.assert_allclose(embeddings(bare, tuned.adapter, samples), moved, rtol=1e-3, atol=1e-4)
    assert not np.allclose(moved, embeddings(first.model, first.adapter, samples), atol=1e-3)
    apply_lora(bare, LoraOptions(r=2))


def test_embedders_are_not_trained_in_stacks_which_know_no_margin() -> None:
    options = TrainOptions(optimizer="sgd")
    plain, with_margin = init_classifier(5, 16, arch="vit"), init_classifier(5, 16, arch="vit-am-softmax")
    assert obstacle(plain.model, plain.adapter, people(), options) is None
    assert "margin" in str(obstacle(with_margin.model, with_margin.adapter, people(), options))


def test_other_architectures_have_no_such_head(tmp_path: Path) -> None:
    save_model(init_classifier(3, 16, arch="mlp"), tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"am_softmax_scale": 30.0}))
    with pytest.raises(UserError, match=r"unknown model type with an AM-softmax head 'expunge_mlp'.*resnet, vit"):
        load_model(tmp_path / "m", device="cpu")
    with pytest.raises(UserError, match="did you mean 'vit-am-softmax'"):
        init_classifier(3, 16, arch="vit-amsoftmax")  # type: ignore[arg-type]
    adapter = init_classifier(3, 16, arch="vit-am-softmax").adapter
    with pytest.raises(UserError, match="is no class of this model: allowed are 0 to 2"):
        adapter.collate([Sample(id="x", subject="x", target=3, image=np.zeros((16, 16, 3), np.uint8))])
