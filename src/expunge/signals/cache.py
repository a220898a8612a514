"""Signals on disk, under digests of everything they depend on: a changed file can never be served from here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from expunge.data.samples import Sample
from expunge.models.adapter import Adapter
from expunge.signals.record import Signals

VERSION = 1  # of the numbers themselves: raise it when signals change their meaning
COLUMNS = ("ids_L", "log_prob_L", "hit_L", "mean_L", "std_L", "rank_L")


@dataclass(frozen=True)
class SignalCache:
    """One safetensors file per model, tokenizer, settings and list of texts."""

    folder: Path

    def path(self, model_digest: str, adapter: Adapter, samples: Sequence[Sample]) -> Path:
        """Where these signals stand: the name is the SHA-256 of everything that they depend on."""
        parts = [VERSION, model_digest, fingerprint(adapter), [s.digest() for s in samples]]
        return self.folder / f"{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}.safetensors"

    def get(self, model_digest: str, adapter: Adapter, samples: Sequence[Sample]) -> list[Signals] | None:
        """The signals of these samples in this order, or None; a damaged file counts as absent."""
        path = self.path(model_digest, adapter, samples)
        try:
            with safe_open(path, framework="numpy") as file:
                columns = {name: file.get_tensor(name) for name in (*COLUMNS, "lengths", "sizes")}
                written = (file.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            return None
        if written != _checksum(columns) or len(columns["lengths"]) != len(samples):
            return None
        ends = np.cumsum(columns["lengths"])
        found = []
        for i, sample in enumerate(samples):
            cut = slice(int(ends[i] - columns["lengths"][i]), int(ends[i]))
            text_bytes, zlib_bytes, truncated = (int(x) for x in columns["sizes"][i])
            arrays: dict[str, Any] = {name: columns[name][cut].copy() for name in COLUMNS}
            found.append(
                Signals(
                    id=sample.id,
                    subject=sample.subject,
                    text_bytes=text_bytes,
                    zlib_bytes=zlib_bytes,
                    truncated=bool(truncated),
                    **arrays,
                )
            )
        return found

    def put(self, model_digest: str, adapter: Adapter, samples: Sequence[Sample], signals: Sequence[Signals]) -> Path:
        """Write atomically; a reader sees the whole file or none."""
        path = self.path(model_digest, adapter, samples)
        columns = {name: np.concatenate([getattr(s, name) for s in signals]) for name in COLUMNS}
        columns["lengths"] = np.array([len(s) for s in signals], dtype=np.int64)
        sizes = [(s.text_bytes, s.zlib_bytes, int(s.truncated)) for s in signals]
        columns["sizes"] = np.array(sizes, dtype=np.int64).reshape(-1, 3)
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")  # two processes may write the same signals
        part.write_bytes(save(columns, metadata={"sha256": _checksum(columns)}))
        part.replace(path)
        return path


def _checksum(columns: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of the numbers, so that a flipped bit is noticed."""
    total = hashlib.sha256()
    for name in sorted(columns):
        total.update(f"{name} {columns[name].dtype} {columns[name].shape}\n".encode())
        total.update(np.ascontiguousarray(columns[name]).tobytes())
    return total.hexdigest()


def fingerprint(adapter: Adapter) -> str:
    """What an adapter adds to the content of samples: tokenizer, template, context, picture preparation."""
    tokenizer = getattr(adapter, "tokenizer", None)
    parts: list[Any] = [type(adapter).__qualname__, adapter.modality]
    if tokenizer is not None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        own = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
        parts += [hashlib.sha256(own.encode()).hexdigest(), tokenizer.chat_template, special]
    for name in ("template", "context", "preprocess", "num_classes", "label_ids", "image_token", "image_tokens"):
        if hasattr(adapter, name):
            parts.append([name, repr(getattr(adapter, name))])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()
