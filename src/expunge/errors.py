"""User errors: one clear sentence that says what was given, what is allowed and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 20  # allowed names that one message lists


class UserError(ValueError):
    """The input is wrong. The command line prints the message and ends with exit code 2, without a traceback."""


def unknown(kind: str, given: str, allowed: Iterable[str]) -> UserError:
    """A :class:`UserError` for a name that does not exist, with the nearest existing name first.

    >>> print(unknown("method", "nop", ["npo", "ga"]))
    unknown method 'nop': did you mean 'npo'? Allowed: ga, npo.
    """
    names = sorted(allowed)
    by_case = {name.lower(): name for name in names}
    near = difflib.get_close_matches(given.lower(), by_case, n=1, cutoff=0.4)
    hint = f" did you mean '{by_case[near[0]]}'?" if near else ""
    shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    return UserError(f"unknown {kind} '{given}':{hint} Allowed: {shown}.")
