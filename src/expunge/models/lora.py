"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank updates beside frozen weights, through peft.

With an adapter the original is still inside the unlearned model: switching the adapter off gives the original's
logits, so that methods which need a teacher hold one model in memory and not two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from expunge.errors import UserError
from expunge.models.adapter import evaluating
from expunge.models.quiet import quiet
from expunge.models.towers import TOWERS, modules_of
from expunge.options import option

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """``--lora r=8 alpha=16 …``."""

    r: int = option(8, "rank of the update", "Hu et al. 2021, section 4.2")
    alpha: float = option(16.0, "scale: the update is multiplied by alpha / r", "peft's usual 2·r")
    dropout: float = option(0.0, "dropout on the adapter's input; 0 keeps unlearning deterministic")
    targets: str = option(
        ALL_LINEAR,
        "all-linear; language or vision, the linear layers of that tower of a vision-language model; or names of "
        "layers joined by commas, e.g. q_proj,v_proj",
    )


def is_lora(model: nn.Module) -> bool:
    """Whether the model carries a peft adapter."""
    return hasattr(model, "peft_config")


def apply_lora(model: nn.Module, options: LoraOptions, *, seed: int = 0) -> nn.Module:
    """Wrap the model: its weights are frozen, and r·(in + out) new ones per target layer are trained.

    The second factor starts at zero, so the wrapped model computes exactly what the bare one does. "all-linear"
    means every linear layer but the output head; in a convolutional classifier, every convolution and the head.
    "language" and "vision" part "all-linear" between the towers of a vision-language model.

    Raises:
        UserError: the model has an adapter already, an option is out of range, no layer has a target's name, or a tower
            is asked of a model that has none.
    """
    from peft import LoraConfig, get_peft_model

    if is_lora(model):
        raise UserError("the model is a LoRA adapter already: leave --lora out, or merge the adapter first.")
    if options.r < 1 or options.alpha <= 0 or not 0 <= options.dropout < 1:
        raise UserError(
            f"LoRA r={options.r} alpha={options.alpha} dropout={options.dropout}: r is at least 1, alpha above 0, "
            "dropout at least 0 and below 1."
        )
    names = _targets(model, options.targets)
    config = LoraConfig(r=options.r, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=names)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(seed)
        # peft initialises on the CPU and on the model's device alike from this generator.
        wrapped: nn.Module = get_peft_model(model, config)
    return wrapped


def _targets(model: nn.Module, targets: str) -> list[str]:
    """Full names of the layers to adapt, so that what a name means never depends on peft's matching rules."""
    kinds = (nn.Linear, nn.Conv2d) if any(isinstance(m, nn.Conv2d) for m in model.modules()) else (nn.Linear,)
    if hasattr(model, "vision_tower") or getattr(getattr(model, "config", None), "vision_config", None) is not None:
        kinds = (nn.Linear,)  # the one convolution of a vision tower only cuts the image into patches
    inner: Any = model
    head = inner.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers = [n for n, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"]
    everywhere = [n for n in layers if model.get_submodule(n) is not head]
    if targets == ALL_LINEAR:
        return everywhere
    for tower in TOWERS:
        if targets == tower:
            inside = modules_of(model, tower)
            return [n for n in everywhere if id(model.get_submodule(n)) in inside]
    wanted = [t.strip() for t in targets.split(",") if t.strip()]
    found = [n for n in layers if any(n == w or n.endswith("." + w) for w in wanted)]
    lost = [w for w in wanted if not any(n == w or n.endswith("." + w) for n in layers)]
    if lost or not found:
        names = sorted({n.rsplit(".", 1)[-1] for n in layers})
        raise UserError(
            f"no layer of this model is called {', '.join(lost) or repr(targets)}: LoRA targets are all-linear or "
            f"some of {', '.join(names)}."
        )
    return found


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before LoRA (the teacher), in eval mode and without gradients.

    Raises:
        UserError: the model has no adapter to switch off.
    """
    if not is_lora(model):
        raise UserError("the model has no LoRA adapter to switch off: load it with --lora, or keep a second copy.")
    wrapped: Any = model
    with evaluating(model), wrapped.disable_adapter():
        yield model


def merge_lora(model: nn.Module) -> nn.Module:
    """The bare model with the update added to its weights; the wrapper is used up. No adapter: the model itself."""
    if not is_lora(model):
        return model
    wrapped: Any = model
    merged: nn.Module = wrapped.merge_and_unload()
    return merged.requires_grad_(True)
