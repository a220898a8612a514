"""What a model was trained on, as salted digests beside its folder: a shadow must never have seen what it judges."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from expunge.data.samples import Sample
from expunge.errors import UserError

TRAINED_ON = "trained_on.json"
MANIFEST = "expunge.trained_on/1"


def trained_on(samples: Sequence[Sample], salt: str | None = None) -> dict[str, Any]:
    """Salted digests of the samples of a training, for :data:`TRAINED_ON` beside the model."""
    salt = salt or secrets.token_hex(16)
    return {"schema": MANIFEST, "salt": salt, "samples": sorted(_salted(s, salt) for s in samples)}


def _salted(sample: Sample, salt: str) -> str:
    return hashlib.sha256(f"{salt}/{sample.digest()}".encode()).hexdigest()


def provenance(forget: Sequence[Sample], folders: Sequence[str]) -> list[str]:
    """Check that references and shadows never saw the forget samples; a note for each of which nothing is known.

    Raises:
        UserError: the record beside a model says that it was trained on one of them.
    """
    notes = []
    for folder in folders:
        path = Path(folder).expanduser().parent / TRAINED_ON
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            known, salt = set(content["samples"]), str(content["salt"])
        except (OSError, ValueError, KeyError, TypeError):
            notes.append(f"nothing is known of what '{folder}' was trained on: that it never saw the data is assumed.")
            continue
        seen = next((s.id for s in forget if _salted(s, salt) in known), None)
        if seen is not None:
            raise UserError(
                f"'{folder}' was trained on forget sample '{seen}': references and shadows must never have seen the "
                "forget set; retrain it without."
            )
    return notes
