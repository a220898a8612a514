"""The two towers of a vision-language model: what sees and what speaks.

``vision`` is the image encoder with the projector behind it, ``language`` the language model with its output head;
together they are the whole model, and no weight stands in both.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from expunge.errors import UserError
from expunge.models.text import causal_lm

TOWERS = ("language", "vision")


def modules_of(model: nn.Module, tower: str) -> set[int]:
    """``id`` of each module of the tower; of a LoRA model the layers' wrappers and updates among them.

    Raises:
        UserError: the model is no vision-language model.
    """
    inner: Any = causal_lm(model)
    speaks = getattr(getattr(inner, "base_model", None), "language_model", None)
    if getattr(getattr(inner, "config", None), "vision_config", None) is None or speaks is None:
        raise UserError(f"'{tower}' is a tower of vision-language models, and this {type(inner).__name__} has none.")
    parts = [speaks, inner.get_output_embeddings()]
    if tower == "vision":
        parts = [child for child in inner.base_model.children() if child is not speaks]
    return {id(m) for part in parts for m in part.modules()}


def parameters_of(model: nn.Module, tower: str) -> set[str]:
    """Names, in ``model``, of the tower's own parameters.

    Raises:
        UserError: the model is no vision-language model.
    """
    chosen = modules_of(model, tower)
    own = {id(p) for m in model.modules() if id(m) in chosen for p in m.parameters(recurse=False)}
    return {name for name, p in model.named_parameters() if id(p) in own}
