"""Kind ``shared``: one explicit ridge head for a group of subjects, from sums that can be taken back exactly.

Keys (:mod:`expunge.zones.context`) become random Fourier features z, which are integers of public numbers
(:mod:`expunge.zones.fixed_point`); targets are one-hot. The sums ΣzzT and ΣzyT are then exact integers, a record is
taken out by subtracting its own, and ``W = (ΣzzT + αI)⁻¹ c ΣzyT`` has the bytes of a fit that never saw it, in
whatever order records came and went. Logits at an open position are ``λ log p_base + zW``, with λ as in a ridge zone.
Subjects are put into groups by a keyed hash of their names. Files hold rows only: sums and weights are made when first
asked for, so that no trace of a removed or sealed block lies in them.

With ``epsilon`` above 0 the weights are solved to a residual only, starting from those of the release before, and
released with noise that hides where they came from (:mod:`expunge.zones.residual`). Such weights are kept, sealed, and
are not a function of the rows: what a removal leaves is (ε, δ)-indistinguishable from what a zone without the record
releases, and not equal to it. A group whose rows are not those of its release stays closed.

Shape suffixes: N rows, E key width, D random features, C columns (tokens), M open positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.noise import SEED, NoiseGone, gaussian_noise
from expunge.options import option
from expunge.zones.context import (
    ContextZone,
    check_options,
    key_width,
    prepare_context,
    query_keys,
    row_keys,
    tokens_of,
)
from expunge.zones.fixed_point import Moments, RandomFeatures
from expunge.zones.linear_algebra import Doubles, digest_arrays, solve_positive, solve_within
from expunge.zones.residual import ResidualCertificate, residual_certificate, ridge_residual, ridge_rounding
from expunge.zones.zone import Array, FrozenBase, Public, Row, Seen, zone

FEATURE_NORM = math.sqrt(2)  # |z(x)| of D cosines of height √(2/D) is at most this


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """Constants of the shared zone; none is fitted on private texts."""

    features: int = option(2048, "random features D; facts are held when D reaches the tokens of a group")
    groups: int = option(5, "groups into which subjects fall by a keyed hash; each has a head of its own")
    alpha: float = option(0.03, "ridge α", "sweep on public subjects")
    scale: float = option(22.0, "c: how many nats a whole target is worth", "sweep on people, seed 0")
    trust: float = option(0.3, "κ: power of the base's probabilities where a block is sure", "people, seed 0")
    feature_seed: int = option(0, "published seed of the random features")
    epsilon: float = option(0.0, "above 0: (ε, δ) in place of exactness, solved to a residual and released with noise")
    delta: float = option(1e-5, "δ of a release with noise")
    tolerance: float = option(5e-4, "largest gradient norm of a solve; the noise follows from it, not from the data")
    learn: bool = option(True, "learn the kernel on public paraphrases, where there are any")
    false_open: float = option(0.01, "share of public texts that may open a block, in calibration")

    def __post_init__(self) -> None:
        """Raises UserError for a number that no zone can have."""
        check_options(self, "shared", ("features", "groups", "alpha", "scale", "tolerance"))
        if not 0 <= self.feature_seed < 2**32:
            raise UserError(f"feature_seed {self.feature_seed} cannot be: give a number from 0 to 2^32 - 1.")
        if self.epsilon:
            judged = self.judge(0.0, 0.0, 0.0)
            if not judged.certified:
                raise UserError(judged.refusal)

    def judge(self, residual: float, reference: float, rounding: float) -> ResidualCertificate:
        """What these gradient norms of the whole zone support: :func:`~expunge.zones.residual.residual_certificate`."""
        return residual_certificate(
            residual,
            reference,
            self.alpha,
            epsilon=self.epsilon,
            delta=self.delta,
            tolerance=self.tolerance,
            feature_norm=FEATURE_NORM,
            rounding=rounding,
        )


@dataclass
class Group:
    """The sums of a group over the rows that it holds at present, and what was solved from them."""

    rows: dict[str, Row]
    columns_C: Array  # token ids, ascending
    moments: Moments
    weights_DC: Doubles  # for integer features


@zone(
    "shared",
    summary="one ridge head per group of subjects on public random features; exact subtraction of records",
    source="Rahimi and Recht 2007 (random features); removal by exact integer sums",
    options=SharedOptions,
)
class Shared(ContextZone):
    """See the module's docstring."""

    options: SharedOptions

    @classmethod
    def prepare(cls, base: FrozenBase, public: Sequence[Sample], options: SharedOptions, seed: int) -> Public:
        """Router gate, idf, spread of the layers, the learnt kernel; the random features' digest among constants."""
        found = prepare_context(base, public, options, seed)
        width = key_width(found)
        features = RandomFeatures(width, options.features, options.feature_seed)
        constants = {**found.constants, "width": width, "features": features.digest()}
        return Public(arrays=found.arrays, constants=constants, texts=found.texts)

    @torch.no_grad()
    def shift(self, seen: Seen, subject: str, place_M: Array) -> Tensor:
        columns_C, weights_DC, unit = self._head(self.group_of(subject))
        features_MD = self.features()(query_keys(seen, place_M, self.public)).astype(np.float64) * unit
        shift_MV = torch.zeros(len(features_MD), seen.log_probs_BTV.shape[2])
        shift_MV[:, columns_C.tolist()] = torch.from_numpy(features_MD @ weights_DC).float()
        return shift_MV.to(seen.log_probs_BTV.device)

    def features(self) -> RandomFeatures:
        """The public random features.

        Raises:
            UserError: they are not those that the zone was built with.
        """
        if "_features" not in self.__dict__:
            made = RandomFeatures(self.public.constants["width"], self.options.features, self.options.feature_seed)
            if made.digest() != self.public.constants["features"]:
                raise UserError(
                    "the random features drawn here are not those that this zone was built with: use the NumPy "
                    "version that is recorded with it."
                )
            self.__dict__["_features"] = made
        found: RandomFeatures = self.__dict__["_features"]
        return found

    def _settle(self, touched: Iterable[str], base: FrozenBase | None) -> None:
        super()._settle(touched, base)
        if self.options.epsilon:
            self._release()
            return
        for number in range(self.options.groups):  # at once, so that no row that went stays in memory
            self.group(number)

    def _head(self, number: int) -> tuple[Array, Doubles, float]:
        """Columns (C,), weights (D, C) and what one unit of an integer feature is worth to them."""
        if not self.options.epsilon:
            group = self.group(number)
            return group.columns_C, group.weights_DC, 1.0
        if self.__dict__.get("_sound_version") != self.version:
            self.__dict__["_sound"] = {n for n in range(self.options.groups) if not self._stale(n)}
            self.__dict__["_sound_version"] = self.version
        if number not in self.__dict__["_sound"]:
            return np.zeros(0, dtype=np.int64), np.zeros((self.options.features, 0)), 0.0
        return self.kept[f"{number}/columns"], self.kept[f"{number}/weights"], self.features().square ** 0.5

    # -- groups ------------------------------------------------------------------------------------------------------

    def group_of(self, subject: str) -> int:
        """HMAC-SHA-256 of the subject under the zone's salt: it depends on no other subject and on no text."""
        code = hmac.new(bytes.fromhex(self.salt), b"group/" + subject.encode(), hashlib.sha256).digest()
        return int.from_bytes(code[:8], "big") % self.options.groups

    def group(self, number: int) -> Group:
        """The group as it follows from the rows at present; what came or went since is added or subtracted."""
        groups: dict[int, Group] = self.__dict__.setdefault("_groups", {})
        rows = self._rows(number)
        held = groups.get(number) or self._empty()
        came = [row for row_id, row in rows.items() if held.rows.get(row_id) is not row]
        went = [row for row_id, row in held.rows.items() if rows.get(row_id) is not row]
        if number not in groups or came or went:
            groups[number] = self._moved(held, rows, came, went)
        return groups[number]

    def _rows(self, number: int) -> dict[str, Row]:
        own = (block for subject, block in self.blocks.items() if self.group_of(subject) == number)
        return {row_id: row for block in own for row_id, row in block.rows.items()}

    def _empty(self) -> Group:
        nothing = np.zeros((self.options.features, 0))
        columns_C = np.zeros(0, dtype=np.int64)
        return Group({}, columns_C, Moments.zero(self.options.features, 0), nothing)

    def _moved(self, held: Group, rows: dict[str, Row], came: Sequence[Row], went: Sequence[Row]) -> Group:
        columns_C = np.union1d(held.columns_C, tokens_of(came))
        moments = _onto(held.moments, held.columns_C, columns_C)
        if came:
            moments = moments + self._moments(came, columns_C)
        if went:
            moments = moments - self._moments(went, columns_C)
        used_C = columns_C[moments.uses_V > 0]
        moments = _onto(moments, columns_C, used_C)
        return Group(rows, used_C, moments, self._solve(moments))

    def _moments(self, rows: Sequence[Row], columns_C: Array) -> Moments:
        features_ND = np.concatenate([self.features()(row_keys(row, self.public)) for row in rows])
        place_N = np.searchsorted(columns_C, tokens_of(rows))
        return Moments.of(features_ND, (place_N[:, None] == np.arange(len(columns_C))).astype(np.int8), place_N)

    def _solve(self, moments: Moments) -> Doubles:
        """W for integer features: z = √square · integer, on both sides of the system."""
        unit = self.features().square
        system_DD = moments.gram_DD * unit + self.options.alpha * np.eye(self.options.features)
        return solve_positive(system_DD, moments.cross_DV * (unit * self.options.scale))

    def solution_digest(self) -> str:
        """SHA-256 over sums, columns and weights of all groups: what a fit without the removed records must equal."""
        arrays: dict[str, Array] = {}
        for number in range(self.options.groups):
            group = self.group(number)
            arrays[f"{number}/columns"], arrays[f"{number}/weights"] = group.columns_C, group.weights_DC
            arrays[f"{number}/sums"] = np.frombuffer(bytes.fromhex(group.moments.digest()), dtype=np.uint8)
        return digest_arrays(arrays)

    # -- releases with noise -----------------------------------------------------------------------------------------

    def _release(self) -> None:
        """Solve the groups whose rows have changed, from the weights that were released before, and put noise on."""
        from expunge.zones.storage import KEPT, block_name

        moved = [number for number in range(self.options.groups) if self._stale(number)]
        if not moved:
            return
        releases = int(self.kept["releases"][0]) + 1 if self.kept else 0
        for number in moved:
            columns_C, gram_DD, cross_DC = self._system(number)
            start_DC = np.zeros(cross_DC.shape)
            if f"{number}/weights" in self.kept:
                _, now, before = np.intersect1d(
                    columns_C, self.kept[f"{number}/columns"], assume_unique=True, return_indices=True
                )
                start_DC[:, now] = self.kept[f"{number}/weights"][:, before]
            weights_DC, _ = self._solved(gram_DD, cross_DC, start_DC)
            seed = secrets.token_bytes(SEED)
            noise_DC = gaussian_noise(weights_DC.shape, self.options.judge(0.0, 0.0, 0.0).noise, seed)
            self.noise[str(number)] = seed.hex()
            self.kept[f"{number}/columns"], self.kept[f"{number}/weights"] = columns_C, weights_DC + noise_DC
            self.kept[f"{number}/rows"] = self._marks(number)
        self.kept["releases"] = np.array([releases])
        self.keys.pop(block_name(self.salt, KEPT), None)

    def _solved(self, gram_DD: Doubles, cross_DC: Doubles, start_DC: Doubles) -> tuple[Doubles, float]:
        """Each group to its part of the tolerance, so that the whole zone keeps within it."""
        matrix_DD = gram_DD + self.options.alpha * np.eye(self.options.features)
        return solve_within(matrix_DD, cross_DC, start_DC, self.options.tolerance / self.options.groups**0.5)

    def _system(self, number: int) -> tuple[Array, Doubles, Doubles]:
        """Columns, gram and cross of a group's rows, in real features."""
        rows = list(self._rows(number).values())
        columns_C, unit = np.unique(tokens_of(rows)), self.features().square
        moments = self._moments(rows, columns_C) if rows else Moments.zero(self.options.features, 0)
        return columns_C, moments.gram_DD * unit, moments.cross_DV * (unit**0.5 * self.options.scale)

    def _marks(self, number: int) -> Array:
        """SHA-256 over the salted digests of a group's rows."""
        digests = sorted(row.record.digest for row in self._rows(number).values())
        return np.frombuffer(hashlib.sha256("".join(digests).encode()).digest(), dtype=np.uint8)

    def _stale(self, number: int) -> bool:
        return not np.array_equal(self.kept.get(f"{number}/rows", np.zeros(0)), self._marks(number))

    def certificate(self) -> tuple[ResidualCertificate, tuple[float, ...]]:
        """Of a release with noise: the gradient norms measured again over all rows, and μ of the removals before.

        The noise is taken off by its seeds. The reference is solved from zero, as in a zone that never had the rows
        that went. Every release after the first is counted as one that follows a removal.

        Raises:
            UserError: the zone is an exact one, its seeds are gone or another release's, or a group is out of date.
        """
        numbers = range(self.options.groups)
        if not self.options.epsilon or any(self._stale(number) for number in numbers):
            raise UserError("this zone holds no release with noise that fits its rows: nothing can be measured.")
        if sorted(self.noise) != sorted(map(str, numbers)):
            raise NoiseGone(
                "the seeds of the zone's noise are gone, so that the gradient without noise cannot be measured: "
                "certify before the file zone-….noise.json is destroyed."
            )
        deviation, squares = self.options.judge(0.0, 0.0, 0.0).noise, np.zeros(3)
        for number in numbers:
            _, gram_DD, cross_DC = self._system(number)
            released_DC = self.kept[f"{number}/weights"]
            noise_DC = gaussian_noise(released_DC.shape, deviation, bytes.fromhex(self.noise[str(number)]))
            reference_DC, _ = self._solved(gram_DD, cross_DC, np.zeros(cross_DC.shape))
            own, other = (
                ridge_residual(gram_DD, cross_DC, w, self.options.alpha) for w in (released_DC - noise_DC, reference_DC)
            )
            slack = max(ridge_rounding(gram_DD, cross_DC, w, self.options.alpha) for w in (released_DC, reference_DC))
            slack *= 1 + 4 / self.options.features  # sums are scaled, and noise put on and taken off: four roundings
            squares += np.square([own, other, slack])
        judged = self.options.judge(*np.sqrt(squares).tolist())
        return judged, (judged.mu,) * (int(self.kept["releases"][0]) - 1)


def _onto(moments: Moments, old_C: Array, new_C: Array) -> Moments:
    """The same sums over other columns; a one-hot target is 0 in a column that no row uses, so nothing is lost."""
    cross_DV = np.zeros((moments.cross_DV.shape[0], len(new_C)))
    uses_V = np.zeros(len(new_C), dtype=np.int64)
    _, from_C, to_C = np.intersect1d(old_C, new_C, assume_unique=True, return_indices=True)
    cross_DV[:, to_C], uses_V[to_C] = moments.cross_DV[:, from_C], moments.uses_V[from_C]
    return Moments(moments.gram_DD, cross_DV, uses_V, moments.rows)
