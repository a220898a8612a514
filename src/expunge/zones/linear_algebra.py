"""Solving positive definite systems so that the same numbers always give the same bits.

Shape suffixes: N unknowns, V right-hand sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from expunge.errors import UserError

Doubles = NDArray[np.float64]


@contextmanager
def one_thread() -> Iterator[None]:
    """BLAS and torch on one thread: with more, the order of a sum, and so its last bits, depends on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(threads)


def solve_positive(matrix_NN: Doubles, right_NV: Doubles) -> Doubles:
    """``matrix⁻¹ right`` by a float64 Cholesky factor on one thread, (N, V); the arguments are left as they are.

    Raises:
        UserError: the matrix is not positive definite to rounding.
    """
    with one_thread():
        try:
            factor = cho_factor(np.ascontiguousarray(matrix_NN, dtype=np.float64), lower=True)
        except LinAlgError as error:
            raise UserError(
                "the ridge system is not positive definite to rounding: give a larger ridge (alpha), for example 0.03."
            ) from error
        solution_NV = cho_solve(factor, np.ascontiguousarray(right_NV, dtype=np.float64))
    return np.ascontiguousarray(solution_NV)


def solve_within(
    matrix_NN: Doubles, right_NV: Doubles, start_NV: Doubles, tolerance: float, steps: int = 100
) -> tuple[Doubles, float]:
    """(X, ‖matrix X − right‖) with a Frobenius norm of at most ``tolerance``, found from ``start_NV`` on.

    Iterative refinement (Higham 2002, chapter 12): corrections by a factor in single precision, residuals in double.
    It stops as soon as the residual is small enough, so that the solution depends on where it started.

    Raises:
        UserError: the matrix is not positive definite in single precision, or the tolerance was not reached.
    """
    with one_thread():
        try:
            factor = cho_factor(matrix_NN.astype(np.float32), lower=True)
        except LinAlgError as error:
            raise UserError("the ridge system cannot be solved to a residual: give a larger ridge (alpha).") from error
        solution_NV = start_NV.astype(np.float64)
        for _ in range(steps):
            rest_NV = right_NV - matrix_NN @ solution_NV
            residual = float(np.linalg.norm(rest_NV))
            if residual <= tolerance:
                return solution_NV, residual
            solution_NV = solution_NV + cho_solve(factor, rest_NV.astype(np.float32))
    raise UserError(
        f"the solve has not converged: its gradient norm is {residual:.3g} and at most {tolerance:.3g} was promised; "
        "give a larger tolerance or a larger ridge (alpha)."
    )


def digest_arrays(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over names, types, shapes and bytes of the arrays, whatever their order in the mapping."""
    state = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        state.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        state.update(array.tobytes())
    return state.hexdigest()
