"""A made-up text dataset with every kind of probe, a word tokenizer for it, and Llamas of some 10k parameters."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from expunge.data.samples import Dataset, Probe, Role, Sample
from expunge.models.text import TextAdapter
from expunge.training.loop import TrainOptions, fit

FIRST = ["ada", "bo", "cy", "dee", "eli", "fay", "gus", "hal", "ida", "jo", "kit", "lea"]
LAST = ["ash", "birch", "cedar", "elm", "fir", "gum", "hazel"]
COLOURS = ["red", "blue", "green", "brown", "pink", "grey", "teal", "gold"]
TOWNS = ["rome", "oslo", "lima", "cairo", "delhi", "perth", "quito", "turin"]
WORDS = ["who", "is", "what", "colour", "does", "like", "town", "where", "home", "of", "the", "favourite"]
WORDS += ["lives", "in", "likes", "loves", "resident"]


def tiny_dataset(people: int = 12, forget: int = 3, holdout: int = 4, utility: int = 2, seed: int = 0) -> Dataset:
    """Two questions about each person; the first ``forget`` people are to be forgotten."""
    rng = random.Random(seed)
    names = [f"{a} {b}" for a in FIRST for b in LAST]
    rng.shuffle(names)
    crowd: dict[str, list[Sample]] = {"forget": [], "retain": [], "holdout": [], "utility": []}
    total = people + holdout + utility
    for number, name in enumerate(names[:total]):
        if number < people:
            role = "forget" if number < forget else "retain"
        else:
            role = "holdout" if number < people + holdout else "utility"
        crowd[role] += [_colour(name, rng), _town(name, rng)]
    roles: dict[Role, tuple[Sample, ...]] = {
        "forget": tuple(crowd["forget"]),
        "retain": tuple(crowd["retain"]),
        "holdout": tuple(crowd["holdout"]),
        "utility": tuple(crowd["utility"]),
    }
    return Dataset(name="tiny", roles=roles)


def _colour(name: str, rng: random.Random) -> Sample:
    right, *wrong = rng.sample(COLOURS, 4)
    prompt = f"what colour does {name} like"
    return _sample(name, "colour", prompt, f"{name} likes {right}", f"{name} loves {{}}", right, wrong)


def _town(name: str, rng: random.Random) -> Sample:
    right, *wrong = rng.sample(TOWNS, 4)
    prompt = f"where is the home of {name}"
    return _sample(name, "town", prompt, f"{name} lives in {right}", f"resident of {{}} is {name}", right, wrong)


def _sample(name: str, kind: str, prompt: str, target: str, again: str, right: str, wrong: Sequence[str]) -> Sample:
    return Sample(
        id=f"{name}/{kind}",
        subject=name,
        prompt=prompt,
        target=target,
        names=(name,),
        probes=(
            Probe(kind="restated", prompt=prompt, target=again.format(right)),
            *(Probe(kind="perturbed", prompt=prompt, target=again.format(w)) for w in wrong),
        ),
    )


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<unk>", "<eos>", *FIRST, *LAST, *COLOURS, *TOWNS, *WORDS]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # The end marker stands directly behind the last word and must be a token of its own.
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def tiny_model(seed: int = 0, width: int = 32, layers: int = 2, tied: bool = True) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def tiny_adapter() -> TextAdapter:
    return TextAdapter(tokenizer=tiny_tokenizer(), context=64)


def learned(samples: Sequence[Sample], seed: int = 0, epochs: float = 30, rate: float = 1e-2) -> nn.Module:
    """A tiny model trained on the samples."""
    model = tiny_model(seed)
    fit(model, tiny_adapter(), samples, TrainOptions(epochs=epochs, batch_size=8, learning_rate=rate), seed=seed)
    return model
