"""Chance without state: every draw is a pure function of its key, on any platform and version, for ever."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TypeVar

from expunge.errors import UserError

T = TypeVar("T")


def hashed(*key: object) -> int:
    """64 uniform bits from the key (SHA-256 of its parts, so that 1, 23 and 12, 3 differ)."""
    text = "\x1f".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def pick(size: int, *key: object) -> int:
    """An integer in [0, size), uniform over keys (the bias of the remainder is below size / 2^64)."""
    return hashed(*key) % size


def shuffled(items: Iterable[T], *key: object) -> list[T]:
    """The items in an order given by a hash of each one's text.

    The order of any two items does not depend on which others are there, so a longer list keeps the relative
    order of a shorter one, and prefixes of one order are nested.
    """
    return sorted(items, key=lambda item: (hashed(*key, item), str(item)))


def share(amount: int | float, total: int, what: str) -> int:
    """A count from a count (1 or more) or a fraction (between 0 and 1) of ``total``; a fraction gives at least 1.

    Raises:
        UserError: negative, or more than ``total``.
    """
    if not amount >= 0:
        raise UserError(f"{what} = {amount}: give a count (1, 2, …) or a fraction between 0 and 1.")
    if amount == 0:
        return 0
    if amount < 1:
        return max(1, round(amount * total))
    if amount != int(amount):
        raise UserError(f"{what} = {amount} is neither a whole count nor a fraction below 1: give one of the two.")
    if amount > total:
        raise UserError(f"{what} = {amount}, but there are only {total}: ask for fewer.")
    return int(amount)
