"""What a teacher costs: memory against plain fine-tuning, time of a step against a gradient-difference step.

    python benchmarks/memory.py [--shapes 5.8M,27M] [--texts 96] [--tokens 60] [--rounds 3] [--device cpu]

Every side trains the same model on the same texts with as many samples in a step, in a process of its own, the sides
one after another in each round:

* finetune: negative log-likelihood of 16 samples a step;
* graddiff, npo, kl: 8 forget and 8 retain samples a step;
* undial: 16 forget samples a step.

Printed: highest memory over finetune's (aim: at most 1.15), processor time of the median step over graddiff's (aim: at
most 1.1; undial has no retain term and is compared with finetune), and what the pass that asks the original costs in
steps. Memory is what the process held above what it held before the model was built (on a GPU: what torch allocated).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from expunge.methods.registry import Context, get_method
from expunge.models.text import TextAdapter
from expunge.models.tiny import train_tokenizer
from expunge.progress import Progress
from expunge.training.loop import TrainOptions, fit
from signals import SHAPES, documents, llama

SIDES = ("finetune", "graddiff", "npo", "kl", "undial")
STEP = 16  # samples
SKIPPED = 2  # first steps, which also allocate the optimizer's state
AGAINST = {"npo": "graddiff", "kl": "graddiff", "undial": "finetune"}


class Clock(Progress):
    """Notes the time at every step. ``start`` and ``step`` are all that a training says to it."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.times: list[float] = []

    def step(self, *_: Any, **__: Any) -> None:
        self.times.append(now(self.device))


def now(device: str) -> float:
    """Processor seconds, which other work on the machine does not disturb; wall seconds where a GPU works."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def held_mib(what: str) -> float:
    """A line of the process's own status: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(what))) / 1024


def side(name: str, shape: str, texts: int, tokens: int, device: str, out: Any) -> None:
    """Train one side and send its figures."""
    torch.set_num_threads(1)
    vocab = SHAPES[shape][4]
    rough = documents(200, tokens, lambda text: len(text.split()))
    tokenizer = train_tokenizer([str(s.target) for s in rough], min(vocab, 1500))
    adapter = TextAdapter(tokenizer=tokenizer)
    samples = documents(2 * texts, tokens, lambda text: len(tokenizer(text).input_ids))
    forget, retain = samples[:texts], samples[texts:]
    before = held_mib("VmRSS")
    model = llama(shape, seed=0).to(device)
    clock, started = Clock(device), now(device)
    if name == "finetune":
        options = TrainOptions(epochs=1, batch_size=STEP, learning_rate=1e-5, checkpoint_every=0)
        fit(model, adapter, samples, options, progress=clock)
    else:
        method = get_method(name)
        each = STEP if name == "undial" else STEP // 2
        settings = {"epochs": 1, "batch_size": each, "retain_batch": each, "learning_rate": 1e-5}
        method(Context(model, adapter, forget, retain, progress=clock), method.configure(settings))
    steps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)][SKIPPED:]
    peak = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else held_mib("VmHWM") - before
    # The first tick is the training's start: all that was before is what the original was asked.
    before_s = clock.times[0] - started
    parameters = sum(p.numel() for p in model.parameters())
    out.send({"peak_mib": peak, "step_s": median(steps), "before_s": before_s, "parameters": parameters})


def measure(name: str, shape: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One side in a fork of this process, which has imported everything and holds no model."""
    processes = multiprocessing.get_context("fork")
    here, there = processes.Pipe()
    process = processes.Process(
        target=side, args=(name, shape, arguments.texts, arguments.tokens, arguments.device, there)
    )
    process.start()
    there.close()
    try:
        found: dict[str, float] = here.recv()
    finally:
        process.join()
    print(f"{shape} {name}: {found['peak_mib']:.0f} MiB, {found['step_s']:.3f} s a step", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="5.8M")
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    get_method("npo")  # imports every method
    torch.set_num_threads(1)
    for shape in arguments.shapes.split(","):
        rounds = [{name: measure(name, shape, arguments) for name in SIDES} for _ in range(arguments.rounds)]
        rows = {}
        for name in SIDES:
            one = [r[name] for r in rounds]
            rows[name] = {
                "peak_mib": round(median(o["peak_mib"] for o in one), 1),
                "memory": round(median(r[name]["peak_mib"] / r["finetune"]["peak_mib"] for r in rounds), 3),
                "step_ms": round(1000 * median(o["step_s"] for o in one), 1),
                "before_in_steps": round(median(o["before_s"] / o["step_s"] for o in one), 2),
            }
            if name in AGAINST:
                pairs = [(r[name]["step_s"], r[AGAINST[name]]["step_s"]) for r in rounds]
                rows[name]["time"] = round(median(a / b for a, b in pairs), 3)
        print(json.dumps({"shape": shape, "parameters": rounds[0]["finetune"]["parameters"], "sides": rows}, indent=1))


if __name__ == "__main__":
    main()
