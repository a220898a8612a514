"""Low-rank steps in the retain metric, contrastive directions, and the hard null space as a control arm.

Surgery solves max_Δ <-G, Δ> - ½ ΔᵀFΔ, whose solution is Δ = -(F + γ)⁻¹ G; here its best approximations of rank r,
and inside given directions. Shape suffixes: I layer inputs, O layer outputs, R rank or number of directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.errors import UserError
from expunge.methods.cluster.kfac import Factor


def truncated(matrix_OI: Tensor, rank: int) -> Tensor:
    """Best approximation of rank ``rank`` in the Frobenius norm (Eckart and Young 1936), (O, I).

    From the eigenvectors of the smaller Gram matrix, in float64: far cheaper than a full SVD of a flat matrix.
    """
    if rank < 1:
        raise UserError(f"rank {rank} cannot be: give at least 1.")
    rows, cols = matrix_OI.shape
    if rank >= min(rows, cols):
        return matrix_OI
    exact = matrix_OI.double()
    kept: Tensor
    if rows <= cols:
        basis_OR = torch.linalg.eigh(exact @ exact.T).eigenvectors[:, -rank:]
        kept = basis_OR @ (basis_OR.T @ exact)
        return kept.to(matrix_OI.dtype)
    basis_IR = torch.linalg.eigh(exact.T @ exact).eigenvectors[:, -rank:]
    kept = (exact @ basis_IR) @ basis_IR.T
    return kept.to(matrix_OI.dtype)


def low_rank_direction(grad_OI: Tensor, factor: Factor, rank: int | None) -> Tensor:
    """Preconditioned direction P of rank at most ``rank`` (None: any), (O, I); subtract it to lower the objective.

    Truncated in the whitened space: of all rank-r steps it has the largest <G, P> - ½ Pᵀ(F + γ)P.
    """
    if rank is None:
        return factor.precondition(grad_OI)
    return factor.unwhiten(truncated(factor.whiten(grad_OI), rank))


@dataclass(frozen=True)
class Directions:
    """Generalised eigenvectors ``vectors_IR`` (columns, orthonormal in the damped retain metric) and their ratios."""

    vectors_IR: Tensor
    ratios_R: Tensor


def contrastive_directions(forget_II: Tensor, retain_II: Tensor, count: int, damping: float = 1e-2) -> Directions:
    """Directions with the most forget energy per retain energy: C_f u = λ (C_R + γ) u, largest λ first.

    γ = damping · tr(C_R)/I. Columns satisfy Uᵀ(C_R + γ)U = I. Works for inputs and for output gradients alike.
    """
    num = retain_II.shape[0]
    if not 1 <= count <= num:
        raise UserError(f"{count} directions of {num} cannot be: give 1 to {num}.")
    root_II = Factor(retain_II, retain_II, damping).input_root.double()
    half_II = torch.linalg.solve_triangular(root_II, forget_II.double(), upper=False)
    white_II = torch.linalg.solve_triangular(root_II, half_II.T, upper=False)
    values, vectors = torch.linalg.eigh(0.5 * (white_II + white_II.T))
    chosen_IR = vectors[:, -count:].flip(1)
    vectors_IR = torch.linalg.solve_triangular(root_II.T, chosen_IR, upper=True)
    return Directions(vectors_IR.to(retain_II.dtype), values[-count:].flip(0).to(retain_II.dtype))


def step_within(grad_OI: Tensor, inputs: Directions, outputs: Directions) -> Tensor:
    """The preconditioned direction restricted to steps of the form U_d M U_xᵀ: U_d U_dᵀ G U_x U_xᵀ, (O, I).

    As U_x and U_d are orthonormal in the damped A and S, the metric is the identity in M, so this is the exact
    optimum of the surgery problem among such steps; with all directions, U_x U_xᵀ = A⁻¹ and it is S⁻¹ G A⁻¹.
    """
    core = outputs.vectors_IR.T @ grad_OI @ inputs.vectors_IR
    return outputs.vectors_IR @ core @ inputs.vectors_IR.T


def null_space(retain_II: Tensor, energy: float) -> Tensor:
    """Control arm: the projector (I, I) off the leading retain directions that hold ``energy`` of the trace.

    ``grad_OI @ null_space(A, energy)`` then leaves the layer's answer to those retain inputs as it is (as OGD, GPM
    and AlphaEdit do). Near energy 1 few directions are left, and what is edited hits them hard.
    """
    if not 0 < energy <= 1:
        raise UserError(f"energy {energy} is not a share: give a number above 0 and up to 1.")
    values, vectors = torch.linalg.eigh(0.5 * (retain_II + retain_II.T).double())
    values = values.clamp_min(0).flip(0)
    # The smallest number of leading directions whose sum reaches the energy.
    held = int((values.cumsum(0) < energy * values.sum() * (1 - 1e-12)).sum()) + 1
    kept_IR = vectors.flip(1)[:, held:]
    projector: Tensor = kept_IR @ kept_IR.T
    return projector.to(retain_II.dtype)
