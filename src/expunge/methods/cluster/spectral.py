"""Spectral clustering of token states at scale, and a hierarchy over the leaves that survives separated groups.

Graph of self-tuned neighbours → normalised Laplacian → k-means on row-normalised eigenvectors. The hierarchy is
Ward's on the cluster centroids in activation space and not on the spectral rows: components that do not touch are
mutually orthogonal in the spectral rows, hence equidistant, and the upper level would be arbitrary.

Shape suffixes: N states, D width, M eigenvectors, K clusters.

Sources: Ng, Jordan and Weiss 2001; Zelnik-Manor and Perona 2004; von Luxburg 2007 (eigengap);
Ben-Hur, Elisseeff and Guyon 2002 (stability); Damle, Minden and Ying 2018 (pivoted QR start).
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
from scipy.linalg import qr

from expunge.errors import UserError
from expunge.methods.cluster.graph import Spectrum, extend, nearest, neighbours, self_tuned, spectrum
from expunge.methods.cluster.partition import (
    Clustering,
    check_count,
    checked,
    finish,
    load_clustering,
    moments,
    unit_features,
)

__all__ = ["Clustering", "load_clustering", "spectral_clustering"]

STABLE = 0.8  # smallest mean ARI over bootstrap samples that makes a number of clusters acceptable
CANDIDATES = 4  # eigengaps that are tried, widest first
BOOTSTRAP = 3
BOOTSTRAP_STATES = 2000
STRATA = 32


def spectral_clustering(
    states_ND: np.ndarray,
    *,
    clusters: int | None = None,
    seed: int = 0,
    neighbours_count: int = 15,
    components: int = 40,
    approximate_from: int = 20_000,
    landmarks_from: int = 40_000,
    landmarks: int = 8_000,
) -> Clustering:
    """Cluster N states of width D.

    ``clusters`` None chooses K: eigengaps among the first ``components`` eigenvalues, widest first, of which the
    first with a bootstrap ARI of at least 0.8 is taken, else the most stable. ``approximate_from``: above this
    many states pynndescent finds the neighbours where installed. ``landmarks_from``: above this many states the
    graph is built on ``landmarks`` stratified states and its eigenvectors are extended to the others (Nyström).

    Raises:
        UserError: too few states, states that are not finite, an impossible number of clusters, or eigenvectors
            that did not converge.
    """
    states_ND = checked(states_ND)
    num = len(states_ND)
    if clusters is not None:
        check_count(clusters, num)
    mean_D, std_D = moments(states_ND)
    features_ND = unit_features(states_ND, mean_D, std_D)
    if clusters == 1:
        return finish(features_ND, np.zeros(num, dtype=np.int64), (mean_D, std_D), "spectral", seed)

    chosen_L = stratified(features_ND, landmarks, seed) if num > landmarks_from else np.arange(num)
    nodes_LD = features_ND[chosen_L]
    if clusters is not None and clusters > len(nodes_LD):
        raise UserError(f"{clusters} clusters need more than {len(nodes_LD)} landmarks: raise 'landmarks'.")
    near = max(1, min(neighbours_count, len(nodes_LD) - 1))
    distance_LK, index_LK = neighbours(nodes_LD, near, approximate_from, seed)
    wanted = clusters if clusters is not None else min(components, len(nodes_LD))
    found = spectrum(self_tuned(distance_LK, index_LK), wanted, seed)

    stability = float("nan")
    if clusters is None:
        clusters, stability, labels_L = _choose(nodes_LD, found, near, seed)
    else:
        labels_L = leaves(nodes_LD, found, clusters, seed)
    labels_N = labels_L
    if len(nodes_LD) < num:
        if found.components < clusters:
            labels_N = _spread(features_ND, chosen_L, distance_LK, found, labels_L)
        else:
            # The clusters are whole components, and a new state belongs to the component that it lies in.
            labels_N = labels_L[nearest(features_ND, nodes_LD, 1, same=False)[1][:, 0]]
    result = finish(features_ND, labels_N, (mean_D, std_D), "spectral", seed)
    return replace(
        result,
        eigenvalues=found.values_M,
        components=found.components,
        residual=found.residual,
        stability=stability,
    )


def leaves(nodes_LD: np.ndarray, found: Spectrum, clusters: int, seed: int) -> np.ndarray:
    """Labels from the first K eigenvectors; components in excess of K are merged by their place in activation space."""
    from sklearn.cluster import KMeans

    if found.components == clusters:
        return found.component_N
    if found.components > clusters:
        size_C = np.bincount(found.component_N)
        sums_CD = np.zeros((found.components, nodes_LD.shape[1]))
        np.add.at(sums_CD, found.component_N, nodes_LD)
        merged = KMeans(clusters, n_init=10, random_state=seed).fit(sums_CD / size_C[:, None], sample_weight=size_C)
        return np.asarray(merged.labels_[found.component_N])
    rows_LK = _rows(found.vectors_NM[:, :clusters])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct rows than clusters: labels are renumbered later
        _, _, pivots = qr(rows_LK.T, mode="economic", pivoting=True)
        runs = [
            KMeans(clusters, init=rows_LK[pivots[:clusters]], n_init=1).fit(rows_LK),
            KMeans(clusters, n_init=3, random_state=seed).fit(rows_LK),
        ]
    return np.asarray(min(runs, key=lambda run: float(run.inertia_)).labels_)


def _rows(vectors_NM: np.ndarray) -> np.ndarray:
    norm_N = np.linalg.norm(vectors_NM, axis=1, keepdims=True)
    return np.asarray(vectors_NM / np.maximum(norm_N, 1e-12))


def _choose(nodes_LD: np.ndarray, found: Spectrum, near: int, seed: int) -> tuple[int, float, np.ndarray]:
    """(K, stability, labels) by eigengap and stability."""
    values_M = found.values_M
    gaps = {k: float(values_M[k] - values_M[k - 1]) for k in range(2, len(values_M))}
    ranked = sorted(gaps, key=lambda k: (-gaps[k], k))[:CANDIDATES] or [min(2, len(nodes_LD))]
    if found.components >= len(values_M) > 2:  # only islands, no gap to see: as many as asked for, else fewer
        ranked = [max(2, len(values_M) >> halving) for halving in range(CANDIDATES)]
    tried: list[tuple[float, int, np.ndarray]] = []
    for clusters in ranked:
        labels_L = leaves(nodes_LD, found, clusters, seed)
        stability = _stability(nodes_LD, labels_L, clusters, near, seed)
        if stability >= STABLE:
            return clusters, stability, labels_L
        tried.append((stability, -clusters, labels_L))
    # Nothing is stable: the most stable, and of equals the coarsest.
    stability, negative, labels_L = max(tried, key=lambda item: item[:2])
    return -negative, stability, labels_L


def _stability(nodes_LD: np.ndarray, labels_L: np.ndarray, clusters: int, near: int, seed: int) -> float:
    """Mean ARI between the labels and those of the whole procedure repeated on samples of the states."""
    from sklearn.metrics import adjusted_rand_score

    rng = np.random.default_rng(seed)
    size = min(BOOTSTRAP_STATES, int(0.8 * len(nodes_LD)))
    if size <= max(clusters, near):
        return 0.0
    scores = []
    for draw in range(BOOTSTRAP):
        chosen = rng.choice(len(nodes_LD), size, replace=False)
        distance, index = neighbours(nodes_LD[chosen], near, size, seed)
        again = spectrum(self_tuned(distance, index), clusters, seed + draw)
        scores.append(float(adjusted_rand_score(labels_L[chosen], leaves(nodes_LD[chosen], again, clusters, seed))))
    return float(np.mean(scores))


def stratified(features_ND: np.ndarray, count: int, seed: int) -> np.ndarray:
    """``count`` rows in proportion to coarse strata, at least 16 of each where it has them: (L,) sorted."""
    from sklearn.cluster import MiniBatchKMeans

    rng = np.random.default_rng(seed)
    count = min(count, len(features_ND))
    coarse = MiniBatchKMeans(min(STRATA, count), n_init=1, random_state=seed, batch_size=4096)
    stratum_N = coarse.fit(features_ND[rng.choice(len(features_ND), min(20_000, len(features_ND)), False)]).predict(
        features_ND
    )
    chosen: list[np.ndarray] = []
    for stratum in np.unique(stratum_N):
        members = np.flatnonzero(stratum_N == stratum)
        share = max(16, round(count * len(members) / len(features_ND)))
        chosen.append(rng.choice(members, min(share, len(members)), replace=False))
    return np.sort(np.concatenate(chosen))


def _spread(
    features_ND: np.ndarray, chosen_L: np.ndarray, distance_LK: np.ndarray, found: Spectrum, labels_L: np.ndarray
) -> np.ndarray:
    """Labels of all states: nearest cluster centre in the Nyström rows; landmarks keep theirs."""
    rows_LM = _rows(found.vectors_NM)
    clusters = int(labels_L.max()) + 1
    centres_KM = np.zeros((clusters, rows_LM.shape[1]))
    np.add.at(centres_KM, labels_L, rows_LM)
    centres_KM /= np.maximum(1, np.bincount(labels_L, minlength=clusters))[:, None]
    rows_NM = _rows(extend(features_ND, features_ND[chosen_L], distance_LK, found))
    score_NK = rows_NM @ centres_KM.T - 0.5 * (centres_KM**2).sum(1)
    labels_N = np.asarray(score_NK.argmax(1))
    labels_N[chosen_L] = labels_L
    return labels_N
