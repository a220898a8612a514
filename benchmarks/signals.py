"""All pass-sharing membership statistics against plain loss passes, alternating in one run.

    python benchmarks/signals.py [--model FOLDER] [--texts 48] [--tokens 120] [--rounds 3] [--threads 1] [--shapes a,b]

Three sides over the same texts in the same batches, in CPU seconds:

* plain: one forward pass of the audited model with cross-entropy of the target tokens;
* shared: every attack of :data:`ATTACKS` over signals that are collected once, NumPy included;
* each: the same attacks, each with a pass of its own, as in tools that keep nothing.

What pair attacks compare with (a shadow, the original) was read before, for all sides alike.

Printed: shared / plain (aim: at most 1.2) and each / shared (aim: at least 8). Plain is as lean as it gets: hidden
states at the targets only, the bare head, logits in the same chunks. Token ids are cached beforehand for all sides.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Attack, get_attack
from expunge.data.people_words import CITIES, SURNAMES
from expunge.data.samples import Sample
from expunge.models import adapter as seam
from expunge.models.adapter import Adapter, evaluating
from expunge.models.load import load_model
from expunge.models.text import TextAdapter
from expunge.models.tiny import train_tokenizer

ATTACKS = (
    "loss", "zlib", "min_k", "min_k++", "surp", "dc_pdd", "camia", "dataset_inference", "reference_ratio",
    "reference_difference", "ez_mia", "wbc", "update_loss", "update_logit",
)  # fmt: skip
# name: width, inner width, layers, heads, vocabulary, share of the texts (large models see fewer)
SHAPES = {
    "small": (128, 320, 3, 4, 1500, 1.0),  # the embedded preset
    "5.8M": (256, 688, 6, 8, 4096, 1.0),
    "stories15M": (288, 768, 6, 6, 32000, 0.5),  # the shape of llama2.c's stories15M
    "27M": (512, 1376, 8, 8, 4096, 0.5),
    "gpt2-size": (768, 2048, 12, 12, 50257, 0.17),
}


def llama(shape: str, seed: int) -> nn.Module:
    width, inner, layers, heads, vocab, _ = SHAPES[shape]
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def documents(count: int, tokens: int, length: Callable[[str], int]) -> list[Sample]:
    """Made-up documents of about ``tokens`` tokens under the tokenizer that ``length`` counts with."""
    rng, found = random.Random(0), []
    for number in range(count):
        text = ""
        while length(text) < tokens:
            who, where, whom = rng.choice(SURNAMES), rng.choice(CITIES), rng.choice(SURNAMES)
            text += f"{who} of {where} owed {whom} {rng.randint(1, 9999)} pounds. "
        found.append(Sample(id=str(number), subject=str(number // 4), target=text))
    return found


def plain(model: nn.Module, adapter: Adapter, samples: Sequence[Sample], max_tokens: int) -> float:
    """Sum of the losses of all target tokens, in nats."""
    total = 0.0
    with evaluating(model):
        for group in adapter.batches(samples, max_tokens):
            states = adapter.positions(model, [samples[i] for i in group])
            step = max(1, seam.CHUNK_ELEMENTS // states.vocab)
            for hidden_CD, targets_C in zip(
                torch.split(states.hidden_ND, step), torch.split(states.targets_N, step), strict=True
            ):
                total += float(cross_entropy(states.head.module(hidden_CD), targets_C, reduction="sum"))
    return total


def fresh(exam: Exam) -> Exam:
    """The same exam with nothing computed yet for the audited model."""
    audited = Checkpoint.of(exam.audited.model, exam.audited.adapter)
    audited.max_tokens = exam.audited.max_tokens
    return replace(exam, audited=audited, shared={})


def attacked(exam: Exam, attacks: Sequence[Attack]) -> None:
    for attack in attacks:
        attack.run(exam, exam.audited, attack.options())


def measure(exam: Exam, rounds: int) -> dict[str, float]:
    attacks = [get_attack(name) for name in ATTACKS]
    everything = [s for role in exam.samples.values() for s in role] + [*exam.aux]

    def each() -> None:
        for attack in attacks:
            attacked(fresh(exam), [attack])

    sides: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(exam.audited.model, exam.audited.adapter, everything, exam.audited.max_tokens),
        "shared": lambda: attacked(fresh(exam), attacks),
        "each": each,
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    sides["shared"]()  # first calls, caches of token ids, signals of the other models
    for _ in range(rounds):
        for side, run in sides.items():
            start = time.process_time()
            run()
            times[side].append(time.process_time() - start)
    ratios = {
        "shared/plain": median(s / p for s, p in zip(times["shared"], times["plain"], strict=True)),
        "each/shared": median(e / s for e, s in zip(times["each"], times["shared"], strict=True)),
    }
    numbers = {f"{side}_s": min(found) for side, found in times.items()} | ratios
    return {name: round(number, 3) for name, number in numbers.items()}


def build(models: Sequence[nn.Module], adapter: Adapter, texts: int, tokens: int, max_tokens: int) -> Exam:
    samples = documents(texts, tokens, lambda text: len(adapter.tokenizer(text)["input_ids"]))
    part = max(4, texts // 4 // 4 * 4)  # whole subjects
    audited, shadow = (Checkpoint.of(m, adapter, k) for m, k in zip(models, ("audited", "shadow"), strict=True))
    audited.max_tokens = shadow.max_tokens = max_tokens
    return Exam(
        audited=audited,
        original=shadow,  # any other model costs the same
        shadows=[shadow],
        samples={"forget": samples[:part], "holdout": samples[part : 2 * part], "retain": samples[2 * part : 3 * part]},
        aux=samples[3 * part :],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", help="folder of a real model to measure beside the built ones")
    parser.add_argument("--texts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=4096, help="padded tokens of a batch")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = (given.tokens, given.max_tokens)
    if given.model:
        loaded = [load_model(given.model) for _ in range(2)]
        exam = build([one.model for one in loaded], loaded[0].adapter, given.texts, *settings)
        print(json.dumps({"shape": given.model} | measure(exam, given.rounds)), flush=True)
    vocabulary = train_tokenizer([s.target for s in documents(64, 400, lambda text: len(text) // 3)], 1500)
    for shape in filter(None, given.shapes.split(",")):
        texts = max(16, int(given.texts * SHAPES[shape][-1]))
        adapter = TextAdapter(tokenizer=vocabulary, context=1024)
        exam = build([llama(shape, seed) for seed in range(2)], adapter, texts, *settings)
        print(json.dumps({"shape": shape, "texts": texts} | measure(exam, given.rounds)), flush=True)


if __name__ == "__main__":
    main()
