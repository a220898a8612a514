"""What methods beside the weights share: places to attach to, states of any layout, training of the attachment alone.

Shape suffixes: B samples, T positions, C channels (features), H and W of feature maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.methods.registry import Context
from expunge.models.adapter import Adapter, evaluating
from expunge.models.text import causal_lm
from expunge.training.batching import Plan
from expunge.training.loop import Feed, Log, train
from expunge.training.terms import Term


@dataclass(frozen=True)
class Site:
    """A module of the Hugging Face model whose output states an attachment works on, and their width."""

    name: str
    width: int


def states_of(output: Any) -> Tensor:
    """A block's output states with features last: (B, T, C), or (B, H, W, C) of a feature map."""
    states: Tensor = output if isinstance(output, Tensor) else output[0]
    return states.movedim(1, -1) if states.ndim == 4 else states


def with_states(output: Any, states: Tensor) -> Any:
    """The output with its states replaced, in its own layout and dtype."""
    old: Tensor = output if isinstance(output, Tensor) else output[0]
    new = (states.movedim(-1, 1) if old.ndim == 4 else states).to(old.dtype)
    return new if isinstance(output, Tensor) else (new, *output[1:])


def block_sites(model: nn.Module, adapter: Adapter, sample: Sample) -> list[Site]:
    """The repeated blocks of the model, input side first; the widths are seen in one pass over ``sample``."""
    names = {id(module): name for name, module in causal_lm(model).named_modules()}
    blocks = adapter.blocks(model)
    widths: dict[int, int] = {}

    def look(module: nn.Module, _inputs: Any, output: Any) -> None:
        widths[id(module)] = int(states_of(output).shape[-1])

    handles = [block.register_forward_hook(look) for block in blocks]
    try:
        with evaluating(model):
            adapter.positions(model, [sample])
    finally:
        for handle in handles:
            handle.remove()
    return [Site(names[id(block)], widths[id(block)]) for block in blocks]


@contextmanager
def only_trainable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block gradients reach ``parameters`` alone; afterwards everything may be trained that could before,
    and the attachment cannot."""
    chosen = {id(p) for p in parameters}
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        for p in before:
            p.requires_grad_(id(p) in chosen)
        yield
    finally:
        for p, could in before.items():
            p.requires_grad_(could and id(p) not in chosen)


def train_beside(
    context: Context,
    parameters: Sequence[nn.Parameter],
    feeds: Mapping[str, Feed],
    terms: Sequence[Term],
    plan: Plan,
    options: Any,
    name: str,
    told: Callable[[Sequence[Sample]], None] | None = None,
) -> Log:
    """:func:`train` of these parameters of an attachment; the model's own weights and buffers stay as they are.

    The model runs as it is served, in eval mode: no dropout, and batch norm with the statistics that it has. ``told``
    is called with the samples of each micro-batch before its pass. Checkpoints stand in ``context.work / name``.
    """

    @contextmanager
    def served(batch: Sequence[tuple[str, Sample]]) -> Iterator[None]:
        context.model.eval()
        if told is not None:
            told([sample for _, sample in batch])
        yield

    with only_trainable(context.model, parameters):
        return train(
            context.model,
            context.adapter,
            feeds,
            terms,
            plan,
            options,
            seed=context.seed,
            work=None if context.work is None else context.work / name,
            progress=context.progress,
            name=name,
            around=served,
        )
