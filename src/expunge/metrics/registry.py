"""The table of metrics: what each is called, which definition it has, what counts as good, where it comes from."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from expunge.errors import unknown

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Metric:
    """A registered metric. ``definition`` is a name and a version: numbers compare only under one definition."""

    name: str
    definition: str
    formula: str
    direction: str
    source: str
    measure: Callable[..., Any]

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.measure.__doc__ or "").strip().split("\n")[0]

    @property
    def doc(self) -> str:
        """The docstring: what the metric can and cannot show."""
        lines = (self.measure.__doc__ or "").strip().split("\n")
        return "\n".join(line.removeprefix("    ") for line in lines)

    def record(self) -> dict[str, str]:
        """For ``expunge ls metrics --json``."""
        return {
            "name": self.name,
            "definition": self.definition,
            "formula": self.formula,
            "direction": self.direction,
            "source": self.source,
            "summary": self.summary,
        }


_METRICS: dict[str, Metric] = {}


def metric(*, name: str, definition: str, formula: str, direction: str, source: str) -> Callable[[Function], Function]:
    """Decorator that puts a function into the table; the function itself is left as it is."""

    def wrap(measure: Function) -> Function:
        known = _METRICS.get(name)
        if known is not None and known.measure.__qualname__ != measure.__qualname__:
            raise AssertionError(f"two metrics are called {name}")
        _METRICS[name] = Metric(name, definition, formula, direction, source, measure)
        return measure

    return wrap


def all_metrics() -> dict[str, Metric]:
    """Every metric by name: the modules of this package, those already imported, and group ``expunge.metrics``.

    The membership scores stand in ``expunge.attacks.membership``, a room above this one: import it to list them.
    """
    package = importlib.import_module("expunge.metrics")
    for found in pkgutil.iter_modules(package.__path__, "expunge.metrics."):
        importlib.import_module(found.name)
    for entry in entry_points(group="expunge.metrics"):
        entry.load()
    return dict(sorted(_METRICS.items()))


def get_metric(name: str) -> Metric:
    """By name.

    Raises:
        UserError: no such metric; the nearest name is suggested.
    """
    metrics = all_metrics()
    if name not in metrics:
        raise unknown("metric", name, metrics)
    return metrics[name]
