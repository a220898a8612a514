"""Twins: pictures of those to forget get the embeddings that the original gives to their mirror images.

Shape suffixes: B samples, D width of the embedding, H height, W width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.curvature import standing
from expunge.methods.registry import Context, Outcome, method
from expunge.models.images import read_image
from expunge.models.snapshot import snapshot
from expunge.options import option
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, TrainOptions, train
from expunge.training.optimizers import sized_rate
from expunge.training.terms import Term, View

RATE = 1e-5  # at a billion parameters, of AdamW: as the loss families


@dataclass(frozen=True, kw_only=True)
class TwinsOptions(TrainOptions):
    """Training on the forget pictures alone."""

    epochs: float = option(50.0, "passes over the forget set", "CLEAR's code: 5 epochs, each picture 10 times in one")
    batch_size: int = option(8, "forget samples in one step", "ours: as the loss families; CLEAR's code: 128")
    learning_rate: float | None = option(
        None, "peak learning rate; by the model's size if none", "ours: AdamW's; CLEAR's code: 0.4 of SGD"
    )


def mirrored(sample: Sample) -> Sample:
    """The sample with its picture seen in a mirror.

    Raises:
        UserError: a row of features, of which there is no mirror image.
    """
    image_HWC = read_image(sample)
    if image_HWC.shape[0] == 1:
        raise UserError(f"sample '{sample.id}' is a row of features, which has no mirror image: choose another method.")
    return replace(sample, image=np.ascontiguousarray(image_HWC[:, ::-1]), probes=())


def twins_of(context: Context, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The original's embedding of each mirror image, (D,) float32 by sample id."""
    store = snapshot(context.model, context.adapter, [mirrored(s) for s in samples])
    return {name: hidden_1D[0].float() for name, hidden_1D in store.hidden.items()}


@method(
    name="twins",
    options=TwinsOptions,
    paper="Dontsov et al. 2024 (CLEAR), arXiv:2410.18057, Twins",
    formula="mean over D of (h_θ(x) − h_o(mirror image of x))², x in f",
    modalities=frozenset({"classifier"}),
)
def twins(context: Context, options: TwinsOptions) -> Outcome:
    """Give forget pictures the embeddings that the original gives to their mirror images.

    A mirror image of a training picture is nearly a picture of the same person that was never trained on, so the target
    is what the original makes of new pictures. What it recognises in a mirror (faces are nearly symmetric) stays
    recognised, and nothing holds the retain samples.
    """
    model, adapter = context.model, context.adapter
    if options.learning_rate is None:
        options = replace(options, learning_rate=sized_rate(model, RATE))
    wanted = twins_of(context, context.forget)

    def apart_B(view: View) -> Tensor:
        own_BD = view.positions.hidden_ND.float()
        return (own_BD - torch.stack([wanted[s.id] for s in view.samples]).to(own_BD)).square().mean(1)

    feed = Feed(context.forget)
    sizes = {"forget": options.batch_size}
    plan = EpochPlan({"forget": feed.lengths(adapter)}, sizes, options.epochs, "forget", context.seed)
    log = train(
        model,
        adapter,
        {"forget": feed},
        [Term("forget", "forget", "sample", apart_B)],
        plan,
        options,
        seed=context.seed,
        work=context.work,
        progress=context.progress,
        name="twins",
        # The targets were taken without dropout and with running batch statistics.
        around=lambda _: standing(model),
    )
    return Outcome(model, [], {"steps": len(log.steps), "log": log.steps})
