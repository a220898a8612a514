"""The forget terms of the loss families: what is lowered on the forget samples, one function per published loss.

Each takes a view of the forget samples, the row's options and the aids made before the training, and returns values
per target token (N,) or per sample (B,). Notation: p the model's probability, o the original, y the true token,
z logits. Shape suffixes: B samples, N target positions, C of them in a chunk, V vocabulary, L targets of a sample.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, one_hot

from expunge.data.samples import Sample
from expunge.methods.family_options import (
    CEUOptions,
    FamilyOptions,
    PreferenceOptions,
    SatImpOptions,
    SimNPOOptions,
    UndialOptions,
    WGAOptions,
)
from expunge.models.adapter import Adapter, evaluating
from expunge.training.terms import Teacher, View, nll_N


@dataclass
class Aids:
    """What a term looks up: the original's distributions, and numbers per target token by sample id, (L,) each."""

    teacher: Teacher | None = None
    per_target: Mapping[str, Tensor] = field(default_factory=dict)

    def numbers_N(self, view: View) -> Tensor:
        """The numbers of the view's samples, one after another."""
        return torch.cat([self.per_target[s.id] for s in view.samples]).to(view.positions.targets_N.device)


ForgetTerm = Callable[[View, Any, Aids], Tensor]


def averaging_one(weights_N: Tensor, view: View) -> Tensor:
    """Token weights scaled so that those of each sample average 1: samples keep their share of the batch."""
    mean_B = view.positions.mean_per_sample(weights_N)
    return weights_N / mean_B.clamp_min(torch.finfo(weights_N.dtype).tiny)[view.positions.sample_N]


# -- ascent and its weightings ---------------------------------------------------------------------------------------


def ascent_N(view: View, options: FamilyOptions, aids: Aids) -> Tensor:
    """log p(y): descending on it is ascending on the loss. Or −log(1−p(y)), which has the same direction and a bound.

    d(−log(1−p))/dz_y = p: the push fades as the token is forgotten, where that of log p stays 1−p and never ends.
    """
    if options.ascent == "log":
        return view.log_prob_N()
    view.log_prob_N()  # for the curves
    return view.positions.per_token(unlikelihood_C)


def unlikelihood_C(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """−log(1−p(y)) from the other tokens' logits, exact also where p is 1 in float32."""
    others_CV = logits_CV.scatter(1, targets_C[:, None], -torch.inf)
    return logits_CV.logsumexp(1) - others_CV.logsumexp(1)


def wga_N(view: View, options: WGAOptions, aids: Aids) -> Tensor:
    """p(y)^β · log p(y), the weight held constant: what is forgotten already is pushed no more."""
    log_p_N = view.log_prob_N()
    return (options.exponent * log_p_N.detach()).exp() * log_p_N


def satimp_N(view: View, options: SatImpOptions, aids: Aids) -> Tensor:
    """p(y)^β₁ (1−p(y))^β₂ · log p(y), the weight held constant.

    A token that the model is sure of is hardly pushed at all: on a memorised text nothing moves for long.
    """
    log_p_N = view.log_prob_N()
    held_N = log_p_N.detach()
    doubt_N = -torch.expm1(held_N.clamp_max(0.0))
    return (options.exponent * held_N).exp() * doubt_N.pow(options.doubt) * log_p_N


# -- other answers and preferences -----------------------------------------------------------------------------------


def nll_of_replacement_N(view: View, options: FamilyOptions, aids: Aids) -> Tensor:
    """−log p of the refusal that stands in the answer's place."""
    return nll_N(view)


def dpo_B(view: View, options: PreferenceOptions, aids: Aids) -> Tensor:
    """−log σ(β[log p/p_o(other answer) − log p/p_o(y)]); ln 2 at θ = o."""
    assert aids.teacher is not None and view.partner is not None
    won_B, lost_B = view.partner.log_prob_B(), view.log_prob_B()
    won_o_B = aids.teacher.log_prob_B(view.partner.samples, won_B)
    lost_o_B = aids.teacher.log_prob_B(view.samples, lost_B)
    return -logsigmoid(options.beta * ((won_B - won_o_B) - (lost_B - lost_o_B)))


def altpo_B(view: View, options: PreferenceOptions, aids: Aids) -> Tensor:
    """2/β times :func:`dpo_B`, so that the push does not fade with β; 2 ln 2/β at θ = o."""
    return 2.0 / options.beta * dpo_B(view, options, aids)


def npo_B(view: View, options: PreferenceOptions, aids: Aids) -> Tensor:
    """−(2/β) log σ(−β log p/p_o(y)); 2 ln 2/β at θ = o."""
    assert aids.teacher is not None
    own_B = view.log_prob_B()
    return -2.0 / options.beta * logsigmoid(-options.beta * (own_B - aids.teacher.log_prob_B(view.samples, own_B)))


def simnpo_B(view: View, options: SimNPOOptions, aids: Aids) -> Tensor:
    """−(2/β) log σ(−(β/|y|) log p(y) − δ)."""
    mean_B = view.log_prob_B() / view.positions.count_per_sample().clamp_min(1)
    return -2.0 / options.beta * logsigmoid(-options.beta * mean_B - options.delta)


# -- target distributions: all bounded below -------------------------------------------------------------------------


def undial_N(view: View, options: UndialOptions, aids: Aids) -> Tensor:
    """CE(q, p), q = softmax(z_o − β·onehot(y)): the original with the true token's logit lowered."""
    assert aids.teacher is not None

    def value(logits_CV: Tensor, teacher_CV: Tensor, targets_C: Tensor) -> Tensor:
        lowered_CV = teacher_CV - options.beta * one_hot(targets_C, teacher_CV.shape[1])
        return -(lowered_CV.softmax(1) * logits_CV.log_softmax(1)).sum(1)

    cross_N = aids.teacher.compare(view, value)
    return cross_N if options.focus == "none" else averaging_one(aids.numbers_N(view), view) * cross_N


def ceu_C(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """CE(q, p), q = the model's own distribution without the true token, held constant: dL/dz = p − q."""
    with torch.no_grad():
        target_CV = logits_CV.scatter(1, targets_C[:, None], -torch.inf).softmax(1)
    return -(target_CV * logits_CV.log_softmax(1)).sum(1)


def ceu_N(view: View, options: CEUOptions, aids: Aids) -> Tensor:
    """:func:`ceu_C` without the first tokens of each answer."""
    sample_N, count_B = view.positions.sample_N, view.positions.count_per_sample()
    first_B = count_B.cumsum(0) - count_B
    place_N = torch.arange(len(sample_N), device=sample_N.device) - first_B[sample_N]
    counts_N = ((place_N >= options.skip) | (count_B[sample_N] <= options.skip)).float()
    return averaging_one(counts_N, view) * view.positions.per_token(ceu_C)


def entropy_C(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """KL(p ‖ uniform) = log V − H(p), nats: in [0, log V], 0 where every token is equally likely."""
    log_p_CV = logits_CV.log_softmax(1)
    return (log_p_CV.exp() * log_p_CV).sum(1) + float(np.log(logits_CV.shape[1]))


def entropy_N(view: View, options: FamilyOptions, aids: Aids) -> Tensor:
    """:func:`entropy_C` at every target."""
    return view.positions.per_token(entropy_C)


def margin_C(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """(max z − mean z)²: 0 where all logits are equal; no softmax, so its gradient does not fade before that."""
    return (logits_CV.amax(1) - logits_CV.mean(1)).square()


def margin_N(view: View, options: FamilyOptions, aids: Aids) -> Tensor:
    """:func:`margin_C` at every target."""
    return view.positions.per_token(margin_C)


def random_label_N(view: View, options: FamilyOptions, aids: Aids) -> Tensor:
    """−log p of a wrong token in the true one's place; the text before it stays the true one."""

    def value(logits_CV: Tensor, targets_C: Tensor, wrong_C: Tensor) -> Tensor:
        return logits_CV.logsumexp(1) - logits_CV.gather(1, wrong_C[:, None])[:, 0]

    return view.positions.per_token(value, aids.numbers_N(view))


# -- numbers per target token, made before the training --------------------------------------------------------------


def wrong_labels(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], options: Any, seed: int
) -> dict[str, Tensor]:
    """For every target one of the V − 1 other tokens (classes), drawn once: a function of seed and sample id."""
    with evaluating(model):
        vocab = adapter.positions(model, samples[:1]).vocab
    found = {}
    for sample in samples:
        true_L = adapter.collate([sample]).targets_N
        rng = np.random.default_rng([seed, zlib.crc32(sample.id.encode())])
        drawn_L = torch.from_numpy(rng.integers(vocab - 1, size=len(true_L)))
        found[sample.id] = drawn_L + (drawn_L >= true_L)
    return found
