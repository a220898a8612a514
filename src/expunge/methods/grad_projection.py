"""Projected-gradient unlearning: steps only in directions that the inputs of retain samples do not have.

A linear layer's gradient is a sum of d xᵀ over its inputs x, so that a change of the weights W with ΔW x = 0 for all
retain inputs x leaves the layer's answers to retain samples as they are.

Shape suffixes: M tokens of a batch, I layer inputs, O layer outputs, K directions that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.cluster.layers import Layer, linear_layers, recorded
from expunge.methods.cluster.tokens import forward, passes
from expunge.methods.registry import Context, Outcome, method
from expunge.methods.scope import held
from expunge.models.adapter import Adapter, evaluating, num_parameters
from expunge.models.text import causal_lm
from expunge.options import Ranges, check_ranges, option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, Trainer, TrainOptions, train
from expunge.training.terms import Term, View

Bases = Mapping[str, Tensor]  # by layer: (I, K) float32, orthonormal columns


@dataclass(frozen=True, kw_only=True)
class GradProjectionOptions(TrainOptions):
    """The paper's loss and its projection."""

    epochs: float = option(20.0, "passes over the forget set", "ours; paper's code: up to 100, stopped by validation")
    batch_size: int = option(8, "forget samples in one step", "ours: as the loss families; paper's code: 128")
    optimizer: str = option("sgd", "adamw, muon or sgd (momentum 0.9)", "paper: SGD", ("adamw", "muon", "sgd"))
    learning_rate: float | None = option(0.04, "peak learning rate", "ours; paper's code: from 0.1 down to 0.01")
    warmup: float = option(0.0, "share of the steps with rising learning rate", "paper's code: none")
    variance: float = option(
        0.99,
        "share of the retain inputs' energy in the directions that are kept",
        "ours: a few directions hold most of it in transformers; paper's code: 0.9 for small CNNs",
    )
    offset: float = option(0.05, "δ in −log(1 + δ − p): keeps the loss finite at p = 1", "paper's code: 0.05")
    entropy: float = option(0.2, "weight of the entropy that is raised", "paper's code: 0.2")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, RANGES)


RANGES: Ranges = (
    (("variance",), "a share above 0 and below 1", lambda v: 0 < v < 1),
    (("offset",), "a number above 0", lambda v: 0 < v < math.inf),
    (("entropy",), "0 or more", lambda v: 0 <= v < math.inf),
)


def energies(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], layers: Mapping[str, Layer]
) -> dict[str, Tensor]:
    """Σ x xᵀ over everything that each layer sees of the samples, (I, I) float64; padding left out."""
    found = {n: torch.zeros(layer.shape[1], layer.shape[1], dtype=torch.float64) for n, layer in layers.items()}
    with evaluating(model):
        for _, batch in passes(model, adapter, samples, 4096):
            with recorded(layers) as calls:
                forward(model, adapter, batch).log_prob_N()  # the head is called by this alone
            for call in calls:
                x = call.layer.inputs(call.x)
                mask_BT = batch.inputs.get("attention_mask")  # what sees other places has no padding: patches, targets
                if mask_BT is not None and x.shape[:-1] == mask_BT.shape:
                    x = x[mask_BT.bool()]
                x_MI = x.flatten(0, -2).double().cpu()
                found[call.layer.name] += x_MI.T @ x_MI
    return found


def main_directions(energy_II: Tensor, variance: float) -> Tensor:
    """The fewest eigenvectors that hold ``variance`` of the energy, as columns (I, K); none of no energy."""
    values_I, vectors_II = torch.linalg.eigh(energy_II)
    values_I, vectors_II = values_I.flip(0).clamp_min(0), vectors_II.flip(1)
    short_I = values_I.cumsum(0) < variance * values_I.sum()
    count = min(int(short_I.sum()) + 1, len(values_I)) if bool(values_I.sum() > 0) else 0
    chosen_IK: Tensor = vectors_II[:, :count].float()
    return chosen_IK


def bases_of(context: Context, layers: Mapping[str, Layer], variance: float) -> dict[str, Tensor]:
    """Directions to leave alone, by layer; layers that retain samples fill are not in it.

    Raises:
        UserError: they fill every layer.
    """
    device = next(context.model.parameters()).device
    found = {
        name: main_directions(energy_II, variance).to(device)
        for name, energy_II in energies(context.model, context.adapter, context.retain, layers).items()
    }
    free = {name: basis_IK for name, basis_IK in found.items() if basis_IK.shape[1] < basis_IK.shape[0]}
    if not free:
        raise UserError(f"retain samples use every direction of every layer: lower variance = {variance}.")
    return free


def without(layer: Layer, tensor: Tensor, basis_IK: Tensor) -> Tensor:
    """A change or gradient of the layer's weight without its part in the span of ``basis_IK``."""
    change_OI = layer.matrix(tensor).to(basis_IK.dtype)
    return layer.unmatrix(change_OI - (change_OI @ basis_IK) @ basis_IK.T).to(tensor.dtype)


def scrub_C(logits_CV: Tensor, targets_C: Tensor, offset: float, entropy: float) -> Tensor:
    """−log(1 + δ − p(y)) − λ·H(p): lowest where y is impossible and all others are equally likely; bounded."""
    log_p_CV = logits_CV.log_softmax(1)
    p_C = log_p_CV.gather(1, targets_C[:, None])[:, 0].exp()
    return -torch.log1p(offset - p_C) + entropy * (log_p_CV.exp() * log_p_CV).sum(1)


@method(
    name="grad-projection",
    options=GradProjectionOptions,
    paper="Hoang et al. 2024 (PGU), arXiv:2312.04095",
    formula="−log(1 + δ − p_θ(y))(f) − λ·H(p_θ)(f), every step times I − M Mᵀ, M the retain inputs' main directions",
    needs=frozenset({"retain"}),
    changes="some",
)
def grad_projection(context: Context, options: GradProjectionOptions) -> Outcome:
    """Forget only in directions of each layer's input space that retain samples do not use.

    The paper projects the gradient; here the whole change since the original is projected after every step, which is
    the same under SGD and holds under Adam and weight decay too. Embeddings, norms, biases and a head that shares its
    weight stay. Directions come from the retain set itself; the paper derives them from all data less the forget set.
    The border is sharp: a little less variance or a little more learning rate costs retain, a little less forgets less.
    """
    model, adapter = context.model, context.adapter
    layers, _ = linear_layers(causal_lm(model), head=True)
    bases = bases_of(context, layers, options.variance)
    layers = {name: layers[name] for name in bases}
    original = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    moving = {id(layer.weight) for layer in layers.values()}
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters() if id(p) in moving}

    def compute(trainer: Trainer, picks: Mapping[str, Sequence[int]]) -> dict[str, float]:
        values = trainer.gradients(picks)
        for name, layer in layers.items():
            if layer.weight.grad is not None:
                layer.weight.grad = without(layer, layer.weight.grad, bases[name])
        return values

    def project(_: Trainer) -> None:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(original[name] + without(layer, layer.weight - original[name], bases[name]))

    def scrub_N(view: View) -> Tensor:
        return view.positions.per_token(lambda z_CV, y_C: scrub_C(z_CV, y_C, options.offset, options.entropy))

    feed = Feed(context.forget)
    sizes = {"forget": options.batch_size}
    plan = EpochPlan({"forget": feed.lengths(adapter)}, sizes, options.epochs, "forget", context.seed)
    with held(model, masks):
        log = train(
            model,
            adapter,
            {"forget": feed},
            [Term("forget", "forget", "token", scrub_N)],
            plan,
            options,
            seed=context.seed,
            work=context.work,
            progress=context.progress,
            name="grad-projection",
            compute=compute,
            on_step=project,
        )
    free = sum(layer.shape[0] * (bases[n].shape[0] - bases[n].shape[1]) for n, layer in layers.items())
    note = f"{free} of {num_parameters(model)} directions of the weights could move"
    kept = {n: int(basis_IK.shape[1]) for n, basis_IK in bases.items()}
    return Outcome(model, [note], {"steps": len(log.steps), "log": log.steps, "directions_kept": kept})
