"""One low-rank adapter per request beside the weights, each behind a gate that reads the prompt.

A layer gives W x + Σ_t w_t (α_t / r_t) B_t A_t x with one weight w_t in [0, 1] per request and sample (Gao et al. 2025,
arXiv:2407.10223). Before a pass over prompts the bare model reads them once, all adapters off; tokens that a pass with
a key-value cache adds keep the weights of their prompt. Where an adapter of this tool runs the model on prompt and
answer together, the gate is told where the prompt ends; anything else that is fed in counts as a prompt.

Shape suffixes: B samples, T positions, C width of a block, R rank, I and O inputs and outputs of a layer, Q requests,
N samples that a gate knows, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, normalize

from expunge.data.samples import Sample
from expunge.methods.beside import Site, states_of
from expunge.models.adapter import Adapter, Batch, evaluating
from expunge.models.attached import Attachment

SHRINK = 0.1  # of the mean variance, added to every direction before whitening


class Gate(nn.Module):
    """How much a prompt looks like one of the N prompts of a request, from mean states at L blocks.

    Score: the mean over blocks of the largest cosine with a known prompt, after whitening; 1 for a known prompt. The
    weight is σ((score − ``threshold``) / ``slope``).
    """

    def __init__(self, widths: Sequence[int], known: int) -> None:
        super().__init__()
        for number, width in enumerate(widths):
            self.register_buffer(f"mean_{number}", torch.zeros(width))
            self.register_buffer(f"whiten_{number}", torch.eye(width))
            self.register_buffer(f"known_{number}", torch.zeros(known, width))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("slope", torch.ones(()))
        self.depth = len(widths)

    def learn(self, known: Sequence[Tensor], background: Sequence[Tensor]) -> None:
        """Take whitening from ``background`` and the known prompts together; (·, C) of each block."""
        for number, (known_NC, other_MC) in enumerate(zip(known, background, strict=True)):
            both = torch.cat([known_NC, other_MC]).double()
            centred = both - both.mean(0)
            covariance = centred.T @ centred / len(both)
            ridge = SHRINK * float(covariance.diagonal().mean()) + 1e-12
            values, vectors = torch.linalg.eigh(covariance + ridge * torch.eye(len(covariance), device=both.device))
            self.get_buffer(f"mean_{number}").copy_(both.mean(0))
            self.get_buffer(f"whiten_{number}").copy_(vectors @ (values**-0.5)[:, None].mul(vectors.T))
            self.get_buffer(f"known_{number}").copy_(self._unit(number, known_NC))

    def _unit(self, number: int, states_BC: Tensor) -> Tensor:
        # In float32 also where the model is served in half precision: differences of large numbers.
        mean_C, whiten_CC = self.get_buffer(f"mean_{number}").float(), self.get_buffer(f"whiten_{number}").float()
        return normalize((states_BC.float() - mean_C) @ whiten_CC, dim=-1)

    def score(self, states: Sequence[Tensor], *, without_itself: bool = False) -> Tensor:
        """(B,) from (B, C) of each block. ``without_itself``: the rows are the known prompts, each left out once."""
        scores = []
        for number, states_BC in enumerate(states):
            cosine_BN = self._unit(number, states_BC) @ self.get_buffer(f"known_{number}").float().T
            if without_itself:
                cosine_BN = cosine_BN.masked_fill(
                    torch.eye(len(cosine_BN), dtype=torch.bool).to(cosine_BN.device), -1.0
                )
            scores.append(cosine_BN.amax(1))
        return torch.stack(scores).mean(0)

    def weight(self, states: Sequence[Tensor]) -> Tensor:
        """w in (0, 1), (B,)."""
        return torch.sigmoid((self.score(states) - self.get_buffer("threshold")) / self.get_buffer("slope"))


class Request(nn.Module):
    """What one request added: A (R, I) and B (O, R) of every layer, and the gate. B is zero at first."""

    def __init__(self, shapes: Sequence[tuple[int, int]], widths: Sequence[int], rank: int, alpha: float, known: int):
        super().__init__()
        self.rank, self.alpha, self.known = rank, alpha, known
        self.A = nn.ParameterList([torch.zeros(rank, inputs) for _, inputs in shapes])
        self.B = nn.ParameterList([torch.zeros(outputs, rank) for outputs, _ in shapes])
        self.gate = Gate(widths, known)

    def begin(self, seed: int) -> None:
        """A normal with variance 1 / I."""
        chance = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for a_RI in self.A:
                a_RI.copy_(torch.randn(a_RI.shape, generator=chance) / a_RI.shape[1] ** 0.5)


class GatedLora(Attachment):
    """Adapters on ``layers`` (names in the Hugging Face model; (O, I) of each in ``shapes``), one set per request.

    The gates read the states after ``blocks`` of widths ``widths``. ``requests``: (rank, alpha, known prompts) of each.
    """

    kind = "o3"

    def __init__(
        self,
        *,
        layers: Sequence[str],
        shapes: Sequence[Sequence[int]],
        blocks: Sequence[str],
        widths: Sequence[int],
        requests: Sequence[Sequence[float]] = (),
    ) -> None:
        super().__init__()
        self.layers, self.shapes = list(layers), [(int(o), int(i)) for o, i in shapes]
        self.blocks, self.widths = list(blocks), list(widths)
        self.requests = nn.ModuleList()  # of Request; see :meth:`request`
        for rank, alpha, known in requests:
            self.add(int(rank), float(alpha), int(known))
        self.forced: list[float] | None = None  # weights of all samples instead of the gates', while training
        self.noted: list[list[Tensor]] | None = None  # mean prompt states of each pass, while the gate is learnt
        self._weights_QB: Tensor | None = None  # None: all adapters off
        self._taken: list[Tensor] | None = None  # states of the blocks, while the bare model reads
        self._batch: Batch | None = None

    def arguments(self) -> dict[str, Any]:
        made = [[r.rank, r.alpha, r.known] for r in self.requests]
        names = ("layers", "shapes", "blocks", "widths")
        return {**{name: getattr(self, name) for name in names}, "requests": made}

    def request(self, place: int) -> Request:
        found = self.requests[place]
        assert isinstance(found, Request)
        return found

    def add(self, rank: int, alpha: float, known: int) -> Request:
        """Room for one more request; the adapter does nothing yet."""
        made = Request(self.shapes, self.widths, rank, alpha, known)
        self.requests.append(made)
        return made

    def install(self, model: Any) -> None:
        model.base_model.register_forward_pre_hook(self._read, with_kwargs=True)
        for name in self.blocks:
            model.get_submodule(name).register_forward_hook(self._take)
        for number, name in enumerate(self.layers):
            model.get_submodule(name).register_forward_hook(partial(self._added, number))

    # -- the gates ---------------------------------------------------------------------------------------------------

    def see(self, batch: Batch) -> None:
        self._batch = batch

    def _read(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Before every pass of the model's body: the weights of its samples."""
        batch, self._batch = self._batch, None
        cache = kwargs.get("past_key_values")
        if self.forced is not None or (cache is not None and cache.get_seq_length() > 0):
            return  # a pass that goes on after a prompt has the weights of that prompt
        self._weights_QB, self._taken = None, []
        more = {"past_key_values": None, "use_cache": False} if "past_key_values" in kwargs else {}
        try:
            with evaluating(module):
                module.forward(*args, **{**kwargs, **more})
            real_BT = prompt_mask(args, kwargs, batch)
            states = [mean_states(states, real_BT) for states in self._taken]
        finally:
            self._taken = None
        if self.noted is not None:
            self.noted.append(states)
            return
        with torch.no_grad():
            gates = [self.request(place).gate for place in range(len(self.requests))]
            self._weights_QB = torch.stack([gate.weight(states) for gate in gates])

    def _take(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self._taken is not None:
            self._taken.append(states_of(output).detach().float())

    def prompt_states(self, model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> list[Tensor]:
        """Mean states over each sample's prompt after every block, as the gates see them: (samples, C) of each."""
        order: list[int] = []
        self.noted = []
        try:
            with evaluating(model):
                for group in adapter.batches(samples):
                    order += group
                    adapter.positions(model, [samples[i] for i in group])
            columns = [torch.cat(parts) for parts in zip(*self.noted, strict=True)]
        finally:
            self.noted = None
        back = torch.tensor(order).argsort()
        return [column[back.to(column.device)] for column in columns]

    # -- the adapters ------------------------------------------------------------------------------------------------

    def _added(self, number: int, module: Any, inputs: Any, output: Tensor) -> Tensor:
        if self.noted is not None or self._taken is not None or (self.forced is None and self._weights_QB is None):
            return output
        total: Tensor | None = None
        for place in range(len(self.requests)):
            if self.forced is not None and self.forced[place] == 0:
                continue
            request = self.request(place)
            change = low_rank(getattr(module, "base_layer", module), inputs[0], request.A[number], request.B[number])
            change = change * (request.alpha / request.rank) * self._weight(place, change)
            total = change if total is None else total + change
        return output if total is None else output + total.to(output.dtype)

    def _weight(self, place: int, like: Tensor) -> Tensor:
        if self.forced is not None:
            return like.new_tensor(self.forced[place])
        assert self._weights_QB is not None
        weights_B, rows = self._weights_QB[place], len(like)
        if rows % len(weights_B):  # rows that belong to no sample in particular: nothing is let through
            weights_B = weights_B.amax().expand(rows)
        weights_B = weights_B.repeat_interleave(rows // len(weights_B))  # beams, or tokens laid out in rows
        return weights_B.view(-1, *[1] * (like.ndim - 1)).to(like.dtype)

    def overlap(self, place: int) -> Tensor:
        """Σ over layers and earlier requests of ‖A_earlier A_newᵀ‖²_F; 0 for the first request."""
        new = self.request(place)
        total: Tensor = new.A[0].new_zeros(())
        for earlier in range(place):
            for old_RI, new_RI in zip(self.request(earlier).A, new.A, strict=True):
                total = total + (old_RI.detach() @ new_RI.T).square().sum()
        return total


def prompt_mask(args: Any, kwargs: dict[str, Any], batch: Batch | None) -> Tensor | None:
    """Which positions belong to prompts, bool (B, T); None: all of them (images)."""
    fed = next((kwargs[n] for n in ("input_ids", "inputs_embeds") if kwargs.get(n) is not None), None)
    if fed is None and args and not args[0].is_floating_point():
        fed = args[0]
    if fed is None:
        return None
    given = kwargs.get("attention_mask")
    real_BT = given.bool() if given is not None and given.ndim == 2 else torch.ones(fed.shape[:2]).bool().to(fed.device)
    if batch is not None and any(fed is tensor for tensor in batch.inputs.values()):
        last_B = torch.full((len(fed),), fed.shape[1], device=fed.device)
        last_B = last_B.scatter_reduce(0, batch.sample_N, batch.cols_N, "amin")
        real_BT = real_BT & (torch.arange(fed.shape[1], device=fed.device)[None] <= last_B[:, None])
    return real_BT


def mean_states(states: Tensor, real_BT: Tensor | None) -> Tensor:
    """(B, C): the mean over the positions that count."""
    if real_BT is None:
        return states.flatten(1, -2).mean(1)
    weights_BT1 = real_BT[..., None].to(states.dtype)
    return (states * weights_BT1).sum(1) / weights_BT1.sum(1).clamp_min(1)


def low_rank(module: Any, x: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """B A x, in the layout of the layer's output."""
    x = x.to(a_RI.dtype)
    if not isinstance(module, nn.Conv2d):
        return linear(linear(x, a_RI), b_OR)
    kernel = a_RI.view(len(a_RI), module.in_channels, *module.kernel_size)
    inside = conv2d(x, kernel, None, module.stride, module.padding, module.dilation)
    return conv2d(inside, b_OR[..., None, None])


def adapted_layers(model: Any, sites: Sequence[Site]) -> dict[str, tuple[int, int]]:
    """(O, I) of every linear map and convolution inside the blocks, by name; a LoRA layer counts as one."""
    found: dict[str, tuple[int, int]] = {}
    for site in sites:
        for name, module in model.get_submodule(site.name).named_modules(prefix=site.name):
            if any(name.startswith(outer + ".") for outer in found):
                continue
            layer = getattr(module, "base_layer", module)
            if isinstance(layer, nn.Linear):
                found[name] = (layer.out_features, layer.in_features)
            elif type(layer).__name__ == "Conv1D":
                found[name] = (int(layer.weight.shape[1]), int(layer.weight.shape[0]))
            elif isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros":
                found[name] = (layer.out_channels, layer.weight[0].numel())
    return found
