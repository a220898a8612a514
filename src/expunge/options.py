"""Options: a frozen keyword-only dataclass beside each method, dataset or attack; strings read as field types."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

from expunge.errors import UserError, unknown


def option(default: Any, meaning: str, source: str = "", choices: Sequence[Any] = ()) -> Any:
    """A dataclass field with its meaning, the source of its default, and the allowed values."""
    return field(default=default, metadata={"meaning": meaning, "source": source, "choices": tuple(choices)})


Ranges = Sequence[tuple[Sequence[str], str, Callable[[float], bool]]]  # fields, what is allowed in words, the test


def check_ranges(options: Any, ranges: Ranges) -> None:
    """Raises UserError for the first number outside of its range; none and fields that are not there are passed."""
    for names, allowed, good in ranges:
        for name in names:
            value = getattr(options, name, None)
            if value is not None and not good(value):
                raise UserError(f"{name} = {value} cannot be: give {allowed}.")


def name_and_settings(item: str, kind: str, example: str) -> tuple[str, dict[str, str]]:
    """``name:key=value;key=value``, where the name may be ``FILE.py:NAME``, cut into name and settings.

    Raises:
        UserError: a setting that is not key=value.
    """
    cut = item.find(":", item.find(".py:") + 4 if ".py:" in item else 0)
    name, settings = (item, "") if cut < 0 else (item[:cut], item[cut + 1 :])
    values: dict[str, str] = {}
    for pair in filter(None, settings.split(";")):
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{kind} setting '{pair}' is not key=value: write for example {example}.")
        values[key.strip()] = value.strip()
    return name.strip(), values


def configure(options: type[Any], values: Mapping[str, Any], kind: str) -> Any:
    """``options(**values)`` with strings read as the field's type.

    Raises:
        UserError: unknown option (the nearest is suggested), a value of the wrong type, or one not allowed.
    """
    fields = {f.name: f for f in dataclasses.fields(options)}
    hints = typing.get_type_hints(options)
    read: dict[str, Any] = {}
    for raw_key, value in values.items():
        key = raw_key.replace("-", "_")
        if key not in fields:
            raise unknown(kind, raw_key, fields)
        read[key] = _read(value, hints[key], f"{kind} '{key}'")
        choices = fields[key].metadata.get("choices", ())
        if choices and read[key] not in choices:
            raise UserError(f"{kind} '{key}' = {value}: allowed are {', '.join(map(str, choices))}.")
    return options(**read)


def _read(value: Any, hint: Any, where: str) -> Any:
    kinds = list(typing.get_args(hint)) if isinstance(hint, types.UnionType) else [hint]
    if value is None or (isinstance(value, str) and value.lower() == "none" and type(None) in kinds):
        if type(None) in kinds:
            return None
        raise UserError(f"{where} may not be none.")
    for kind in kinds:
        try:
            if kind is bool:
                if isinstance(value, bool):
                    return value
                if isinstance(value, str) and value.lower() in ("true", "false", "1", "0", "yes", "no"):
                    return value.lower() in ("true", "1", "yes")
            elif kind in (int, float, str):
                if kind is int and isinstance(value, float) and value != int(value):
                    continue
                return kind(value)
        except (TypeError, ValueError):
            continue
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    names = " or ".join(words.get(k, str(k)) for k in kinds if k is not type(None))
    raise UserError(f"{where} = {value!r} is not {names}.")
