"""How a method is declared, found by name, alias or file, and refused."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from expunge.errors import UserError
from expunge.methods import registry
from expunge.methods.registry import Context, Method, Outcome, all_methods, get_method, method, register
from expunge.options import option
from expunge.training.loop import TrainOptions
from tiny_text import tiny_adapter, tiny_dataset, tiny_model

DATA = tiny_dataset()
PLUGIN = '''
"""A method of one's own."""
from dataclasses import dataclass

import torch

from expunge.methods.registry import Context, Outcome, method
from expunge.options import option


@dataclass(frozen=True, kw_only=True)
class Options:
    """Its options."""

    size: float = option(0.5, "what the head is multiplied by")
    {extra}

@method(name="{name}", options=Options, paper="none", needs=frozenset({{"retain"}}))
def shrink(context: Context, options: Options) -> Outcome:
    """Shrink the head."""
    with torch.no_grad():
        context.model.get_output_embeddings().weight.mul_(options.size)
    return Outcome(context.model, ["shrunk"])
'''


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test registers is gone afterwards."""
    all_methods()
    monkeypatch.setattr(registry, "_METHODS", copy.copy(registry._METHODS))


def plugin(folder: Path, name: str = "shrink", extra: str = "", file: str = "mine.py") -> str:
    (folder / file).write_text(PLUGIN.format(name=name, extra=extra))
    return f"{folder / file}:{name}"


def test_a_file_is_a_method(tmp_path: Path) -> None:
    found = get_method(plugin(tmp_path))
    assert found.summary == "Shrink the head." and found.needs == {"retain"}
    model = tiny_model(tied=False)
    before = model.lm_head.weight.detach().clone()
    context = Context(model, tiny_adapter(), DATA["forget"], DATA["retain"])
    outcome = found(context, found.configure({"size": "0.25"}))
    assert torch.equal(outcome.model.get_output_embeddings().weight, 0.25 * before) and outcome.notes == ["shrunk"]
    with pytest.raises(UserError, match="method 'shrink' needs retain data: give --retain FILE"):
        found(Context(model, tiny_adapter(), DATA["forget"]))
    assert "shrink" in all_methods()


def test_a_file_may_be_named_again_and_edited_between(tmp_path: Path) -> None:
    first = get_method(plugin(tmp_path))
    second = get_method(plugin(tmp_path, extra='more: int = option(3, "another")'))
    assert not hasattr(first.options(), "more") and second.options().more == 3


def test_files_that_are_not_methods(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method file .*none\.py' does not exist: give path/to/file\.py:name"):
        get_method(f"{tmp_path / 'none.py'}:shrink")
    path = plugin(tmp_path).rpartition(":")[0]
    with pytest.raises(UserError, match="registers no method called 'shrnk'"):
        get_method(f"{path}:shrnk")
    with pytest.raises(UserError, match="registers no method called 'npo'"):
        get_method(f"{path}:npo")


def test_a_file_cannot_take_the_name_of_a_method_that_is_there(tmp_path: Path) -> None:
    before = get_method("npo")
    with pytest.raises(UserError, match="two methods are called 'npo'"):
        get_method(plugin(tmp_path, name="npo"))
    assert get_method("npo") is before


def test_names() -> None:
    known = all_methods()
    assert list(known) == sorted(known) and {"cluster", "npo", "retrain", "finetune"} <= set(known)
    assert all(name == entry.name for name, entry in known.items())
    assert get_method("cluster_driven") is known["cluster"]
    with pytest.raises(UserError, match="unknown method 'simpno': did you mean 'simnpo'"):
        get_method("simpno")


@dataclass(frozen=True, kw_only=True)
class Few(TrainOptions):
    """Options of the methods made here."""

    depth: int | None = option(None, "how deep")


def test_the_decorator_registers_what_it_is_told() -> None:
    @method(name="nothing", options=Few, paper="p", modalities=frozenset({"classifier"}), sequential="not-defined")
    def nothing(context: Context, options: Few) -> Outcome:
        """Do nothing.

        More of it.
        """
        return Outcome(context.model)

    found = get_method("nothing")
    assert found.summary == "Do nothing." and found.sequential == "not-defined" and found.removes_from_weights
    assert found.configure({"depth": "3", "batch-size": "4"}) == Few(depth=3, batch_size=4)
    assert found.configure({"depth": "none"}).depth is None
    context = Context(tiny_model(), tiny_adapter(), DATA["forget"])
    with pytest.raises(UserError, match="'nothing' works on classifier, not on a text model"):
        found(context)
    assert register(found) is found, "registering the same again is no clash"


def test_options_are_checked_before_anything_runs() -> None:
    npo = get_method("npo")
    for values, message in (
        ({"learning_rte": 1}, "unknown option of method npo 'learning_rte': did you mean 'learning_rate'"),
        ({"optimizer": "adam"}, "'optimizer' = adam: allowed are adamw, muon, sgd"),
        ({"batch_size": "2.5"}, "'batch_size' = '2.5' is not a"),
        ({"batch_size": 0}, "batch_size = 0 cannot be: give 1 or more"),
        ({"retain_batch": 0}, "retain_batch = 0 cannot be: give 1 or more"),
        ({"epochs": -1}, "epochs = -1.0 cannot be: give a number above 0"),
        ({"beta": None}, "'beta' may not be none"),
    ):
        with pytest.raises(UserError, match=message):
            npo.configure(values)
    assert npo.configure({"learning_rate": "none"}).learning_rate is None


def test_needs_of_every_kind() -> None:
    made = Method("m", lambda c, o: Outcome(c.model), Few, "p", "s", needs=frozenset({"base", "unseen"}))
    context = Context(tiny_model(), tiny_adapter(), DATA["forget"], DATA["retain"])
    with pytest.raises(UserError, match="'m' needs the base, the model before"):
        made(context)
    context.base = tiny_model
    with pytest.raises(UserError, match="'m' needs unseen data"):
        made(context)
    context.unseen = DATA["holdout"]
    assert made(context).model is context.model
    context.forget = ()
    with pytest.raises(UserError, match="was given no forget samples"):
        made(context)


def test_settings_in_the_name_of_a_method_are_shown_their_place() -> None:
    with pytest.raises(UserError, match=r"give --method npo --set beta=0\.05 --set retain=kl "):
        get_method("npo:beta=0.05;retain=kl")
