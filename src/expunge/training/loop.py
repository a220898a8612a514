"""The one training loop: terms over roles, micro-batches by tokens, any optimizer, exact resume.

A step is: pick samples of each role, cut them into micro-batches of similar length, sum the terms' gradients with
the whole batch's denominators, clip, step. Everything random is a function of (seed, step), so a checkpoint holds
weights, optimizer state and the step number, and a resumed run gives the same bits on CPU as one never stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter
from expunge.options import Ranges, check_ranges, option
from expunge.progress import Progress
from expunge.training.batching import EpochPlan, Plan, group_by_tokens
from expunge.training.optimizers import NAMES, build, factor, load_state_tensors, sized_rate, state_tensors
from expunge.training.sophia import observe_curvature
from expunge.training.terms import Term, View, training_term

ORDINARY_RATE = 2e-5  # fine-tuning rate at a billion parameters and more


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How to train. Methods have the same fields beside their own."""

    epochs: float = option(10.0, "passes over the leading role", "ours")
    batch_size: int = option(16, "samples of the leading role in one step", "ours")
    learning_rate: float | None = option(None, "peak learning rate; by the model's size if none", "ours: sized_rate")
    optimizer: str = option(
        "adamw",
        "adamw, muon (hidden matrices; AdamW elsewhere), sgd or sophia (second order)",
        "as the papers; muon: Jordan et al. 2024; sophia: Liu et al. 2023, arXiv:2305.14342",
        NAMES,
    )
    other_learning_rate: float | None = option(
        None, "AdamW rate beside muon; a tenth of the learning rate if none", "ours: measured on the embedded data"
    )
    schedule: str = option("cosine", "shape after warm-up", "ours: usual", ("cosine", "linear", "constant"))
    warmup: float = option(0.1, "share of the steps with rising learning rate", "OpenUnlearning: one pass of ten")
    weight_decay: float = option(0.0, "decoupled weight decay", "OpenUnlearning: 0 (TOFU: .01)")
    clip: float = option(1.0, "largest gradient norm; 0 = no clipping", "transformers' Trainer: 1")
    micro_tokens: int = option(
        4096, "padded tokens in one forward pass; smaller saves memory, result is the same", "ours: about 1 GiB"
    )
    precision: str = option(
        "fp32", "bf16 runs the passes under autocast, weights stay fp32", "ours: exact on CPUs", ("fp32", "bf16")
    )
    checkpoint_every: int = option(
        200, "steps between checkpoints, where a work folder is given; 0 = none", "ours: minutes at most are lost"
    )

    def __post_init__(self) -> None:
        """Raises UserError for a number that no training can have, in this class's fields and in those of methods."""
        check_ranges(self, RANGES)


RANGES: Ranges = (
    (("epochs", "learning_rate", "other_learning_rate"), "a number above 0", lambda v: 0 < v < math.inf),
    (("batch_size", "retain_batch", "micro_tokens"), "1 or more", lambda v: v >= 1),
    (("warmup",), "a share from 0 to 1", lambda v: 0 <= v <= 1),
    (("weight_decay", "clip", "checkpoint_every"), "0 or more", lambda v: 0 <= v < math.inf),
)


@dataclass(frozen=True)
class Feed:
    """Samples of one role, and a partner for each where the objective compares two answers."""

    samples: Sequence[Sample]
    partners: Sequence[Sample] | None = None

    def length(self, adapter: Adapter, i: int) -> int:
        own = adapter.num_tokens(self.samples[i])
        return own if self.partners is None else max(own, adapter.num_tokens(self.partners[i]))

    def lengths(self, adapter: Adapter) -> list[int]:
        return [self.length(adapter, i) for i in range(len(self.samples))]

    def digest(self) -> str:
        """SHA-256 of ids and texts in their order, so that a checkpoint is known to be of the same data."""
        texts = [[s.id, s.prompt, s.target] for s in (*self.samples, *(self.partners or ()))]
        return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()


Item = tuple[str, int]  # role, index in its feed


@dataclass
class Log:
    """Mean value of each term at each step."""

    steps: list[dict[str, float]] = field(default_factory=list)

    def last(self, name: str, window: int = 10) -> float:
        values = [s[name] for s in self.steps[-window:] if name in s]
        return sum(values) / len(values) if values else math.nan


@dataclass
class Trainer:
    """The state of one training: made by :func:`train`, handed to ``compute`` and ``on_step`` callbacks."""

    model: nn.Module
    adapter: Adapter
    feeds: Mapping[str, Feed]
    terms: Sequence[Term]
    options: Any
    optimizers: Sequence[torch.optim.Optimizer]
    steps: int
    accelerator: Any
    step: int = 0
    log: Log = field(default_factory=Log)
    around: Callable[[Sequence[tuple[str, Sample]]], AbstractContextManager[Any]] | None = None
    memory: dict[str, Any] = field(default_factory=dict)  # JSON values of callbacks, kept in checkpoints
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)  # the same for tensors
    rate: float = 1.0  # a callback may lower it: every learning rate is multiplied by it
    stop: str = ""  # a reason set by a callback ends the training after this step

    def gradients(
        self, picks: Mapping[str, Sequence[int]], terms: Sequence[Term] | None = None, scale: float = 1.0
    ) -> dict[str, float]:
        """Add the gradients of ``terms`` on the picked samples to ``.grad``; return each term's mean value."""
        chosen = [t for t in (self.terms if terms is None else terms) if picks.get(t.role)]
        totals = {t.name: self.units(t, picks[t.role]) for t in chosen}
        roles = {t.role for t in chosen}
        items: list[Item] = [(role, i) for role in sorted(roles) for i in picks[role]]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        items = items[rank::world]
        # A sample and its partner go through the model in one pass: together they have twice the length.
        rows = {role: 1 if self.feeds[role].partners is None else 2 for role in roles}
        lengths = [rows[role] * self.feeds[role].length(self.adapter, i) for role, i in items]
        values = dict.fromkeys(totals, 0.0)
        for group in group_by_tokens(items, lengths, self.options.micro_tokens):
            loss, parts = self._group_loss(group, chosen, totals)
            for name, part in parts.items():
                values[name] = values.get(name, 0.0) + part
            if loss is not None and loss.requires_grad:
                self.accelerator.backward(loss * scale)
        if world > 1:
            self._reduce()
        for role in roles & {name.removesuffix("_nll") for name in values}:
            if f"{role}_nll" in values and f"{role}_nll" not in totals:
                values[f"{role}_nll"] /= len(picks[role])
        return values

    def _group_loss(
        self, group: Sequence[Item], terms: Sequence[Term], totals: Mapping[str, float]
    ) -> tuple[torch.Tensor | None, dict[str, float]]:
        # Samples of a role stand together, so that a view is a contiguous cut of the batch.
        group = sorted(group)
        flat: list[tuple[str, Sample]] = []
        spans: dict[str, tuple[int, int]] = {}
        for role in dict.fromkeys(r for r, _ in group):
            feed = self.feeds[role]
            own = [i for r, i in group if r == role]
            first = len(flat)
            flat += [(role, feed.samples[i]) for i in own]
            spans[role] = (first, len(flat))
            if feed.partners is not None:
                first = len(flat)
                flat += [(role + "/partner", feed.partners[i]) for i in own]
                spans[role + "/partner"] = (first, len(flat))
        around = self.around(flat) if self.around is not None else nullcontext()
        device_type = next(self.model.parameters()).device.type
        with around, torch.autocast(device_type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            positions = self.adapter.positions(self.model, [s for _, s in flat])

            def view(role: str) -> View:
                first, last = spans[role]
                partner = view(role + "/partner") if role + "/partner" in spans else None
                return View(positions.select(first, last), [s for _, s in flat[first:last]], partner)

            views = {role: view(role) for role in spans if not role.endswith("/partner")}
            total: torch.Tensor | None = None
            parts: dict[str, float] = {}
            for term in terms:
                if term.role not in views:
                    continue
                mean = term.values(views[term.role]).sum() / totals[term.name]
                parts[term.name] = parts.get(term.name, 0.0) + float(mean.detach())
                total = term.weight * mean if total is None else total + term.weight * mean
            for role, seen in views.items():  # the loss itself, for the curves, where a term has computed it anyway
                nll = seen.mean_nll()
                if nll is not None:
                    parts[f"{role}_nll"] = nll * len(seen.samples)
        return total, parts

    def units(self, term: Term, picked: Sequence[int]) -> float:
        """What the term's sum over these samples is divided by: their number, or that of their targets."""
        if term.unit == "sample":
            return float(len(picked))
        feed = self.feeds[term.role]
        return float(max(1, sum(self.adapter.num_targets(feed.samples[i]) for i in picked)))

    def _reduce(self) -> None:
        for p in self.model.parameters():
            if p.requires_grad:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                p.grad = self.accelerator.reduce(p.grad, reduction="sum")


def train(
    model: nn.Module,
    adapter: Adapter,
    feeds: Mapping[str, Feed],
    terms: Sequence[Term],
    plan: Plan,
    options: Any,
    *,
    seed: int = 0,
    optimizers: Sequence[torch.optim.Optimizer] | None = None,
    work: Path | None = None,
    progress: Progress | None = None,
    name: str = "training",
    compute: Callable[[Trainer, Mapping[str, Sequence[int]]], dict[str, float]] | None = None,
    on_step: Callable[[Trainer], None] | None = None,
    around: Callable[[Sequence[tuple[str, Sample]]], AbstractContextManager[Any]] | None = None,
    memory: dict[str, Any] | None = None,
) -> Log:
    """Train ``model`` in place and return the log.

    Args:
        feeds: samples by role. terms: the objective. plan: which samples each step sees.
        options: has the fields of :class:`TrainOptions`.
        work: folder for checkpoints; a run that was killed goes on from the last one with the same bits (CPU).
        compute: replaces ``trainer.gradients(picks)`` for methods that need more than one gradient per step.
        around: context manager per micro-batch, e.g. to restrict weight gradients to some tokens.
        on_step: called after each optimizer step; may set ``trainer.stop``.
        memory: JSON values that plan and callbacks share; comes back from a checkpoint.

    Raises:
        UserError: the loss is not finite (the reason and the step are said), or a checkpoint is of another run.
    """
    from accelerate import Accelerator

    progress = progress or Progress()
    accelerator = Accelerator(cpu=next(model.parameters()).device.type == "cpu")
    chosen = (
        list(optimizers)
        if optimizers is not None
        else build(
            model,
            options.optimizer,
            options.learning_rate,
            weight_decay=options.weight_decay,
            other_learning_rate=options.other_learning_rate,
        )
    )
    trainer = Trainer(model, adapter, feeds, terms, options, chosen, plan.steps, accelerator, around=around)
    trainer.memory = memory if memory is not None else {}
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in chosen]
    data = {role: feed.digest() for role, feed in feeds.items()}
    fingerprint = {"name": name, "steps": plan.steps, "seed": seed, "options": str(options), "data": data}
    if work is not None:
        _resume(trainer, work, fingerprint)
    was_training = model.training
    model.train()
    progress.start(name, plan.steps)
    progress.step(trainer.step)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with ExitStack() as after:  # also when it diverges or is interrupted
        after.callback(progress.stop)
        after.callback(model.train, was_training)
        after.enter_context(torch.random.fork_rng(devices=devices))
        for step in range(trainer.step, plan.steps):
            torch.manual_seed(seed * 1_000_003 + step)  # dropout and the like: a function of the step
            rate = factor(options.schedule, step, plan.steps, options.warmup)
            for optimizer, starts in zip(chosen, peaks, strict=True):
                optimizer.zero_grad(set_to_none=True)
                for group, peak in zip(optimizer.param_groups, starts, strict=True):
                    group["lr"] = peak * rate * trainer.rate
            picks = plan.batch(step)
            observe_curvature(trainer, picks, seed)
            values = compute(trainer, picks) if compute is not None else trainer.gradients(picks)
            # Finite losses may have gradients that are not, so the norm before clipping is looked at too.
            moved = [p for p in model.parameters() if p.grad is not None] if options.clip else []
            norm = float(accelerator.clip_grad_norm_(moved, options.clip)) if moved else 0.0
            _finite({**values, "the gradient": norm}, f"{name} diverged at step {step + 1} of {plan.steps}")
            for optimizer in chosen:
                optimizer.step()
            trainer.step = step + 1
            trainer.log.steps.append(values)
            if on_step is not None:
                on_step(trainer)
            progress.step(step + 1, " ".join(f"{k} {v:.3g}" for k, v in values.items()))
            progress.log("step", task=name, step=step + 1, steps=plan.steps, **values)
            due = options.checkpoint_every and (step + 1) % options.checkpoint_every == 0
            if work is not None and due and step + 1 < plan.steps and not trainer.stop:
                _checkpoint(trainer, work, fingerprint)
            if trainer.stop:
                progress.log("stopped", task=name, step=step + 1, reason=trainer.stop)
                break
    for optimizer in chosen:
        optimizer.zero_grad(set_to_none=True)
    # The last step has no next loss that would show it.
    _finite({n: float(p.detach().abs().max()) for n, p in model.named_parameters() if p.numel()}, f"{name} diverged")
    if work is not None:
        shutil.rmtree(work / "checkpoint", ignore_errors=True)
    return trainer.log


def _finite(values: Mapping[str, float], what: str) -> None:
    """Raises UserError that begins with ``what`` and names the first value that is not finite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(
                f"{what}: {name} is not finite; use a smaller learning rate (--learning-rate) or --dtype fp32."
            )


def fit(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    options: Any,
    *,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
    name: str = "training",
) -> Log:
    """Ordinary training of ``model`` on ``samples`` by negative log-likelihood of the target tokens."""
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(model, ORDINARY_RATE))
    lengths = [adapter.num_tokens(s) for s in samples]
    plan = EpochPlan({"train": lengths}, {"train": options.batch_size}, options.epochs, "train", seed)
    feeds = {"train": Feed(samples)}
    return train(
        model, adapter, feeds, [training_term()], plan, options, seed=seed, work=work, progress=progress, name=name
    )


# -- checkpoints: safetensors and JSON, written beside and renamed ---------------------------------------------------


def _checkpoint(trainer: Trainer, work: Path, fingerprint: Mapping[str, Any]) -> None:
    folder, fresh = work / "checkpoint", work / "checkpoint.tmp"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    weights = {n: p.detach().clone().contiguous() for n, p in trainer.model.named_parameters()}
    weights |= {f"buffer:{n}": b.detach().clone().contiguous() for n, b in trainer.model.named_buffers()}
    save_file(weights, fresh / "model.safetensors")
    save_file(state_tensors(trainer.optimizers), fresh / "optimizer.safetensors")
    if trainer.tensors:
        save_file({n: v.contiguous() for n, v in trainer.tensors.items()}, fresh / "tensors.safetensors")
    state = {
        "step": trainer.step,
        "fingerprint": dict(fingerprint),
        "log": trainer.log.steps,
        "memory": trainer.memory,
        "rate": trainer.rate,
    }
    (fresh / "state.json").write_text(json.dumps(state))
    old = work / "checkpoint.old"
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _resume(trainer: Trainer, work: Path, fingerprint: Mapping[str, Any]) -> None:
    folder = work / "checkpoint"
    if not folder.exists() and (work / "checkpoint.old").exists():
        folder = work / "checkpoint.old"  # killed between the two renames
    if not (folder / "state.json").exists():
        return
    state = json.loads((folder / "state.json").read_text())
    if state["fingerprint"] != dict(fingerprint):
        raise UserError(f"the checkpoint in {work} is of another training: delete it, or choose a new --out.")
    device = next(trainer.model.parameters()).device
    weights = load_file(folder / "model.safetensors", device=str(device))
    with torch.no_grad():
        for n, p in trainer.model.named_parameters():
            p.copy_(weights[n])
        for n, b in trainer.model.named_buffers():
            b.copy_(weights[f"buffer:{n}"])
    load_state_tensors(trainer.optimizers, load_file(folder / "optimizer.safetensors", device=str(device)))
    trainer.step = state["step"]
    trainer.log.steps = state["log"]
    trainer.rate = state["rate"]
    trainer.memory.clear()
    trainer.memory.update(state["memory"])
    if (folder / "tensors.safetensors").exists():
        trainer.tensors = load_file(folder / "tensors.safetensors", device=str(device))
