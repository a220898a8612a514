"""Signals and total variation against the full logits of a tiny model, computed one sample at a time."""

from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models import adapter as adapter_module
from expunge.models.snapshot import snapshot
from expunge.models.text import TextAdapter
from expunge.signals.distribution import total_variation, tv_per_token
from expunge.signals.forward import collect, token_numbers
from expunge.signals.record import Signals, text_sizes

WORDS = [f"w{i}" for i in range(57)]


def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<unk>", "<eos>", *WORDS])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def llama(seed: int = 0, vocab: int = 60) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


SAMPLES = [
    Sample(id="a", subject="s1", prompt="w1 w2 w3", target="w4 w5 w6 w7 w8"),
    Sample(id="b", subject="s1", prompt="w9", target="w10"),
    Sample(id="doc", subject="s2", target="w11 w12 w13 w14 w15 w16 w17 w18 w19"),
    Sample(id="c", subject="s3", prompt="w1 w1 w1 w1 w1 w1", target="w1 w2"),
]


@pytest.fixture(scope="module")
def setting() -> tuple[LlamaForCausalLM, TextAdapter]:
    return llama(), TextAdapter(tokenizer=tokenizer(), context=32)


def slow(model: nn.Module, adapter: TextAdapter, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (L, V) in double precision and target ids (L,) of one sample alone, from whole logits."""
    coded = adapter.encode(sample)
    ids = torch.tensor([coded.ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    return logits[coded.first - 1 : -1].log_softmax(1), ids[0, coded.first :]


@pytest.mark.parametrize("max_tokens", [8, 20, 4096])
def test_signals_equal_whole_logits(setting: tuple[LlamaForCausalLM, TextAdapter], max_tokens: int) -> None:
    model, adapter = setting
    found = collect(model, adapter, SAMPLES, max_tokens=max_tokens)
    assert [s.id for s in found] == ["a", "b", "doc", "c"]
    for sample, signals in zip(SAMPLES, found, strict=True):
        log_p, targets = slow(model, adapter, sample)
        chosen = log_p.gather(1, targets[:, None])[:, 0]
        p = log_p.exp()
        mean = (p * log_p).sum(1)
        np.testing.assert_allclose(signals.log_prob_L, chosen.numpy(), atol=1e-5)
        np.testing.assert_allclose(signals.mean_L, mean.numpy(), atol=1e-5)
        np.testing.assert_allclose(signals.entropy_L, torch.distributions.Categorical(p).entropy().numpy(), atol=1e-5)
        variance = (p * log_p**2).sum(1) - mean**2
        np.testing.assert_allclose(signals.std_L, variance.sqrt().numpy(), atol=1e-4)
        ranks = [int((log_p[t] > chosen[t]).sum()) for t in range(len(targets))]
        assert signals.rank_L.tolist() == ranks
        assert signals.hit_L.tolist() == [r == 0 for r in ranks]
        assert signals.loss == pytest.approx(-float(chosen.mean()), abs=1e-5)
        assert signals.prob == pytest.approx(math.exp(-signals.loss))
        assert signals.subject == sample.subject


def test_chunking_changes_nothing(
    setting: tuple[LlamaForCausalLM, TextAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = setting
    whole = collect(model, adapter, SAMPLES)
    monkeypatch.setattr(adapter_module, "CHUNK_ELEMENTS", 120)  # two positions at a time
    for one, other in zip(whole, collect(model, adapter, SAMPLES), strict=True):
        np.testing.assert_allclose(one.log_prob_L, other.log_prob_L, atol=1e-6)
        np.testing.assert_allclose(one.std_L, other.std_L, atol=1e-6)


def test_mode_and_gradients_are_left_alone(setting: tuple[LlamaForCausalLM, TextAdapter]) -> None:
    model, adapter = setting
    model.train()
    collect(model, adapter, SAMPLES[:1])
    assert model.training and all(p.grad is None for p in model.parameters())
    assert collect(model, adapter, []) == []


def test_moments_of_known_distributions() -> None:
    """Uniform: mu = -log V, sigma = 0. Two values p, 1 - p: sigma = |log(p/(1-p))| sqrt(p(1-p))."""
    share = 0.8
    logits = torch.tensor([[0.0] * 4, [math.log(share), math.log(1 - share), -math.inf, -math.inf]])
    numbers = token_numbers(logits, torch.tensor([2, 1])).numpy()
    assert numbers[0] == pytest.approx([-math.log(4), 0.0, -math.log(4), 0.0, 0.0], abs=1e-6)
    spread = abs(math.log(share / (1 - share))) * math.sqrt(share * (1 - share))
    mean = share * math.log(share) + (1 - share) * math.log(1 - share)
    assert numbers[1] == pytest.approx([math.log(1 - share), 0.0, mean, spread, 1.0], abs=1e-6)


def test_deviation_does_not_cancel_for_near_certain_tokens() -> None:
    logits = torch.zeros(1, 50_000)
    logits[0, 0] = 40.0
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    exact = float(((p * (log_p - (p * log_p).sum()) ** 2).sum()).sqrt())
    assert float(token_numbers(logits, torch.tensor([0]))[0, 3]) == pytest.approx(exact, rel=1e-3)


def test_sizes_are_of_the_utf8_text() -> None:
    text = "größe " * 50
    assert text_sizes(text) == (len(text.encode()), len(zlib.compress(text.encode())))
    assert text_sizes(7) == (1, len(zlib.compress(b"7")))


def test_a_sample_without_targets_has_no_loss() -> None:
    none = np.zeros(0, dtype=np.float32)
    empty = Signals(
        id="e", subject="s", log_prob_L=none, hit_L=none > 0, mean_L=none, std_L=none,
        rank_L=none.astype(np.int32), text_bytes=0, zlib_bytes=8,
    )  # fmt: skip
    assert math.isnan(empty.loss) and math.isnan(empty.prob) and math.isnan(empty.bits_per_byte)
    assert empty.summary()["loss"] is None and empty.summary()["tokens"] == 0


def test_bits_per_byte_closed_form() -> None:
    halves = np.full(4, math.log(0.5), dtype=np.float32)
    signals = Signals(
        id="e", subject="s", log_prob_L=halves, hit_L=halves > 0, mean_L=halves, std_L=halves,
        rank_L=halves.astype(np.int32), text_bytes=8, zlib_bytes=16,
    )  # fmt: skip
    assert signals.bits_per_byte == pytest.approx(0.5)
    assert signals.prob == pytest.approx(0.5)


def test_cut_samples_are_marked() -> None:
    adapter = TextAdapter(tokenizer=tokenizer(), context=6)
    found = collect(llama(), adapter, SAMPLES)
    assert {s.id for s in found if s.truncated} == {"a", "doc", "c"}


# -- total variation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_logits", [False, True])
def test_total_variation_equals_whole_distributions(whole_logits: bool) -> None:
    adapter = TextAdapter(tokenizer=tokenizer(), context=32, whole_logits=whole_logits)
    model, references = llama(0), [llama(1), llama(2)]
    stores = [snapshot(r, adapter, SAMPLES, max_tokens=20) for r in references]
    found = total_variation(model, adapter, list(reversed(SAMPLES)), stores, max_tokens=12)
    for sample, values in zip(reversed(SAMPLES), found, strict=True):
        ours = slow(model, adapter, sample)[0].exp()
        assert values.shape == (len(ours), 2)
        for column, reference in enumerate(references):
            theirs = slow(reference, adapter, sample)[0].exp()
            np.testing.assert_allclose(values[:, column], (0.5 * (ours - theirs).abs().sum(1)).numpy(), atol=1e-5)


def test_a_model_has_no_distance_to_itself_and_one_to_what_it_becomes() -> None:
    adapter, model = TextAdapter(tokenizer=tokenizer(), context=32), llama()
    store = snapshot(model, adapter, SAMPLES)
    assert max(v.max() for v in tv_per_token(model, adapter, SAMPLES, store)) < 1e-6
    with torch.no_grad():
        model.lm_head.weight.add_(torch.randn_like(model.lm_head.weight))
    assert min(v.mean() for v in tv_per_token(model, adapter, SAMPLES, store)) > 0.05


def test_the_store_is_smaller_than_logits() -> None:
    adapter, model = TextAdapter(tokenizer=tokenizer(), context=32), llama()
    store = snapshot(model, adapter, SAMPLES)
    positions = sum(len(t) for t in store.targets.values())
    assert store.bytes == positions * 16 * 4 < positions * 60 * 4
    assert not any(p.requires_grad for p in store.head.module.parameters())


def test_what_cannot_be_compared_is_refused() -> None:
    adapter, model = TextAdapter(tokenizer=tokenizer(), context=32), llama()
    store = snapshot(model, adapter, SAMPLES[:1])
    with pytest.raises(UserError, match="not run on sample 'doc'"):
        tv_per_token(model, adapter, SAMPLES, store)
    with pytest.raises(UserError, match="one vocabulary"):
        tv_per_token(llama(vocab=70), adapter, SAMPLES[:1], store)
    other = TextAdapter(tokenizer=tokenizer(), context=32, template="{prompt} w50 {target}")
    with pytest.raises(UserError, match="different tokens"):
        tv_per_token(model, other, SAMPLES[:1], store)
    with pytest.raises(UserError, match="at least one reference"):
        total_variation(model, adapter, SAMPLES, [])
    with pytest.raises(UserError, match="no samples"):
        snapshot(model, adapter, [])
