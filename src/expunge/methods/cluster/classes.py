"""Whole classes that go from a classifier: their rows of the head are put where retraining leaves such rows.

A retrained model has no sample of these classes, as the original has none of classes that nobody was trained on. A row
of the head without samples is only ever pushed down, nearly alike whatever its class, and far. An edit of some dozen
steps cannot take a row that far and scales the features up instead, so that every class without data sinks with it
(docs/flagship.md). Where the original itself shows how far such rows went, nothing has to be trained.

Shape suffixes: V classes, D width of the head's input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from expunge.data.samples import Sample
from expunge.methods.registry import Context
from expunge.models.adapter import Adapter, evaluating


def comparable(context: Context) -> list[Sample]:
    """The never-seen samples that say what a model without the forget set loses on it.

    Where whole classes go, those of classes that nobody was trained on: new pictures of known people are recognised.
    """
    if context.adapter.modality != "classifier":
        return list(context.unseen)
    stays, goes = ({s.target for s in samples} for samples in (context.retain, context.forget))
    return list(context.unseen) if stays & goes else [s for s in context.unseen if s.target not in stays | goes]


def place_rows(context: Context) -> bool:
    """Put the head's rows of classes that go where retraining leaves them; False, and nothing done, where it cannot.

    row_c = mean of row_u over the classes u that nobody was trained on, biases alike: ours. It takes a classifier whose
    linear head may move, classes none of whose samples stay, and never-seen samples of classes that nobody was
    trained on. The rows of all classes that go are the same afterwards.
    """
    if context.adapter.modality != "classifier" or not context.retain:
        return False
    never_seen = comparable(context)
    if not never_seen or {s.target for s in context.retain} & {s.target for s in context.forget}:
        return False
    with evaluating(context.model):
        head = context.adapter.positions(context.model, context.forget[:1]).head.module
    if type(head) is not nn.Linear or not all(p.requires_grad for p in head.parameters()):
        return False
    goes, never = (_rows(context.adapter, samples) for samples in (context.forget, never_seen))
    with torch.no_grad():
        for p in head.parameters():  # weight (V, D) and, where there is one, bias (V,)
            p[goes] = p[never].mean(0)
    return True


def _rows(adapter: Adapter, samples: Sequence[Sample]) -> list[int]:
    """The rows of the head that the targets of ``samples`` stand for."""
    one_each = list({s.target: s for s in samples}.values())
    return sorted(set(adapter.collate(one_each).targets_N.tolist()))
