"""Who was trained on what: the manifest that every training leaves beside its model, and what an audit reads from it.

A manifest carries those of the models it was made from, so that a chain of trainings can be followed to its roots
wherever the earlier folders have gone; see :mod:`expunge.certify.provenance`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from expunge.certify.exact import manifest_of_zone
from expunge.certify.provenance import (
    Manifest,
    Mechanism,
    Part,
    describe,
    lineage_of,
    salted,
    save_manifest,
    tokenizer_digest,
)
from expunge.data.samples import Role, Sample
from expunge.errors import UserError
from expunge.files import digest_folder
from expunge.runs import Run
from expunge.zones.zone import Zone


def record_training(
    run: Run, folder: Path, samples: Sequence[Sample], roles: Sequence[Role], *, start: str | None,
    texts: Sequence[Sample] = (), zone: Zone | None = None, mechanism: Mechanism | None = None,
) -> Path:  # fmt: skip
    """Write ``provenance.json`` into the run: what the model in ``folder`` was trained on and made from.

    Args:
        start: folder or hub name that the training went on from; None for random weights, whose tokenizer was fitted
            on ``texts``.
        zone: what was put over the frozen ``start``.
        mechanism: what hid the samples in a private training.
    """
    below = [] if start is None else lineage_of(Path(start))
    base = None if start is None else _named(start)
    if zone is not None:
        assert base is not None
        own = manifest_of_zone(folder, zone, samples, base, run.record.digests["code"])
    else:
        kind = "original" if "forget" in roles else "reference" if "retain" in roles else "base"
        code, parents = run.record.digests["code"], [base] if base else []
        own = describe(kind=kind, artefact=folder, records=samples, code=code, made_from=parents)
        parts = {"constants": Part(digest=run.record.digests["config"], fitted_on=(), source="options of the run")}
        if start is None and (tokenizer := tokenizer_digest(folder)) is not None:
            known = tuple(sorted({salted(s.digest(), own.salt) for s in texts}))
            parts["tokenizer"] = Part(digest=tokenizer, fitted_on=known, source="texts of the run")
        own = own.model_copy(update={"parts": parts, "mechanism": mechanism})
    return save_manifest(own.model_copy(update={"ancestors": tuple(below)}), run.folder)


def _named(start: str) -> str:
    """Digest of the folder; of a model of the hub only its name is known, and no manifest will ever bear it."""
    folder = Path(start).expanduser()
    return digest_folder(folder) if folder.is_dir() else hashlib.sha256(start.encode()).hexdigest()


def provenance(forget: Sequence[Sample], folders: Sequence[str]) -> list[str]:
    """Check that references and shadows, and what they were made from, never saw the forget samples; a note on those
    of which something is not known.

    Raises:
        UserError: a manifest says that one of them was trained on.
    """
    unknown = []
    for folder in folders:
        chain = lineage_of(Path(folder))
        for manifest in chain:
            seen = next((s.id for s in forget if salted(s.digest(), manifest.salt) in (manifest.records or ())), None)
            if seen is not None:
                which = f"'{folder}'" if manifest is chain[0] else f"what '{folder}' was made from"
                raise UserError(
                    f"{which} was trained on forget sample '{seen}': references and shadows must never have seen the "
                    "forget set; retrain it without."
                )
        if not _whole(chain):
            unknown.append(f"'{folder}'")
    if not unknown:
        return []
    return [f"nothing is known of what {', '.join(unknown)} saw in training; that it was no forget sample is assumed."]


def _whole(chain: Sequence[Manifest]) -> bool:
    """Whether the records of the model and of all that it was made from are known."""
    known = {manifest.artefact for manifest in chain if manifest.records is not None}
    return bool(chain) and all({m.artefact, *m.made_from} <= known for m in chain)
