"""Kind ``shared``: one explicit ridge head for a group of subjects, from sums that can be taken back exactly.

Keys (:mod:`expunge.zones.context`) become random Fourier features z, which are integers of public numbers
(:mod:`expunge.zones.fixed_point`); targets are one-hot. The sums ΣzzT and ΣzyT are then exact integers, a record is
taken out by subtracting its own, and ``W = (ΣzzT + αI)⁻¹ c ΣzyT`` has the bytes of a fit that never saw it, in
whatever order records came and went. Subjects are put into groups by a keyed hash of their names. Files hold rows
only: sums and weights are made when first asked for, so that no trace of a removed or sealed block lies in them.

:func:`release_real` is the same head with real-valued features, where subtraction leaves rounding behind: it is
released under the residual certificate (:mod:`expunge.zones.residual`) or not at all.

Shape suffixes: N rows, E key width, D random features, C columns (tokens), M open positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.options import option
from expunge.zones.context import BAG_WIDTH, extract_states, prepare_context, query_keys, row_keys, shifted
from expunge.zones.fixed_point import Moments, RandomFeatures
from expunge.zones.linear_algebra import Doubles, digest_arrays, one_thread, solve_positive
from expunge.zones.residual import (
    ResidualCertificate,
    gaussian_noise,
    residual_certificate,
    ridge_residual,
    ridge_rounding,
)
from expunge.zones.zone import Array, FrozenBase, Public, Record, Row, Seen, Zone, zone

FEATURE_NORM = math.sqrt(2)  # |z(x)| of D cosines of height √(2/D) is at most this


@dataclass(frozen=True, kw_only=True)
class SharedOptions:
    """Constants of the shared zone; none is fitted on private texts."""

    features: int = option(2048, "random features D; facts are held when D reaches the tokens of a group")
    groups: int = option(5, "groups into which subjects fall by a keyed hash; each has a head of its own")
    alpha: float = option(0.03, "ridge α", "sweep on public subjects")
    scale: float = option(40.0, "c: how many nats a whole target is worth", "sweep on people, seed 0")
    feature_seed: int = option(0, "published seed of the random features")
    false_open: float = option(0.01, "share of public texts that may open a block, in calibration")

    def __post_init__(self) -> None:
        """Raises UserError for a number that no zone can have."""
        for name in ("features", "groups", "alpha", "scale"):
            if not getattr(self, name) > 0:
                raise UserError(f"shared option {name} = {getattr(self, name)} cannot be: give a number above 0.")
        if not 0 <= self.feature_seed < 2**32:
            raise UserError(f"feature_seed {self.feature_seed} cannot be: give a number from 0 to 2^32 - 1.")


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
class Shared(Zone):
    """See the module's docstring. Row tensors: ``states`` (L, ·) int16 for L target tokens."""

    options: SharedOptions

    @classmethod
    def prepare(cls, base: FrozenBase, public: Sequence[Sample], options: SharedOptions, seed: int) -> Public:
        """Router gate, idf, spread of three layers; the digest of the random features is among the constants."""
        found = prepare_context(base, public, options.false_open)
        width = sum(len(found.arrays[f"mean.{layer}"]) for layer in found.constants["layers"]) + BAG_WIDTH
        features = RandomFeatures(width, options.features, options.feature_seed)
        constants = {**found.constants, "width": width, "features": features.digest()}
        return Public(arrays=found.arrays, constants=constants, texts=found.texts)

    def extract(self, record: Record, base: FrozenBase) -> tuple[dict[str, Array], str]:
        return extract_states(record, base.states(record)[0], self.public)

    def adjust(self, seen: Seen) -> Tensor:
        return shifted(seen, partial(self._shift, seen))

    @torch.no_grad()
    def _shift(self, seen: Seen, subject: str, place_M: Array) -> Tensor:
        group = self.group(self.group_of(subject))
        features_MD = self.features()(query_keys(seen, place_M, self.public))
        shift_MC = torch.from_numpy(features_MD.astype(np.float64) @ group.weights_DC)
        shift_MV = torch.zeros(len(shift_MC), seen.log_probs_BTV.shape[2])
        shift_MV[:, group.columns_C.tolist()] = shift_MC.float()
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
        for number in range(self.options.groups):  # at once, so that no row that went stays in memory
            self.group(number)

    # -- groups ------------------------------------------------------------------------------------------------------

    def group_of(self, subject: str) -> int:
        """HMAC-SHA-256 of the subject under the zone's salt: it depends on no other subject and on no text."""
        code = hmac.new(bytes.fromhex(self.salt), b"group/" + subject.encode(), hashlib.sha256).digest()
        return int.from_bytes(code[:8], "big") % self.options.groups

    def group(self, number: int) -> Group:
        """The group as it follows from the rows at present; what came or went since is added or subtracted."""
        groups: dict[int, Group] = self.__dict__.setdefault("_groups", {})
        rows = {
            row_id: row
            for subject, block in self.blocks.items()
            if self.group_of(subject) == number
            for row_id, row in block.rows.items()
        }
        held = groups.get(number) or self._empty()
        came = [row for row_id, row in rows.items() if held.rows.get(row_id) is not row]
        went = [row for row_id, row in held.rows.items() if rows.get(row_id) is not row]
        if number not in groups or came or went:
            groups[number] = self._moved(held, rows, came, went)
        return groups[number]

    def _empty(self) -> Group:
        nothing = np.zeros((self.options.features, 0))
        columns_C = np.zeros(0, dtype=np.int64)
        return Group({}, columns_C, Moments.zero(self.options.features, 0), nothing)

    def _moved(self, held: Group, rows: dict[str, Row], came: Sequence[Row], went: Sequence[Row]) -> Group:
        columns_C = np.union1d(held.columns_C, _tokens(came))
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
        place_N = np.searchsorted(columns_C, _tokens(rows))
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


def _tokens(rows: Sequence[Row]) -> Array:
    return np.array([token for row in rows for token in row.record.ids[row.record.first :]], dtype=np.int64)


def _onto(moments: Moments, old_C: Array, new_C: Array) -> Moments:
    """The same sums over other columns; a one-hot target is 0 in a column that no row uses, so nothing is lost."""
    cross_DV = np.zeros((moments.cross_DV.shape[0], len(new_C)))
    uses_V = np.zeros(len(new_C), dtype=np.int64)
    _, from_C, to_C = np.intersect1d(old_C, new_C, assume_unique=True, return_indices=True)
    cross_DV[:, to_C], uses_V[to_C] = moments.cross_DV[:, from_C], moments.uses_V[from_C]
    return Moments(moments.gram_DD, cross_DV, uses_V, moments.rows)


# -- real-valued features --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Release:
    """Weights (D, C) with noise, to be published; None where the certificate refuses."""

    weights_DC: Doubles | None
    certificate: ResidualCertificate


def release_real(
    features_ND: Doubles,
    targets_NC: Doubles,
    gone_N: Array,
    *,
    alpha: float,
    epsilon: float,
    delta: float,
    tolerance: float,
    feature_norm: float = FEATURE_NORM,
    weights_DC: Doubles | None = None,
) -> Release:
    """Take rows out of a ridge head with real-valued features, and release it with noise under the certificate.

    The sums of the rows that go are subtracted from the sums over all, which leaves rounding behind; the residuals of
    the result and of the reference (solved from the rows that stay) are measured on the rows that stay.

    Args:
        gone_N: True for rows to remove. tolerance: largest residual, fixed beforehand; see
            :func:`~expunge.zones.residual.residual_certificate`.
        feature_norm: what no row's norm exceeds, known beforehand.
        weights_DC: weights found in another way are judged in place of those after subtraction.

    Raises:
        UserError: nothing is to be removed, a row is longer than ``feature_norm``, the system is not positive
            definite, or a number is out of range.
    """
    gone = np.asarray(gone_N, dtype=bool)
    if not gone.any():
        raise UserError("no row is to be removed: mark at least one.")
    longest = float(np.linalg.norm(features_ND, axis=1).max())
    if longest > feature_norm * (1 + 1e-9):
        raise UserError(f"a row of features has norm {longest:.4g}, above feature_norm {feature_norm:.4g}: raise it.")
    stay_ND, stay_NC = features_ND[~gone], targets_NC[~gone]
    with one_thread():
        gram_DD, cross_DC = stay_ND.T @ stay_ND, stay_ND.T @ stay_NC
        left_DD = features_ND.T @ features_ND - features_ND[gone].T @ features_ND[gone]
        left_DC = features_ND.T @ targets_NC - features_ND[gone].T @ targets_NC[gone]
    ridge_DD = alpha * np.eye(features_ND.shape[1])
    found_DC = solve_positive(left_DD + ridge_DD, left_DC) if weights_DC is None else weights_DC
    reference_DC = solve_positive(gram_DD + ridge_DD, cross_DC)
    judged = residual_certificate(
        ridge_residual(gram_DD, cross_DC, found_DC, alpha),
        ridge_residual(gram_DD, cross_DC, reference_DC, alpha),
        alpha,
        epsilon=epsilon,
        delta=delta,
        tolerance=tolerance,
        feature_norm=feature_norm,
        rounding=max(ridge_rounding(gram_DD, cross_DC, w, alpha) for w in (found_DC, reference_DC)),
    )
    if not judged.certified:
        return Release(None, judged)
    noised_DC: Doubles = found_DC + gaussian_noise(found_DC.shape, judged.noise)
    return Release(noised_DC, judged)
