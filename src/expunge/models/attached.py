"""Modules beside a model's own weights: unlearning layers, gated adapters, guards, bottlenecks.

An attachment is a submodule ``attached.N`` of the Hugging Face model that works through forward hooks, so that
everything which runs the model (losses, generation, attacks) runs it with the attachment. The model's own weights stay
what they were: who takes the attachment off has the model as it was before. Methods that use one declare
``removes_from_weights = False``.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from safetensors.torch import load_file, save_file
from torch import nn

from expunge.errors import UserError, unknown

if TYPE_CHECKING:
    from expunge.models.adapter import Batch

ATTACHED = "attached.json"  # beside the weights: kinds and constructor arguments, in the order of attaching
TENSORS = "attached.safetensors"
SCHEMA = "expunge.attached/1"
_KINDS: dict[str, type[Attachment]] = {}


class Attachment(nn.Module, ABC):
    """One module with its hooks. ``kind`` names it in files; a subclass that sets it is registered."""

    kind: ClassVar[str] = ""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if cls.kind:
            _KINDS[cls.kind] = cls

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What the constructor was given, as JSON: ``type(self)(**self.arguments())`` has the same shapes."""

    @abstractmethod
    def install(self, model: Any) -> None:
        """Register hooks on modules of ``model`` (the Hugging Face model). Hooks are bound methods of this module, or
        partials of them, so that a deep copy of the model has hooks of its own."""

    def see(self, batch: Batch) -> None:
        """Told by text adapters which batch the next pass is over, for guards that must know where prompts end: the
        last prompt token of row b is the smallest ``cols_N`` of that row. Nothing by default."""


def attach(model: nn.Module, attachment: Attachment) -> nn.Module:
    """Put the attachment on the model in place, after those that are there; the model itself."""
    if "attached" not in model._modules:
        model.add_module("attached", nn.ModuleList())
    reference = next(model.parameters())
    attachment.to(device=reference.device)
    model.get_submodule("attached").append(attachment)  # type: ignore[operator]
    attachment.install(model)
    attachment.train(model.training)
    return model


def attachments(model: nn.Module) -> list[Attachment]:
    """What is attached to the model, in order."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return list(inner._modules.get("attached", None) or [])


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters without those of its attachments."""
    beside = {id(p) for a in attachments(model) for p in a.parameters()}
    return {n: p for n, p in model.named_parameters() if id(p) not in beside}


def save_attached(model: nn.Module, folder: Path) -> None:
    """Write :data:`ATTACHED` and :data:`TENSORS`."""
    found = attachments(model)
    listed = [{"kind": a.kind, "arguments": a.arguments()} for a in found]
    tensors = {
        f"{i}.{n}": t.detach().cpu().contiguous() for i, a in enumerate(found) for n, t in a.state_dict().items()
    }
    save_file(tensors, folder / TENSORS)
    (folder / ATTACHED).write_text(json.dumps({"schema": SCHEMA, "attached": listed}, indent=1), encoding="utf-8")


def load_attached(model: nn.Module, folder: Path) -> None:
    """Attach what :func:`save_attached` wrote.

    Raises:
        UserError: files that are not whole, or a kind that this version does not have.
    """
    try:
        content = json.loads((folder / ATTACHED).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        if content["schema"] != SCHEMA:
            raise ValueError(f"its schema is {content['schema']}, and this version reads {SCHEMA}")
        for number, entry in enumerate(content["attached"]):
            if entry["kind"] not in _KINDS:
                raise unknown("kind of attachment", str(entry["kind"]), _KINDS)
            made = _KINDS[entry["kind"]](**entry["arguments"])
            begin = f"{number}."
            made.load_state_dict({n.removeprefix(begin): t for n, t in tensors.items() if n.startswith(begin)})
            attach(model, made)
    except UserError:
        raise
    except Exception as error:  # the files are outside input: whatever is wrong with them ends here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"'{folder / ATTACHED}' cannot be read: {reason}.") from error
