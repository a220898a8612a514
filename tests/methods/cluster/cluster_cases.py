"""Tiny models and data for the building blocks of the flagship."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from expunge.data.samples import Sample
from expunge.models.adapter import Adapter, Batch, Head, Modality
from expunge.models.text import TextAdapter

WORDS = [f"w{i}" for i in range(28)]
WIDTH = 16


@dataclass
class Case:
    model: nn.Module
    adapter: Adapter
    samples: list[Sample]


def text_samples(count: int, seed: int) -> list[Sample]:
    """Prompts and answers of different lengths, so that batches are padded."""
    rng = np.random.default_rng(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, size=rng.integers(low, high)))

    return [Sample(id=f"{seed}-{i}", subject="s", prompt=words(2, 5), target=words(1, 5)) for i in range(count)]


def text_adapter() -> TextAdapter:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="[UNK]", pad_token="</s>")
    return TextAdapter(tokenizer=tokenizer, context=32)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS) + 2, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=2, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


class Convolutions(nn.Module):
    """Two convolutions (stride, padding and dilation in use), pooling, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.act = torch.tanh
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 5, 2, dilation=2)
        self.middle = nn.Linear(5, 6)
        self.classifier = nn.Linear(6, 3)

    def hidden(self, pixels: Tensor) -> Tensor:
        pooled = self.act(self.second(self.act(self.first(pixels)))).mean((2, 3))
        return torch.tanh(self.middle(pooled))


@dataclass
class ImageAdapter(Adapter):
    """Smallest possible classifier adapter: ``model.hidden`` and ``model.classifier``."""

    modality: Modality = "classifier"

    def encode(self, sample: Sample) -> Any:
        assert isinstance(sample.image, np.ndarray)
        return torch.from_numpy(sample.image).float().permute(2, 0, 1) / 255.0

    def collate(self, samples: Sequence[Sample]) -> Batch:
        pixels = torch.stack([self.cached(s) for s in samples])
        num = len(samples)
        targets = torch.tensor([int(s.target) for s in samples])
        return Batch({"pixel_values": pixels}, targets, torch.arange(num), torch.zeros(num, dtype=torch.long), num, num)

    def hidden_and_head(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Head]:
        inner: Any = model
        return inner.hidden(batch.inputs["pixel_values"]), Head(inner.classifier)

    def num_tokens(self, sample: Sample) -> int:
        return 1

    def num_targets(self, sample: Sample) -> int:
        return 1

    def save(self, folder: Any) -> None:
        return None


def image_samples(count: int, side: int = 8) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            id=f"image-{i}",
            subject="c",
            target=int(rng.integers(3)),
            image=rng.integers(0, 256, size=(side, side, 3), dtype=np.uint8),
        )
        for i in range(count)
    ]


def images() -> Case:
    torch.manual_seed(0)
    return Case(Convolutions().eval(), ImageAdapter(), image_samples(9))


def llamas() -> Case:
    return Case(llama(), text_adapter(), text_samples(9, 1))


def gpt2s() -> Case:
    return Case(gpt2(), text_adapter(), text_samples(9, 1))


ALL = [llamas, gpt2s, images]
torch.set_num_threads(1)
