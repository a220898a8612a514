"""L-CODEC: a Newton step on the units alone that the forget loss depends on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.methods.cluster.layers import Layer, linear_layers
from expunge.methods.cluster.tokens import forward
from expunge.methods.curvature import (
    LABELS,
    LABELS_MEAN,
    DualFisher,
    Line,
    farthest,
    flat,
    mean_gradient,
    mean_loss,
    num_targets,
    some,
    trainable,
    unflat,
)
from expunge.methods.dependence import foci
from expunge.methods.registry import Context, Outcome, method
from expunge.models.adapter import Batch, evaluating
from expunge.models.text import causal_lm
from expunge.options import check_ranges, option

LORA = ".lora_B."


@dataclass(frozen=True, kw_only=True)
class LCodecOptions:
    """Batches of forget samples are removed one after another."""

    batch_size: int = option(16, "forget samples that are removed together", "Mehta et al. 2022: one, or one batch")
    perturbations: int = option(100, "disturbed copies of a batch", "Mehta et al. 2022: 1000; ours: cost")
    sigma: float = option(0.1, "disturbance of pixels and embeddings, in their deviations", "released code: 0.1")
    units: int = option(64, "most units that one batch may choose", "ours: the selection ends by itself before, mostly")
    damping: float = option(0.1, "added to the curvature, as a share of its mean eigenvalue", "ours: scale-free")
    budget: float = option(
        0.1,
        "the step is shortened until the retain loss has risen by no more than this, nats per token",
        "ours: the paper's loss is convex where its bound holds",
    )
    noise: float = option(
        0.0, "deviation of Gaussian noise on the chosen weights", "ours: the noise proves nothing for deep models"
    )
    samples: int = option(128, "retain samples that the curvature is taken from", "ours: cost")
    labels: str = option("true", LABELS_MEAN, "released code: empirical Fisher or finite differences", LABELS)

    def __post_init__(self) -> None:
        check_ranges(
            self,
            (
                (("batch_size", "units", "samples"), "1 or more", lambda v: v >= 1),
                (("perturbations",), "4 or more", lambda v: v >= 4),
                (("sigma", "damping", "budget"), "a number above 0", lambda v: 0 < v < math.inf),
                (("noise",), "0 or more", lambda v: 0 <= v < math.inf),
            ),
        )


@dataclass(frozen=True)
class Unit:
    """One output of one layer, with the weights that enter it."""

    layer: Layer
    row: int


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Layers whose units may be chosen; of a LoRA adapter the second factors, whose rows are the layers' outputs."""
    found = linear_layers(model)[0]
    second = {name: layer for name, layer in found.items() if LORA in name}
    return second or found


@contextmanager
def mean_outputs(model: nn.Module, layers: Mapping[str, Layer], batch: Batch) -> Iterator[dict[str, Tensor]]:
    """Within the block a pass leaves each layer's mean output over real tokens and samples, (O,)."""
    seen: dict[str, Tensor] = {}
    mask = batch.inputs.get("attention_mask")

    def hook_of(layer: Layer) -> Any:
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            tokens_MO = layer.outputs(output).flatten(0, -2).float()
            if mask is not None and mask.numel() == len(tokens_MO):  # not so in a vision tower, which has no padding
                tokens_MO = tokens_MO[mask.reshape(-1).bool()]
            seen[layer.name] = tokens_MO.mean(0)

        return hook

    handles = []
    for name, layer in layers.items():
        # A fresh adapter's own output is zero: what its layer as a whole puts out is looked at.
        module = model.get_submodule(name.split(LORA)[0]) if LORA in name else layer.module
        handles.append(module.register_forward_hook(hook_of(layer)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def disturbed(model: nn.Module, batch: Batch, sigma: float, generator: torch.Generator) -> Iterator[Batch]:
    """The batch with Gaussian noise on pixels, and a model with noise on its token embeddings."""

    def noisy(values: Tensor, deviation: Tensor) -> Tensor:
        noise = torch.randn(values.shape, generator=generator).to(values.device, values.dtype)
        return values + sigma * deviation.to(values) * noise

    inputs = {k: noisy(v, v.float().std()) if v.is_floating_point() else v for k, v in batch.inputs.items()}
    finder = getattr(causal_lm(model), "get_input_embeddings", lambda: None)
    table = finder() if batch.inputs.get("input_ids") is not None else None
    handle = None
    if table is not None:
        deviation = table.weight.detach().float().std()
        handle = table.register_forward_hook(lambda _, __, output: noisy(output, deviation))
    try:
        yield replace(batch, inputs=inputs)
    finally:
        if handle is not None:
            handle.remove()


def choose_units(context: Context, samples: Sequence[Sample], options: LCodecOptions, seed: int) -> list[Unit]:
    """Units whose outputs the loss of ``samples`` depends on when the inputs are disturbed: a Markov blanket."""
    model, adapter = context.model, context.adapter
    layers = layers_of(model)
    device = next(model.parameters()).device
    batch = adapter.collate(samples).to(device)
    generator = torch.Generator().manual_seed(seed)
    losses, outputs = [], []
    with evaluating(model):
        for _ in range(options.perturbations):
            with disturbed(model, batch, options.sigma, generator) as other, mean_outputs(model, layers, other) as seen:
                positions = forward(model, adapter, other)
                losses.append(-positions.learnt_log_prob_N().mean())
            outputs.append(torch.cat([seen[name] for name in layers if name in seen]))
    # A layer that no pass reaches (the last block of a vision tower, say) has no units to choose.
    units = [Unit(layer, row) for name, layer in layers.items() if name in seen for row in range(layer.shape[0])]
    return [units[i] for i in foci(torch.stack(losses), torch.stack(outputs), options.units, generator)]


def entries(model: nn.Module, units: Sequence[Unit]) -> Tensor:
    """Places of the units' weights and biases among all trainable entries one after another, ascending."""
    masks = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in trainable(model).items()}
    for unit in units:
        rows_OI = torch.zeros(unit.layer.shape, dtype=torch.bool, device=unit.layer.weight.device)
        rows_OI[unit.row] = True
        masks[f"{unit.layer.name}.weight"] |= unit.layer.unmatrix(rows_OI)
        bias = masks.get(f"{unit.layer.name}.bias")
        if bias is not None:
            bias[unit.row] = True
    return flat(masks).nonzero()[:, 0]


@method(
    name="l-codec",
    options=LCodecOptions,
    paper="Mehta et al. 2022, Deep Unlearning via Randomized Conditionally Independent Hessians, arXiv:2204.07655",
    needs=frozenset({"retain"}),
    changes="some",
    formula="θ_P ← θ_P + (n_f/n_r) (F_r + λ)⁻¹_P ∇_P NLL(f), P by conditional dependence of the loss",
)
def l_codec(context: Context, options: LCodecOptions) -> Outcome:
    """Newton steps on the few units that the loss of the forget samples depends on.

    Inputs are disturbed, and units are chosen by the coefficient of conditional dependence between their mean outputs
    and the loss; the step is that of Sekhari et al. 2021 on their weights alone, with the curvature of retain samples.
    All forget samples are removed, batch after batch; the released code stops after the first batch. A few units hold
    little of what a model has memorised: with these defaults most of it stays (``people``: probability .99 to .84).
    """
    model, adapter = context.model, context.adapter
    few = some(context.retain, options.samples, context.seed)
    retained = mean_loss(model, adapter, few)
    start, log, notes = retained(), [], []
    weights = {name: p.detach() for name, p in trainable(model).items()}
    everything = num_targets(adapter, context.retain)
    batches = math.ceil(len(context.forget) / options.batch_size)
    generator = torch.Generator().manual_seed(context.seed)
    for number in range(batches):
        batch = context.forget[number * options.batch_size : (number + 1) * options.batch_size]
        units = choose_units(context, batch, options, context.seed * 1009 + number)
        place_K = entries(model, units)
        metric = DualFisher.of(
            model,
            adapter,
            few,
            damping=options.damping,
            labels=options.labels,
            seed=context.seed + number,
            take=lambda row, place_K=place_K: flat(row)[place_K],  # type: ignore[misc]
            progress=context.progress,
        )
        rises_P = flat(mean_gradient(model, adapter, batch))
        move_P = torch.zeros_like(rises_P)
        move_P[place_K] = metric.power(rises_P[place_K], -1.0) * num_targets(adapter, batch) / everything
        line = Line(model, unflat(move_P, weights))
        limit = start + options.budget * (number + 1) / batches
        line.at(1.0)
        length = 1.0 if retained() <= limit else farthest(line.at, retained, limit, 0.5)
        if options.noise:
            noise_P = torch.zeros_like(rises_P)
            noise_P[place_K] = torch.randn(len(place_K), generator=generator).to(rises_P.device)
            Line(model, unflat(noise_P, weights)).at(options.noise)
        log.append({"units": float(len(units)), "step": length, "retain": retained()})
    if not any(entry["step"] for entry in log):
        notes.append("no step kept the retain loss within its budget: nothing was changed")
    return Outcome(model, notes, {"log": log, "retain_start": start})
