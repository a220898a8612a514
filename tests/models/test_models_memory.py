"""Estimates against loaded models and counted activations; refusal before a start."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models import memory
from expunge.models.adapter import Adapter, Meter, evaluating, num_parameters
from expunge.models.load import Loaded, load_model, save_model
from expunge.models.lora import LoraOptions
from expunge.models.memory import available_memory, check_resources, estimate
from expunge.models.tiny import init_classifier, init_llava, init_qwen2vl, init_text

torch.set_num_threads(1)
QA = [Sample(id=str(i), subject="x", prompt=f"Question {i}?", target="an answer of words " * 12) for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(init_text(QA, "tiny"), tmp_path_factory.mktemp("m") / "tiny")


def kept_bytes(loaded: Loaded, samples: list[Sample]) -> int:
    """Bytes that autograd keeps for the backward pass, weights not counted."""
    weights = {p.data_ptr() for p in loaded.model.parameters()}
    kept: dict[tuple[int, int], int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.data_ptr() not in weights:
            kept[(storage.data_ptr(), storage.nbytes())] = storage.nbytes()
        return tensor

    loaded.model.train()
    with saved_tensors_hooks(pack, lambda t: t):
        loss = -loaded.adapter.positions(loaded.model, samples).log_prob_N().mean()
    loss.backward()
    return sum(kept.values())


def test_figures_are_those_of_the_loaded_model(folder: Path) -> None:
    loaded = load_model(folder, device="cpu")
    parameters = sum(p.numel() for p in loaded.model.parameters())
    full = estimate(folder)
    assert full.parameters == full.trainable == parameters
    assert (full.weights, full.gradients, full.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    assert full.disk == pytest.approx((folder / "model.safetensors").stat().st_size, rel=0.02)
    half = estimate(folder, dtype="bf16", train=False, copies=2, outputs=3)
    assert (half.weights, half.gradients, half.optimizer) == (2 * parameters, 0, 0)
    assert half.memory == 3 * half.weights + half.activations and half.disk == 3 * 2 * parameters
    assert estimate(folder, dtype="auto").weights == full.weights
    assert estimate(folder, optimizer="sgd").optimizer == 0
    for targets in ("all-linear", "q_proj,v_proj"):
        options = LoraOptions(r=4, targets=targets)
        tuned = load_model(folder, device="cpu", lora=options)
        trainable = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
        assert estimate(folder, lora=options).trainable == trainable
        assert estimate(folder, lora=options).parameters == parameters + trainable
    save_model(tuned, folder.parent / "adapter")
    assert estimate(folder.parent / "adapter").trainable == trainable


def test_activations_bound_what_autograd_keeps(folder: Path) -> None:
    loaded = load_model(folder, device="cpu")
    tokens = loaded.adapter.collate(QA).num_tokens
    measured = kept_bytes(loaded, QA)
    told = estimate(folder, batch_tokens=tokens).activations
    assert measured < told < 1.6 * measured


@pytest.mark.parametrize("arch", ["resnet", "vit"])
def test_image_models(arch: Any, tmp_path: Path) -> None:
    save_model(init_classifier(3, 32, arch=arch), tmp_path / "c")
    loaded = load_model(tmp_path / "c", device="cpu")
    pixels = np.zeros((32, 32, 3), np.uint8)
    images = [Sample(id=str(i), subject="x", target=0, image=pixels) for i in range(8)]
    measured = kept_bytes(loaded, images)
    told = estimate(tmp_path / "c", batch_tokens=loaded.adapter.collate(images).num_tokens).activations
    assert 0.6 * measured < told < 2.0 * measured
    options = LoraOptions(r=2)
    tuned = load_model(tmp_path / "c", device="cpu", lora=options)
    trainable = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    assert estimate(tmp_path / "c", lora=options).trainable == trainable


@pytest.mark.parametrize("build", [init_llava, init_qwen2vl])
@pytest.mark.parametrize("targets", ["all-linear", "language", "vision"])
def test_lora_on_towers(tmp_path: Path, targets: str, build: Any) -> None:
    save_model(build(QA), tmp_path / "l")
    options = LoraOptions(r=2, targets=targets)
    tuned = load_model(tmp_path / "l", device="cpu", lora=options)
    trainable = sum(p.numel() for p in tuned.model.parameters() if p.requires_grad)
    assert estimate(tmp_path / "l", lora=options).trainable == trainable


def test_refused_before_the_start(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = estimate(folder, outputs=2)
    assert available_memory("cpu") > 1 << 20
    monkeypatch.setattr(memory, "available_memory", lambda _: 64 << 30)
    check_resources(needed, tmp_path / "not" / "there" / "yet", device="cpu")
    assert list(tmp_path.iterdir()) == []
    Usage = namedtuple("Usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(memory.shutil, "disk_usage", lambda _: Usage(1, 1, needed.disk))
        with pytest.raises(UserError, match="of disk are needed"):
            check_resources(needed, tmp_path, device="cpu")
    monkeypatch.setattr(memory, "available_memory", lambda _: needed.memory)
    with pytest.raises(UserError, match=r"of memory are needed .* parameters"):
        check_resources(needed, tmp_path, device="cpu")


def test_wrong_estimates(folder: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        estimate(folder, optimizer="adam-w")
    with pytest.raises(UserError, match="at least 1, 0 and 0"):
        estimate(folder, batch_tokens=0)
    with pytest.raises(UserError, match="does not exist"):
        estimate(folder.parent / "nothing")


def test_meter_counts_parameters_once_and_follows_kaplan() -> None:
    model = torch.nn.Linear(3, 2)
    calls = 0
    original = model.parameters

    def counted(recurse: bool = True):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        return original(recurse)

    model.parameters = counted  # type: ignore[method-assign]
    meter = Meter()
    for _ in range(5):
        meter.count(model, 10)
    with evaluating(model):
        meter.count(model, 10)
    assert calls == 1 and num_parameters(model) == 8
    assert meter.tokens_forward == 60 and meter.tokens_backward == 50
    assert meter.flops == 5 * 6 * 8 * 10 + 2 * 8 * 10
    for width in range(1, 40):  # models die at once, so that their ids are used again
        assert num_parameters(torch.nn.Linear(width, 1, bias=False)) == width


def test_cache_tells_samples_apart() -> None:
    adapter: Adapter = init_text(QA, "tiny-test").adapter
    first = adapter.cached(Sample(id="x", subject="x", prompt="Question 1?", target="a"))
    assert adapter.cached(Sample(id="x", subject="x", prompt="Question 1?", target="b")) != first
    assert adapter.cached(Sample(id="x", subject="y", prompt="Question 1?", target="a")) is first
