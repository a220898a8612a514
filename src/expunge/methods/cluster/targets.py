"""Where the edit goes: a calibrated ensemble of distributions that a model which never saw the data could have.

Members are log-probabilities at every target position of the forget samples, from models or inputs that know less:
the base, a short retraining without the forget data (proxy), the original asked about other people
(counterfactual), the weights halfway back (blend). Members that have seen the data get the true token's
probability capped by the anchor, which has not. The ensemble is sharpened until its mean loss on the forget
answers is what the original's loss is on texts that it never saw.

Shape suffixes: n positions of one sample, C positions of a chunk, V vocabulary, k kept entries.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.models.adapter import Adapter, evaluating
from expunge.training.terms import View

KEPT = 4096  # entries of each distribution that are stored; the rest shares what is left evenly
NEVER = -1e9


def log_probs(model: nn.Module, adapter: Adapter, samples: Sequence[Sample]) -> list[tuple[Tensor, Tensor]]:
    """(log-probabilities (n, V), targets (n,)) of each sample, on the CPU in float32."""
    out: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(samples)
    with evaluating(model):
        for group in adapter.batches(samples, 4096):
            positions = adapter.positions(model, [samples[i] for i in group])
            for row, i in enumerate(group):
                cut = positions.select(row, row + 1)
                log_CV = cut.per_token(lambda logits_CV, _: logits_CV.log_softmax(1))
                out[i] = (log_CV.cpu(), cut.targets_N.cpu())
    return out


def cap_true_token(log_nV: Tensor, targets_n: Tensor, cap_n: Tensor) -> Tensor:
    """The true token's log-probability lowered to ``cap_n`` where it is above; the others share the rest."""
    true_n = log_nV.gather(1, targets_n[:, None])[:, 0]
    wanted_n = torch.minimum(true_n, cap_n)
    others_nV = log_nV.scatter(1, targets_n[:, None], NEVER)
    rest_n = torch.log1p(-wanted_n.exp().clamp(max=1 - 1e-6))
    others_nV = others_nV - others_nV.logsumexp(1, keepdim=True) + rest_n[:, None]
    return others_nV.scatter(1, targets_n[:, None], wanted_n[:, None])


# -- counterfactual subjects -----------------------------------------------------------------------------------------


def other_names(samples: Sequence[Sample], rng: np.random.Generator, count: int) -> list[tuple[str, ...]]:
    """Names of ``count`` people who occur in ``samples``, one tuple per person."""
    people = list(dict.fromkeys(s.names for s in samples if s.names))
    return [people[int(i)] for i in rng.permutation(len(people))[:count]]


def swap_names(sample: Sample, names: Sequence[str], others: Sequence[str], number: int) -> Sample:
    """The sample with each of its subject's names replaced by the other person's in prompt and target."""
    pairs = [pair for pair in zip(names, [*others, *[others[0]] * len(names)], strict=False) if pair[0]]
    if not pairs:
        return sample
    pairs.sort(key=lambda pair: -len(pair[0]))
    replacing = dict(pairs)
    # Whole words only: "Al" is not in "Also". The longest name comes first, so that full names stay whole.
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name, _ in pairs))

    def swap(text: str) -> str:
        return pattern.sub(lambda found: replacing[found.group()], text)

    return replace(
        sample,
        id=f"{sample.id}/counterfactual/{number}",
        prompt=swap(sample.prompt),
        target=swap(str(sample.target)),
        probes=(),
    )


def aligned(targets_n: Tensor, others_m: Tensor) -> Tensor:
    """For each position the matching position of the other sequence, or -1: longest runs of equal tokens."""
    index_n = torch.full_like(targets_n, -1)
    matcher = difflib.SequenceMatcher(None, targets_n.tolist(), others_m.tolist(), autojunk=False)
    for block in matcher.get_matching_blocks():
        index_n[block.a : block.a + block.size] = torch.arange(block.b, block.b + block.size)
    return index_n


def counterfactual(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    anchor: Sequence[tuple[Tensor, Tensor]],
    people: Sequence[tuple[str, ...]],
) -> list[Tensor]:
    """Mean over ``people`` of the original's distribution for the sample with their names in it, log (n, V).

    Positions inside names have no counterpart: there the anchor's distribution stands.
    """
    out: list[Tensor] = []
    swapped: list[Sample] = []
    for number, others in enumerate(people):
        swapped += [swap_names(s, s.names, others, number) if s.names else s for s in samples]
    answers = log_probs(model, adapter, swapped)
    for i, (log_nV, targets_n) in enumerate(anchor):
        total_nV = torch.zeros_like(log_nV)
        for number in range(len(people)):
            other_mV, other_targets_m = answers[number * len(samples) + i]
            index_n = aligned(targets_n, other_targets_m)
            found_nV = other_mV[index_n.clamp_min(0)]
            total_nV += torch.where((index_n >= 0)[:, None], found_nV, log_nV).exp()
        # Far below the smallest float the logarithm of the mean is unknown, not minus infinity.
        out.append((total_nV / len(people)).clamp_min(torch.finfo(torch.float32).tiny).log())
    return out


# -- the ensemble ----------------------------------------------------------------------------------------------------


@dataclass
class Targets:
    """Target distributions of the forget samples, compactly kept, with a shift of the true token's logit.

    ``shift`` (nats) is what the closed loop moves during the edit: it lowers the true token where the model still
    finds the forget answers easier than never-seen text, and raises it where it overshoots.
    """

    kept: dict[str, tuple[Tensor, Tensor, Tensor]]  # id -> (log-probs (n, k), indices (n, k), log of the rest (n,))
    vocab: int
    sharpness: float = 1.0
    loss: float = math.nan  # mean over samples of the target's own loss on the true tokens, nats per token
    shift: float = 0.0
    notes: list[str] = field(default_factory=list)

    def log_q_CV(self, log_Ck: Tensor, index_Ck: Tensor, rest_C: Tensor, targets_C: Tensor) -> Tensor:
        """Full distributions from their kept entries, (C, V) log."""
        left = self.vocab - log_Ck.shape[1]
        spread_C = rest_C - math.log(left) if left else torch.full_like(rest_C, NEVER)
        log_CV = spread_C[:, None].expand(-1, self.vocab).scatter(1, index_Ck, log_Ck)
        if self.shift:
            true_C1 = log_CV.gather(1, targets_C[:, None])
            log_CV = log_CV.scatter(1, targets_C[:, None], true_C1 - self.shift).log_softmax(1)
        return log_CV

    def compare(self, view: View, value: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """``value(log_p_CV, log_q_CV, targets_C) -> (C,)`` over the positions of the view."""
        parts = [self.kept[s.id] for s in view.samples]
        kept = [torch.cat([p[i] for p in parts]).to(view.positions.hidden_ND.device) for i in range(3)]

        def both(logits_CV: Tensor, targets_C: Tensor, log_Ck: Tensor, index_Ck: Tensor, rest_C: Tensor) -> Tensor:
            with torch.no_grad():
                log_q_CV = self.log_q_CV(log_Ck, index_Ck, rest_C, targets_C)
            return value(logits_CV.log_softmax(1), log_q_CV, targets_C)

        return view.positions.per_token(both, *kept)


def calibrated(loss: Callable[[float], float], wanted: float, low: float = 0.5, high: float = 3.0) -> float:
    """The exponent s in [low, high] with loss(s) = wanted, or the one that comes nearest.

    The loss is convex in s (each position's is log Σ exp(s z) - s z_y), so it may fall before it rises. Of two
    solutions the one on the rising side is taken, where sharper means further from the true answers.
    """
    at_low, at_high = loss(low), loss(high)
    below, above = (low, high) if at_low < at_high else (high, low)
    if max(at_low, at_high) < wanted:
        return above
    if min(at_low, at_high) >= wanted:
        left, right = low, high
        for _ in range(16):  # golden section: the lowest point
            a, b = left + 0.382 * (right - left), left + 0.618 * (right - left)
            left, right = (left, b) if loss(a) <= loss(b) else (a, right)
        below, above = (left + right) / 2, high
        if loss(below) >= wanted:
            return below
    for _ in range(24):
        middle = (below + above) / 2
        below, above = (middle, above) if loss(middle) < wanted else (below, middle)
    return (below + above) / 2


def ensemble(
    samples: Sequence[Sample],
    members: Mapping[str, Sequence[Tensor]],
    targets: Sequence[Tensor],
    unseen_loss: float | None,
    sharpness: float | None = None,
) -> Targets:
    """softmax(s · mean of the members' log-probabilities), s such that its loss on the answers is ``unseen_loss``.

    Without ``unseen_loss`` (no never-trained text) and ``sharpness``, s = 1.
    """
    mean = [torch.stack([m[i] for m in members.values()]).mean(0) for i in range(len(samples))]

    def loss(s: float) -> float:
        each = []
        for log_nV, targets_n in zip(mean, targets, strict=True):
            if len(targets_n):
                true_n = (s * log_nV).log_softmax(1).gather(1, targets_n[:, None])
                each.append(-float(true_n.mean()))
        return float(np.mean(each)) if each else math.nan

    notes = []
    if sharpness is None:
        sharpness = 1.0
        if unseen_loss is not None:
            sharpness = calibrated(loss, unseen_loss)
            if not abs(loss(sharpness) - unseen_loss) <= 0.2:
                notes.append(f"targets could not be calibrated: loss {loss(sharpness):.2f}, wanted {unseen_loss:.2f}")
    vocab = int(mean[0].shape[1])
    keep = min(vocab, KEPT)
    kept = {}
    for sample, log_nV, targets_n in zip(samples, mean, targets, strict=True):
        sharp_nV = (sharpness * log_nV).log_softmax(1)
        index_nk = sharp_nV.topk(keep, dim=1).indices
        # The true token is always kept exactly: the loss of the targets and the match term are about it.
        lost_n = (index_nk != targets_n[:, None]).all(1)
        index_nk[lost_n, -1] = targets_n[lost_n]
        log_nk = sharp_nV.gather(1, index_nk)
        rest_n = torch.log((1 - log_nk.exp().sum(1)).clamp_min(1e-12))
        kept[sample.id] = (log_nk, index_nk, rest_n)
    return Targets(kept, vocab, sharpness, loss(sharpness), notes=notes)


# -- divergences between the model (p) and the target (q), per position ----------------------------------------------


@dataclass(frozen=True)
class Divergence:
    """js·JS(q, p) + reverse·KL(p ‖ q) + forward·KL(q ‖ p) + match·d²/(1 + |d|/4), nats per position,
    with d = log p(y) - log q(y) at the true token y.

    The last term holds the true token's probability to the target's on a log scale, where membership is decided and
    the bounded divergences are blind.
    """

    js: float
    reverse: float = 0.0
    forward: float = 0.0
    match: float = 0.0

    def __call__(self, log_p_CV: Tensor, log_q_CV: Tensor, targets_C: Tensor) -> Tensor:
        """(C,) values from log-probabilities of the model (p) and the target (q)."""
        total_C = log_p_CV.new_zeros(log_p_CV.shape[0])
        p_CV, q_CV = log_p_CV.exp(), log_q_CV.exp()
        if self.js:
            middle_CV = torch.logaddexp(log_p_CV, log_q_CV) - math.log(2)
            half_p = (p_CV * (log_p_CV - middle_CV)).sum(1)
            half_q = (q_CV * (log_q_CV - middle_CV)).sum(1)
            total_C = total_C + self.js * 0.5 * (half_p + half_q)
        if self.reverse:
            total_C = total_C + self.reverse * (p_CV * (log_p_CV - log_q_CV)).sum(1)
        if self.forward:
            total_C = total_C + self.forward * (q_CV * (log_q_CV - log_p_CV)).sum(1)
        if self.match:
            gap_C = (log_p_CV - log_q_CV).gather(1, targets_C[:, None])[:, 0]
            total_C = total_C + self.match * gap_C.square() / (1 + gap_C.abs() / 4)
        return total_C
