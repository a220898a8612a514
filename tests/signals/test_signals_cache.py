"""Signals on disk: what was stored comes back, and anything that has changed never does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from expunge.attacks.exam import Checkpoint
from expunge.data.samples import Sample
from expunge.models.text import TextAdapter
from expunge.signals import cache as cache_module
from expunge.signals.cache import COLUMNS, SignalCache, fingerprint
from expunge.signals.forward import collect
from expunge.signals.record import Signals
from tiny_text import tiny_adapter, tiny_dataset, tiny_model, tiny_tokenizer

SAMPLES = list(tiny_dataset()["forget"])
DIGEST = "a" * 64


@pytest.fixture(scope="module")
def signals() -> list[Signals]:
    return collect(tiny_model(), tiny_adapter(), SAMPLES)


@pytest.fixture
def cache(tmp_path: Path, signals: list[Signals]) -> SignalCache:
    store = SignalCache(tmp_path)
    store.put(DIGEST, tiny_adapter(), SAMPLES, signals)
    return store


def equal(one: Signals, other: Signals) -> bool:
    arrays = all(
        np.array_equal(getattr(one, c), getattr(other, c)) and getattr(one, c).dtype == getattr(other, c).dtype
        for c in COLUMNS
    )
    return arrays and all(
        getattr(one, n) == getattr(other, n) for n in ("id", "subject", "text_bytes", "zlib_bytes", "truncated")
    )


def test_what_was_stored_comes_back_to_the_bit(cache: SignalCache, signals: list[Signals]) -> None:
    found = cache.get(DIGEST, tiny_adapter(), SAMPLES)
    assert found is not None and all(map(equal, found, signals))
    empty = replace(signals[0], id="none", truncated=True, **{c: getattr(signals[0], c)[:0] for c in COLUMNS})
    samples = [replace(SAMPLES[0], id="none", target=""), SAMPLES[1]]
    cache.put(DIGEST, tiny_adapter(), samples, [empty, signals[1]])
    again = cache.get(DIGEST, tiny_adapter(), samples)
    assert again is not None and equal(again[0], empty) and equal(again[1], signals[1])
    assert cache.get(DIGEST, tiny_adapter(), []) is None


def other_tokenizer() -> TextAdapter:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    return TextAdapter(tokenizer=tokenizer, context=64)


def chat() -> TextAdapter:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return TextAdapter(tokenizer=tokenizer, context=64, template="plain")


def other_end() -> TextAdapter:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "red"
    return TextAdapter(tokenizer=tokenizer, context=64)


@pytest.mark.parametrize(
    "changed",
    [
        other_tokenizer,
        chat,
        other_end,
        lambda: TextAdapter(tokenizer=tiny_tokenizer(), context=32),
        lambda: TextAdapter(tokenizer=tiny_tokenizer(), context=64, template="{prompt} is {target}{eos}"),
    ],
)
def test_another_adapter_never_hits(cache: SignalCache, changed: Callable[[], TextAdapter]) -> None:
    assert cache.get(DIGEST, tiny_adapter(), SAMPLES) is not None
    assert fingerprint(changed()) != fingerprint(tiny_adapter())
    assert cache.get(DIGEST, changed(), SAMPLES) is None


def test_other_weights_texts_orders_and_versions_never_hit(cache: SignalCache, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = tiny_adapter()
    assert cache.get("b" + DIGEST[1:], adapter, SAMPLES) is None
    for changed in (
        [replace(SAMPLES[0], target=f"{SAMPLES[0].target} "), *SAMPLES[1:]],
        [replace(SAMPLES[0], prompt=SAMPLES[0].prompt.upper()), *SAMPLES[1:]],
        SAMPLES[:-1],
        [*SAMPLES, SAMPLES[0]],
        SAMPLES[::-1],
    ):
        assert cache.get(DIGEST, adapter, changed) is None
    moved = [replace(SAMPLES[0], prompt="", target=f"{SAMPLES[0].prompt}{SAMPLES[0].target}"), *SAMPLES[1:]]
    assert cache.get(DIGEST, adapter, moved) is None
    monkeypatch.setattr(cache_module, "VERSION", cache_module.VERSION + 1)
    assert cache.get(DIGEST, adapter, SAMPLES) is None


def test_names_do_not_count_but_are_those_of_the_caller(cache: SignalCache) -> None:
    renamed = [replace(s, id=f"{i}", subject="someone") for i, s in enumerate(SAMPLES)]
    found = cache.get(DIGEST, tiny_adapter(), renamed)
    assert found is not None and [s.id for s in found] == [s.id for s in renamed]
    assert {s.subject for s in found} == {"someone"}


def damage(path: Path, how: str, signals: list[Signals]) -> None:
    raw = path.read_bytes()
    if how == "cut":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        place = len(raw) - 5  # inside the numbers
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
    elif how == "noise":
        path.write_bytes(bytes(range(256)) * 4)
    elif how == "lacking":
        save_file({"log_prob_L": signals[0].log_prob_L}, path)
    else:  # complete in form, with fewer samples than were asked for
        columns = {c: getattr(signals[0], c) for c in COLUMNS}
        columns["lengths"] = np.array([len(signals[0])])
        columns["sizes"] = np.array([[1, 1, 0]])
        save_file(columns, path)


@pytest.mark.parametrize("how", ["cut", "empty", "noise", "lacking", "short", "flipped"])
def test_a_damaged_file_counts_as_absent_and_is_written_anew(
    cache: SignalCache, signals: list[Signals], how: str
) -> None:
    adapter = tiny_adapter()
    damage(cache.path(DIGEST, adapter, SAMPLES), how, signals)
    assert cache.get(DIGEST, adapter, SAMPLES) is None
    cache.put(DIGEST, adapter, SAMPLES, signals)
    assert cache.get(DIGEST, adapter, SAMPLES) is not None


def test_a_checkpoint_reads_the_cache_instead_of_the_model(tmp_path: Path) -> None:
    model, loads = tiny_model(), []

    def checkpoint(digest: str = DIGEST) -> Checkpoint:
        def load() -> torch.nn.Module:
            loads.append(digest)
            return copy.deepcopy(model)

        return Checkpoint("m", "audited", tiny_adapter(), load, digest, SignalCache(tmp_path))

    first = checkpoint().signals(SAMPLES)
    again = checkpoint().signals(SAMPLES[::-1])[::-1]
    assert loads == [DIGEST] and all(map(equal, first, again))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1.0
    changed = checkpoint("c" * 64).signals(SAMPLES)
    assert len(loads) == 2
    assert not np.array_equal(changed[0].log_prob_L, first[0].log_prob_L)


def test_the_order_of_samples_changes_no_bit() -> None:
    """Lengths differ, batches are small: only the order by content makes them the same."""
    crowd = [*tiny_dataset()["retain"], *(Sample(id=f"d{i}", subject="d", target="red " * (i + 1)) for i in range(9))]
    shuffled = [crowd[i] for i in np.random.default_rng(0).permutation(len(crowd))]
    sides = []
    for order in (crowd, shuffled):
        checkpoint = Checkpoint.of(tiny_model(), tiny_adapter())
        checkpoint.max_tokens = 60
        sides.append({s.id: s for s in checkpoint.signals(order)})
    assert all(equal(sides[0][s.id], sides[1][s.id]) for s in crowd)
