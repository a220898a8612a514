"""Representation misdirection: hidden states of forget tokens are pushed to a random direction, those of retain tokens
are held where they were.

Shape suffixes: B samples, T places (tokens; pixels of a feature map; patches), D width of the hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.registry import Context, Outcome, method
from expunge.methods.scope import held
from expunge.models.adapter import Adapter
from expunge.models.lora import is_lora
from expunge.options import Ranges, check_ranges, option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Term, View

PAPER_RATE = 5e-5  # of a model of 7 billion parameters
PAPER_DEPTH = 7 / 31  # layer 7 of the 32 of Zephyr-7B


@dataclass(frozen=True, kw_only=True)
class SteeringOptions(TrainOptions):
    """What both variants of RMU have."""

    epochs: float = option(10.0, "passes over the forget set", "OpenUnlearning on TOFU: 10; the paper: 150 batches")
    batch_size: int = option(4, "forget samples in one step", "paper: 4")
    retain_batch: int = option(4, "retain samples in one step", "paper: 4")
    learning_rate: float | None = option(None, "peak learning rate; the paper's 5e-5 at 7B, raised for small models")
    schedule: str = option("constant", "shape after warm-up", "paper: none", choices=("cosine", "linear", "constant"))
    warmup: float = option(0.0, "share of the steps with rising learning rate", "paper: none")
    layer: int | None = option(
        None, "block whose output is steered, counted from 0; at the paper's depth (7 of 32) if none", "paper: 7"
    )
    layers: int = option(3, "blocks that may move: the steered one and those just before it", "paper: 3")
    alpha: float = option(1200.0, "weight of the retain term", "paper, Zephyr-7B: 1200")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, RANGES)


RANGES: Ranges = (
    (("layer",), "the number of a block, counted from 0", lambda v: v >= 0),
    (("layers",), "1 or more", lambda v: v >= 1),
    (("alpha", "coefficient", "beta"), "0 or more", lambda v: 0 <= v < math.inf),
)


@dataclass(frozen=True, kw_only=True)
class RmuOptions(SteeringOptions):
    """RMU. Where the retain texts resemble the forget texts, as here, the paper's α = 1200 and c = 6.5 move nothing."""

    alpha: float = option(1.0, "weight of the retain term", "OpenUnlearning on TOFU: 1; paper: 1200")
    coefficient: float = option(
        2.0, "length c of the vector that forget states are pushed to", "OpenUnlearning on TOFU: 2; paper: 6.5"
    )


@dataclass
class States:
    """The output of one block, read by a hook during the passes that the training loop makes anyway."""

    adapter: Adapter
    block: nn.Module
    _read_BTD: Tensor | None = field(default=None, repr=False)
    _flat: Sequence[tuple[str, Sample]] = field(default=(), repr=False)

    @contextmanager
    def around(self, flat: Sequence[tuple[str, Sample]], model: nn.Module) -> Iterator[None]:
        """Read the block's output in the passes inside, without dropout and with running batch statistics: so were the
        original's states taken, which they are compared with."""
        self._flat, was_training = flat, model.training
        model.eval()
        handle = self.block.register_forward_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()
            model.train(was_training)
            self._read_BTD = None

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        states: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        self._read_BTD = states.flatten(2).transpose(1, 2) if states.ndim == 4 else states  # channels are the width

    def of(self, role: str) -> tuple[Tensor, Tensor]:
        """(states (B, T, D) float32, which places are no padding (B, T)) of the samples of a role."""
        rows = [row for row, (own, _) in enumerate(self._flat) if own == role]
        assert self._read_BTD is not None, "the block has not been run"
        states_BTD = self._read_BTD[rows].float()
        places = states_BTD.shape[1]
        if self.adapter.modality == "classifier":
            return states_BTD, torch.ones(states_BTD.shape[:2], dtype=torch.bool, device=states_BTD.device)
        lengths = torch.tensor([self.adapter.num_tokens(self._flat[row][1]) for row in rows])
        return states_BTD, (torch.arange(places) < lengths[:, None]).to(states_BTD.device)  # padding is on the right

    def take(self, model: nn.Module, samples: Sequence[Sample], what: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """``what(states of a sample's places (T, D))`` by sample id, on the CPU; one pass without gradients."""
        found: dict[str, Tensor] = {}
        with torch.no_grad():
            for group in self.adapter.batches(samples):
                own = [samples[i] for i in group]
                with self.around([("", s) for s in own], model):
                    self.adapter.positions(model, own)
                    states_BTD, real_BT = self.of("")
                for sample, states_TD, real_T in zip(own, states_BTD, real_BT, strict=True):
                    found[sample.id] = what(states_TD[real_T]).cpu()
        return found


def distance_B(states_BTD: Tensor, target_BTD: Tensor, real_BT: Tensor) -> Tensor:
    """Mean over a sample's places of the squared distance ‖h − target‖², (B,)."""
    squared_BT = (states_BTD - target_BTD).square().sum(2) * real_BT
    return squared_BT.sum(1) / real_BT.sum(1).clamp_min(1)


def random_direction(width: int, seed: int) -> Tensor:
    """The unit vector u (D,): entries drawn uniformly from [0, 1), then normalised."""
    drawn_D = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    unit_D: Tensor = drawn_D / drawn_D.norm()
    return unit_D


def steered_blocks(context: Context, options: SteeringOptions) -> tuple[int, list[nn.Module]]:
    """(number of the steered block, the blocks that may move, the steered one last).

    Raises:
        UserError: the model has no such block.
    """
    blocks = context.adapter.blocks(context.model)
    layer = options.layer if options.layer is not None else round(PAPER_DEPTH * (len(blocks) - 1))
    if layer >= len(blocks):
        raise UserError(f"layer {layer} does not exist: this model has the blocks 0 to {len(blocks) - 1}.")
    return layer, blocks[max(0, layer + 1 - options.layers) : layer + 1]


def movable(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """Masks of what moves: the last matrix of each block (the MLP's output in a transformer); of a LoRA model the
    adapters of these blocks.

    Raises:
        UserError: everything there is frozen.
    """
    chosen: set[int] = set()
    for block in blocks:
        matrices = [p for p in block.parameters() if p.requires_grad and p.ndim >= 2]
        chosen |= {id(p) for p in (matrices if is_lora(model) else matrices[-1:])}
    if not chosen:
        raise UserError("every weight of the blocks to steer is frozen: choose another layer or a wider scope.")
    return {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if id(p) in chosen}


def steer(
    context: Context,
    options: SteeringOptions,
    name: str,
    length_of: Callable[[States], Callable[[Sequence[Sample], int], Tensor | float]],
) -> Outcome:
    """Edit ``context.model``: E_f ‖h − length·u‖² + alpha · E_r ‖h − h_o‖², means over places, then samples.

    ``length_of(states)`` is asked once, of the original; what it returns gives the lengths of the target vectors for
    some samples padded to T places, (B, T, 1) or one number.
    """
    model, adapter = context.model, context.adapter
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(model, PAPER_RATE))
    layer, blocks = steered_blocks(context, options)
    states = States(adapter, blocks[-1])
    kept = states.take(model, context.retain, lambda states_TD: states_TD)
    lengths = length_of(states)
    width = next(iter(states.take(model, context.forget[:1], lambda states_TD: states_TD).values())).shape[1]
    direction_D = random_direction(width, context.seed).to(next(model.parameters()).device)

    def forget_B(view: View) -> Tensor:
        states_BTD, real_BT = states.of("forget")
        length = lengths(view.samples, states_BTD.shape[1])
        if isinstance(length, Tensor):
            length = length.to(states_BTD.device)
        return distance_B(states_BTD, length * direction_D, real_BT)

    def retain_B(view: View) -> Tensor:
        states_BTD, real_BT = states.of("retain")
        target_BTD = padded(kept, view.samples, states_BTD.shape[1]).to(states_BTD.device)
        return distance_B(states_BTD, target_BTD, real_BT)

    feeds = {"forget": Feed(context.forget)}
    terms = [Term("forget", "forget", "sample", forget_B)]
    sizes, notes = {"forget": options.batch_size}, []
    if context.retain:
        feeds["retain"] = Feed(context.retain)
        terms.append(Term("retain", "retain", "sample", retain_B, options.alpha))
        sizes["retain"] = options.retain_batch
    else:
        notes.append("no retain samples were given: nothing holds the rest of the model in place")
    plan = EpochPlan({r: f.lengths(adapter) for r, f in feeds.items()}, sizes, options.epochs, "forget", context.seed)
    with held(model, movable(model, blocks)):
        log = train(
            model,
            adapter,
            feeds,
            terms,
            plan,
            options,
            seed=context.seed,
            work=context.work,
            progress=context.progress,
            name=name,
            around=lambda flat: states.around(flat, model),
        )
    return Outcome(model, notes, {"steps": len(log.steps), "log": log.steps, "layer": layer})


def padded(by_id: Mapping[str, Tensor], samples: Sequence[Sample], places: int) -> Tensor:
    """What is kept of these samples, (T, ...) each, as one tensor (B, places, ...), zero behind each one's end."""
    together: Tensor = pad_sequence([by_id[s.id] for s in samples], batch_first=True)
    missing = places - together.shape[1]
    return torch.cat([together, together.new_zeros(len(samples), missing, *together.shape[2:])], dim=1)


@method(
    name="rmu",
    options=RmuOptions,
    paper="Li et al. 2024 (WMDP), arXiv:2403.03218, RMU",
    formula="E_f ‖h_ℓ − c·u‖² + α · E_r ‖h_ℓ − h_ℓ,o‖²",
    wants=frozenset({"retain"}),
    changes="some",
)
def rmu(context: Context, options: RmuOptions) -> Outcome:
    """Push hidden states of forget tokens to a random direction, hold those of retain tokens.

    Only the last matrix of up to three blocks moves. What is said after the push is noise: the loss on the forget set
    goes far above that of a model that never saw it. Forget and retain samples that share their form are hard to push
    apart in one layer, so that a retain weight that is too small costs retain, and the paper's holds everything.
    """
    return steer(context, options, "rmu", lambda _: lambda _samples, _places: options.coefficient)
