"""Verify a certificate: what the vendored checker says, and beside it what a kept run folder can still show."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from expunge.certify import evidence
from expunge.certify.commitments import Keys, read_keys
from expunge.certify.signing import PUBLIC, public_key
from expunge.certify.statement import commit_request
from expunge.certify.timestamps import Bad, check_stamp
from expunge.certify.vendored import (
    LEVELS,
    Finding,
    Unreadable,
    check,
    exit_code,
    lines,
    load,
    read_envelope,
    read_statement,
)
from expunge.data.samples import Dataset
from expunge.errors import UserError, unknown
from expunge.files import digest_file

UNKNOWN_SIGNER = (
    "who signed: the key lies beside the certificate, and whoever changes one can change both; give --pub with the "
    "key that the signer gave you."
)


STAMP = "the RFC 3161 time stamp"  # begins the line about it


@dataclass(frozen=True)
class Verification:
    """The findings, and the content of the certificate if somebody trusted signed it."""

    findings: Sequence[Finding]
    statement: dict[str, Any] | None

    @property
    def code(self) -> int:
        """0 nothing is refuted, 1 something is."""
        return exit_code(self.findings)

    def text(self) -> str:
        """One line per finding, and the answer last."""
        counts = {s: sum(f.state == s for f in self.findings) for s in ("holds", "refuted", "not checked", "read")}
        answer = "REFUTED" if self.code else "Nothing is refuted"
        told = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
        return f"{lines(self.findings)}\n\n{answer}: {told}."

    def record(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "schema": "expunge.verification/1",
            "refuted": bool(self.code),
            "findings": [f._asdict() for f in self.findings],
            "statement": self.statement,
        }


def verify(
    certificate: Path | str,
    *,
    pub: Sequence[Path | str] = (),
    model: Path | str | None = None,
    run: Path | str | None = None,
    commitments: Path | str | None = None,
    dataset: Dataset | None = None,
    threshold: int | None = None,
    require: str | None = None,
    now: datetime | None = None,
) -> Verification:
    """Check a certificate offline.

    Args:
        pub: PEM public keys of those who must have signed, as they gave them to you. Without any the one beside the
            certificate is taken, which shows damage, and not who signed.
        model: folder of the model; without it the folder ``model`` beside the certificate, if there is one.
        run: run folder whose files are compared with the commitments; needs ``commitments``.
        commitments: the file of keys that ``certify`` wrote.
        dataset: what the run was given: claims are recomputed from it and from the models; needs ``run``.
        threshold: how many of the keys must have signed; all without it.
        require: level that must be certified, ``L0`` to ``L5``; else it counts as refuted.

    Raises:
        UserError: the certificate, a key, the model folder or the run is nothing that can be read.
    """
    path = Path(certificate)
    if require is not None and require not in LEVELS:
        raise unknown("level", require, LEVELS)
    if (run is None) != (commitments is None):
        raise UserError("--run and --commitments belong together: the run's files, and the keys to compare them by.")
    own = path.with_suffix(PUBLIC)
    if not pub and not own.is_file():
        raise UserError(
            "without a public key nothing can be checked: give --pub with the one that the signer gave you."
        )
    keys = [public_key(p) for p in pub or [own]]
    beside = path.parent / "model"
    folder = Path(model) if model is not None else beside if beside.is_dir() else None
    try:
        data = load(path)
        found = check(data, keys, folder, now=now, threshold=threshold)
        if not pub:
            found.insert(1, Finding("not checked", UNKNOWN_SIGNER))
        trusted = any(f.state == "holds" for f in found)
        statement = read_statement(read_envelope(data).payload) if trusted else None
    except Unreadable as error:
        raise UserError(str(error)) from error
    if statement is not None:
        if statement["predicate"]["timestamp"] is not None:
            found = [_stamped(statement) if f.text.startswith(STAMP) else f for f in found]
        if require is not None:
            found.append(_required(statement["predicate"]["claims"], require))
        if run is not None and commitments is not None:
            keys_of = read_keys(commitments)
            found += compare_run(statement["predicate"], Path(run), keys_of)
            if dataset is not None:
                from expunge.certify import replay

                found += replay.from_data(statement["predicate"], Path(run), keys_of, dataset)
    return Verification(found, statement)


def _stamped(statement: dict[str, Any]) -> Finding:
    """What the time stamp in the statement is worth, in place of the vendored checker's word that it is not checked."""
    try:
        token = base64.b64decode(statement["predicate"]["timestamp"], validate=True)
        stamp = check_stamp(token, statement["subject"][0]["digest"]["sha256"])
    except (Bad, binascii.Error) as error:
        return Finding("refuted", f"{STAMP}: {error}")
    return Finding(
        "holds",
        f"{STAMP}: the model existed on {stamp.time:%Y-%m-%d %H:%M:%S} UTC, says the holder of the certificate with "
        f"SHA-256 {stamp.fingerprint}; whether to trust this authority is yours to say.",
    )


def _required(claims: Sequence[dict[str, Any]], level: str) -> Finding:
    verdicts = [c["verdict"] for c in claims if c["level"] == level]
    if "certified" in verdicts and "refuted" not in verdicts:
        return Finding("holds", f"{level} is certified, as required.")
    return Finding("refuted", f"{level} is required, and is {verdicts[0] if verdicts else 'not claimed'}.")


def compare_run(predicate: dict[str, Any], folder: Path, keys: Keys) -> list[Finding]:
    """Whether a run folder is the one that the certificate was made from, by its commitments.

    Raises:
        UserError: ``folder`` is no folder.
    """
    if not folder.is_dir():
        raise UserError(f"'{folder}' is no run folder: give the one that was certified.")
    said = predicate["evidence"]["record_commitments"]
    found = []
    for name, commitment in sorted(said.items()):
        path = folder / name
        if name not in evidence.FILES or not path.is_file():
            found.append(Finding("not checked", f"{name}: not in the run folder."))
        elif not keys.record:
            found.append(Finding("not checked", f"{name}: the key of its commitment has been destroyed."))
        elif keys.commit("record", name, digest_file(path)) == commitment:
            found.append(Finding("holds", f"{name} is the one of the certified run."))
        else:
            found.append(Finding("refuted", f"{name} is not the one of the certified run, or the key is another's."))
    if any(f.state == "refuted" for f in found) or not (folder / "samples.jsonl").is_file():
        return found
    forgotten = evidence.forgotten(folder)
    if not keys.request:
        found.append(Finding("not checked", "whose data it was: the key of the request has been destroyed."))
    elif commit_request(keys, forgotten) == predicate["request"]["commitment"]:
        found.append(Finding("holds", f"the request is about the {len(forgotten)} forget sample(s) of the run."))
    else:
        found.append(Finding("refuted", "the request is about other samples than the run forgot."))
    figures = evidence.figures(folder)
    if figures == predicate["evidence"]["measures"]:
        found.append(Finding("holds", f"all {len(figures)} figures stand so in the run's files."))
    else:
        found.append(Finding("refuted", "the figures differ from those in the run's files."))
    from expunge.certify import replay  # heavy, and most who verify have no run to compare

    return found + replay.from_files(predicate, folder)
