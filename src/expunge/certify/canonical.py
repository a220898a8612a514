"""Canonical JSON for what is signed, written by the ``rfc8785`` package and read by our own strict reader.

The two know nothing of each other: what one writes and the other does not take for canonical is never signed.
"""

from __future__ import annotations

from typing import Any

import rfc8785

from expunge.certify.vendored import Unreadable, read_json
from expunge.errors import UserError
from expunge.files import plain


def canonical(obj: Any) -> bytes:
    """RFC 8785 bytes of ``plain(obj)``; numbers of numpy are taken, NaN becomes null.

    Raises:
        UserError: an integer beyond 2^53 - 1 or half of a surrogate pair, which canonical JSON cannot hold.
    """
    try:
        data: bytes = rfc8785.dumps(plain(obj))
        read_json(data, "the content")
    except (rfc8785.CanonicalizationError, Unreadable) as error:
        raise UserError(f"this cannot be signed: {error}.") from error
    return data
