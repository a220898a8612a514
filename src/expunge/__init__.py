"""Expunge: make a trained model forget, measure whether it did, and put a name under the answer.

``expunge.unlearn``, ``audit``, ``bench``, ``train`` and ``demo`` do what the verbs of the command line do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expunge.api import audit, bench, train, unlearn
    from expunge.opening import Result
    from expunge.showcase import demo

__version__ = "0.1.0"
__all__ = ["Result", "audit", "bench", "demo", "train", "unlearn"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported at first use: the command line's help must not wait for torch
        from expunge import api, opening, showcase

        return getattr({"demo": showcase, "Result": opening}.get(name, api), name)
    raise AttributeError(f"module 'expunge' has no attribute '{name}'")
