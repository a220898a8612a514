"""Commitments to personal data: HMAC-SHA256 under random keys that stand in a file of their own.

A certificate lives long and goes round; names and answers are few enough to be guessed, so that a plain hash of them
is as good as the text. Under a key of 256 random bits a commitment says nothing to anybody without the key, and
nothing to anybody at all once the key is destroyed; the signature over it stays good.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from expunge.certify.canonical import canonical
from expunge.certify.signing import write_new
from expunge.certify.vendored import Unreadable, load, read_json
from expunge.errors import UserError

SCHEMA = "expunge.commitment_keys/1"
PURPOSES = ("request", "record")  # whose data it was; what the run wrote down. Either can be destroyed alone.


def _fresh() -> str:
    return secrets.token_hex(32)


@dataclass(frozen=True)
class Keys:
    """256 bits in hexadecimal for each purpose, or "" where the key has been destroyed."""

    request: str = field(default_factory=_fresh, repr=False)
    record: str = field(default_factory=_fresh, repr=False)

    def commit(self, purpose: str, label: str, value: Any) -> str:
        """HMAC-SHA256 over the canonical JSON of ``[label, value]``, in hexadecimal.

        Raises:
            UserError: the key for this purpose has been destroyed.
        """
        key = {"request": self.request, "record": self.record}[purpose]
        if not key:
            raise UserError(f"the key '{purpose}' has been destroyed: what it committed to can no longer be checked.")
        return hmac.new(bytes.fromhex(key), canonical([label, value]), hashlib.sha256).hexdigest()

    def write(self, path: Path) -> Path:
        """Write them to a new file that only its owner reads.

        Raises:
            UserError: the file exists, or cannot be written.
        """
        content = canonical({"schema": SCHEMA, "keys": {"request": self.request, "record": self.record}})
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_new(path, content, 0o600)
        except FileExistsError:
            raise UserError(f"'{path}' exists, and is never overwritten: choose a new --out.") from None
        except OSError as error:
            raise UserError(f"'{path}' cannot be written ({error.strerror}): choose another --out.") from error
        return path


def read_keys(path: Path | str) -> Keys:
    """Keys from their file; one that is absent or empty there counts as destroyed.

    Raises:
        UserError: no such file, or another content.
    """
    try:
        content = read_json(load(Path(path)).strip(), f"'{path}'")
    except Unreadable as error:
        raise UserError(f"{error} The keys of commitments stand in the file that certify wrote.") from error
    keys = content.get("keys") if isinstance(content, dict) and content.get("schema") == SCHEMA else None
    if not isinstance(keys, Mapping) or not set(keys) <= set(PURPOSES) or not all(map(_is_key, keys.values())):
        raise UserError(f"'{path}' holds no keys of commitments ({SCHEMA}): give the file that certify wrote.")
    return Keys(**{purpose: keys.get(purpose, "") for purpose in PURPOSES})


def _is_key(value: Any) -> bool:
    if not isinstance(value, str) or len(value) not in (0, 64):
        return False
    return all(c in "0123456789abcdef" for c in value)
