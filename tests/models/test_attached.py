"""Attachments: hooks that travel with copies and files, and leave the model's own weights alone."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.matrix.worlds import world
from torch import Tensor, nn

from expunge.errors import UserError
from expunge.models.attached import ATTACHED, Attachment, attach, attachments, own_parameters
from expunge.models.load import Loaded, load_model, save_model


class Shift(Attachment):
    """Adds a learnt vector to what the first block gives."""

    kind = "test-shift"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.vector = nn.Parameter(torch.linspace(-3, 3, width))

    def arguments(self) -> dict[str, Any]:
        return {"width": self.width}

    def install(self, model: Any) -> None:
        model.model.layers[0].register_forward_hook(self.shifted)

    def shifted(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return output + self.vector
        return (output[0] + self.vector, *output[1:])


def shifted_world() -> tuple[Any, nn.Module]:
    here = world("text")
    model = copy.deepcopy(here.original)
    return here, attach(model, Shift(int(model.config.hidden_size)))


def test_it_works_and_copies_have_hooks_of_their_own() -> None:
    here, model = shifted_world()
    assert here.loss(model, here.forget) > here.loss(here.original, here.forget) + 0.1
    twin = copy.deepcopy(model)
    with torch.no_grad():
        attachments(twin)[0].get_parameter("vector").zero_()
    assert here.loss(twin, here.forget) == pytest.approx(here.loss(here.original, here.forget))
    assert here.loss(model, here.forget) > here.loss(here.original, here.forget) + 0.1
    assert set(own_parameters(model)) == {n for n, _ in here.original.named_parameters()}


def test_saved_and_loaded_and_the_base_alone_is_the_original(tmp_path: Path) -> None:
    here, model = shifted_world()
    folder = save_model(Loaded(model, here.adapter, ""), tmp_path / "model")
    again = load_model(folder, device="cpu")
    assert here.losses(again.model, here.forget) == pytest.approx(here.losses(model, here.forget), rel=1e-5)
    assert again.adapter.generate(again.model, here.forget[:2], 8) == here.adapter.generate(model, here.forget[:2], 8)
    (folder / ATTACHED).unlink()
    bare = load_model(folder, device="cpu").model
    assert here.losses(bare, here.forget) == pytest.approx(here.losses(here.original, here.forget), rel=1e-5)


def test_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    here, model = shifted_world()
    folder = save_model(Loaded(model, here.adapter, ""), tmp_path / "model")
    content = json.loads((folder / ATTACHED).read_text())
    for change, message in (
        ({"schema": "expunge.attached/9"}, "this version reads"),
        ({"attached": [{"kind": "test-shif", "arguments": {}}]}, "did you mean 'test-shift'"),
        ({"attached": [{"kind": "test-shift", "arguments": {"width": 3}}]}, "cannot be read"),
    ):
        (folder / ATTACHED).write_text(json.dumps({**content, **change}))
        with pytest.raises(UserError, match=message):
            load_model(folder, device="cpu")
