"""Sums that can be taken back exactly: integer features, and their moments as integers held in float64.

Floating-point sums depend on their order, so what is left after subtracting a record is not what a fit without it
would have given. Integers do not have this flaw: while every partial sum stays below 2^53, float64 holds it exactly,
whatever the order, the blocking or fused operations of the matrix product. Features and targets are therefore
rounded to integers record by record, and added and subtracted as such.

Shape suffixes: N rows (target tokens), E width of a key, D random features, V columns (tokens).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from expunge.errors import UserError
from expunge.zones.linear_algebra import Doubles, digest_arrays, one_thread

EXACT = 2**53  # integers up to here are exact in float64
FEATURE_ONE = 511  # what a feature of 1 becomes: signed, 10 bits
KEY_BITS = 10  # a key's component of 1 becomes 2^10
TARGET_BITS = 16  # a probability of 1 becomes 2^16
TURN = 4096  # ticks of a full turn in the table of cosines
FREQUENCY_BITS = 4  # binary places of a frequency, in ticks

Integers = NDArray[np.integer]


def fixed(values: NDArray[np.floating], bits: int) -> NDArray[np.int32]:
    """``values · 2^bits``, rounded half to even.

    Raises:
        UserError: a value is not finite or does not fit 31 bits.
    """
    scaled = np.rint(np.asarray(values, dtype=np.float64) * 2.0**bits)
    if not bool(np.all(np.abs(scaled) < 2**31)):  # also false for nan
        raise UserError(f"a value cannot be held with {bits} binary places: all must be finite and far below 2^{31}.")
    return scaled.astype(np.int32)


def exact_product(left_NA: Integers, right_NB: Integers) -> Doubles:
    """``leftᵀ right`` exactly, (A, B), as integers in float64.

    Raises:
        UserError: a partial sum could reach 2^53.
    """
    rows = left_NA.shape[0]
    bound = rows * _largest(left_NA) * _largest(right_NB)
    if bound >= EXACT:
        raise UserError(
            f"sums over {rows} rows could reach 2^{math.log2(bound):.1f}, and are exact only below 2^53: use more "
            "blocks, so that each holds fewer rows."
        )
    with one_thread():
        product: Doubles = left_NA.astype(np.float64).T @ right_NB.astype(np.float64)
    return product + 0.0  # -0.0 + 0.0 = 0.0: zero has one form in bytes


def _largest(values: Integers) -> int:
    return max(abs(int(values.max())), abs(int(values.min()))) if values.size else 0


@dataclass(frozen=True)
class RandomFeatures:
    """Random Fourier features of the Gaussian kernel exp(-|x - y|²/2), as integers of integers.

    ``z_d(x) = √(2/D) cos(ω_d·x + b_d)`` with ω ~ N(0, I) and b uniform (Rahimi and Recht 2007, equation 2 ff.). Key,
    frequencies and table of cosines are integers, so the value is the same on every machine and in every batch.
    ``seed`` is public; the legacy generator of NumPy is used because its stream is frozen for all versions.
    """

    width: int  # E
    count: int  # D
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 1 or self.count < 1:
            raise UserError(f"{self.count} random features of width {self.width} cannot be: both are 1 or more.")

    @cached_property
    def frequencies_ED(self) -> NDArray[np.int32]:
        """Ticks per unit of key, with :data:`FREQUENCY_BITS` binary places."""
        drawn_ED = np.random.RandomState([self.seed, 0]).standard_normal((self.width, self.count))
        return fixed(drawn_ED * (TURN / (2 * math.pi)), FREQUENCY_BITS)

    @cached_property
    def phases_D(self) -> NDArray[np.int64]:
        return np.random.RandomState([self.seed, 1]).randint(0, TURN, self.count).astype(np.int64)

    @cached_property
    def cosines(self) -> NDArray[np.int16]:
        """round(511 cos) at every tick of a turn."""
        heights: Doubles = np.cos(np.arange(TURN, dtype=np.float64) * (2 * math.pi / TURN))
        return np.rint(FEATURE_ONE * heights).astype(np.int16)

    @cached_property
    def _frequencies_ED(self) -> Doubles:
        return self.frequencies_ED.astype(np.float64)

    @cached_property
    def _largest_frequency(self) -> int:
        return _largest(self.frequencies_ED)

    @property
    def square(self) -> float:
        """What one unit of a product of two features is worth: 2 / (511² D)."""
        return 2.0 / (FEATURE_ONE**2 * self.count)

    def __call__(self, keys_NE: Integers) -> NDArray[np.int16]:
        """Features of keys with :data:`KEY_BITS` binary places, (N, D), each from -511 to 511."""
        if keys_NE.shape[1] != self.width:
            raise UserError(f"keys are {keys_NE.shape[1]} wide, the random features {self.width}: use the same model.")
        bound = self.width * _largest(keys_NE) * self._largest_frequency
        if bound >= EXACT:
            raise UserError(f"keys as large as {_largest(keys_NE)} are no keys: they have {KEY_BITS} binary places.")
        with one_thread():
            sums_ND = (keys_NE.astype(np.float64) @ self._frequencies_ED).astype(np.int64)
        ticks_ND = (sums_ND >> (KEY_BITS + FREQUENCY_BITS)) + self.phases_D
        features_ND: NDArray[np.int16] = self.cosines[ticks_ND & (TURN - 1)]
        return features_ND

    def digest(self) -> str:
        """SHA-256 of what the features are made of."""
        parts: dict[str, Integers] = {
            "frequencies": self.frequencies_ED,
            "phases": self.phases_D,
            "cosines": self.cosines,
        }
        return digest_arrays(parts)


@dataclass(frozen=True)
class Moments:
    """Exact sums over rows: ``gram`` = ΣzzT, ``cross`` = Σz tT for integer features z and integer targets t.

    ``uses_V`` counts the rows whose target token is the column's, so that a column used by no one can be told.
    """

    gram_DD: Doubles
    cross_DV: Doubles
    uses_V: NDArray[np.int64]
    rows: int

    @classmethod
    def of(cls, features_ND: Integers, targets_NV: Integers, tokens_N: Integers) -> Moments:
        """Moments of some rows; ``tokens_N`` is the column of each row's target token."""
        uses_V = np.bincount(tokens_N, minlength=targets_NV.shape[1]).astype(np.int64)
        gram_DD, cross_DV = exact_product(features_ND, features_ND), exact_product(features_ND, targets_NV)
        return cls(gram_DD, cross_DV, uses_V, features_ND.shape[0])

    @classmethod
    def zero(cls, count: int, columns: int) -> Moments:
        return cls(np.zeros((count, count)), np.zeros((count, columns)), np.zeros(columns, dtype=np.int64), 0)

    def __add__(self, other: Moments) -> Moments:
        return self._joined(other, 1)

    def __sub__(self, other: Moments) -> Moments:
        """What is left without the rows of ``other``.

        Raises:
            UserError: ``other`` holds rows that cannot be in here (a count would become negative).
        """
        left = self._joined(other, -1)
        if left.rows < 0 or bool((left.uses_V < 0).any()) or bool((np.diag(left.gram_DD) < 0).any()):
            raise UserError(
                f"the rows to remove are not all in this block ({other.rows} to remove, {self.rows} there): give "
                "records that the zone was trained on."
            )
        return left

    def _joined(self, other: Moments, sign: int) -> Moments:
        gram_DD = self.gram_DD + sign * other.gram_DD + 0.0
        cross_DV = self.cross_DV + sign * other.cross_DV + 0.0
        for sums in (gram_DD, cross_DV):
            if float(np.abs(sums).max(initial=0.0)) >= EXACT:
                raise UserError("a sum has reached 2^53 and is no longer exact: use more blocks.")
        return Moments(gram_DD, cross_DV, self.uses_V + sign * other.uses_V, self.rows + sign * other.rows)

    def digest(self) -> str:
        """SHA-256 of the sums; equal for equal sets of rows, in whatever order they came and went."""
        rows = np.array([self.rows])
        parts = {"gram": self.gram_DD, "cross": self.cross_DV, "uses": self.uses_V, "rows": rows}
        return digest_arrays(parts)
