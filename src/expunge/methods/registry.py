"""Methods: what one is, what it declares, how it is found by name.

A method is a typed function ``(context, options) -> Outcome`` in one file of this package (or an entry point of
group ``expunge.methods``, or ``path/to/file.py:name``), registered by :func:`method`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from expunge.data.samples import Modality, Sample
from expunge.errors import UserError, unknown
from expunge.extensions import import_all, import_file
from expunge.methods.helpers import Helpers
from expunge.methods.scope import Scope, held
from expunge.models.adapter import Adapter, num_parameters
from expunge.options import configure
from expunge.progress import Progress

Need = Literal["retain", "base", "unseen", "llm"]
Sequential = Literal["repeat", "protect", "fuse", "not-defined"]
Changes = Literal["all", "some", "beside", "new", "memory"]


@dataclass
class Context:
    """Everything a method may look at. ``model`` may be edited in place.

    ``base`` loads the model from before the private data was learnt, or is None when nobody kept it.
    ``unseen`` are texts of the same kind that no model was trained on and no evaluation uses.
    ``earlier`` are the forget samples of earlier requests on the same model (sequence of requests).
    ``llm`` answers a prompt with a text, where the user has given such a callable.
    ``scope`` says which weights may move; methods need not look at it, see :mod:`expunge.methods.scope`.
    ``helpers`` takes every second model that a method trains on private data.
    ``work`` is a folder for checkpoints; a method called again with the same folder resumes.
    """

    model: nn.Module
    adapter: Adapter
    forget: Sequence[Sample]
    retain: Sequence[Sample] = ()
    unseen: Sequence[Sample] = ()
    earlier: Sequence[Sample] = ()
    base: Callable[[], nn.Module] | None = None
    llm: Callable[[str], str] | None = None
    scope: Scope | None = None
    helpers: Helpers = field(default_factory=Helpers)
    seed: int = 0
    work: Path | None = None
    progress: Progress = field(default_factory=Progress)


@dataclass
class Outcome:
    """The unlearned model, and what the reader of the report must know about how it came about."""

    model: nn.Module
    notes: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)  # figures of the method itself: goes into run.json
    removes_from_weights: bool = True  # False where this run left the data in the weights, whatever the method declares


@dataclass(frozen=True)
class Method:
    """A registered method with its declared properties; the matrix test checks them by probing.

    ``changes``: all weights; some of them (chosen by the method); modules beside the weights, which stay as they were;
    a new model; or the memory of a zone. ``sequential``: what a second request on the same model does: the method is
    repeated, repeated while the earlier targets are protected, its parts are fused in closed form, or not defined.
    """

    name: str
    run: Callable[[Context, Any], Outcome]
    options: type[Any]
    paper: str
    summary: str
    needs: frozenset[Need] = frozenset()
    wants: frozenset[Need] = frozenset()  # used when there, said when missing
    modalities: frozenset[Modality] = frozenset({"text", "classifier", "multimodal"})
    removes_from_weights: bool = True
    helpers_hold_data: bool = False  # trains helper models on the private data
    sequential: Sequential = "repeat"
    changes: Changes = "all"
    formula: str = ""

    def __call__(self, context: Context, options: Any = None) -> Outcome:
        """Check what the method needs, then run it.

        Raises:
            UserError: something that the method needs is missing, or the modality is not supported.
        """
        if not context.forget:
            raise UserError(f"method '{self.name}' was given no forget samples: name at least one sample to forget.")
        for need in sorted(self.needs):
            if not getattr(context, need):
                raise UserError(f"method '{self.name}' needs {WORDS[need]}.")
        self.check_modality(context.adapter.modality)
        if context.scope is not None and self.changes in ("beside", "new", "memory"):
            raise UserError(f"method '{self.name}' moves none of the model's weights: leave --scope out.")
        outcome: Outcome | None = None
        try:
            with self._scoped(context) as notes:
                outcome = self.run(context, options if options is not None else self.options())
            outcome.notes += notes
        finally:
            context.helpers.finish(None if outcome is None else outcome.model)
        if context.helpers.record:
            outcome.record["helpers"] = [dict(entry) for entry in context.helpers.record]
        return outcome

    def check_modality(self, modality: Modality) -> None:
        """Raises UserError when the method is not for such models; asked before anything is measured."""
        if modality not in self.modalities:
            raise UserError(
                f"method '{self.name}' works on {', '.join(sorted(self.modalities))}, not on a {modality} model."
            )

    @contextmanager
    def _scoped(self, context: Context) -> Iterator[list[str]]:
        if context.scope is None:
            yield []
            return
        masks = context.scope.masks(context)
        free, total = sum(int(m.sum()) for m in masks.values()), num_parameters(context.model)
        with held(context.model, masks):
            yield [f"scope {context.scope.selector.name}: {free} of {total} weights could move"]

    def configure(self, values: Mapping[str, Any]) -> Any:
        """The method's options with ``values`` set; strings are read as the field's type."""
        return configure(self.options, values, f"option of method {self.name}")


# How to give what a method needs.
WORDS: dict[Need, str] = {
    "retain": "retain data: give --retain FILE, or a dataset with that role",
    "base": "the base, the model before the private data was learnt: give --base FOLDER",
    "unseen": "unseen data, of the same kind and never trained on: give --holdout FILE, or a dataset with that role",
    "llm": "a language model that answers prompts: give --llm path/to/file.py:name, or llm=… in Python",
}
_METHODS: dict[str, Method] = {}
ALIASES = {  # the published prototype's names
    "cluster_driven": "cluster",
    "unlearn_what_you_want": "eul",
    "code_unlearn": "codeunlearn",
    "o3_framework": "o3",
}


def register(entry: Method) -> Method:
    known = _METHODS.get(entry.name)
    if known is not None and _place(known.run) != _place(entry.run):
        raise UserError(f"two methods are called '{entry.name}': give the one in {_place(entry.run)[0]} another name.")
    _METHODS[entry.name] = entry
    return entry


def _place(run: Any) -> tuple[str, str]:
    run = getattr(run, "func", run)  # a row of a table is a partial
    return run.__module__, run.__qualname__


def method(
    *, name: str, options: type[Any], paper: str, **declared: Any
) -> Callable[[Callable[[Context, Any], Outcome]], Callable[[Context, Any], Outcome]]:
    """Decorator that registers a method; ``summary`` is the first line of the function's docstring."""

    def wrap(run: Callable[[Context, Any], Outcome]) -> Callable[[Context, Any], Outcome]:
        summary = declared.pop("summary", (run.__doc__ or "").strip().split("\n")[0])
        register(Method(name=name, run=run, options=options, paper=paper, summary=summary, **declared))
        return run

    return wrap


def all_methods() -> dict[str, Method]:
    """Every method by name: the modules of this package, then entry points of group ``expunge.methods``."""
    import_all("expunge.methods", "expunge.methods")
    return dict(sorted(_METHODS.items()))


def get_method(name: str) -> Method:
    """By name, alias, or ``path/to/file.py:name``.

    Raises:
        UserError: no such method or file; the nearest name is suggested.
    """
    if ".py:" in name:
        path, _, wanted = name.rpartition(":")
        before = set(_METHODS)
        module = import_file(path, "method")
        if wanted not in _METHODS or (wanted in before and _place(_METHODS[wanted].run)[0] != module):
            raise UserError(f"'{path}' registers no method called '{wanted}'.")
        return _METHODS[wanted]
    methods = all_methods()
    name = ALIASES.get(name, name)
    bare, colon, settings = name.partition(":")
    if colon and ALIASES.get(bare, bare) in methods:
        raise UserError(
            f"'{name}' is method '{bare}' with settings, which only bench and plans read that way; "
            f"give --method {bare} --set {settings.replace(';', ' --set ') or 'name=value'} (in Python set={{...}})."
        )
    if name not in methods:
        raise unknown("method", name, methods)
    return methods[name]
