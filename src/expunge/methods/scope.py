"""Scope: which weights a method may move. One selector, any method, any optimizer.

A selector looks at the original and the data and answers with a mask per parameter: True may move. Parameters that it
does not name stay frozen. The mask holds bit for bit under momentum and weight decay: gradients are zeroed where it is
False, and every optimizer step is followed by putting the original values back there.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from expunge.errors import UserError, unknown
from expunge.models.towers import TOWERS, parameters_of
from expunge.options import configure, option

if TYPE_CHECKING:
    from expunge.methods.registry import Context

Masks = Mapping[str, Tensor]  # by parameter name: bool, shape of the parameter


@dataclass(frozen=True)
class Selector:
    """A registered selector; ``run(context, options)`` returns the masks."""

    name: str
    run: Callable[[Context, Any], Masks]
    options: type[Any]
    summary: str
    paper: str = ""


@dataclass(frozen=True)
class Scope:
    """A selector with its options, as named on the command line."""

    selector: Selector
    options: Any

    def masks(self, context: Context) -> Masks:
        """What may move.

        Raises:
            UserError: nothing may, or the selector cannot work on this model.
        """
        found = self.selector.run(context, self.options)
        if not any(bool(m.any()) for m in found.values()):
            raise UserError(f"scope '{self.selector.name}' leaves no weight to move: choose a wider one.")
        return found


_SELECTORS: dict[str, Selector] = {}


def selector(
    *, name: str, options: type[Any], paper: str = ""
) -> Callable[[Callable[[Context, Any], Masks]], Callable[[Context, Any], Masks]]:
    """Decorator that registers a selector; the first line of its docstring is the summary."""

    def wrap(run: Callable[[Context, Any], Masks]) -> Callable[[Context, Any], Masks]:
        _SELECTORS[name] = Selector(name, run, options, (run.__doc__ or "").strip().split("\n")[0], paper)
        return run

    return wrap


def all_selectors() -> dict[str, Selector]:
    """By name; methods register theirs when they are imported."""
    from expunge.methods.registry import all_methods

    all_methods()
    return dict(sorted(_SELECTORS.items()))


def get_scope(name: str, settings: Mapping[str, Any]) -> Scope | None:
    """A scope by name; None for "all".

    Raises:
        UserError: no such selector or option; the nearest is suggested.
    """
    if name == "all":
        if settings:
            raise UserError(f"scope 'all' has no option '{next(iter(settings))}': leave it out.")
        return None
    known = all_selectors()
    if name not in known:
        raise unknown("scope", name, ["all", *known])
    return Scope(known[name], configure(known[name].options, settings, f"option of scope {name}"))


@contextmanager
def held(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Within the block only what ``masks`` allow moves; buffers of modules that are wholly frozen stay too."""
    fixed: list[tuple[Tensor, Tensor | None, Tensor]] = []  # parameter, where it is fixed (None: all), values there
    with ExitStack() as after:
        for name, p in model.named_parameters():
            mask = masks.get(name)
            mask = None if mask is None else mask.to(p.device)
            if mask is not None and bool(mask.all()):
                continue
            if mask is None or not bool(mask.any()):
                fixed.append((p, None, p.detach().clone()))
                after.callback(p.requires_grad_, p.requires_grad)
                p.requires_grad_(False)
                continue
            fixed.append((p, ~mask, p.detach()[~mask].clone()))
            if p.requires_grad:
                after.callback(p.register_hook(_masked(mask)).remove)  # type: ignore[no-untyped-call]
        for module in model.modules():
            own = list(module.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                fixed += [(b, None, b.detach().clone()) for b in module.buffers(recurse=False)]

        def restore(*_: Any) -> None:
            with torch.no_grad():
                for tensor, where, values in fixed:
                    if where is None:
                        tensor.copy_(values)
                    else:
                        tensor[where] = values

        # Of every optimizer while the block lasts: a method may make its own.
        after.callback(register_optimizer_step_post_hook(restore).remove)
        after.callback(restore)
        yield


def _masked(mask: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * mask


def top_share(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks of the ``share`` of all entries with the largest scores (over all tensors together).

    Ties at the border are broken by position, so that the number of entries is exact.

    Raises:
        UserError: a share that is none.
    """
    if not 0 < share <= 1:
        raise UserError(f"share {share}: give a number above 0 and at most 1.")
    flat = torch.cat([s.detach().flatten().float().cpu() for s in scores.values()])
    count = max(1, round(share * flat.numel()))
    chosen = torch.zeros(flat.numel(), dtype=torch.bool)
    chosen[torch.sort(flat, descending=True, stable=True).indices[:count]] = True
    cuts = np.cumsum([0, *(s.numel() for s in scores.values())])
    return {
        name: chosen[a:b].view(score.shape).to(score.device)
        for (name, score), a, b in zip(scores.items(), cuts[:-1], cuts[1:], strict=True)
    }


@dataclass(frozen=True, kw_only=True)
class LayersOptions:
    """Which parameters by name, by tower, or by both."""

    names: str = option("*", "patterns of parameter names, joined by +; * stands for anything: *.mlp.*+*.layers.3.*")
    tower: str = option(
        "both",
        "of a vision-language model: language (the language model with its head), vision (the image encoder with the "
        "projector) or both; the other one stays bit for bit",
        choices=("both", *TOWERS),
    )


@selector(name="layers", options=LayersOptions)
def layers(context: Context, options: LayersOptions) -> Masks:
    """Whole parameters by name or tower."""
    names = [n for n, p in context.model.named_parameters() if p.requires_grad]
    if options.tower != "both":
        inside = parameters_of(context.model, options.tower)
        names = [n for n in names if n in inside]
        if not names:
            raise UserError(
                f"the {options.tower} tower has no trainable weight here: leave --lora out, or give it one."
            )
    chosen: set[str] = set()
    for pattern in options.names.split("+"):
        found = fnmatch.filter(names, pattern.strip())
        if not found:
            raise UserError(
                f"no trainable parameter is called '{pattern.strip()}': names of this model are like {names[0]}, "
                f"{names[len(names) // 2]}, {names[-1]}."
            )
        chosen |= set(found)
    return {n: torch.ones_like(p, dtype=torch.bool) for n, p in context.model.named_parameters() if n in chosen}


@dataclass(frozen=True, kw_only=True)
class RandomOptions:
    """How many."""

    share: float = option(0.1, "share of the weights that may move")


@selector(name="random", options=RandomOptions)
def random(context: Context, options: RandomOptions) -> Masks:
    """Weights drawn at random: the control of every other selector."""
    generator = torch.Generator().manual_seed(context.seed)
    drawn = {
        n: torch.rand(p.shape, generator=generator) for n, p in context.model.named_parameters() if p.requires_grad
    }
    return top_share(drawn, options.share)
