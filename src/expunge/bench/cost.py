"""What a piece of work cost: time, floating-point operations, memory, and how many weights it changed."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expunge.models.adapter import Adapter
from expunge.record import cpu_seconds, peak_mib

SAMPLING_S = 0.05
STATM = Path("/proc/self/statm")


@dataclass
class Cost:
    """Filled when the block of :func:`measure` ends.

    ``wall_s``, ``cpu_s``: seconds, and processor seconds of all threads. ``flops``, ``tokens``,
    ``tokens_backward``: from the adapter's meter; ``tokens`` counts every forward pass, padding included.
    ``peak_mib``: highest memory within the block in MiB; of the GPU where one was used, else resident memory of the
    process, whose earlier contents (other models) are part of it. ``parameters_changed``: weights whose value differs
    afterwards, or None if no model was given. ``model``: set it inside the block when the work returns a new model.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    flops: float = 0.0
    tokens: int = 0
    tokens_backward: int = 0
    peak_mib: float = 0.0
    parameters_changed: int | None = None
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def share_of(self, other: Cost) -> float:
        """FLOPs over the other's FLOPs, which other work on the machine does not disturb; wall time where the other
        went through no adapter; nan when there is nothing to divide by."""
        if other.flops > 0:
            return self.flops / other.flops
        return self.wall_s / other.wall_s if other.wall_s > 0 else math.nan

    def record(self, retraining: Cost | None = None) -> dict[str, Any]:
        """As JSON for results.json."""
        share = math.nan if retraining is None else self.share_of(retraining)
        return {
            "wall_s": self.wall_s,
            "cpu_s": self.cpu_s,
            "flops": self.flops,
            "tokens": self.tokens,
            "peak_mib": self.peak_mib,
            "share_of_retraining": share if math.isfinite(share) else None,
            "parameters_changed": self.parameters_changed,
        }


@contextmanager
def measure(adapter: Adapter, model_before: nn.Module | None = None) -> Iterator[Cost]:
    """Measure the block: ``with measure(adapter, model) as cost: ...; cost.model = new_model``.

    ``model_before`` is copied to the CPU at the start, so that an edit in place is seen as well; if ``cost.model`` is
    not set, the same object is compared at the end. The costs are filled in even when the block raises.
    """
    cost = Cost()
    before = None if model_before is None else {n: p.detach().cpu().clone() for n, p in weights(model_before).items()}
    meter = adapter.meter
    counted = (meter.flops, meter.tokens_forward, meter.tokens_backward)
    memory = Memory()
    wall, cpu = time.perf_counter(), cpu_seconds()
    memory.start()
    try:
        yield cost
    finally:
        cost.wall_s, cost.cpu_s = time.perf_counter() - wall, cpu_seconds() - cpu
        cost.peak_mib = memory.stop()
        cost.flops = meter.flops - counted[0]
        cost.tokens = meter.tokens_forward - counted[1]
        cost.tokens_backward = meter.tokens_backward - counted[2]
        after = cost.model if cost.model is not None else model_before
        if before is not None and after is not None:
            cost.parameters_changed = changed(before, weights(after))
        cost.model = None  # the cost outlives the model


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones once."""
    return dict(model.named_parameters())


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    """Weights whose value differs; a weight that exists on one side only counts as changed."""
    count = 0
    for name in before.keys() | after.keys():
        old, new = before.get(name), after.get(name)
        if old is None or new is None or old.shape != new.shape:
            sizes = [t.numel() for t in (old, new) if t is not None]
            count += max(sizes)
        else:
            count += int((old != new.detach().to(old.device)).sum())
    return count


class Memory:
    """Peak memory of a block. The process's own high-water mark never falls, so it is right only when it rises."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._mark = peak_mib()
        self._sampled = 0.0

    def start(self) -> None:
        """Begin."""
        if torch.cuda.is_available():
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
        if STATM.exists():
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def stop(self) -> float:
        """End; MiB."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if torch.cuda.is_available():
            used = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
            if used:
                return used / 2**20
        mark = peak_mib()
        # A new high-water mark was reached within the block; otherwise the samples are all there is.
        return mark if mark > self._mark or not self._sampled else self._sampled

    def _watch(self) -> None:
        import resource  # only where /proc is

        page = resource.getpagesize()
        while True:
            self._sampled = max(self._sampled, int(STATM.read_text().split()[1]) * page / 2**20)
            if self._stop.wait(SAMPLING_S):
                return
