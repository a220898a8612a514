"""What a clustering of token states is; k-means, random and one-group partitions as control arms.

Shape suffixes: N states, D width, K clusters (leaves), A anchor states, Q queries.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from scipy.cluster.hierarchy import cut_tree, linkage

from expunge.errors import UserError
from expunge.methods.cluster.graph import nearest

Kind = Literal["spectral", "kmeans", "random", "one"]
ANCHORS = 2048  # labelled states kept for the neighbour vote
VOTERS = 7


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """A partition of N states into K leaves, with a hierarchy over the leaves.

    ``centroids_KD`` live in feature space: standardised by ``mean_D`` and ``std_D``, then of unit length; the tree
    is a scipy linkage (K-1, 4) over them. ``eigenvalues`` (ascending, of the normalised Laplacian), ``residual``
    and ``stability`` (mean ARI over bootstrap samples) are empty or NaN where they do not apply.
    """

    labels_N: np.ndarray
    centroids_KD: np.ndarray
    mean_D: np.ndarray
    std_D: np.ndarray
    tree: np.ndarray
    kind: Kind = "spectral"
    eigenvalues: np.ndarray = field(default_factory=lambda: np.zeros(0))
    components: int = 0  # connected components of the graph = multiplicity of eigenvalue 0
    residual: float = float("nan")
    stability: float = float("nan")
    seed: int = 0
    anchors_AD: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    anchor_labels_A: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @property
    def clusters(self) -> int:
        return len(self.centroids_KD)

    def features(self, states_QD: np.ndarray) -> np.ndarray:
        """States in the space of the centroids, (Q, D) float32."""
        if states_QD.ndim != 2 or states_QD.shape[1] != len(self.mean_D):
            raise UserError(
                f"states of shape {states_QD.shape} do not fit a clustering of width {len(self.mean_D)}: take them "
                "from the same layer of the same model."
            )
        return unit_features(states_QD, self.mean_D, self.std_D)

    def assign(self, states_QD: np.ndarray, how: Literal["centroid", "vote"] = "centroid") -> np.ndarray:
        """Leaf of unseen states, (Q,): nearest centroid, or the majority of the 7 nearest anchor states.

        A random clustering gives each state a group by a seeded hash of its content.
        """
        if self.kind == "random":
            return _hashed(states_QD, self.clusters, self.seed)
        if self.clusters == 1:
            return np.zeros(len(states_QD), dtype=np.int64)
        features_QD = self.features(states_QD)
        if how == "centroid" or len(self.anchors_AD) == 0:
            # Nearest in the Euclidean sense; centroids of unit vectors are shorter than 1 where a cluster is wide.
            score_QK = features_QD @ self.centroids_KD.T - 0.5 * (self.centroids_KD**2).sum(1)
            return np.asarray(score_QK.argmax(1), dtype=np.int64)
        _, index_QV = nearest(features_QD, self.anchors_AD, min(VOTERS, len(self.anchors_AD)), same=False)
        votes_QV = self.anchor_labels_A[index_QV]
        tally_QK = np.zeros((len(states_QD), self.clusters))
        rank_V = np.arange(votes_QV.shape[1])
        # The nearer neighbour wins a tie.
        np.add.at(tally_QK, (np.arange(len(states_QD))[:, None], votes_QV), 1.0 - 1e-3 * rank_V)
        return np.asarray(tally_QK.argmax(1), dtype=np.int64)

    def groups(self, count: int) -> np.ndarray:
        """The coarser group of each leaf when the tree is cut into ``count`` groups, (K,)."""
        if not 1 <= count <= self.clusters:
            raise UserError(f"cannot cut {self.clusters} clusters into {count} groups: give 1 to {self.clusters}.")
        if self.clusters == 1:
            return np.zeros(1, dtype=np.int64)
        return np.asarray(cut_tree(self.tree, n_clusters=[count])[:, 0], dtype=np.int64)

    def cut(self, count: int) -> np.ndarray:
        """Labels of the N states at the level of ``count`` groups, (N,)."""
        return np.asarray(self.groups(count)[self.labels_N])

    def save(self, path: Path) -> None:
        """One safetensors file; the numbers stand as JSON in its header."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        facts = {name: getattr(self, name) for name in _FACTS}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, str(path), metadata={"expunge.clustering": json.dumps(facts)})


_ARRAYS = (
    "labels_N",
    "centroids_KD",
    "mean_D",
    "std_D",
    "tree",
    "eigenvalues",
    "anchors_AD",
    "anchor_labels_A",
)
_FACTS = ("kind", "components", "residual", "stability", "seed")


def load_clustering(path: Path) -> Clustering:
    """What :meth:`Clustering.save` wrote.

    Raises:
        UserError: the file is missing or is no clustering.
    """
    if not path.is_file():
        raise UserError(f"clustering '{path}' does not exist: give the file that an earlier run has written.")
    try:
        with safe_open(str(path), framework="numpy") as held:
            facts = json.loads((held.metadata() or {})["expunge.clustering"])
            arrays = {name: held.get_tensor(name) for name in _ARRAYS}
    except Exception as error:
        raise UserError(f"'{path}' is not a clustering written by Expunge ({error}): give another file.") from error
    return Clustering(**arrays, **facts)


def unit_features(states_ND: np.ndarray, mean_D: np.ndarray, std_D: np.ndarray) -> np.ndarray:
    """Standardised per dimension, then of unit length: (N, D) float32."""
    features_ND = (states_ND.astype(np.float32) - mean_D.astype(np.float32)) / std_D.astype(np.float32)
    norm_N = np.linalg.norm(features_ND, axis=1, keepdims=True)
    return np.asarray(features_ND / np.maximum(norm_N, 1e-12), dtype=np.float32)


def moments(states_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean_D, std_D) in float64; a dimension that never changes gets 1, so that it becomes 0."""
    mean_D = states_ND.mean(0, dtype=np.float64)
    std_D = states_ND.std(0, dtype=np.float64)
    return mean_D, np.where(std_D > 1e-12 + 1e-7 * np.abs(mean_D), std_D, 1.0)


def checked(states_ND: np.ndarray) -> np.ndarray:
    """The states as float32.

    Raises:
        UserError: not a table, fewer than two rows, or numbers that are not finite.
    """
    if states_ND.ndim != 2 or len(states_ND) < 2:
        raise UserError(f"clustering needs a table of at least 2 states, got shape {states_ND.shape}.")
    if not np.isfinite(states_ND).all():
        raise UserError("the states to cluster hold numbers that are not finite: the model has diverged.")
    return np.asarray(states_ND, dtype=np.float32)


def hierarchy(centroids_KD: np.ndarray) -> np.ndarray:
    """Ward's tree over centroids, (K-1, 4)."""
    if len(centroids_KD) < 2:
        return np.zeros((0, 4))
    return np.asarray(linkage(centroids_KD.astype(np.float64), method="ward"))


def finish(
    features_ND: np.ndarray, labels_N: np.ndarray, moments_DD: tuple[np.ndarray, np.ndarray], kind: Kind, seed: int
) -> Clustering:
    """Centroids, tree and anchors for given labels; labels are renumbered without gaps."""
    mean_D, std_D = moments_DD
    _, labels_N = np.unique(labels_N, return_inverse=True)
    clusters = int(labels_N.max()) + 1
    order = np.argsort(labels_N, kind="stable")
    starts = np.searchsorted(labels_N[order], np.arange(clusters))
    sums_KD = np.add.reduceat(features_ND[order].astype(np.float64), starts, axis=0)
    centroids_KD = (sums_KD / np.bincount(labels_N)[:, None]).astype(np.float32)
    chosen = np.random.default_rng(seed).permutation(len(labels_N))[:ANCHORS]
    return Clustering(
        labels_N=labels_N.astype(np.int64),
        centroids_KD=centroids_KD,
        mean_D=mean_D,
        std_D=std_D,
        tree=hierarchy(centroids_KD),
        kind=kind,
        seed=seed,
        anchors_AD=features_ND[chosen],
        anchor_labels_A=labels_N[chosen].astype(np.int64),
    )


def kmeans_groups(states_ND: np.ndarray, clusters: int, seed: int = 0) -> Clustering:
    """Control arm: k-means on the same standardised unit-length features, without a graph."""
    from sklearn.cluster import KMeans

    states_ND = checked(states_ND)
    check_count(clusters, len(states_ND))
    mean_D, std_D = moments(states_ND)
    features_ND = unit_features(states_ND, mean_D, std_D)
    found = KMeans(clusters, n_init=4, random_state=seed).fit(features_ND)
    return finish(features_ND, found.labels_, (mean_D, std_D), "kmeans", seed)


def random_groups(num: int, clusters: int, seed: int = 0) -> Clustering:
    """Control arm: ``num`` states in groups of equal size (±1) at random, with a random tree."""
    check_count(clusters, num)
    rng = np.random.default_rng(seed)
    tree = hierarchy(rng.normal(size=(clusters, 1)))
    return replace(_empty(clusters), labels_N=rng.permutation(num) % clusters, tree=tree, kind="random", seed=seed)


def all_in_one(num: int) -> Clustering:
    """Control arm: no clustering; every state is in group 0."""
    return replace(_empty(1), labels_N=np.zeros(num, dtype=np.int64), kind="one")


def _empty(clusters: int) -> Clustering:
    return Clustering(
        labels_N=np.zeros(0, dtype=np.int64),
        centroids_KD=np.zeros((clusters, 0), dtype=np.float32),
        mean_D=np.zeros(0),
        std_D=np.zeros(0),
        tree=np.zeros((0, 4)),
    )


def check_count(clusters: int, num: int) -> None:
    if not 1 <= clusters <= num:
        raise UserError(f"{clusters} clusters of {num} states cannot be: give 1 to {num}.")


def _hashed(states_QD: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """A group per state that depends on its content and the seed alone (equal states, equal group)."""
    bits_QD = np.ascontiguousarray(states_QD, dtype=np.float32).view(np.uint32).astype(np.uint64)
    odd_D = np.random.default_rng(seed).integers(1, 2**63, size=bits_QD.shape[1], dtype=np.uint64) | np.uint64(1)
    mixed_Q = (bits_QD * odd_D).sum(1, dtype=np.uint64)
    mixed_Q ^= mixed_Q >> np.uint64(31)
    mixed_Q *= np.uint64(0x9E3779B97F4A7C15)
    return np.asarray((mixed_Q >> np.uint64(33)) % np.uint64(clusters), dtype=np.int64)
