"""Graphs, eigenvectors, leaves and hierarchy, against slow references and planted structure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from expunge.errors import UserError
from expunge.methods.cluster.graph import nearest, neighbours, self_tuned, spectrum
from expunge.methods.cluster.partition import (
    all_in_one,
    kmeans_groups,
    load_clustering,
    moments,
    random_groups,
    unit_features,
)
from expunge.methods.cluster.spectral import spectral_clustering


def planted(num: int, width: int = 48, tops: int = 4, per_top: int = 3, noise: float = 0.5, seed: int = 0):
    """States around leaves around top groups, with three dimensions a hundred times larger that say nothing."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(tops, 1, width)) + 0.6 * rng.normal(size=(tops, per_top, width))
    leaf = rng.integers(tops * per_top, size=num)
    states = centres.reshape(-1, width)[leaf] + noise * rng.normal(size=(num, width))
    states[:, :3] = 100.0 * rng.normal(size=(num, 3))
    return states.astype(np.float32), leaf, leaf // per_top


def unit(states: np.ndarray) -> np.ndarray:
    return unit_features(states, *moments(states))


@pytest.mark.parametrize(("num", "count"), [(5, 4), (33, 7), (700, 15)])
def test_nearest_is_brute_force(num: int, count: int) -> None:
    points = unit(np.random.default_rng(0).normal(size=(num, 6)).astype(np.float32))
    similarity, index = nearest(points, points, count, same=True)
    product = points @ points.T
    np.fill_diagonal(product, -np.inf)
    np.testing.assert_allclose(similarity, -np.sort(-product, 1)[:, :count], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(product, index, 1), similarity, atol=1e-6)
    assert all(len(set(row)) == count for row in index)


def test_weights_are_the_formula() -> None:
    points = unit(np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32))
    distance, index = neighbours(points, 9, 1000, 0)
    graph = self_tuned(distance, index).toarray()
    slow = np.zeros((40, 40))
    full = np.linalg.norm(points[:, None] - points[None], axis=2)
    scale = np.sort(full, 1)[:, 7]  # column 0 is the point itself
    for i in range(40):
        for j in np.argsort(full[i])[1:10]:
            weight = np.exp(-(full[i, j] ** 2) / (scale[i] * scale[j]))
            slow[i, j] = max(slow[i, j], weight)
            slow[j, i] = max(slow[j, i], weight)
    np.testing.assert_allclose(graph, slow, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("num", [120, 900])  # dense solver, ARPACK
def test_eigenvalues_are_those_of_the_dense_laplacian(num: int) -> None:
    states, _, _ = planted(num, noise=1.2)
    graph = self_tuned(*neighbours(unit(states), 10, 10_000, 0))
    found = spectrum(graph, 15, 0)
    dense = graph.toarray()
    root = 1 / np.sqrt(dense.sum(1))
    reference = np.linalg.eigvalsh(np.eye(num) - root[:, None] * dense * root)[:15]
    np.testing.assert_allclose(found.values_M, reference, atol=1e-6)
    np.testing.assert_allclose(found.vectors_NM.T @ found.vectors_NM, np.eye(15), atol=1e-6)
    assert found.residual < 1e-5


def test_every_copy_of_a_degenerate_zero_is_found() -> None:
    """Twenty cliques: eigenvalue 0 has multiplicity 20, and the next eigenvalue is that of a clique."""
    block = np.ones((30, 30)) - np.eye(30)
    graph = sparse.csr_matrix(sparse.block_diag([block] * 20))
    found = spectrum(graph, 23, 0)
    assert found.components == 20
    np.testing.assert_allclose(found.values_M[:20], 0.0, atol=1e-12)
    np.testing.assert_allclose(found.values_M[20:], 1 + 1 / 29, atol=1e-6)


@pytest.mark.parametrize("noise", [0.4, 0.9])  # separate components; one connected graph
def test_planted_hierarchy_is_recovered_at_both_levels(noise: float) -> None:
    states, leaf, top = planted(2400, noise=noise)
    found = spectral_clustering(states, clusters=12, seed=0)
    assert adjusted_rand_score(leaf, found.labels_N) > 0.97
    assert adjusted_rand_score(top, found.cut(4)) > 0.97
    assert found.residual < 1e-4
    again = spectral_clustering(states, clusters=12, seed=0)
    np.testing.assert_array_equal(found.labels_N, again.labels_N)


def test_linked_circles_need_the_graph() -> None:
    """Two circles in orthogonal planes have the same centroid: k-means cannot tell them apart."""
    rng = np.random.default_rng(0)
    angle, which = rng.uniform(0, 2 * np.pi, 800), np.arange(800) % 2
    states = np.zeros((800, 4))
    states[np.arange(800), 2 * which] = np.cos(angle)
    states[np.arange(800), 2 * which + 1] = np.sin(angle)
    states = (states + 0.03 * rng.normal(size=states.shape)).astype(np.float32)
    found = spectral_clustering(states, clusters=2)
    assert adjusted_rand_score(which, found.labels_N) > 0.99
    assert adjusted_rand_score(which, kmeans_groups(states, 2).labels_N) < 0.6
    fresh = states + 0.01
    assert adjusted_rand_score(which, found.assign(fresh, "vote")) > 0.99


def test_the_number_of_clusters_is_found_and_stable() -> None:
    states, leaf, _ = planted(1200, tops=5, per_top=1, noise=0.9)
    found = spectral_clustering(states, components=16)
    assert found.clusters == 5
    assert found.stability >= 0.8
    assert adjusted_rand_score(leaf, found.labels_N) > 0.97


def test_pure_noise_is_not_called_stable() -> None:
    states = np.random.default_rng(0).normal(size=(600, 24)).astype(np.float32)
    assert spectral_clustering(states, components=12).stability < 0.8


@pytest.mark.parametrize("noise", [0.4, 0.9])
def test_landmarks_and_extension_give_the_same_clusters(noise: float) -> None:
    states, leaf, top = planted(4000, noise=noise)
    found = spectral_clustering(states, clusters=12, landmarks_from=1000, landmarks=800)
    assert len(found.labels_N) == 4000
    assert adjusted_rand_score(leaf, found.labels_N) > 0.95
    assert adjusted_rand_score(top, found.cut(4)) > 0.95


def test_islands_beyond_the_number_of_clusters_are_merged_by_place() -> None:
    states, _, top = planted(1200, noise=0.2)  # 12 components
    found = spectral_clustering(states, clusters=4)
    assert found.components == 12
    assert adjusted_rand_score(top, found.labels_N) == 1.0


def test_assigning_the_training_states_gives_their_labels_back() -> None:
    states, _, _ = planted(1500)
    found = spectral_clustering(states, clusters=12)
    assert adjusted_rand_score(found.labels_N, found.assign(states)) > 0.99
    assert adjusted_rand_score(found.labels_N, found.assign(states, "vote")) > 0.99
    with pytest.raises(UserError, match="same layer"):
        found.assign(states[:, :5])


def test_save_and_load(tmp_path: Path) -> None:
    states, _, _ = planted(400)
    found = spectral_clustering(states, clusters=6)
    found.save(tmp_path / "c.safetensors")
    back = load_clustering(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(back.assign(states), found.assign(states))
    np.testing.assert_array_equal(back.cut(3), found.cut(3))
    assert (back.kind, back.components, back.residual) == (found.kind, found.components, found.residual)
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not a clustering"):
        load_clustering(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        load_clustering(tmp_path / "none.safetensors")


def test_control_arms() -> None:
    states, leaf, _ = planted(600)
    arm = random_groups(600, 7, seed=3)
    assert np.ptp(np.bincount(arm.labels_N)) <= 1
    assert abs(adjusted_rand_score(leaf, arm.labels_N)) < 0.05
    assert len(np.unique(arm.cut(3))) == 3
    given = arm.assign(states)
    np.testing.assert_array_equal(given, arm.assign(states))  # equal content, equal group
    assert np.bincount(given, minlength=7).min() > 40
    assert adjusted_rand_score(leaf, kmeans_groups(states, 12).labels_N) > 0.8
    one = all_in_one(9)
    assert one.clusters == 1 and (one.cut(1) == 0).all() and (one.assign(states) == 0).all()


def test_small_and_degenerate_inputs() -> None:
    assert spectral_clustering(np.eye(3, dtype=np.float32), clusters=2).clusters == 2
    same = np.ones((50, 4), dtype=np.float32)
    assert spectral_clustering(same, clusters=1).clusters == 1
    assert len(spectral_clustering(same, clusters=3).labels_N) == 50
    with pytest.raises(UserError, match="at least 2"):
        spectral_clustering(np.ones((1, 4)))
    with pytest.raises(UserError, match="not finite"):
        spectral_clustering(np.full((5, 4), np.nan))
    with pytest.raises(UserError, match="give 1 to 5"):
        spectral_clustering(np.eye(5), clusters=6)
    with pytest.raises(UserError, match="cannot cut"):
        random_groups(10, 4).cut(5)
