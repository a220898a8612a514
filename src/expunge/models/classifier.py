"""Image classifiers: one target position per sample, V = number of classes.

Shape suffixes: B = N samples, D width of the last layer's input, V classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from expunge.data.samples import Modality, Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter, Batch, Head, evaluating
from expunge.models.am_softmax import CosineHead
from expunge.models.images import Preprocess
from expunge.models.text import causal_lm, same_logits

KEEP_BYTES = 1 << 16  # images up to this size stay in memory once resized


@dataclass
class ClassifierAdapter(Adapter):
    """Adapter for ``AutoModelForImageClassification``: ``Sample.image``, and ``Sample.target`` as class index or name.

    The hidden state is the input of the last linear layer, which is the head.
    """

    preprocess: Preprocess = field(default_factory=lambda: Preprocess(height=32, width=32))
    num_classes: int = 0
    label_ids: Mapping[str, int] = field(default_factory=dict)
    whole_logits: bool = False
    _flops: WeakKeyDictionary[nn.Module, float] = field(default_factory=WeakKeyDictionary, repr=False)

    modality: Modality = "classifier"

    def encode(self, sample: Sample) -> tuple[np.ndarray | None, int]:
        """(resized pixels when small enough to be kept, class index)."""
        pixels = self.preprocess.pixels(sample)
        return (pixels if pixels.nbytes <= KEEP_BYTES else None), self.label(sample)

    def label(self, sample: Sample) -> int:
        """The class index of a sample.

        Raises:
            UserError: not a class of this model.
        """
        target = sample.target
        if isinstance(target, str):
            known = self.label_ids.get(target)
            target = int(target) if known is None and target.isdecimal() else -1 if known is None else known
        if not 0 <= target < self.num_classes:
            raise UserError(
                f"the target {sample.target!r} of sample '{sample.id}' is no class of this model: allowed are 0 to "
                f"{self.num_classes - 1}{' and the names in its id2label' if self.label_ids else ''}."
            )
        return int(target)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        coded: list[tuple[np.ndarray | None, int]] = [self.cached(s) for s in samples]
        rows = [self.preprocess.pixels(s) if p is None else p for s, (p, _) in zip(samples, coded, strict=True)]
        order = torch.arange(len(samples))
        return Batch(
            {"pixel_values": self.preprocess.tensor(np.stack(rows))},
            torch.tensor([label for _, label in coded], dtype=torch.long),
            order,
            torch.zeros_like(order),
            len(samples),
            len(samples) * self.preprocess.patches,
        )

    def hidden_and_head(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Head]:
        inner = causal_lm(model)
        pixels = batch.inputs["pixel_values"].to(inner.dtype)
        if self.whole_logits:
            return inner(pixel_values=pixels).logits, Head(nn.Identity())
        head = last_linear(inner)
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            inner(pixel_values=pixels)
        finally:
            hook.remove()
        return seen[-1], Head(head, margin=head.logit_margin if isinstance(head, CosineHead) else 0.0)

    def bind(self, model: nn.Module) -> Self:
        """Check that head(hidden) equals the model's own logits; where a model does more, use whole logits."""
        inner = causal_lm(model)
        size = (2, self.preprocess.channels, self.preprocess.height, self.preprocess.width)
        noise = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(inner.device, inner.dtype)
        empty = torch.zeros(0, dtype=torch.long)
        batch = Batch({"pixel_values": noise}, empty, empty, empty, 2, 2)
        self.whole_logits = False
        with evaluating(inner):
            own_BV = inner(pixel_values=noise).logits.float()
            try:
                hidden, head = self.hidden_and_head(inner, batch)
                good = hidden.ndim == 2 and same_logits(own_BV, head(hidden), inner.dtype)
            except (UserError, IndexError):  # no linear head at all, or one that the forward pass does not call
                good = False
        self.whole_logits = not good
        return self

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Residual or transformer blocks, input side first; stages are opened."""
        out: list[nn.Module] = []
        for block in super().blocks(causal_lm(model)):
            layers = getattr(block, "layers", None)
            out += list(layers) if isinstance(layers, (nn.Sequential, nn.ModuleList)) else [block]
        return out

    def forward_flops(self, model: nn.Module) -> float | None:
        """FLOPs of one image, measured once, per 16 x 16 patch: a convolution's weights act at many places."""
        if model not in self._flops:
            inner = causal_lm(model)
            size = (1, self.preprocess.channels, self.preprocess.height, self.preprocess.width)
            pixels = torch.zeros(size, dtype=inner.dtype, device=inner.device)
            with evaluating(inner), FlopCounterMode(display=False) as counter:
                inner(pixel_values=pixels)
            self._flops[model] = float(counter.get_total_flops()) / self.preprocess.patches
        return self._flops[model]

    def num_tokens(self, sample: Sample) -> int:
        """16 x 16 patches of the resized image, whatever the model."""
        return self.preprocess.patches

    def num_targets(self, sample: Sample) -> int:
        return 1

    def save(self, folder: Any) -> None:
        text = json.dumps(self.preprocess.config(), indent=2, sort_keys=True)
        (Path(folder) / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def last_linear(model: Any) -> Any:
    """The last linear layer, or cosine head, whose output is the classes, inside or outside of a LoRA layer.

    Raises:
        UserError: there is none.
    """
    classes = int(model.config.num_labels)
    found: Any = None
    inside: set[int] = set()
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Module):
            # A LoRA layer counts as a whole; what it is made of does not.
            inside |= {id(m) for m in module.modules() if m is not module}
        layer = base if isinstance(base, nn.Module) else module
        if id(module) not in inside and isinstance(layer, (nn.Linear, CosineHead)) and len(layer.weight) == classes:
            found = module
    if found is None:
        raise UserError(f"{type(model).__name__} has no linear layer with {classes} outputs as its head.")
    return found
