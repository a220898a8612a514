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
    """Check that references and shadows never saw the forget samples; a note on those of which nothing is known.

    Raises:
        UserError: the record of a model says that it was trained on one of them.
    """
    unknown = []
    for folder in folders:
        found = _manifest(Path(folder).expanduser())
        if found is None:
            unknown.append(f"'{folder}'")
            continue
        known, salt = found
        seen = next((s.id for s in forget if _salted(s, salt) in known), None)
        if seen is not None:
            raise UserError(
                f"'{folder}' was trained on forget sample '{seen}': references and shadows must never have seen the "
                "forget set; retrain it without."
            )
    if not unknown:
        return []
    return [f"nothing is known of what {', '.join(unknown)} saw in training; that it was no forget sample is assumed."]


def _manifest(folder: Path) -> tuple[set[str], str] | None:
    """(salted digests, salt) of the record in the model's folder, or beside it where ``expunge train`` puts it.

    The record beside a folder of another name may be that of any model there.
    """
    places = [folder / TRAINED_ON, *([folder.parent / TRAINED_ON] if folder.name == "model" else [])]
    for path in places:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] == MANIFEST:
                return set(content["samples"]), str(content["salt"])
        except (OSError, ValueError, KeyError, TypeError):  # absent, or not ours
            continue
    return None
