"""Train many small models of one architecture, each on its own samples: shadows, retrained models, halves.

Two things make it faster than one after another, and they multiply. Classifiers are *stacked*
(:mod:`expunge.training.stacked`); all other models are trained by :func:`fit`, one at a time. And *helpers*, processes
of one thread each, take the next stack from the same list as this process does. The rule is measured: this process
begins alone, and calls helpers once what is left would take it longer than :data:`START_S`, which pays for their
start (``benchmarks/shadows.py``). So the choice never changes a result: models of helpers are the same bits.

Finished models stand in a work folder, so that a killed run goes on with what is missing. Files between the processes
are JSON and safetensors.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.files import write_json
from expunge.models.adapter import Adapter
from expunge.models.classifier import ClassifierAdapter
from expunge.models.load import Loaded, load_model, save_model
from expunge.models.text import TextAdapter
from expunge.progress import Progress
from expunge.training.batching import EpochPlan
from expunge.training.loop import ORDINARY_RATE, Feed, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.stacked import obstacle, train_stack, width
from expunge.training.terms import training_term

START_S = 6.0  # seconds: twice what a helper takes to start on free cores (2.8, n = 3)
LOOK_S = 1.0  # seconds of training before the rest is estimated


@dataclass(frozen=True, eq=False)
class Job:
    """One model to train. ``key``, a file name, stands for all that the result depends on.

    ``make`` gives the initial weights, a new model at each call; ``start`` names them where several jobs share them.
    """

    key: str
    make: Callable[[], nn.Module]
    samples: Sequence[Sample]
    seed: int
    name: str
    start: str = ""


def train_many(
    jobs: Sequence[Job],
    adapter: Adapter,
    options: TrainOptions,
    work: Path,
    *,
    stacked: bool = True,
    processes: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Train every job that ``work`` does not hold yet; return the weights' files by key, for :func:`load_weights`.

    Args:
        stacked: False trains each model by itself also where a stack is possible.
        processes: this one and its helpers; None takes as many as there are cores, once that is worth it, and a
            number takes them at once. Helpers need models on the CPU.

    Raises:
        UserError: a training diverges, or no process is asked for.
    """
    if processes is not None and processes < 1:
        raise UserError(f"processes = {processes}: give 1 or more.")
    work.mkdir(parents=True, exist_ok=True)
    files = {job.key: work / f"{job.key}.safetensors" for job in jobs}
    missing = list({job.key: job for job in jobs if not files[job.key].is_file()}.values())
    if missing:
        model = missing[0].make()
        if options.learning_rate is None:
            options = replace(options, learning_rate=sized_rate(model, ORDINARY_RATE))
        stacks = stacked and all(obstacle(model, adapter, job.samples, options) is None for job in missing)
        lot = _Lot(
            work, adapter, options, _parts(missing, model, adapter, options) if stacks else [[j] for j in missing]
        )
        lot.stacked = stacks
        on_cpu = next(model.parameters()).device.type == "cpu"
        most = min(processes or cores(), len(lot.parts)) if on_cpu else 1
        with _one_thread(most > 1):
            _Crew(lot, most - 1, processes is not None, progress or Progress()).run()
    return files


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_weights(model: nn.Module, file: Path) -> nn.Module:
    """The model with the weights and buffers of ``file``, in eval mode."""
    found = load_file(file, device=str(next(model.parameters()).device))
    with torch.no_grad():
        for name, tensor in _tensors(model).items():
            tensor.copy_(found[name])
    return model.eval()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters()} | dict(model.named_buffers())


def _save_weights(model: nn.Module, file: Path) -> None:
    scratch = file.with_suffix(f".{os.getpid()}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in _tensors(model).items()}, scratch)
    scratch.replace(file)


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """Helpers have one thread, and so has this process beside them: threads change how sums are rounded."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if wanted else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- the list that all processes take from -------------------------------------------------------------------------


def _parts(jobs: Sequence[Job], model: nn.Module, adapter: Adapter, options: TrainOptions) -> list[list[Job]]:
    """Jobs that are stacked together: those of equal numbers of steps, as many as suit the size of the model."""
    found: list[list[Job]] = []
    by_steps = sorted(jobs, key=lambda job: _plan(job, adapter, options).steps)
    for _, own in groupby(by_steps, lambda job: _plan(job, adapter, options).steps):
        equal = list(own)
        size = width(model, len(equal))
        found += [equal[i : i + size] for i in range(0, len(equal), size)]
    return found


def _plan(job: Job, adapter: Adapter, options: TrainOptions) -> EpochPlan:
    lengths = [adapter.num_tokens(s) for s in job.samples]
    return EpochPlan({"train": lengths}, {"train": options.batch_size}, options.epochs, "train", job.seed)


@dataclass(eq=False)
class _Lot:
    """Parts to train, each a stack of jobs or one job, and the files in which they are claimed and kept."""

    work: Path
    adapter: Adapter
    options: TrainOptions
    parts: Sequence[Sequence[Job]]
    stacked: bool = False

    @property
    def claims(self) -> Path:
        return self.work / "claims"

    @property
    def folder(self) -> Path:
        """What helpers read."""
        return self.work / "lot"

    def claim(self, part: int) -> bool:
        """True for the one process that is the first to ask."""
        try:
            (self.claims / str(part)).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def done(self, part: int) -> bool:
        return all((self.work / f"{job.key}.safetensors").is_file() for job in self.parts[part])

    def steps(self, part: int) -> int:
        """Steps of all its models together."""
        return sum(_plan(job, self.adapter, self.options).steps for job in self.parts[part])

    def train(self, part: int, tick: Callable[[int], None], event: Callable[..., None] | None = None) -> None:
        """Train one part into its files; ``tick`` gets the steps done of all its models together."""
        jobs = self.parts[part]
        models = [job.make() for job in jobs]
        if self.stacked:
            assert isinstance(self.adapter, ClassifierAdapter)
            train_stack(
                models, self.adapter, [j.samples for j in jobs], self.options, [j.seed for j in jobs],
                [j.name for j in jobs], lambda step: tick(step * len(jobs)),
            )  # fmt: skip
        else:
            (job,), (model,) = jobs, models
            train(
                model, self.adapter, {"train": Feed(job.samples)}, [training_term()],
                _plan(job, self.adapter, self.options), self.options, seed=job.seed, name=job.name,
                progress=Progress(event=event), on_step=lambda trainer: tick(trainer.step),
            )  # fmt: skip
        for job, model in zip(jobs, models, strict=True):
            _save_weights(model, self.work / f"{job.key}.safetensors")

    # -- what a helper reads ---------------------------------------------------------------------------------------

    def write(self) -> None:
        """Model, samples, initial weights and the list itself, so that another process can work on it."""
        folder = self.folder
        everyone = list({id(s): s for part in self.parts for job in part for s in job.samples}.values())
        number = {id(s): i for i, s in enumerate(everyone)}
        model = self.parts[0][0].make()
        save_model(Loaded(model, self.adapter, "many"), folder / "model")
        starts = {job.start or job.key: job.make for part in self.parts for job in part}
        start = {name: f"start-{i}" for i, name in enumerate(starts)}
        for name, make in starts.items():
            _save_weights(make(), folder / f"{start[name]}.safetensors")
        pixels = {str(i): torch.from_numpy(s.image) for i, s in enumerate(everyone) if isinstance(s.image, np.ndarray)}
        save_file({i: image.contiguous() for i, image in pixels.items()}, folder / "images.safetensors")
        text = self.adapter if isinstance(self.adapter, TextAdapter) else None
        write_json(
            folder / "lot.json",
            {
                "options": asdict(self.options),
                "stacked": self.stacked,
                "template": text.template if text else "auto",
                "context": text.context if text else None,
                "samples": [
                    [s.id, s.prompt, s.target, str(s.image) if isinstance(s.image, Path) else None] for s in everyone
                ],
                "parts": [
                    [[j.key, start[j.start or j.key], j.seed, j.name, [number[id(s)] for s in j.samples]] for j in part]
                    for part in self.parts
                ],
            },
        )

    @classmethod
    def read(cls, work: Path) -> _Lot:
        """The list that :meth:`write` left."""
        folder = work / "lot"
        found = json.loads((folder / "lot.json").read_text(encoding="utf-8"))
        base = load_model(folder / "model", device="cpu", template=found["template"], context=found["context"])
        images = {int(i): pixels.numpy() for i, pixels in load_file(folder / "images.safetensors").items()}
        samples = [
            Sample(id=id_, subject="", prompt=prompt, target=target, image=Path(file) if file else images.get(i))
            for i, (id_, prompt, target, file) in enumerate(found["samples"])
        ]

        def job(key: str, start: str, seed: int, name: str, own: Sequence[int]) -> Job:
            def make() -> nn.Module:
                return load_weights(copy.deepcopy(base.model), folder / f"{start}.safetensors")

            return Job(key, make, [samples[i] for i in own], seed, name)

        parts = [[job(*fields) for fields in part] for part in found["parts"]]
        return cls(work, base.adapter, TrainOptions(**found["options"]), parts, found["stacked"])


# -- this process and its helpers ----------------------------------------------------------------------------------


@dataclass(eq=False)
class _Crew:
    """This process works through the list, and calls ``most`` helpers once that is worth it, or at once."""

    lot: _Lot
    most: int
    at_once: bool
    progress: Progress

    def run(self) -> None:
        """Until every part is there."""
        lot, parts = self.lot, range(len(self.lot.parts))
        self.helpers: list[subprocess.Popen[bytes]] = []
        self.steps = [lot.steps(part) for part in parts]
        self.mine, self.own = 0, set[int]()  # steps done by this process, and parts that it has begun
        self.began = self.looked = time.monotonic()
        self._tidy()  # what a killed run left
        lot.claims.mkdir()
        self.progress.start(f"training {sum(map(len, lot.parts))} models", sum(self.steps))
        try:
            if self.at_once and self.most:
                self._call()
            for part in parts:
                if lot.claim(part):
                    self._train(part)
            for helper in self.helpers:
                while helper.poll() is None:
                    self._look()
                    time.sleep(0.05)
                if helper.returncode:
                    self.progress.say(f"a helper stopped early (exit code {helper.returncode}): its part is done here")
            for part in parts:
                if not lot.done(part):
                    self._train(part)
        finally:
            for helper in self.helpers:
                helper.kill()
                helper.wait()
            self.progress.stop()
            self._tidy()

    def _tidy(self) -> None:
        for folder in (self.lot.claims, self.lot.folder):
            shutil.rmtree(folder, ignore_errors=True)

    def _train(self, part: int) -> None:
        before = self.mine
        self.own.add(part)

        def tick(steps: int) -> None:
            self.mine = before + steps
            self._look()

        self.lot.train(part, tick, self.progress.event)

    def _look(self) -> None:
        """Show how far all are, and call helpers when this process alone would be long over the rest."""
        now, parts = time.monotonic(), range(len(self.steps))
        if now - self.looked < LOOK_S:
            return
        self.looked = now
        theirs = sum(self.steps[part] for part in parts if part not in self.own and self.lot.done(part))
        self.progress.step(self.mine + theirs)
        rest = sum(self.steps[part] for part in parts if part not in self.own)
        if self.most and not self.helpers and (now - self.began) / self.mine * rest > START_S:
            self._call()

    def _call(self) -> None:
        self.lot.write()
        command = [sys.executable, "-m", "expunge.training.many", str(self.lot.work)]
        settings = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        for _ in range(self.most):
            self.helpers.append(
                subprocess.Popen(
                    command,
                    env=settings,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        self.progress.say(f"{self.most} more process(es) help with the training")


def help_with(work: Path) -> None:
    """What a helper does: take parts from the list in ``work`` until none is left, or whoever called it is gone."""
    torch.set_num_threads(1)
    caller = os.getppid()
    lot = _Lot.read(work)

    def tick(_: int) -> None:
        if os.getppid() != caller:
            sys.exit(1)

    for part in range(len(lot.parts)):
        tick(0)
        if not lot.done(part) and lot.claim(part):
            lot.train(part, tick)


if __name__ == "__main__":
    help_with(Path(sys.argv[1]))
