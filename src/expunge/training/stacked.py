"""Several small classifiers of one architecture trained at once: their weights are the rows of one matrix.

What costs in a small model is not arithmetic but the steps around it. Here images are prepared once, clipping and the
optimizer work on all models in one call, and fully connected models share one batched pass. Convolutions go through
each model in turn, channels last: grouped convolutions, which a shared pass makes of them, are slower on a CPU.

Every model sees the batches that it would see alone; results differ by rounding only.
Shape suffixes: M models, P parameters of one, S distinct samples, B batch, C H W image, V classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter
from expunge.models.am_softmax import CosineHead
from expunge.models.classifier import ClassifierAdapter
from expunge.training.batching import EpochPlan
from expunge.training.loop import TrainOptions
from expunge.training.optimizers import factor

FLOATS = 3_000_000  # weights in one stack: more leave the cache between two steps
MOST = 16  # models in one stack
IN_TURN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.modules.batchnorm._BatchNorm)  # batch statistics are a model's own


def obstacle(model: nn.Module, adapter: Adapter, samples: Sequence[Sample], options: TrainOptions) -> str | None:
    """Why models like this one cannot be stacked, or None where they can."""
    if not isinstance(adapter, ClassifierAdapter):
        return "only classifiers are stacked"
    if options.optimizer not in ("adamw", "sgd") or options.precision != "fp32" or options.weight_decay:
        return "stacks are trained by adamw or sgd in fp32 without weight decay"
    parameters = list(model.parameters())
    if any(not p.requires_grad or p.dtype != torch.float32 for p in parameters):
        return "a weight is frozen or not fp32"
    if any(isinstance(m, CosineHead) or (isinstance(m, nn.Dropout) and m.p > 0) for m in model.modules()):
        return "dropout draws its own numbers for each model, and a margin is no part of a stack's loss"
    if adapter.preprocess.patches * min(options.batch_size, len(samples)) > options.micro_tokens:
        return "a batch does not go through in one pass (micro_tokens)"
    return None


def width(model: nn.Module, jobs: int) -> int:
    """How many of ``jobs`` models stand in one stack: within the cache, and few enough that processes can share."""
    parameters = sum(p.numel() for p in model.parameters())
    return max(1, min(MOST, FLOATS // parameters, math.ceil(jobs / 4)))


class Rows:
    """Weights and gradients of M equal models as matrices (M, P), of which the models' own tensors are views."""

    def __init__(
        self, models: Sequence[nn.Module], views: Callable[[Tensor, Iterable[Tensor]], Iterator[Tensor]]
    ) -> None:
        first = list(models[0].parameters())
        size = sum(p.numel() for p in first)
        self.models = models
        self.weights_MP = torch.empty(len(models), size, device=first[0].device)
        self.grads_MP = torch.zeros_like(self.weights_MP)
        for row_P, model in zip(self.weights_MP, models, strict=True):
            for p, own in zip(model.parameters(), views(row_P, first), strict=True):
                own.copy_(p.data)
                p.data = own

    def clip(self, most: float) -> Tensor:
        """Scale each model's gradient to a norm of ``most`` at most; returns the norms before, (M,)."""
        norm_M: Tensor = torch.linalg.vector_norm(self.grads_MP, dim=1)
        self.grads_MP.mul_((most / (norm_M + 1e-6)).clamp(max=1.0)[:, None])
        return norm_M

    def part(self) -> None:
        """Give every model tensors of its own again."""
        for model in self.models:
            for p in model.parameters():
                p.data = p.data.clone(memory_format=torch.contiguous_format)


def train_stack(
    models: Sequence[nn.Module],
    adapter: ClassifierAdapter,
    samples: Sequence[Sequence[Sample]],
    options: TrainOptions,
    seeds: Sequence[int],
    names: Sequence[str],
    tick: Callable[[int], None] = lambda step: None,
) -> None:
    """Train ``models`` in place, each on its own samples, as :func:`expunge.training.loop.fit` trains one.

    All need the same number of steps. ``tick`` is called after each with the steps done.

    Raises:
        UserError: a loss is not finite.
    """
    assert options.learning_rate is not None
    plans = [
        EpochPlan({"train": [1] * len(own)}, {"train": options.batch_size}, options.epochs, "train", seed)
        for own, seed in zip(samples, seeds, strict=True)
    ]
    steps = plans[0].steps
    assert all(plan.steps == steps for plan in plans)
    place = {id(s): i for i, s in enumerate({id(s): s for own in samples for s in own}.values())}
    device = next(models[0].parameters()).device
    whole = adapter.collate(list({id(s): s for own in samples for s in own}.values())).to(device)
    where = [torch.tensor([place[id(s)] for s in own], device=device) for own in samples]
    images_SCHW, labels_S = whole.inputs["pixel_values"], whole.targets_N
    turn = any(isinstance(m, IN_TURN) for m in models[0].modules())
    rows = Rows(models, _in_turn if turn else _together)
    run = _InTurn(rows, images_SCHW, labels_S) if turn else _Together(rows, images_SCHW, labels_S)
    optimizer = _optimizer(rows, options)
    modes = [model.training for model in models]
    for model in models:
        model.train()
    try:
        for step in range(steps):
            rate = options.learning_rate * factor(options.schedule, step, steps, options.warmup)  # type: ignore[arg-type]
            for group in optimizer.param_groups:
                group["lr"] = rate
            picks = [at[plan.batch(step)["train"]] for at, plan in zip(where, plans, strict=True)]
            losses_M = run(picks)
            if options.clip:
                losses_M = losses_M + 0 * rows.clip(options.clip)  # finite only where the gradient is, too
            _finite(losses_M, names, f"diverged at step {step + 1} of {steps}")
            optimizer.step()
            tick(step + 1)
        _finite(rows.weights_MP.sum(dim=1), names, "diverged")
    finally:
        rows.part()
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def _optimizer(rows: Rows, options: TrainOptions) -> torch.optim.Optimizer:
    flat = nn.Parameter(rows.weights_MP.view(-1))
    flat.grad = rows.grads_MP.view(-1)
    if options.optimizer == "sgd":
        return torch.optim.SGD([flat], lr=0.0, momentum=0.9, fused=True)
    return torch.optim.AdamW([flat], lr=0.0, betas=(0.9, 0.999), weight_decay=0.0, fused=True)


def _finite(values_M: Tensor, names: Sequence[str], what: str) -> None:
    good = torch.isfinite(values_M)
    if not bool(good.all()):
        name = names[int(good.logical_not().nonzero()[0])]
        raise UserError(f"{name} {what}: its loss or gradient is not finite; use a smaller learning rate.")


class _InTurn:
    """One pass per model, through the model itself."""

    def __init__(self, rows: Rows, images_SCHW: Tensor, labels_S: Tensor) -> None:
        self.models: Sequence[Any] = rows.models
        self.weights = [list(model.parameters()) for model in rows.models]
        self.grads = [
            list(_in_turn(row_P, weights)) for row_P, weights in zip(rows.grads_MP, self.weights, strict=True)
        ]
        self.images_SCHW, self.labels_S = images_SCHW, labels_S

    def __call__(self, picks: Sequence[Tensor]) -> Tensor:
        found = []
        for model, weights, grads, pick_B in zip(self.models, self.weights, self.grads, picks, strict=True):
            images_BCHW = self.images_SCHW[pick_B].contiguous(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(model(pixel_values=images_BCHW).logits, self.labels_S[pick_B])
            _fill(grads, loss, weights)
            found.append(loss.detach())
        return torch.stack(found)


class _Together:
    """One batched pass for all models. Batches that are shorter than others are filled up with weight 0."""

    def __init__(self, rows: Rows, images_SCHW: Tensor, labels_S: Tensor) -> None:
        self.model: Any = rows.models[0]
        names, like = zip(*self.model.named_parameters(), strict=True)
        weights = (w.detach().requires_grad_() for w in _together(rows.weights_MP, like))
        self.weights = dict(zip(names, weights, strict=True))
        self.grads = list(_together(rows.grads_MP, like))
        self.images_SCHW, self.labels_S = images_SCHW, labels_S

    def _loss(self, weights: dict[str, Tensor], images_BCHW: Tensor, labels_B: Tensor, share_B: Tensor) -> Tensor:
        out = functional_call(self.model, weights, (), {"pixel_values": images_BCHW})
        nll_B = nn.functional.cross_entropy(out.logits, labels_B, reduction="none")
        return (nll_B * share_B).sum()

    def __call__(self, picks: Sequence[Tensor]) -> Tensor:
        longest = max(len(pick_B) for pick_B in picks)
        pick_MB = torch.stack([nn.functional.pad(pick_B, (0, longest - len(pick_B))) for pick_B in picks])
        size_M = torch.tensor([len(pick_B) for pick_B in picks], device=pick_MB.device)
        share_MB = (torch.arange(longest, device=pick_MB.device) < size_M[:, None]) / size_M[:, None]
        losses_M: Tensor = vmap(self._loss)(self.weights, self.images_SCHW[pick_MB], self.labels_S[pick_MB], share_MB)
        _fill(self.grads, losses_M.sum(), list(self.weights.values()))
        return losses_M.detach()


def _fill(grads: Sequence[Tensor], loss: Tensor, weights: Sequence[Tensor]) -> None:
    """Gradients of ``loss`` into ``grads``; of a weight that took no part they are 0."""
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    for own, new in zip(grads, found, strict=True):
        own.zero_() if new is None else own.copy_(new)


def _in_turn(of_P: Tensor, like: Iterable[Tensor]) -> Iterator[Tensor]:
    """Views of one row in the shapes of ``like``, one after another; filters of convolutions lie channels last."""
    for flat, shape in _cut(of_P, like):
        yield flat.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2) if len(shape) == 4 else flat.view(shape)


def _together(of_P: Tensor, like: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same of one row or of all (M, P); matrices lie transposed, as the batched product makes their gradients."""
    for flat, shape in _cut(of_P, like):
        many = flat.shape[:-1]
        yield flat.view(*many, *shape[::-1]).transpose(-1, -2) if len(shape) == 2 else flat.view(*many, *shape)


def _cut(of_P: Tensor, like: Iterable[Tensor]) -> Iterator[tuple[Tensor, torch.Size]]:
    place = 0
    for p in like:
        yield of_P[..., place : place + p.numel()], p.shape
        place += p.numel()
