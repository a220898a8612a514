"""Neighbour graphs and their leading eigenvectors, with every eigenpair checked by its residual.

Shape suffixes: N states, D width, K neighbours, M eigenvectors, C connected components, Q queries.

Sources: Zelnik-Manor and Perona 2004 (self-tuning weights, local scale = distance of the 7th neighbour);
Ng, Jordan and Weiss 2001 (normalised Laplacian); Bengio et al. 2004 (extension of eigenvectors to new points).
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from expunge.errors import UserError

BLOCK_ELEMENTS = 1 << 24  # similarities held at once: 2^24 float32 = 64 MiB
STRIP = 32  # columns that share one maximum in the two-stage selection of neighbours
LOCAL = 7  # the neighbour whose distance is the local scale
DENSE = 400  # graphs up to this size are solved by a dense eigensolver
RESIDUAL = 1e-4  # largest ||Lv - λv|| that is accepted from the iterative solver


def nearest(queries_QD: np.ndarray, keys_ND: np.ndarray, count: int, same: bool) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` most similar keys of each query by inner product, exactly: (similarity_QK, index_QK).

    ``same`` says that queries and keys are one array, so that a row is not its own neighbour. Each strip of keys
    is first reduced to its maximum; the best K keys lie in the best K strips, so selection looks at K strips only
    and costs one pass over the product.
    """
    queries = torch.from_numpy(np.ascontiguousarray(queries_QD, dtype=np.float32))
    keys = queries if same else torch.from_numpy(np.ascontiguousarray(keys_ND, dtype=np.float32))
    num, num_queries = keys.shape[0], queries.shape[0]
    width = num + (-num) % STRIP
    rows = max(1, min(num_queries, BLOCK_ELEMENTS // width))
    block = torch.full((rows, width), -torch.inf)
    value_QK, index_QK = torch.empty(num_queries, count), torch.empty(num_queries, count, dtype=torch.long)
    for start in range(0, num_queries, rows):
        stop = min(num_queries, start + rows)
        part = block[: stop - start]
        part[:, :num] = queries[start:stop] @ keys.T
        if same:
            part[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
        strips = part.view(stop - start, -1, STRIP)
        best = strips.amax(2).topk(min(count, strips.shape[1]), dim=1).indices
        held = strips.gather(1, best[:, :, None].expand(-1, -1, STRIP)).reshape(stop - start, -1)
        value, where = held.topk(count, dim=1)
        value_QK[start:stop] = value
        index_QK[start:stop] = best.gather(1, where // STRIP) * STRIP + where % STRIP
    return value_QK.numpy(), index_QK.numpy()


def neighbours(features_ND: np.ndarray, count: int, approximate_from: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(distance_NK, index_NK) of each unit-length row, itself left out.

    Exact by blocks of a matrix product; above ``approximate_from`` rows by pynndescent where that is installed.
    """
    if len(features_ND) > approximate_from and importlib.util.find_spec("pynndescent") is not None:
        found = importlib.import_module("pynndescent").NNDescent(
            features_ND, metric="euclidean", n_neighbors=count + 1, random_state=seed
        )
        index_NK, distance_NK = found.neighbor_graph
        # A row is its own nearest neighbour except among exact duplicates, where another may stand first.
        own = index_NK == np.arange(len(features_ND))[:, None]
        own[~own.any(1), -1] = True
        shape = (len(features_ND), count)
        return distance_NK[~own].reshape(shape), index_NK[~own].reshape(shape)
    similarity_NK, index_NK = nearest(features_ND, features_ND, count, same=True)
    return np.sqrt(np.maximum(0.0, 2.0 - 2.0 * similarity_NK.astype(np.float64))), index_NK


def local_scale(distance_NK: np.ndarray) -> np.ndarray:
    """Distance of the 7th neighbour, (N,); never 0, so that duplicates do not divide by it."""
    scale_N = distance_NK[:, min(LOCAL, distance_NK.shape[1]) - 1]
    return np.asarray(np.maximum(scale_N, 1e-6 + 1e-3 * float(scale_N.mean())))


def self_tuned(distance_NK: np.ndarray, index_NK: np.ndarray) -> sparse.csr_matrix:
    """Weights exp(-d² / (s_i s_j)) on the neighbour graph, symmetrised by the maximum: (N, N) sparse."""
    num, count = distance_NK.shape
    scale_N = local_scale(distance_NK)
    weight_NK = np.exp(-(distance_NK**2) / (scale_N[:, None] * scale_N[index_NK]))
    # Weights that underflow would cut edges that the graph has.
    values = np.maximum(weight_NK, 1e-12).ravel()
    graph = sparse.csr_matrix((values, (np.repeat(np.arange(num), count), index_NK.ravel())), shape=(num, num))
    return graph.maximum(graph.T).tocsr()


@dataclass(frozen=True)
class Spectrum:
    """Smallest eigenpairs of L = I - D^-1/2 W D^-1/2: values_M ascending, vectors_NM orthonormal.

    The first ``components`` values are 0: the null space is written down from the connected components, exactly,
    because iterative solvers lose copies of a value of high multiplicity. ``residual`` is max ||Lv - λv||.
    """

    values_M: np.ndarray
    vectors_NM: np.ndarray
    component_N: np.ndarray
    components: int
    residual: float
    degree_N: np.ndarray


def spectrum(graph: sparse.csr_matrix, count: int, seed: int) -> Spectrum:
    """The ``count`` smallest eigenpairs of the normalised Laplacian of a symmetric non-negative graph.

    With more components than ``count``, only null vectors are given: of the largest components.

    Raises:
        UserError: the solver did not converge to a residual below 1e-4.
    """
    num = graph.shape[0]
    degree_N = np.asarray(graph.sum(1)).ravel()
    root_N = np.sqrt(np.maximum(degree_N, 1e-300))
    scale = sparse.diags(1.0 / root_N)
    normal = (scale @ graph @ scale).tocsr()
    components, found_N = csgraph.connected_components(graph, directed=False)
    size_C = np.bincount(found_N, minlength=components)
    component_N = np.argsort(np.argsort(-size_C, kind="stable"), kind="stable")[found_N]  # largest is 0
    norm_C = np.sqrt(np.bincount(component_N, weights=root_N**2, minlength=components))
    null_N = root_N / norm_C[component_N]  # value of the one null vector that is not 0 at this row

    kept = min(components, count)
    null_NM = np.zeros((num, kept))
    held = component_N < kept
    null_NM[held, component_N[held]] = null_N[held]
    values_M, vectors_NM = np.zeros(kept), null_NM
    wanted = min(count, num) - components
    if wanted > 0:
        rest_M, rest_NM = _beyond_null(normal, null_N, component_N, components=components, wanted=wanted, seed=seed)
        values_M, vectors_NM = np.concatenate([values_M, rest_M]), np.hstack([null_NM, rest_NM])
    gap_NM = vectors_NM - normal @ vectors_NM - vectors_NM * values_M
    residual = float(np.sqrt((gap_NM**2).sum(0)).max())
    if residual > RESIDUAL:
        raise UserError(
            f"the eigenvectors of the token graph have a residual of {residual:.1e} (allowed {RESIDUAL:.0e}): ask "
            "for fewer clusters or more neighbours."
        )
    return Spectrum(values_M, vectors_NM, component_N, int(components), residual, degree_N)


def _beyond_null(
    normal: sparse.csr_matrix, null_N: np.ndarray, component_N: np.ndarray, *, components: int, wanted: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenpairs of the Laplacian after the null space, by ARPACK on the deflated matrix."""
    num = normal.shape[0]

    def project(vector_N: np.ndarray) -> np.ndarray:
        return np.asarray(
            null_N * np.bincount(component_N, weights=null_N * vector_N, minlength=components)[component_N]
        )

    def deflated(vector_N: np.ndarray) -> np.ndarray:
        # Eigenvalue 1 of the null space becomes -1, below everything else that is asked for.
        flat_N = np.ravel(vector_N)
        return np.asarray(normal @ flat_N - 2.0 * project(flat_N))

    if num <= DENSE or wanted >= num - components - 1:
        null_NC = np.zeros((num, components))
        null_NC[np.arange(num), component_N] = null_N
        values, vectors = np.linalg.eigh(normal.toarray() - 2.0 * null_NC @ null_NC.T)
        values, vectors = values[::-1][:wanted], vectors[:, ::-1][:, :wanted]
    else:
        operator = LinearOperator((num, num), matvec=deflated, dtype=np.float64)
        start_N = np.random.default_rng(seed).normal(size=num)
        ncv = min(num - 1, max(2 * wanted + 1, wanted + 20))
        try:
            values, vectors = eigsh(operator, k=wanted, which="LA", tol=1e-8, ncv=ncv, v0=start_N, maxiter=40 * num)
        except ArpackNoConvergence as error:
            raise UserError(
                f"the eigenvectors of the token graph did not converge ({len(error.eigenvalues)} of {wanted} did): "
                "ask for fewer clusters or more neighbours."
            ) from error
        order = np.argsort(-values, kind="stable")
        values, vectors = values[order], vectors[:, order]
    return np.maximum(0.0, 1.0 - values), vectors


def extend(states_QD: np.ndarray, landmarks_ND: np.ndarray, distance_NK: np.ndarray, found: Spectrum) -> np.ndarray:
    """Nyström values of the eigenvectors at new points, (Q, M).

    φ(x) = 1/(1 - λ) Σ_j w(x, j) / sqrt(d(x) d_j) φ_j over the nearest landmarks j, with self-tuned weights and
    d(x) = Σ_j w(x, j). Vectors with 1 - λ near 0 carry no information about new points and come back as 0.
    """
    count = distance_NK.shape[1]
    similarity_QK, index_QK = nearest(states_QD, landmarks_ND, count, same=False)
    distance_QK = np.sqrt(np.maximum(0.0, 2.0 - 2.0 * similarity_QK.astype(np.float64)))
    scale_Q, scale_N = local_scale(distance_QK), local_scale(distance_NK)
    weight_QK = np.maximum(np.exp(-(distance_QK**2) / (scale_Q[:, None] * scale_N[index_QK])), 1e-12)
    weight_QK /= np.sqrt(weight_QK.sum(1, keepdims=True) * found.degree_N[index_QK])
    rows = np.repeat(np.arange(len(states_QD)), count)
    kernel = sparse.csr_matrix((weight_QK.ravel(), (rows, index_QK.ravel())), shape=(len(states_QD), len(landmarks_ND)))
    keep_M = 1.0 - found.values_M
    factor_M = np.where(keep_M > 1e-3, 1.0 / np.maximum(keep_M, 1e-3), 0.0)
    return np.asarray((kernel @ found.vectors_NM) * factor_M)
