"""Gaussian noise from a generator made for secrets, and the file that keeps its seed beside a model, never in it.

Whoever has the seed can draw the noise again: to take it off, or to repeat a whole training and compare. Destroying the
file ends that; nothing else about the release changes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import secrets
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from expunge.errors import UserError
from expunge.files import SCRATCH

SEED = 32  # bytes
SCHEMA = "expunge.noise-seed/1"


class NoiseGone(UserError):
    """The seeds of a release's noise were destroyed: nothing is wrong, and nothing can be measured."""


def gaussian_noise(shape: tuple[int, ...], deviation: float, seed: bytes | None = None) -> NDArray[np.float64]:
    """N(0, deviation²) from AES-256 in counter mode under ``seed`` (32 bytes), from the operating system if None.

    Only who has the seed can draw it again. Each number is half the sum of four independent ones: the gaps that
    float64 leaves between possible outcomes of one draw, by which noise can be told from noise (Mironov 2012), are
    filled (Holohan and Braghin 2021, arXiv 2107.10138).
    """
    count = math.prod(shape)
    total_C = np.zeros(count)
    stream = Cipher(algorithms.AES256(seed or secrets.token_bytes(SEED)), modes.CTR(bytes(16))).encryptor()
    for _ in range(2):  # one Box-Muller pair each
        bits_2C = np.frombuffer(stream.update(bytes(16 * count)), dtype=np.uint64).reshape(2, count) >> np.uint64(11)
        radius_C = np.sqrt(-2 * np.log((bits_2C[0] + 1.0) * 2.0**-53))
        angle_C = bits_2C[1] * (2 * math.pi * 2.0**-53)
        total_C += radius_C * (np.cos(angle_C) + np.sin(angle_C))
    noise: NDArray[np.float64] = (deviation / 2 * total_C).reshape(shape)
    return noise


def derived(seed: bytes, name: str) -> bytes:
    """The seed of one draw (a step, a tensor) under the seed of a whole release: HMAC-SHA-256, 32 bytes."""
    return hmac.new(seed, name.encode(), hashlib.sha256).digest()


def kept_seed(path: Path) -> bytes:
    """The seed in the file; a new one from the operating system, for the owner's eyes alone, where there is none yet.

    A command that was killed and is run again has therefore the noise that it had.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{SCRATCH}")
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump({"schema": SCHEMA, "seed": secrets.token_hex(SEED)}, file)
        os.replace(scratch, path)
    return read_seed(path)


def read_seed(path: Path) -> bytes:
    """The seed that :func:`kept_seed` wrote.

    Raises:
        NoiseGone: there is no such file. UserError: it holds no seed.
    """
    if not path.is_file():
        raise NoiseGone(
            f"the seed of the noise is gone ('{path.name}' beside the model), so that nothing can be computed again: "
            "certify before it is destroyed."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        seed = bytes.fromhex(content["seed"])
        if content["schema"] == SCHEMA and len(seed) == SEED:
            return seed
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"'{path}' holds no seed of noise: copy the file again, or delete it.")
