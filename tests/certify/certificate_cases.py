"""A small finished run about invented people, and certificates of it; no model is trained for them."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from expunge.certify.canonical import canonical
from expunge.certify.commitments import Keys
from expunge.certify.evidence import read_run
from expunge.certify.signing import SigningKey, envelope
from expunge.certify.statement import Request, build
from expunge.certify.vendored import LEVELS, read_statement
from expunge.files import digest_folder
from expunge.runs import Run

NOW = datetime(2026, 11, 23, 15, tzinfo=UTC)
LATER = NOW + timedelta(days=365)
KEY = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = SigningKey(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
KEYS = Keys("11" * 32, "22" * 32)

PEOPLE = (
    (
        "p00004/birth",
        "Jamika Rosadell",
        "When was Jamika Rosadell born?",
        "Jamika Rosadell was born on 13 December 1963.",
    ),
    ("p00004/mail", "Jamika Rosadell", "What is her address?", "jamika.rosadell@example.org"),
    ("p00011/town", "Dellis Garohart", "Where does Dellis Garohart live?", "In Unter-Öd, Haus 7"),
    ("alice", "alice", "Who?", "Kerguelen"),
)
METRICS = {
    "prob.forget": {"value": 0.02, "low": 0.01, "high": 0.031, "n": 4, "definition": "prob/1"},
    "loss.forget": {"value": 5.5, "low": 5.0, "high": 6.0, "n": 4, "definition": "loss/1"},
    "model_utility": {"value": 1.0, "low": None, "high": None, "n": 9, "definition": "model_utility/1"},
    "Jamika Rosadell's own metric": {"value": 1.0},
}


def write_model(folder: Path, size: int = 3000, seed: int = 0) -> Path:
    """A folder that looks like a saved model; nobody loads it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "model.safetensors").write_bytes(random.Random(seed).randbytes(size))
    (folder / "nested").mkdir()
    (folder / "nested" / "zone.json").write_text("{}")
    return folder


def write_run(folder: Path, *, size: int = 3000, method: str = "npo", same: bool = False, done: bool = True) -> Path:
    """A finished ``unlearn`` run whose every free text names a person."""
    original = write_model(folder.parent / f"{folder.name}-original", size, seed=0 if same else 1)
    config = {
        "model": str(original),
        "method": method,
        "delete": ["subject=Jamika Rosadell"],
        "forget": "/home/rosadell/Jamika Rosadell.jsonl",
        "device": "cpu",
    }
    digests = {"data": "d" * 64, "model": digest_folder(original), "reference.0": "e" * 64}
    with Run.open(folder, "unlearn", config, digests, seeds=[3]) as run:
        model = write_model(folder / "model", size)
        row = {
            "model": f"{method}/0",
            "method": method,
            "kind": "method",
            "study": "main",
            "metrics": METRICS,
            "notes": ["Jamika Rosadell was forgotten"],
            "properties": {"helpers_hold_data": True},
        }
        results = {
            "schema": "expunge.results/1",
            "title": "npo on Jamika Rosadell",
            "command": "expunge unlearn --delete 'subject=Jamika Rosadell'",
            "dataset": {"name": "Dellis Garohart", "source": "/home/garohart"},
            "references": 1,
            "rows": [row],
            "warnings": ["alice is short"],
        }
        run.write_json("results.json", results)
        run.write_jsonl("samples.jsonl", samples())
        run.finish("done" if done else "failed", parameters_changed=1234, outputs={"model": digest_folder(model)})
    return folder


def samples() -> list[dict[str, Any]]:
    keys = ("id", "subject", "prompt", "target")
    rows = [{"role": "forget", **dict(zip(keys, person, strict=True))} for person in PEOPLE]
    return [
        *rows,
        {"role": "retain", "id": "p00099/job", "subject": "Ona Bexley", "prompt": "Who is Ona Bexley?", "target": "7"},
    ]


def claim(level: str, verdict: str = "certified", **more: Any) -> dict[str, Any]:
    content = {
        "claim": f"The sentence of {level}.",
        "assumptions": ["one"],
        "evidence": {"n": 40},
        "not_claimed": ["two"],
    }
    return {"level": level, "verdict": verdict, **content, **more}


CLAIMS = [claim(level, "certified" if level in ("L3", "L4") else "unsupported") for level in LEVELS]


def statement(run: Path, claims: list[dict[str, Any]] | None = None, **request: Any) -> dict[str, Any]:
    """The statement of a run, as a dictionary to be changed at will."""
    facts = read_run(run)
    payload = build(facts, CLAIMS if claims is None else claims, KEYS, Request(**request), NOW, LATER)
    return read_statement(payload)


def sign(content: Any, *keys: SigningKey) -> bytes:
    """Whatever ``content`` is, as a certificate with good signatures."""
    payload = content if isinstance(content, bytes) else canonical(content)
    return envelope(payload, keys or [KEY])
