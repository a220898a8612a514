"""Linear layers seen token by token: their inputs, their output gradients, and weight gradients of chosen tokens.

A weight gradient is a sum over tokens, G = Σ_t d_t x_tᵀ with x_t the layer's input and d_t the gradient of the loss
at its output, so that any partition of the tokens splits it exactly. All matrices here are (out, in), also for
GPT-2's Conv1D, which stores its transpose, and for convolutions, whose tokens are the output places and whose
inputs are unfolded patches.

Shape suffixes: B samples, T positions, M tokens that one call sees, I layer inputs, O layer outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import UserError

Kind = Literal["linear", "conv1d", "conv2d"]


@dataclass(frozen=True)
class Layer:
    """One linear map of the model."""

    name: str
    module: Any  # nn.Linear, transformers' Conv1D or nn.Conv2d
    kind: Kind
    images: bool = False  # beside a language model: sees the images of a batch, one after another, not its tokens

    @property
    def weight(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[no-any-return]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight as a matrix."""
        rows, cols = self.matrix(self.weight).shape
        return int(rows), int(cols)

    def matrix(self, weight: Tensor) -> Tensor:
        """A tensor in the shape of the weight as an (O, I) matrix."""
        return weight.T if self.kind == "conv1d" else weight.flatten(1)

    def unmatrix(self, matrix_OI: Tensor) -> Tensor:
        """Undo :meth:`matrix`."""
        return matrix_OI.T if self.kind == "conv1d" else matrix_OI.reshape(self.weight.shape)

    def inputs(self, x: Tensor) -> Tensor:
        """The layer's input as tokens, (..., I)."""
        if self.kind != "conv2d":
            return x
        m = self.module
        return F.unfold(x, m.kernel_size, dilation=m.dilation, padding=m.padding, stride=m.stride).transpose(1, 2)

    def outputs(self, y: Tensor) -> Tensor:
        """The layer's output, or a gradient at it, as tokens, (..., O)."""
        return y.flatten(2).transpose(1, 2) if self.kind == "conv2d" else y

    def detached(self, x: Tensor) -> Tensor:
        """The layer's output with weight and bias as constants."""
        weight = self.weight.detach()
        bias = self.module.bias.detach() if self.module.bias is not None else None
        if self.kind == "conv2d":
            m = self.module
            return F.conv2d(x, weight, bias, m.stride, m.padding, m.dilation)
        return F.linear(x, weight.T if self.kind == "conv1d" else weight, bias)


def linear_layers(
    model: nn.Module, wanted: Callable[[str], bool] | None = None, *, head: bool = False
) -> tuple[dict[str, Layer], dict[str, str]]:
    """(layers by name, why each other weighted layer is left out).

    Taken are nn.Linear, transformers' Conv1D, and nn.Conv2d without groups and with zero padding, with a trainable
    weight that no other module shares; the output head (``get_output_embeddings``) only where ``head``.

    Raises:
        UserError: no layer is left.
    """
    users: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    finder = getattr(model, "get_output_embeddings", None)
    output = finder() if finder is not None else None
    taken: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2 or isinstance(module, nn.Embedding):
            continue
        if wanted is not None and not wanted(name):
            continue
        kind = _kind(module)
        if kind is None:
            skipped[name] = f"{type(module).__name__} is not supported"
        elif not weight.requires_grad:
            skipped[name] = "frozen"
        elif users[id(weight)] > 1:
            skipped[name] = "shares its weight with another module"
        elif module is output and not head:
            skipped[name] = "output head"
        else:
            taken[name] = Layer(name, module, kind)
    if not taken:
        why = "; ".join(f"{n}: {w}" for n, w in list(skipped.items())[:3]) or "none fits the selection"
        raise UserError(f"the model has no linear layer to edit ({why}): widen the selection of layers.")
    return taken, skipped


def _kind(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return "conv2d" if plain else None
    # By name: importing transformers only for this check would cost seconds.
    is_conv1d = type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"
    return "conv1d" if is_conv1d else None


@dataclass(frozen=True)
class Call:
    """One call of one layer in a forward pass."""

    layer: Layer
    x: Tensor
    y: Tensor


@contextmanager
def recorded(layers: Mapping[str, Layer]) -> Iterator[list[Call]]:
    """Record the calls of ``layers``; leave the context before going backward.

    (With gradient checkpointing the backward pass calls layers again, which must not be recorded.)
    """
    calls: list[Call] = []

    def hook_of(layer: Layer) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, inputs: Any, output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_(True)  # frozen weight on constant input: a leaf whose gradient is still wanted
            calls.append(Call(layer, inputs[0].detach(), output))

        return hook

    handles = [layer.module.register_forward_hook(hook_of(layer)) for layer in layers.values()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def output_gradients(loss: Tensor, calls: list[Call]) -> list[tuple[Call, Tensor, Tensor]]:
    """(call, x, d) of each call that the loss depends on: x (..., I), d (..., O) float32. ``.grad`` stays untouched."""
    if not calls or not loss.requires_grad:
        return []
    grads = torch.autograd.grad(loss, [call.y for call in calls], allow_unused=True)
    return [
        (call, call.layer.inputs(call.x).float(), call.layer.outputs(grad).float())
        for call, grad in zip(calls, grads, strict=True)
        if grad is not None
    ]


class _TokenWeights(torch.autograd.Function):
    """Identity on y; sends Σ_t m_t d_t x_tᵀ to the weight and Σ_t m_t d_t to the bias."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, layer: Layer
    ) -> Tensor:
        ctx.save_for_backward(x, mask)
        ctx.layer = layer
        ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (d,) = grads
        x, mask = ctx.saved_tensors
        layer: Layer = ctx.layer
        weight_dtype, bias_dtype = ctx.dtypes
        work = torch.promote_types(torch.float32, weight_dtype)
        d_MO = layer.outputs(d).flatten(0, -2).to(work) * mask.reshape(-1, 1).to(work)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            x_MI = layer.inputs(x).flatten(0, -2).to(work)
            grad_weight = layer.unmatrix(d_MO.T @ x_MI).to(weight_dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = d_MO.sum(0).to(bias_dtype)
        return d, None, grad_weight, grad_bias, None, None


@contextmanager
def restricted_gradient(layers: Mapping[str, Layer], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, backward passes give the weights of ``layers`` the gradient of chosen tokens only.

    ``masks[name]`` is a 0/1 mask (or weights) over the layer's tokens, (B, T) for a text model; a layer without a
    mask gets the gradient of no token. Weight and bias receive Σ_t m_t d_t x_tᵀ and Σ_t m_t d_t exactly, while
    gradients to the layers' inputs, and all values, stay as they are.

    Raises:
        UserError: a mask does not fit the tokens that its layer sees.
    """

    def forward_of(layer: Layer) -> Callable[[Tensor], Tensor]:
        mask = masks.get(layer.name)

        def forward(x: Tensor) -> Tensor:
            y = layer.detached(x)
            if not torch.is_grad_enabled():
                return y
            tokens = layer.outputs(y).flatten(0, -2).shape[0]
            if mask is not None and mask.numel() != tokens:
                raise UserError(
                    f"layer '{layer.name}' sees {tokens} tokens and the mask has shape {tuple(mask.shape)}: give one "
                    "entry per sample and position."
                )
            held = mask if mask is not None else torch.zeros(tokens)
            chosen: Tensor = _TokenWeights.apply(
                y, x.detach(), layer.weight, layer.module.bias, held.to(y.device), layer
            )  # type: ignore[no-untyped-call]
            return chosen

        return forward

    replaced = [(layer.module, layer.module.__dict__.get("forward")) for layer in layers.values()]
    for layer in layers.values():
        layer.module.forward = forward_of(layer)
    try:
        yield
    finally:
        for module, before in replaced:
            if before is None:
                del module.forward
            else:
                module.forward = before
