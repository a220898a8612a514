"""Rounding against a slow reference in NumPy and its closed-form error bound; the given model stays as it is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from attack_cases import audited, exam, retrain
from expunge.attacks.exam import Checkpoint
from expunge.attacks.quantization import (
    QuantizationOptions,
    encode,
    equal_codes,
    matrices,
    quantization,
    quantized,
    unchanged_codes,
)
from expunge.errors import UserError
from expunge.models.lora import LoraOptions, apply_lora
from expunge.signals.forward import collect
from tiny_text import tiny_adapter, tiny_dataset, tiny_model


def slow(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Nearest of 2^bits evenly spaced levels, group by group, weight by weight."""
    out = np.empty_like(weight)
    for row in range(weight.shape[0]):
        for first in range(0, weight.shape[1], group):
            part = weight[row, first : first + group]
            levels = np.linspace(part.min(), part.max(), 2**bits)
            for i, w in enumerate(part):
                out[row, first + i] = levels[np.abs(levels - w).argmin()]
    return out


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("rows", "width", "group"), [(3, 64, 32), (2, 50, 32), (4, 7, 16), (1, 33, 32)])
def test_equals_the_slow_reference_and_keeps_the_error_bound(bits: int, rows: int, width: int, group: int) -> None:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(bits)).double()
    rounded = encode(weight, bits, group).weights_OI().double()
    assert torch.allclose(rounded, torch.from_numpy(slow(weight.numpy(), bits, group)), atol=1e-5)
    for first in range(0, width, group):
        part, error = weight[:, first : first + group], (rounded - weight)[:, first : first + group].abs()
        step = (part.amax(1) - part.amin(1)) / (2**bits - 1)
        assert bool((error.amax(1) <= step / 2 + 1e-6).all())
        # The bound is sharp enough to fail if a bit were lost, and the ends are levels themselves.
        assert torch.allclose(rounded[:, first : first + group].amax(1), part.amax(1), atol=1e-5)
        assert torch.allclose(rounded[:, first : first + group].amin(1), part.amin(1), atol=1e-5)


def test_codes_of_a_worked_example() -> None:
    codes = encode(torch.tensor([[0.0, 1.1, 1.6, 3.0]]), bits=2, group=4)
    assert codes.codes_OI.tolist() == [[0, 1, 2, 3]]
    assert codes.weights_OI().tolist() == [[0.0, 1.0, 2.0, 3.0]]


def test_a_constant_group_is_exact() -> None:
    weight = torch.full((2, 32), 0.37)
    assert torch.equal(encode(weight, 3).weights_OI(), weight)


def test_the_model_is_not_touched_and_only_matrices_are_rounded() -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    rounded = quantized(model, 4)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    after = dict(rounded.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(after[name], parameter) == (parameter.ndim == 1), name
    embedding = after["model.embed_tokens.weight"]
    assert all(len(row.unique()) <= 16 for row in embedding.detach())  # width 32: one group per row


def test_tied_weights_are_rounded_once_and_stay_tied() -> None:
    rounded = quantized(tiny_model(), 3)
    assert rounded.lm_head.weight is rounded.model.embed_tokens.weight
    assert len(matrices(tiny_model(tied=False))) == len(matrices(tiny_model())) + 1


def test_fewer_bits_disturb_the_losses_more() -> None:
    adapter, samples, model = tiny_adapter(), tiny_dataset()["retain"], tiny_model(seed=3)
    exact = np.array([s.loss for s in collect(model, adapter, samples)])
    moved = [
        np.abs(np.array([s.loss for s in collect(quantized(model, bits), adapter, samples)]) - exact).mean()
        for bits in (8, 4, 2)
    ]
    assert 0 < moved[0] < moved[1] < moved[2]


def test_gpt2_layers_are_grouped_along_their_input() -> None:
    odd = Conv1D(nf=5, nx=64)
    plain = nn.Linear(64, 5)
    plain.weight.data = odd.weight.data.T.clone()
    rounded = [quantized(nn.Sequential(m), 4)[0].weight for m in (odd, plain)]
    assert torch.equal(rounded[0].T, rounded[1])


def test_convolutions_are_grouped_per_output_channel() -> None:
    layer = nn.Conv2d(4, 3, kernel_size=3).to(memory_format=torch.channels_last)
    rounded = quantized(nn.Sequential(layer), 4)[0].weight
    assert torch.equal(rounded.flatten(1), encode(layer.weight.detach().flatten(1), 4).weights_OI())


def test_an_adapter_is_merged_before_rounding() -> None:
    bare = tiny_model()
    wrapped = apply_lora(copy.deepcopy(bare), LoraOptions(r=2))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    rounded = quantized(wrapped, 8)
    assert not hasattr(rounded, "peft_config") and hasattr(wrapped, "peft_config")
    merged = copy.deepcopy(wrapped).merge_and_unload()
    name = "model.layers.0.mlp.up_proj.weight"
    expected = encode(merged.state_dict()[name], 8).weights_OI()
    assert torch.equal(rounded.state_dict()[name], expected)
    assert not torch.equal(expected, encode(bare.state_dict()[name], 8).weights_OI())


def test_unchanged_codes() -> None:
    model, other = tiny_model(0), tiny_model(1)
    assert unchanged_codes(model, model, 4) == 1.0
    # Weights that moved by about a thousandth of a step round to the same codes, all but the few on an edge.
    nudged, chance = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in nudged.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=chance), alpha=5e-6)
    assert not torch.equal(nudged.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert unchanged_codes(model, nudged, 4) > 0.99
    share = unchanged_codes(model, other, 4)
    pairs = [
        (encode(a.weight_OI(), 4).codes_OI, encode(b.weight_OI(), 4).codes_OI)
        for a, b in zip(matrices(model).values(), matrices(other).values(), strict=True)
    ]
    same = sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    assert share == pytest.approx(same) and share < 0.2


@pytest.mark.parametrize(("bits", "group", "words"), [(1, 32, "2 to 8"), (16, 32, "2 to 8"), (4, 1, "at least 2")])
def test_impossible_settings_are_refused(bits: int, group: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        quantized(tiny_model(), bits, group=group)


def test_models_that_do_not_match_are_refused() -> None:
    with pytest.raises(UserError, match="different weight matrices"):
        unchanged_codes(tiny_model(), tiny_model(layers=1), 4)
    with pytest.raises(UserError, match="no weight matrix"):
        quantized(nn.LayerNorm(4), 4)


def test_the_attack_finds_what_is_left_at_every_precision_and_nothing_in_a_retrain() -> None:
    own, clean, reference = (
        quantization(audited(c), c, QuantizationOptions()) for c in (exam().audited, retrain(), exam().references[0])
    )
    for name in ("quantization.8", "quantization.4"):
        means = [float(np.mean(f.scores[name]["forget"])) for f in (own, clean, reference)]
        assert means[0] > means[1] + 3 * abs(means[1] - means[2])
    assert set(own.scores) == {"quantization.8", "quantization.4", "quantization.3"}
    slow = collect(quantized(exam().audited.model, 4), exam().audited.adapter, exam().forget)
    assert own.scores["quantization.4"]["forget"] == pytest.approx([-s.loss for s in slow])
    retain = own.scores["quantization.3"]["retain"]
    assert own.figures["quantization.3.retain"].value == pytest.approx(np.mean(retain))


def test_the_attack_brings_back_an_edit_smaller_than_a_step() -> None:
    before = exam().audited
    edited, chance = copy.deepcopy(before.model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in edited.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=chance), alpha=1e-4)
    checkpoint = Checkpoint.of(edited, before.adapter)
    found = quantization(audited(checkpoint), checkpoint, QuantizationOptions(bits="3"))
    clean = quantization(audited(retrain()), retrain(), QuantizationOptions(bits="3"))
    share, other = (f.figures["quantization.3.unchanged_codes"] for f in (found, clean))
    assert share.value > 0.99 and other.value < 0.5
    same, total = equal_codes(before.model, edited, 3)
    assert share.value == same / total and share.n == total


def test_the_attack_says_when_codes_cannot_be_compared() -> None:
    small = Checkpoint.of(tiny_model(layers=1), tiny_adapter())
    found = quantization(audited(small), small, QuantizationOptions(bits="4"))
    assert "other weight matrices" in found.notes[0] and "quantization.4.unchanged_codes" not in found.figures
    own = exam().original
    assert (
        own is not None
        and "quantization.4.unchanged_codes" not in quantization(exam(), own, QuantizationOptions(bits="4")).figures
    )


def test_bits_are_a_list_of_numbers() -> None:
    assert QuantizationOptions(bits=" 4, 8,4").widths == [4, 8]
    for wrong, words in (("4,nine", "'nine' is not"), ("16", "'16' is not"), (" , ", "no bits")):
        with pytest.raises(UserError, match=words):
            QuantizationOptions(bits=wrong)
