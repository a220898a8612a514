"""Train 16 small classifiers on 16 subsets: one after another, stacked, in two processes, and both, in one run.

    python benchmarks/shadows.py [--kinds mlp,conv] [--sizes 10,50,250,1000] [--models 16] [--seconds 6] [--rounds 1]

One after another is the ordinary loop (``fit``) with one thread, and again with two. The ways follow each other in
every round, so that a change of the machine's speed meets all of them. Two processes are there before the clock starts,
as in a long run; ``--whole`` adds ``train_many`` as it is called, start of its helper and all. All ways train the same
models for the same steps, as many as take one after another ``--seconds`` with one thread. Printed are milliseconds per
step of one model (wall time, median over rounds) and ratios of throughput.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from expunge.data.samples import Sample
from expunge.models.load import Loaded
from expunge.models.small_resnet import SmallResNetForImageClassification
from expunge.models.tiny import init_classifier, seeded
from expunge.training.loop import TrainOptions
from expunge.training.many import Job, train_many

SIDE, CLASSES, SUBSET, BATCH = 16, 10, 320, 32
MLP = {10: (34,), 50: (128, 120), 250: (384, 360), 1000: (900, 800)}  # thousands of parameters -> hidden widths
CONV = {10: (6, 12, 22), 50: (13, 26, 52), 250: (30, 58, 115), 1000: (58, 116, 232)}
ALONE = "one after another, 1 thread"
WAYS = {  # name -> (stacked, processes, threads)
    ALONE: (False, 1, 1),
    "one after another, 2 threads": (False, 1, 2),
    "stacked": (True, 1, 1),
    "2 processes": (False, 2, 1),
    "2 processes, stacked": (True, 2, 1),
}


def build(kind: str, size: int, seed: int) -> Loaded:
    """A classifier of about ``size`` thousand parameters on 16 x 16 grey images; ``conv`` has batch norm."""
    if kind == "mlp":
        return init_classifier(CLASSES, SIDE, 1, "mlp", seed, hidden_sizes=MLP[size])
    found = init_classifier(CLASSES, SIDE, 1, "resnet", seed)
    config: Any = found.model.config
    config.hidden_sizes, config.embedding_size = list(CONV[size]), CONV[size][0]
    with seeded(seed):
        found.model = SmallResNetForImageClassification(config).eval()
    return found


def jobs_of(kind: str, size: int, numbers: list[int]) -> list[Job]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2 * SUBSET, SIDE, SIDE), dtype=np.uint8)
    pool = [Sample(id=str(i), subject="", target=i % CLASSES, image=image) for i, image in enumerate(images)]

    def job(number: int) -> Job:
        chosen = np.random.default_rng(number).choice(len(pool), SUBSET, replace=False)
        own = [pool[i] for i in chosen]
        return Job(f"m{number}", lambda: build(kind, size, number).model, own, number, f"model {number}")

    return [job(number) for number in numbers]


def run(order: dict[str, Any]) -> float:
    """Seconds that this process takes for its share."""
    torch.set_num_threads(order["threads"])
    options = TrainOptions(epochs=order["epochs"], batch_size=BATCH, learning_rate=1e-3, checkpoint_every=0)
    jobs, adapter = (
        jobs_of(order["kind"], order["size"], order["models"]),
        build(order["kind"], order["size"], 0).adapter,
    )
    work = Path(tempfile.mkdtemp())
    begun = time.perf_counter()
    train_many(jobs, adapter, options, work, stacked=order["stacked"], processes=order["processes"])
    taken = time.perf_counter() - begun
    shutil.rmtree(work)
    return taken


class Worker:
    """A process that carries out orders, one JSON line each."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--work"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def send(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(order), file=self.process.stdin, flush=True)

    def answer(self) -> float:
        assert self.process.stdout is not None
        return float(self.process.stdout.readline())


def measured(workers: list[Worker], order: dict[str, Any], way: str) -> float:
    """Seconds for all models in this way: those of the slower process."""
    stacked, processes, threads = WAYS[way]
    used = workers[:processes]
    for i, worker in enumerate(used):
        own = order["models"][i :: len(used)]
        worker.send(order | {"stacked": stacked, "threads": threads, "models": own, "processes": 1})
    return max(worker.answer() for worker in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="mlp,conv")
    parser.add_argument("--sizes", default="10,50,250,1000", help="thousands of parameters")
    parser.add_argument("--models", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="train_many as it is called, with the start of helpers")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        for line in sys.stdin:
            print(run(json.loads(line)), flush=True)
        return
    begun = time.perf_counter()
    workers = [Worker(), Worker()]
    for kind in given.kinds.split(","):
        for size in map(int, given.sizes.split(",")):
            compare(workers, kind, size, given)
    print(f"{time.perf_counter() - begun:.0f} s in all")
    for worker in workers:
        worker.process.kill()


def compare(workers: list[Worker], kind: str, size: int, given: argparse.Namespace) -> None:
    parameters = sum(p.numel() for p in build(kind, size, 0).model.parameters())
    order = {"kind": kind, "size": size, "models": [0, 1], "epochs": 1}
    for way in ("stacked", "2 processes"):
        measured(workers, order, way)  # first calls
    trial = measured(workers, order | {"epochs": 2}, ALONE)
    order |= {"models": list(range(given.models)), "epochs": max(1, round(given.seconds / given.models / (trial / 4)))}
    steps = given.models * int(order["epochs"]) * SUBSET // BATCH
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(given.rounds):
        for way in WAYS:
            times[way].append(measured(workers, order, way))
    best = min(median(times[way]) for way in list(WAYS)[:2])
    print(f"\n{kind}, {parameters:,} parameters, {given.models} models, {steps // given.models} steps each")
    print(f"{'':30} {'ms/step':>8} {'x 1 thread':>11} {'x the better of 1 and 2':>24}")
    for way, found in times.items():
        taken = median(found)
        print(
            f"{way:30} {taken / steps * 1e3:8.2f} {median(times[ALONE]) / taken:11.2f} {best / taken:24.2f}", flush=True
        )
    if given.whole:
        workers[0].send(order | {"stacked": True, "threads": 1, "processes": None})
        taken = workers[0].answer()
        print(
            f"{'train_many, start included':30} {taken / steps * 1e3:8.2f} {median(times[ALONE]) / taken:11.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
