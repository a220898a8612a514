"""Spectral clustering of 20,000 states of width 256, ours against scikit-learn's, in one run.

    python benchmarks/clustering.py [--states 20000] [--width 256] [--rounds 2] [--threads 2] [--noise 0.8]

Both sides run in turns, each turn in a fresh process, so that its peak memory is its own. The data are a planted
hierarchy (6 groups of 5 leaves) with three rogue dimensions; scikit-learn gets it already standardised and of unit
length, which its time does not include, because on the raw states it would recover nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from statistics import median

import numpy as np

TOPS, LEAVES = 6, 5


def planted(states: int, width: int, seed: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(states_ND, leaf_N, top_N): leaves around top groups, and three dimensions a hundred times as large."""
    rng = np.random.default_rng(seed)
    tops = rng.normal(size=(TOPS, width))
    leaves = (tops[:, None] + 0.6 * rng.normal(size=(TOPS, LEAVES, width))).reshape(-1, width)
    leaf = rng.integers(TOPS * LEAVES, size=states)
    data = leaves[leaf] + noise * rng.normal(size=(states, width))
    data[:, :3] = 100.0 * rng.normal(size=(states, 3))
    return data.astype(np.float32), leaf, leaf // LEAVES


def side(name: str, states: int, width: int, seed: int, noise: float) -> dict[str, float]:
    from sklearn.cluster import SpectralClustering
    from sklearn.metrics import adjusted_rand_score

    from expunge.methods.cluster.partition import hierarchy, moments, unit_features
    from expunge.methods.cluster.spectral import spectral_clustering

    data, leaf, top = planted(states, width, seed, noise)
    spectral_clustering(data[:500], clusters=5)  # imports and first calls are not what is compared
    clusters = TOPS * LEAVES
    features = unit_features(data, *moments(data))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    if name == "expunge":
        found = spectral_clustering(data, clusters=clusters, seed=seed)
        labels = found.labels_N
        groups = found.cut(TOPS)
    else:
        model = SpectralClustering(
            clusters, affinity="nearest_neighbors", n_neighbors=15, random_state=seed, assign_labels="kmeans"
        )
        labels = model.fit_predict(features)
    wall, used = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name != "expunge":  # it has no hierarchy: give it ours, over its own leaves
        from scipy.cluster.hierarchy import cut_tree

        centroids = np.stack([features[labels == k].mean(0) for k in np.unique(labels)])
        groups = cut_tree(hierarchy(centroids), n_clusters=[TOPS])[:, 0][np.unique(labels, return_inverse=True)[1]]
    return {
        "wall_s": wall,
        "cpu_s": used,
        "peak_added_mib": (peak - before) / 1024,
        "ari_leaves": float(adjusted_rand_score(leaf, labels)),
        "ari_groups": float(adjusted_rand_score(top, groups)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--noise", type=float, default=0.8, help="spread inside a leaf; 1.6 lets the leaves touch")
    parser.add_argument("--side", choices=("expunge", "sklearn"), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(side(given.side, given.states, given.width, given.seed, given.noise)))
        return
    kept: dict[str, list[dict[str, float]]] = {"expunge": [], "sklearn": []}
    limit = {name: str(given.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    for turn in range(given.rounds):
        for name in ("expunge", "sklearn") if turn % 2 == 0 else ("sklearn", "expunge"):
            command = [sys.executable, __file__, "--side", name, "--seed", str(turn)]
            command += ["--states", str(given.states), "--width", str(given.width), "--noise", str(given.noise)]
            done = subprocess.run(command, env={**os.environ, **limit}, capture_output=True, text=True, check=True)
            kept[name].append(json.loads(done.stdout))
            print(name, {k: round(v, 3) for k, v in kept[name][-1].items()}, flush=True)
    middle = {name: median(r["wall_s"] for r in results) for name, results in kept.items()}
    print(f"wall time, median of {given.rounds}: expunge {middle['expunge']:.2f} s, sklearn {middle['sklearn']:.2f} s")
    print(f"ratio expunge / sklearn: {middle['expunge'] / middle['sklearn']:.3f} (below 1 is faster)")


if __name__ == "__main__":
    main()
