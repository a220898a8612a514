"""The seam: a modality adapter turns samples into hidden states at the N target positions.

Losses, signals, metrics, influence and surgery are written once against :class:`Positions`; an image classifier
is the case of one position per sample and V = number of classes.

Shape suffixes: B samples, N target positions in the batch, D hidden width, V vocabulary or classes.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from expunge.data.samples import Modality, Sample
from expunge.errors import UserError

CHUNK_ELEMENTS = 1 << 23  # logits held at once: 2^23 float32 = 32 MiB
_PARAMETERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # weak: a new model may get an old one's id


def num_parameters(model: nn.Module) -> int:
    """Parameters of the model (tied ones once); counted at the first call for each model object."""
    if model not in _PARAMETERS:
        _PARAMETERS[model] = sum(p.numel() for p in model.parameters())
    return _PARAMETERS[model]


@dataclass
class Meter:
    """Counts the work of every pass through an adapter: FLOPs ≈ 2·P per token forward, 6·P with backward.

    The rule is that of Kaplan et al. 2020 (arXiv 2001.08361, section 2.1); a model whose parameters act at many
    positions (convolutions) gives its own forward FLOPs per token.
    """

    tokens_forward: int = 0
    tokens_backward: int = 0
    flops: float = 0.0

    def count(self, model: nn.Module, tokens: int, forward_flops: float | None = None) -> None:
        """Add a pass over ``tokens``; ``forward_flops`` per token replaces 2·P."""
        each = 2.0 * num_parameters(model) if forward_flops is None else forward_flops
        backward = torch.is_grad_enabled()
        self.tokens_forward += tokens
        self.tokens_backward += tokens if backward else 0
        self.flops += (3.0 if backward else 1.0) * each * tokens


@dataclass(frozen=True)
class Head:
    """The output head: maps (M, D) hidden states to (M, V) logits in float32.

    ``margin`` is taken off the target's logit in the loss that is learnt, and in nothing that is measured (AM-softmax).
    """

    module: nn.Module
    softcap: float | None = None
    scale: float = 1.0
    margin: float = 0.0

    def __call__(self, hidden_MD: Tensor) -> Tensor:
        logits_MV: Tensor = self.module(hidden_MD).float() * self.scale
        if self.softcap is not None:
            logits_MV = self.softcap * torch.tanh(logits_MV / self.softcap)
        return logits_MV

    def snapshot(self) -> Head:
        """A frozen copy, which later training of the model does not touch."""
        return replace(self, module=copy.deepcopy(self.module).requires_grad_(False))


@dataclass
class Batch:
    """Model inputs, and where the targets are: token ``cols_N`` of row ``sample_N`` predicts ``targets_N``."""

    inputs: dict[str, Tensor]
    targets_N: Tensor
    sample_N: Tensor
    cols_N: Tensor
    num_samples: int
    num_tokens: int  # positions that the model computes, padding included

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            inputs={k: v.to(device) for k, v in self.inputs.items()},
            targets_N=self.targets_N.to(device),
            sample_N=self.sample_N.to(device),
            cols_N=self.cols_N.to(device),
        )


@dataclass
class Positions:
    """What one pass leaves at the N target positions."""

    hidden_ND: Tensor
    targets_N: Tensor
    sample_N: Tensor
    num_samples: int
    head: Head

    def per_token(self, value: Callable[..., Tensor], *others_N: Tensor) -> Tensor:
        """``value(logits_CV, targets_C, *others_C) -> (C,) or (C, K)`` over chunks, concatenated.

        Full logits are never held: with gradients on, each chunk is recomputed in the backward pass.
        """
        num = self.targets_N.numel()
        if num == 0:
            return self.hidden_ND.sum() * torch.zeros(0, device=self.hidden_ND.device)
        vocab = self.vocab
        step = max(1, CHUNK_ELEMENTS // vocab)

        def chunk(hidden_CD: Tensor, targets_C: Tensor, *others_C: Tensor) -> Tensor:
            return value(self.head(hidden_CD), targets_C, *others_C)

        parts = []
        for start in range(0, num, step):
            cut = slice(start, start + step)
            arguments = (self.hidden_ND[cut], self.targets_N[cut], *(o[cut] for o in others_N))
            if torch.is_grad_enabled() and num > step:
                parts.append(checkpoint(chunk, *arguments, use_reentrant=False))
            else:
                parts.append(chunk(*arguments))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def vocab(self) -> int:
        weight = next(self.head.module.parameters(), None)
        if weight is None:  # identity head: the states are the logits
            return int(self.hidden_ND.shape[-1])
        return int(weight.shape[0])

    def log_prob_N(self) -> Tensor:
        """Log-probability of each target in nats, (N,) float32."""
        return self.per_token(target_log_prob)

    def learnt_log_prob_N(self) -> Tensor:
        """:meth:`log_prob_N` with the head's margin off the target's logit: what objectives and gradients are made of.

        Where a margin was learnt, probabilities without it are 1 to the last bit and have no gradient left.
        """
        if not self.head.margin:
            return self.log_prob_N()

        def value(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
            margin_C1 = torch.full_like(logits_CV[:, :1], -self.head.margin)
            return target_log_prob(logits_CV.scatter_add(1, targets_C[:, None], margin_C1), targets_C)

        return self.per_token(value)

    def sum_per_sample(self, values_N: Tensor) -> Tensor:
        """Sum the (N,) values of each sample: (B,)."""
        return values_N.new_zeros(self.num_samples).index_add(0, self.sample_N, values_N)

    def count_per_sample(self) -> Tensor:
        """Target positions of each sample, (B,) float32."""
        ones_N = torch.ones_like(self.targets_N, dtype=torch.float32)
        return self.sum_per_sample(ones_N)

    def mean_per_sample(self, values_N: Tensor) -> Tensor:
        """Mean of the (N,) values of each sample: (B,); 0 for a sample without a target."""
        return self.sum_per_sample(values_N) / self.count_per_sample().clamp_min(1)

    def select(self, first: int, last: int) -> Positions:
        """The samples ``first`` to ``last`` (exclusive) of the batch, renumbered from 0."""
        keep_N = (self.sample_N >= first) & (self.sample_N < last)
        return Positions(
            self.hidden_ND[keep_N], self.targets_N[keep_N], self.sample_N[keep_N] - first, last - first, self.head
        )


def target_log_prob(logits_CV: Tensor, targets_C: Tensor) -> Tensor:
    """Log-softmax at the target, (C,)."""
    return logits_CV.gather(1, targets_C[:, None])[:, 0] - logits_CV.logsumexp(1)


@dataclass
class Adapter(ABC):
    """One modality. ``encode`` prepares a sample once; ``collate`` batches; ``positions`` runs the model."""

    meter: Meter = field(default_factory=Meter)
    truncated: set[str] = field(default_factory=set)  # ids of samples that were cut to the context
    _encoded: dict[Any, tuple[Any, Any]] = field(default_factory=dict, repr=False)

    modality: Modality = "text"
    can_generate: bool = False

    @abstractmethod
    def encode(self, sample: Sample) -> Any:
        """Whatever ``collate`` needs of one sample; computed once per sample and kept."""

    @abstractmethod
    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A batch on the CPU."""

    @abstractmethod
    def hidden_and_head(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Head]:
        """States at the target positions (N, D), and the head that turns them into logits."""

    @abstractmethod
    def num_tokens(self, sample: Sample) -> int:
        """Length for bucketing: positions that the model computes for this sample."""

    @abstractmethod
    def num_targets(self, sample: Sample) -> int:
        """Target positions of this sample."""

    @abstractmethod
    def save(self, folder: Any) -> None:
        """Write tokenizer or processor files beside the weights."""

    def generate(self, model: nn.Module, samples: Sequence[Sample], max_new_tokens: int) -> list[str]:
        """Greedy continuations of the prompts; only where ``can_generate``."""
        raise UserError(f"a {self.modality} model does not generate text: leave generation metrics out.")

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The repeated blocks of the model, input side first; hidden-state methods hook their outputs."""
        longest: list[nn.Module] = []
        for module in model.modules():
            if isinstance(module, (nn.ModuleList, nn.Sequential)):
                children = list(module.children())
                if len(children) > len(longest) and len({type(c) for c in children}) == 1:
                    longest = children
        return longest or list(model.children())

    def positions(self, model: nn.Module, samples: Sequence[Sample]) -> Positions:
        """Collate, move to the model's device, run, and count the work."""
        device = next(model.parameters()).device
        batch = self.collate(samples).to(device)
        self.meter.count(model, batch.num_tokens, self.forward_flops(model))
        hidden_ND, head = self.hidden_and_head(model, batch)
        return Positions(hidden_ND, batch.targets_N, batch.sample_N, batch.num_samples, head)

    def forward_flops(self, model: nn.Module) -> float | None:
        """Forward FLOPs per token where 2·P is wrong; None elsewhere."""
        return None

    def cached(self, sample: Sample) -> Any:
        """``encode(sample)``, computed once. Arrays count by identity: do not edit one in place afterwards."""
        image = sample.image
        # The entry holds on to the array, so that its id cannot be given to another one.
        seen = id(image) if isinstance(image, np.ndarray) else str(image or "")
        key = (sample.id, sample.prompt, sample.target, seen)
        if key not in self._encoded:
            self._encoded[key] = (self.encode(sample), image)
        return self._encoded[key][0]

    def batches(self, samples: Sequence[Sample], max_tokens: int = 4096) -> Iterator[list[int]]:
        """Indices in batches of at most ``max_tokens`` padded tokens, longest first (so memory peaks early)."""
        order = sorted(range(len(samples)), key=lambda i: -self.num_tokens(samples[i]))
        group: list[int] = []
        for index in order:
            longest = self.num_tokens(samples[group[0]]) if group else self.num_tokens(samples[index])
            if group and longest * (len(group) + 1) > max_tokens:
                yield group
                group = []
            group.append(index)
        if group:
            yield group


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode and without gradients; its mode comes back afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(was_training)
