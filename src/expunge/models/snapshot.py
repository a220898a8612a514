"""What a frozen model says at the target tokens of given samples, kept small: hidden states and one head.

N positions of D numbers are stored instead of N x V logits; logits are made again chunk by chunk when needed.
Shape suffixes: L target tokens of a sample, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Adapter, Head, evaluating


@dataclass(frozen=True)
class TokenDistributions:
    """A model's distributions at the target tokens of some samples, by sample id; on the CPU.

    A model whose adapter needs whole logits has no smaller form; its store then holds the logits themselves.
    """

    hidden: dict[str, Tensor]  # (L, D) each
    targets: dict[str, Tensor]  # (L,) each, to see that the same tokens are compared
    head: Head
    vocab: int

    @property
    def bytes(self) -> int:
        """Memory of the stored states, without the head."""
        return sum(h.numel() * h.element_size() for h in self.hidden.values())


def snapshot(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], *, max_tokens: int = 4096
) -> TokenDistributions:
    """Run the model once over the samples; later training of ``model`` does not change what is kept."""
    hidden: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    head: Head | None = None
    vocab = 0
    with evaluating(model):
        for group in adapter.batches(samples, max_tokens):
            positions = adapter.positions(model, [samples[i] for i in group])
            for row, index in enumerate(group):
                mine_N = positions.sample_N == row
                hidden[samples[index].id] = positions.hidden_ND[mine_N].cpu()
                targets[samples[index].id] = positions.targets_N[mine_N].cpu()
            if head is None:
                head, vocab = positions.head.snapshot(), positions.vocab
    if head is None:
        raise UserError("no samples were given to take the model's distributions on: name at least one.")
    head.module.cpu()
    return TokenDistributions(hidden, targets, head, vocab)
