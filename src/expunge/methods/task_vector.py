"""Task vector: learn the forget samples once more, and walk the same way backwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import Context, Outcome, method
from expunge.models.losses import error_and_loss
from expunge.options import option
from expunge.training.loop import Log, TrainOptions, fit
from expunge.training.optimizers import sized_rate

PAPER_RATE = 1e-5
GRID = 20  # scales that are tried, evenly spaced
JUDGED = 200  # retain samples that one trial reads


@dataclass(frozen=True, kw_only=True)
class TaskVectorOptions(TrainOptions):
    """How to learn the forget samples, and how far to walk back."""

    epochs: float = option(10.0, "passes over the forget set", "ours: the paper trains for 2,000 steps on whole tasks")
    batch_size: int = option(8, "forget samples in one step", "ours: the paper has 128 of large sets")
    learning_rate: float | None = option(
        None, "peak learning rate; the paper's, raised for small models, if none", "paper app. B: 1e-5"
    )
    scale: float | None = option(None, "multiple of the task vector that is subtracted; chosen on retain if none")
    keep: float = option(0.95, "share of the original's retain accuracy that the chosen scale must leave", "paper §3")
    largest: float = option(1.0, "largest scale that is tried", "paper app. B: 0 to 1 in steps of .05")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale(self.scale, self.keep, self.largest)


def check_scale(scale: float | None, keep: float, largest: float) -> None:
    """Raises UserError for numbers with which nothing could be subtracted."""
    if not 0 <= keep <= 1 or largest <= 0 or (scale is not None and scale <= 0):
        raise UserError(
            f"scale = {scale}, keep = {keep}, largest = {largest} cannot be: give scales above 0, and a share from 0 "
            "to 1."
        )


@dataclass
class TaskVector:
    """The two ends of a training: the original's weights, and the helper model that holds the learnt ones.

    Buffers (running means of batch norm) are part of ``start`` alone: they are no direction to walk in.
    """

    start: dict[str, Tensor]
    end: nn.Module

    def put(self, model: nn.Module, scale: float) -> None:
        """θ = θ_start − scale·(θ_end − θ_start), in place."""
        ends = dict(self.end.named_parameters())
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if name in self.start:
                    own = self.start[name]
                    tensor.copy_(torch.lerp(own, ends[name], -scale) if name in ends else own)


def learnt(
    context: Context, learn: Callable[[], Log], samples: Sequence[Sample], purpose: str
) -> tuple[TaskVector, Log]:
    """Train ``context.model`` by ``learn``, move what it became into a helper, and go back to the start.

    It is trained in place so that a scope holds for the task vector too. Of a LoRA adapter only the second factors
    move: the update is linear in them, so that subtracting weights subtracts exactly what was learnt.
    """
    model = context.model
    start = {n: t.detach().clone() for n, t in model.named_parameters() if t.requires_grad}
    start |= {n: t.detach().clone() for n, t in model.named_buffers()}
    firsts = [p for n, p in model.named_parameters() if ".lora_A." in n and p.requires_grad]
    for p in firsts:
        p.requires_grad_(False)
    try:
        log = learn()
    finally:
        for p in firsts:
            p.requires_grad_(True)
    vector = TaskVector(start, context.helpers.add("task", copy.deepcopy(model), samples, purpose))
    vector.put(model, 0.0)
    return vector, log


def walk_back(
    context: Context, vector: TaskVector, scale: float | None, keep: float, largest: float
) -> tuple[float, list[str]]:
    """Subtract the vector, ``scale`` times or as often as retain allows: the scale, and notes on how it was chosen.

    The rule of the paper's section 3: the largest scale that leaves ``keep`` of the original's accuracy, which is the
    share of target tokens (of images, for a classifier) that are the model's first choice.
    """
    model, notes = context.model, list[str]()
    if scale is None and not context.retain:
        scale = largest
        notes.append(f"no retain samples were given: scale {scale:g} is unchecked")
    if scale is None:
        judged = _some(context.retain, context.seed)
        wanted = keep * (1 - error_and_loss(model, context.adapter, judged)[0])
        for number in range(GRID, 0, -1):
            vector.put(model, largest * number / GRID)
            if 1 - error_and_loss(model, context.adapter, judged)[0] >= wanted:
                scale = largest * number / GRID
                notes.append(f"scale {scale:g} was chosen on {len(judged)} retain samples")
                break
    if scale is None:
        scale = largest / GRID
        notes.append(
            f"even scale {scale:g} leaves less than {keep:.0%} of the retain accuracy, and was taken all the same"
        )
    vector.put(model, scale)
    return scale, notes


def _some(samples: Sequence[Sample], seed: int) -> list[Sample]:
    chosen = np.random.default_rng(seed).permutation(len(samples))[:JUDGED]
    return [samples[i] for i in sorted(chosen)]


@method(
    name="task-vector",
    options=TaskVectorOptions,
    paper="Ilharco et al. 2023, arXiv:2212.04089, section 3",
    formula="θ_o − λ·(θ_f − θ_o), θ_f trained on f by NLL; the largest λ that keeps the accuracy on r",
    wants=frozenset({"retain"}),
    helpers_hold_data=True,
)
def task_vector(context: Context, options: TaskVectorOptions) -> Outcome:
    """Train on forget, subtract what that has added to the weights.

    The original knows the forget samples already, so what is subtracted is the way to knowing them even better.
    """
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(context.model, PAPER_RATE))
    work = None if context.work is None else context.work / "task"

    def learn() -> Log:
        return fit(
            context.model, context.adapter, context.forget, options,
            seed=context.seed, work=work, progress=context.progress, name="task-vector",
        )  # fmt: skip

    vector, log = learnt(context, learn, context.forget, "learns the forget samples once more, to be subtracted")
    scale, notes = walk_back(context, vector, options.scale, options.keep, options.largest)
    return Outcome(context.model, notes, {"scale": scale, "steps": len(log.steps), "log": log.steps})
