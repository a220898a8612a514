"""Zones of every kind beside full fine-tuning of the same base; and what a zone costs per generated token.

    python benchmarks/zones.py --data people --subjects 20 --kinds store,ridge,shards,shared --seeds 1 2 3 --out z.jsonl
    python benchmarks/zones.py --data tofu --data-dir PATH_TO_TOFU --subjects 100 --kinds store --seeds 1 2 3
    python benchmarks/zones.py --table z.jsonl                      # mean and range over the seeds
    python benchmarks/zones.py --overhead                           # time per token at 0.8M and 27M parameters

Per seed: a base that learnt the public people, fine-tuned on the private people, and each kind of zone of the same
people over the frozen base. Nothing of a zone is fitted on private texts. Minutes per seed on one core.

On TOFU the private subjects are authors with published paraphrases, as long as there are any; the public ones are 80
other authors, 20 of them with paraphrases, and the real authors and world facts.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from expunge.data.registry import load_dataset
from expunge.data.samples import Sample
from expunge.metrics.facts import FactMatcher
from expunge.models.load import Loaded, load_model, save_model
from expunge.models.text import TextAdapter
from expunge.models.tiny import PRESETS, init_text
from expunge.options import configure
from expunge.signals.forward import collect
from expunge.stats import auc
from expunge.training.loop import TrainOptions, fit
from expunge.zones.build import build_zone, check_disjoint
from expunge.zones.model import ZonedModel
from expunge.zones.storage import digest_weights
from expunge.zones.zone import FrozenBase, Zone, get_zone

SALT = "5a" * 32
SIZES = {"people": "20", "forget": "0.2", "utility": "60", "holdout": "20"}
PARAPHRASED = 20  # public TOFU authors with paraphrases, from whom key maps are learnt
MOST = 400  # samples of one view at most; generation looks at half as many


@dataclass(frozen=True)
class People:
    """Who is private, who of them is deleted, who was never seen, and who is public."""

    deleted: list[Sample]
    kept: list[Sample]
    holdout: list[Sample]
    public: list[Sample]
    answer: int  # longest generated answer in tokens

    @property
    def private(self) -> list[Sample]:
        return self.deleted + self.kept

    def views(self) -> dict[str, list[Sample]]:
        found = {
            "private": self.private,
            "paraphrased": asked(self.private, 3),
            "deleted": self.deleted,
            "holdout": self.holdout,
            "utility": self.public,
            "utility paraphrased": asked(self.public, 1),
        }
        return {name: some(samples, MOST) for name, samples in found.items()}


def people(data: str, data_dir: Path | None, subjects: int, seed: int) -> People:
    """A fifth of the private subjects is deleted, ten at most."""
    gone = min(10, max(1, subjects // 5))
    if data == "people":
        sizes = {**SIZES, "people": str(subjects), "forget": str(gone)}
        found = load_dataset("people", data_dir=None, seed=seed, options=sizes)
        return People(list(found["forget"]), list(found["retain"]), list(found["holdout"]), list(found["utility"]), 40)
    sizes = {"authors": str(subjects + PARAPHRASED), "split_seed": str(seed)}
    sizes |= {"base_authors": str(min(60, 160 - subjects)), "forget_authors": str(subjects)}
    found = load_dataset("tofu", data_dir=data_dir, seed=0, options=sizes)
    everyone = [*found["forget"], *found["retain"]]
    of = {who: [s for s in everyone if s.subject == who] for who in dict.fromkeys(s.subject for s in everyone)}
    known = [who for who in of if of[who][0].probes_of("paraphrase")]
    public = known[-PARAPHRASED:]
    private = [*known[:-PARAPHRASED], *(who for who in of if who not in known)][:subjects]
    return People(
        [s for who in private[:gone] for s in of[who]],
        [s for who in private[gone:] for s in of[who]],
        list(found["holdout"]),
        [*found["utility"], *(s for who in public for s in of[who])],
        128,
    )


def asked(samples: Sequence[Sample], each: int) -> list[Sample]:
    """Paraphrase probes, ``each`` per sample."""
    return [s.as_probe(p, i) for s in samples for i, p in enumerate(s.probes_of("paraphrase")[:each])]


def some(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Evenly spread samples, ``most`` of them at most."""
    return [samples[i * len(samples) // most] for i in range(most)] if len(samples) > most else list(samples)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time, which does not count what others do on the machine."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def row(model: nn.Module, adapter: TextAdapter, here: People) -> dict[str, float]:
    """Probability of every view, generated facts of the private ones, and the loss attack on the deleted subjects."""
    found: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    views = here.views()
    for name, samples in views.items():
        if samples:
            signals = collect(model, adapter, samples)
            found[f"prob.{name}"] = float(np.mean([s.prob for s in signals]))
            losses[name] = [s.loss for s in signals]
    for name in ("private", "paraphrased"):
        few = some(views[name], MOST // 2)
        texts = adapter.generate(model, few, here.answer)
        match = [FactMatcher()(str(s.target), text, s.prompt) for s, text in zip(few, texts, strict=True)]
        found[f"facts.{name}"] = float(np.nanmean(match))
    found["auc.deleted"] = auc([-x for x in losses["deleted"]], [-x for x in losses["holdout"]])
    return found


# -- one seed ----------------------------------------------------------------------------------------------------------


def models_of(here: People, model: str, seed: int, keep: Path) -> tuple[Loaded, nn.Module, float]:
    """Base, fine-tuned model and the seconds of its training; kept in a folder, since every kind needs the same."""
    if (keep / "seconds.json").is_file():
        tuned = load_model(keep / "fine-tuned").model
        return load_model(keep / "base"), tuned, float(json.loads((keep / "seconds.json").read_text()))
    if model in PRESETS:
        loaded = init_text(here.public, model, seed)
        fit(loaded.model, loaded.adapter, here.public, TrainOptions(epochs=24, batch_size=16), seed=seed)
    else:
        loaded = load_model(model)
    loaded.model.eval()
    tuned = copy.deepcopy(loaded.model)
    options = TrainOptions(epochs=16, batch_size=16)
    tuning_s, _ = seconds(lambda: fit(tuned, loaded.adapter, here.private, options, seed=seed))
    tuned.eval()
    save_model(loaded, keep / "base")
    save_model(Loaded(tuned, loaded.adapter, ""), keep / "fine-tuned")
    (keep / "seconds.json").write_text(json.dumps(tuning_s))
    return loaded, tuned, tuning_s


def one_seed(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Everything of one seed: people, base, fine-tuning and zones are all its own."""
    here = people(given.data, given.data_dir, given.subjects, seed)
    check_disjoint(here.private, here.public)
    keep = given.keep / f"{given.data}-{given.subjects}-{Path(given.model).name}-{seed}"
    loaded, tuned, tuning_s = models_of(here, given.model, seed, keep)
    adapter = loaded.adapter
    assert isinstance(adapter, TextAdapter)
    size = sum(p.numel() for p in loaded.model.parameters())
    found: dict[str, Any] = {"data": given.data, "subjects": given.subjects, "seed": seed, "parameters": size}
    found |= {"records": len(here.private), "fine-tuning_s": tuning_s, "kinds": {}}
    found["models"] = {"base": row(loaded.model, adapter, here), "fine-tuned": row(tuned, adapter, here)}
    for kind in given.kinds.split(","):
        chosen = dict(pair.split("=", 1) for name, pair in map(split_option, given.set) if name == kind)
        models, figures = one_zone(kind, chosen, loaded, here, seed)
        found["models"] |= models
        found["kinds"][kind] = figures
    return found


def split_option(given: str) -> tuple[str, str]:
    """``ridge.alpha=0.01`` as kind and ``alpha=0.01``."""
    kind, _, pair = given.partition(".")
    return kind, pair


def one_zone(
    kind: str, chosen: dict[str, str], loaded: Loaded, here: People, seed: int
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Figures of the zone and of the zone after the deletion, and what building and deleting took."""
    adapter = loaded.adapter
    assert isinstance(adapter, TextAdapter)
    found, base = get_zone(kind), FrozenBase(loaded.model, adapter)
    options = configure(found.options, chosen, f"option of zone {kind}")
    public_s, public = seconds(lambda: found.build.prepare(base, here.public, options, seed))
    zone = found.build(options, public, digest_weights(loaded.model), SALT)
    rows_s, _ = seconds(lambda: zone.add([zone.record(s, adapter) for s in here.private], base))
    zoned = ZonedModel(loaded.model, zone)
    models = {kind: row(zoned, adapter, here)}
    subjects = sorted({s.subject for s in here.deleted})
    one = min(zone.blocks[subjects[-1]].rows)
    record_s, _ = seconds(lambda: zone.remove(ids=[one], base=base))
    subject_s, _ = seconds(lambda: [zone.remove(subject=s, base=base) for s in subjects])
    models[f"{kind}, deleted"] = row(zoned, adapter, here)
    without = filled(zone, here.kept[::-1], base)  # in another order too
    figures = {
        "constants": {k: v for k, v in public.constants.items() if isinstance(v, (int, float))},
        "equal": without.digest() == zone.digest(),
        "base_untouched": digest_weights(loaded.model) == zone.base_digest,
        "public_s": public_s,
        "rows_s": rows_s,
        "delete_subject": subject_s / len(subjects) / rows_s,
        "delete_record": record_s / rows_s,
    }
    return models, figures


def filled(like: Zone, samples: Sequence[Sample], base: FrozenBase) -> Zone:
    """A zone with the public artefacts of ``like`` and these records."""
    zone = get_zone(like.kind).build(like.options, like.public, like.base_digest, like.salt)
    zone.add([zone.record(s, base.adapter) for s in samples], base)
    return zone


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
    """Of every data set, size and choice of kinds the mean over the seeds, smallest and largest in brackets."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for data, subjects, kinds in dict.fromkeys((s["data"], s["subjects"], tuple(s["kinds"])) for s in lines):
        seeds = [s for s in lines if (s["data"], s["subjects"], tuple(s["kinds"])) == (data, subjects, kinds)]
        print(f"\n{data}, {subjects} subjects, {seeds[0]['records']} records, seeds {[s['seed'] for s in seeds]}\n")
        names = list(seeds[0]["models"])
        print("| | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
        for figure in seeds[0]["models"]["base"]:
            print(f"| {figure} | " + " | ".join(spread([s["models"][n][figure] for s in seeds]) for n in names) + " |")
        for kind in seeds[0]["kinds"]:
            base, own = ([s["models"][n]["prob.utility"] for s in seeds] for n in ("base", kind))
            print(f"\n{kind}: utility relative to base {spread([a / b for a, b in zip(own, base, strict=True)], 4)}")
            for name, digits in (("public_s", 1), ("rows_s", 2), ("delete_subject", 6), ("delete_record", 4)):
                print(f"  {name} {spread([s['kinds'][kind][name] for s in seeds], digits)}")
            print(f"  equal {[s['kinds'][kind]['equal'] for s in seeds]}")
            print(f"  base_untouched {[s['kinds'][kind]['base_untouched'] for s in seeds]}")
            for name in ("false_open", "false_open_high", "open_stored", "calibrated"):
                print(f"  {name} {[round(s['kinds'][kind]['constants'][name], 4) for s in seeds]}")
        print(f"\nfine-tuning_s {spread([s['fine-tuning_s'] for s in seeds], 1)}")


def spread(values: Sequence[float], digits: int = 3) -> str:
    return f"{np.mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("people", "tofu"), default="people")
    parser.add_argument("--data-dir", type=Path, help="local copy of TOFU")
    parser.add_argument("--subjects", type=int, default=20, help="private subjects; on TOFU up to 160")
    parser.add_argument("--kinds", default="store", help="store,ridge,shards,shared")
    parser.add_argument("--model", default="small", help="preset that is trained on the public people, or a model")
    parser.add_argument("--set", nargs="*", default=[], metavar="KIND.OPTION=VALUE", help="e.g. shared.groups=20")
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--keep", type=Path, default=Path("runs/zones"), help="where trained bases are kept")
    parser.add_argument("--out", type=Path, default=Path("zones.jsonl"))
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--table", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    for seed in given.seeds:
        found = one_seed(given, seed)
        with given.out.open("a") as file:
            file.write(json.dumps(found) + "\n")
    if given.overhead:
        overhead()
    if given.table:
        table(given.table)


if __name__ == "__main__":
    main()
