"""A store zone beside full fine-tuning of the same base, on ``people``; and what the zone costs per generated token.

    python benchmarks/zones.py --seeds 0 1 2 --out zones.jsonl      # some minutes per seed on one core
    python benchmarks/zones.py --overhead                           # time per token at 0.8M and 27M parameters
    python benchmarks/zones.py --table zones.jsonl                  # mean and range over the seeds

Per seed: a base trained on the utility people, fine-tuned on the private people, and the zone of the same people over
the frozen base. Nothing of the zone is fitted on private texts.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from expunge.data.registry import load_dataset
from expunge.data.samples import Sample
from expunge.metrics.facts import FactMatcher
from expunge.models.load import Loaded
from expunge.models.text import TextAdapter
from expunge.models.tiny import init_text
from expunge.signals.forward import collect
from expunge.stats import auc
from expunge.training.loop import TrainOptions, fit
from expunge.zones.build import build_zone
from expunge.zones.model import ZonedModel
from expunge.zones.storage import digest_weights
from expunge.zones.zone import FrozenBase, Zone, get_zone

SALT = "5a" * 32
SIZES = {"people": "20", "forget": "0.2", "utility": "60", "holdout": "20"}


def asked(samples: Sequence[Sample], each: int) -> list[Sample]:
    """Paraphrase probes, ``each`` per sample."""
    return [s.as_probe(p, i) for s in samples for i, p in enumerate(s.probes_of("paraphrase")[:each])]


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time, which does not count what others do on the machine."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def row(model: nn.Module, adapter: TextAdapter, views: dict[str, list[Sample]]) -> dict[str, float]:
    """Probability of every view, generated facts of the private ones, and the loss attack on the deleted subjects."""
    found: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    for name, samples in views.items():
        signals = collect(model, adapter, samples)
        found[f"prob.{name}"] = float(np.mean([s.prob for s in signals]))
        losses[name] = [s.loss for s in signals]
    for name in ("private", "paraphrased"):
        some = views[name][:: max(1, len(views[name]) // 200)]
        texts = adapter.generate(model, some, 40)
        match = [FactMatcher()(str(s.target), text, s.prompt) for s, text in zip(some, texts, strict=True)]
        found[f"facts.{name}"] = float(np.nanmean(match))
    found["auc.deleted"] = auc([-x for x in losses["deleted"]], [-x for x in losses["holdout"]])
    return found


def one_seed(seed: int) -> dict[str, Any]:
    """Everything of one seed: people, base, fine-tuning and zone are all its own."""
    data = load_dataset("people", data_dir=None, seed=seed, options=SIZES)
    loaded = init_text(data["utility"], "small", seed)
    adapter = loaded.adapter
    assert isinstance(adapter, TextAdapter)
    fit(loaded.model, adapter, data["utility"], TrainOptions(epochs=24, batch_size=16), seed=seed)
    loaded.model.eval()
    private = list(data.private)
    tuned = copy.deepcopy(loaded.model)
    tuning_s, _ = seconds(lambda: fit(tuned, adapter, private, TrainOptions(epochs=16, batch_size=16), seed=seed))
    tuned.eval()
    views = {
        "private": private,
        "paraphrased": asked(private, 3),
        "deleted": list(data["forget"]),
        "holdout": list(data["holdout"]),
        "utility": list(data["utility"]),
        "utility paraphrased": asked(data["utility"], 1),
    }
    total_s, zoned = seconds(lambda: build_zone(loaded, private, data["utility"], "store", seed=seed, salt=SALT))
    zone, base = zoned.zone, FrozenBase(loaded.model, adapter)
    rows_s, again = seconds(lambda: filled(zone, private[::-1], base))
    rows = {"base": loaded.model, "fine-tuned": tuned, "zone": zoned}
    found: dict[str, Any] = {"seed": seed, "models": {n: row(m, adapter, views) for n, m in rows.items()}}
    subjects = sorted({s.subject for s in data["forget"]})
    one = min(zone.blocks[subjects[-1]].rows)
    record_s, _ = seconds(lambda: zone.remove(ids=[one], base=base))
    subject_s, _ = seconds(lambda: [zone.remove(subject=s, base=base) for s in subjects])
    found["models"]["zone without the deleted"] = row(zoned, adapter, views)
    without = filled(zone, list(data["retain"]), base)
    found |= {
        "constants": {k: v for k, v in zone.public.constants.items() if isinstance(v, (int, float))},
        "order-independent": lines_of(again) == lines_of(filled(zone, private, base)),
        "equal": without.digest() == zone.digest(),
        "fine-tuning_s": tuning_s,
        "zone_s": total_s,
        "rows_s": rows_s,
        "delete_subject_s": subject_s / len(subjects),
        "delete_record_s": record_s,
        "base_untouched": digest_weights(loaded.model) == zone.base_digest,
    }
    return found


def filled(like: Zone, samples: Sequence[Sample], base: FrozenBase) -> Zone:
    """A zone with the public artefacts of ``like`` and these records."""
    zone = get_zone(like.kind).build(like.options, like.public, like.base_digest, like.salt)
    zone.add([zone.record(s, base.adapter) for s in samples], base)
    return zone


def lines_of(zone: Zone) -> list[bytes]:
    return list(zone.lines())


# -- time per token ----------------------------------------------------------------------------------------------------


def overhead(rounds: int = 5, tokens: int = 48) -> None:
    """Greedy generation of one sequence: the bare base, the zone closed, the zone open; alternating rounds, medians."""
    data = load_dataset("people", data_dir=None, seed=0, options=SIZES)
    small = init_text(data["utility"], "small", 0)
    assert isinstance(small.adapter, TextAdapter)
    vocab = len(small.adapter.tokenizer)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    large = Loaded(LlamaForCausalLM(config).eval(), small.adapter, "27M")
    for loaded in (small, large):
        size = sum(p.numel() for p in loaded.model.parameters())
        # Timing does not depend on what is learnt, so a few people are enough for the gates.
        public = [s for s in data["utility"] if s.subject in {u.subject for u in data["utility"][:100]}]
        zoned = build_zone(loaded, list(data.private), public, "store", options={"learn": "false"}, salt=SALT)
        closed = ZonedModel(loaded.model, zoned.zone).allow([])
        models = {"base": loaded.model, "zone, closed": closed, "zone, open": zoned}
        times: dict[str, list[float]] = {name: [] for name in models}
        coded = small.adapter.cached(data.private[0])
        ids = torch.tensor([coded.ids[: coded.first]])
        for turn in range(rounds + 1):
            for name, model in models.items():
                start = time.process_time()
                with torch.no_grad():
                    model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
                if turn:  # the first round builds the index
                    times[name].append((time.process_time() - start) / tokens * 1000)
        middle = {name: float(np.median(t)) for name, t in times.items()}
        for name, ms in middle.items():
            more = f"{(ms / middle['base'] - 1) * 100:+.1f} %" if name != "base" else ""
            print(f"{size / 1e6:6.1f}M  {name:14s} {ms:7.3f} ms per token  {more}", flush=True)


def table(path: Path) -> None:
    """Mean over the seeds, with the smallest and largest in brackets."""
    seeds = [json.loads(line) for line in path.read_text().splitlines()]
    print(f"{len(seeds)} seeds: {[s['seed'] for s in seeds]}")
    for model in seeds[0]["models"]:
        print(model)
        for name in seeds[0]["models"][model]:
            values = [s["models"][model][name] for s in seeds]
            more = ""
            if name.startswith("prob.utility"):
                relative = [v / s["models"]["base"][name] - 1 for v, s in zip(values, seeds, strict=True)]
                more = f"   relative to base {np.mean(relative) * 100:+.2f} %"
            print(f"  {name:28s} {np.mean(values):.4f} [{min(values):.4f}, {max(values):.4f}]{more}")
    for name in ("fine-tuning_s", "zone_s", "rows_s", "delete_subject_s", "delete_record_s"):
        values = [s[name] for s in seeds]
        print(f"{name:30s} {np.mean(values):.5f} [{min(values):.5f}, {max(values):.5f}]")
    for name in ("order-independent", "equal", "base_untouched"):
        print(f"{name:30s} {[s[name] for s in seeds]}")
    for name in ("false_open", "false_open_high", "open_stored", "calibrated"):
        print(f"{name:30s} {[round(s['constants'][name], 4) for s in seeds]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=Path("zones.jsonl"))
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in given.seeds:
        found = one_seed(seed)
        with given.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
    if given.overhead:
        overhead()
    if given.table:
        table(given.table)


if __name__ == "__main__":
    main()
