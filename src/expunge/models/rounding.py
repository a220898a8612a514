"""Rounding of weights to a few bits, as deployed models have it.

To the nearest of 2^bits evenly spaced values between the smallest and the largest weight of each group of the input
dimension (the layout of GGML's Q4_1: 4 bits, groups of 32). Weights are put back as floating-point numbers ("fake"
quantization), so that the model runs as before.

Shape suffixes: O rows (everything but the input dimension), I input dimension, G groups, S group size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from expunge.errors import UserError

GROUP = 32
BITS = range(2, 9)


@dataclass(frozen=True)
class Codes:
    """A weight as codes: w ≈ minimum + code · scale, per group; the last group may be shorter than the others."""

    codes_OI: Tensor  # uint8
    minimum_OG: Tensor
    scale_OG: Tensor
    group: int

    def weights_OI(self) -> Tensor:
        """The rounded weights, float32."""
        width = self.codes_OI.shape[1]
        minimum_OI = self.minimum_OG.repeat_interleave(self.group, dim=1)[:, :width]
        scale_OI = self.scale_OG.repeat_interleave(self.group, dim=1)[:, :width]
        return minimum_OI + self.codes_OI.float() * scale_OI


def encode(weight_OI: Tensor, bits: int, group: int = GROUP) -> Codes:
    """Round a matrix to the nearest of 2^bits values per group of ``group`` inputs.

    The error of a weight is at most half a step, (largest − smallest of its group) / (2·(2^bits − 1)); the smallest,
    the largest and constant groups are exact up to float32.

    Raises:
        UserError: bits are not 2 to 8, or the group is smaller than 2.
    """
    if bits not in BITS:
        raise UserError(f"quantization to {bits} bits is not possible: give 2 to 8, usually 8, 4 or 3.")
    if group < 2:
        raise UserError(f"a quantization group of {group} weights is too small: give at least 2, usually 32.")
    rows, width = weight_OI.shape
    fill = -width % group
    # The last value is repeated, so that a short group keeps its own smallest and largest weight.
    full_OI = pad(weight_OI.float()[None], (0, fill), mode="replicate")[0] if fill else weight_OI.float()
    grouped_OGS = full_OI.reshape(rows, -1, group)
    minimum_OG, maximum_OG = grouped_OGS.amin(2), grouped_OGS.amax(2)
    scale_OG = (maximum_OG - minimum_OG) / (2**bits - 1)
    safe_OG = torch.where(scale_OG > 0, scale_OG, torch.ones_like(scale_OG))
    codes_OGS = ((grouped_OGS - minimum_OG[..., None]) / safe_OG[..., None]).round().clamp(0, 2**bits - 1)
    codes_OI = codes_OGS.to(torch.uint8).reshape(rows, -1)[:, :width]
    return Codes(codes_OI, minimum_OG, scale_OG, group)


@dataclass(frozen=True)
class Matrix:
    """A parameter as a matrix (O, I), and the way back."""

    parameter: nn.Parameter
    kind: Literal["rows", "kernel", "transposed"]

    def weight_OI(self) -> Tensor:
        weight = self.parameter.detach()
        if self.kind == "transposed":
            return weight.T
        return weight.flatten(1) if self.kind == "kernel" else weight.flatten(0, -2)

    def write(self, weight_OI: Tensor) -> None:
        back = weight_OI.T if self.kind == "transposed" else weight_OI
        self.parameter.copy_(back.reshape(self.parameter.shape))


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """Every weight that is rounded, by name; tied ones once.

    Matrices, embeddings included; stacks of matrices (experts) along their last dimension; convolution kernels as
    (out, in·height·width). Biases, norms and other vectors stay as they are, as in deployed formats.
    """
    kernels = {id(m.weight) for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)}
    # GPT-2's linear layer keeps its weight as (in, out).
    transposed = {id(m.weight) for m in model.modules() if type(m).__name__ == "Conv1D" and hasattr(m, "weight")}
    found: dict[str, Matrix] = {}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.ndim < 2:
            continue
        if id(parameter) in kernels:
            found[name] = Matrix(parameter, "kernel")
        elif id(parameter) in transposed and parameter.ndim == 2:
            found[name] = Matrix(parameter, "transposed")
        elif parameter.ndim == 2 or parameter.numel() > parameter.shape[-1]:  # (1, 1, D) is a vector
            found[name] = Matrix(parameter, "rows")
    return found


@contextmanager
def rounded_weights(model: nn.Module, bits: int, group: int = GROUP) -> Iterator[None]:
    """Inside, the trainable matrices are rounded; gradients taken there are those at the rounded weights
    (straight-through, Bengio et al. 2013). Outside, the weights are what they were, bit for bit."""
    held = [(m, m.parameter.detach().clone()) for m in matrices(model).values() if m.parameter.requires_grad]
    with torch.no_grad():
        for matrix, _ in held:
            matrix.write(encode(matrix.weight_OI(), bits, group).weights_OI().to(matrix.parameter.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for matrix, weight in held:
                matrix.parameter.copy_(weight)
