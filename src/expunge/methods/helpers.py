"""Helper models: second models that hold private data while a method works, and what became of them.

A method says ``context.helpers.add(...)`` as soon as it has trained one. When the method ends, for whatever reason,
every helper is overwritten with zeros, unless it was asked to be kept; the record says which of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from expunge.data.samples import Sample
from expunge.record import now


@dataclass
class Helpers:
    """The helper models of one call of a method. ``keep``: a folder where they are kept on purpose."""

    keep: Path | None = None
    record: list[dict[str, Any]] = field(default_factory=list)
    _models: list[tuple[str, nn.Module]] = field(default_factory=list, repr=False)

    def add(self, name: str, model: nn.Module, samples: Sequence[Sample], purpose: str) -> nn.Module:
        """Register ``model``, which was trained on ``samples`` (of any role); the model itself."""
        self._models.append((name, model))
        self.record.append({"name": name, "purpose": purpose, "samples": len(samples)})
        return model

    def finish(self, result: nn.Module | None) -> None:
        """Keep or destroy them all. A helper that became the result itself is neither: it is said so."""
        shared = set() if result is None else {t.data_ptr() for t in (*result.parameters(), *result.buffers())}
        for entry, (name, model) in zip(self.record, self._models, strict=True):
            state = {n: p for n, p in (*model.named_parameters(), *model.named_buffers()) if p.data_ptr() not in shared}
            if not state:
                entry |= {"kept": "as the result", "destroyed": None}
                continue
            if self.keep is not None:
                self.keep.mkdir(parents=True, exist_ok=True)
                file = self.keep / f"{name}.safetensors"
                save_file({n: t.detach().cpu().clone().contiguous() for n, t in state.items()}, file)
                entry["kept"] = file.name
            entry["destroyed"] = now()
            with torch.no_grad():
                for tensor in state.values():
                    tensor.zero_()
        self._models.clear()
