"""Terms of an objective: a value per target token or per sample of one role, weighted and averaged.

Because every term is a sum over units divided by the number of units in the whole batch, gradient accumulation
over micro-batches of any shape equals the large batch.

Shape suffixes: B samples, N target positions, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.models.adapter import Adapter, Positions, evaluating
from expunge.models.snapshot import TokenDistributions, snapshot


@dataclass
class View:
    """One role in one micro-batch: what the model left at its target positions, and whose they are.

    ``partner`` is the same for each sample's partner (the refusal beside the answer, say), in the same order.
    """

    positions: Positions
    samples: Sequence[Sample]
    partner: View | None = None
    _log_prob_N: Tensor | None = field(default=None, repr=False)

    def log_prob_N(self) -> Tensor:
        """Of each target, as it is learnt: with the head's margin, where it has one."""
        if self._log_prob_N is None:
            self._log_prob_N = self.positions.learnt_log_prob_N()
        return self._log_prob_N

    def mean_nll(self) -> float | None:
        """Mean over samples of their mean loss, nats per token; None if no term has looked at it."""
        if self._log_prob_N is None:
            return None
        return float(self.positions.mean_per_sample(-self._log_prob_N.detach()).mean())

    def log_prob_B(self) -> Tensor:
        """Summed log-probability of each sample's target, nats."""
        return self.positions.sum_per_sample(self.log_prob_N())


@dataclass(frozen=True)
class Term:
    """``weight`` × mean over the units of ``role`` of ``values(view)``, shape (N,) for tokens, (B,) for samples."""

    name: str
    role: str
    unit: Literal["token", "sample"]
    values: Callable[[View], Tensor]
    weight: float = 1.0


@dataclass
class Teacher:
    """A frozen model's answers on given samples, taken once: no second model in memory, no N×V logits.

    ``store`` has the states that whole distributions are made from again; ``log_prob_sum`` one number per sample, for
    objectives that ask for no more.
    """

    store: TokenDistributions | None
    log_prob_sum: dict[str, float]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        adapter: Adapter,
        samples: Sequence[Sample],
        max_tokens: int = 8192,
        *,
        sums: Sequence[Sample] = (),
    ) -> Teacher:
        """One pass of ``model``: states of ``samples``, and summed target log-probabilities of ``sums``."""
        store = None
        if samples:
            store = snapshot(model, adapter, samples, max_tokens=max_tokens)
            store.head.module.to(next(model.parameters()).device)
        found: dict[str, float] = {}
        once = list({s.id: s for s in sums}.values())
        with evaluating(model):
            for group in adapter.batches(once, max_tokens):
                positions = adapter.positions(model, [once[i] for i in group])
                totals = positions.sum_per_sample(positions.learnt_log_prob_N()).tolist()
                found |= {once[i].id: total for i, total in zip(group, totals, strict=True)}
        return cls(store, found)

    def hidden_ND(self, samples: Sequence[Sample]) -> Tensor:
        """States at the target positions of these samples, one after another."""
        assert self.store is not None
        return torch.cat([self.store.hidden[s.id] for s in samples])

    def log_prob_B(self, samples: Sequence[Sample], like: Tensor) -> Tensor:
        """Summed target log-probabilities of these samples under the teacher, nats."""
        return torch.tensor([self.log_prob_sum[s.id] for s in samples], device=like.device, dtype=like.dtype)

    def compare(self, view: View, value: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """``value(logits_CV, teacher_logits_CV, targets_C) -> (C,)`` over all positions of the view."""
        assert self.store is not None
        head = self.store.head

        def both(logits_CV: Tensor, targets_C: Tensor, hidden_CD: Tensor) -> Tensor:
            with torch.no_grad():
                teacher_CV = head(hidden_CD)
            return value(logits_CV, teacher_CV, targets_C)

        return view.positions.per_token(both, self.hidden_ND(view.samples).to(view.positions.hidden_ND.device))


# -- values shared by training and methods ---------------------------------------------------------------------------


def nll_N(view: View) -> Tensor:
    """−log p(target), nats per token: the training loss."""
    return -view.log_prob_N()


def kl_C(logits_CV: Tensor, teacher_CV: Tensor, targets_C: Tensor) -> Tensor:
    """KL(teacher ‖ model) per position, nats; what is the teacher's alone keeps nothing for the backward pass."""
    with torch.no_grad():
        log_q_CV = teacher_CV.log_softmax(1)
        q_CV = log_q_CV.exp()
        own_C = (q_CV * log_q_CV).sum(1)
    return own_C - (q_CV * logits_CV.log_softmax(1)).sum(1)


def training_term(role: str = "train") -> Term:
    """Mean negative log-likelihood over the target tokens of ``role``."""
    return Term("nll", role, "token", nll_N)
