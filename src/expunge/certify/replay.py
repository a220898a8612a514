"""Claims once more, from what is kept: from a run's files, and from its data and models where these are there."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expunge.certify.canonical import canonical
from expunge.certify.commitments import Keys
from expunge.certify.evidence import FILES
from expunge.certify.issue import claims_of
from expunge.certify.vendored import Finding
from expunge.data.samples import Dataset
from expunge.noise import NoiseGone
from expunge.record import digest_code


def from_files(predicate: Mapping[str, Any], run: Path) -> list[Finding]:
    """Whether the certificate's claims follow from the figures in the run folder."""
    return [_compared(predicate, claims_of(run), "the run's files")]


def from_data(predicate: Mapping[str, Any], run: Path, keys: Keys, dataset: Dataset) -> list[Finding]:
    """Whether the data is the certified one, and the claims come out again when near-duplicates, the removal from a
    zone and the chain of manifests are recomputed from data and models. The run folder stays as it is.

    Raises:
        UserError: a model that the run names is not there any more, or the run is none of ``unlearn`` or ``audit``.
    """
    if not keys.record:
        return [Finding("not checked", "the data: the key of its commitment has been destroyed.")]
    if keys.commit("record", "data", dataset.digest()) != predicate["evidence"]["data_commitment"]:
        return [Finding("refuted", "the data is not the data of the certificate.")]
    from expunge.certify.collect import collect  # heavy: it loads models

    found = [Finding("holds", "the data is the data of the certificate.")]
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for name in FILES:
            if (run / name).is_file():
                shutil.copy(run / name, copy / name)
        for path in (*run.glob("*.keys.json"), *run.glob("*.noise.json")):  # of a zone, which lie beside its model
            shutil.copy(path, copy / path.name)
        if (run / "model").is_dir():  # of an audit, the model is where the run says
            shutil.copytree(run / "model", copy / "model")
        try:
            sections = ", ".join(collect(copy, dataset))
        except NoiseGone as gone:
            return [*found, Finding("not checked", str(gone))]
        return [*found, _compared(predicate, claims_of(copy), f"data and models ({sections} recomputed)")]


def _compared(predicate: Mapping[str, Any], claims: list[dict[str, Any]], source: str) -> Finding:
    differ = [c["level"] for c, d in zip(claims, predicate["claims"], strict=False) if canonical(c) != canonical(d)]
    if not differ and len(claims) == len(predicate["claims"]):
        return Finding("holds", f"all {len(claims)} claims come out the same from {source}.")
    text = f"{', '.join(differ) or 'the number of claims'}: comes out differently from {source}"
    if predicate["generator"]["code"] != digest_code():
        return Finding("not checked", f"{text}, with another version of the code.")
    return Finding("refuted", f"{text}.")
