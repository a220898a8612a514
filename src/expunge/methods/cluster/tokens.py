"""Where tokens are: sample and position of everything that a layer sees, states there, and labels put back there.

Shape suffixes: B samples of a batch, T positions, M tokens of one call, N tokens of all samples, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.cluster.layers import Call
from expunge.models.adapter import Adapter, Batch, Positions, evaluating


@dataclass(frozen=True)
class TokenTable:
    """Token n is position ``col_N[n]`` of sample ``sample_N[n]``; ordered by sample, then position, without repeats."""

    sample_N: np.ndarray
    col_N: np.ndarray

    def __len__(self) -> int:
        return len(self.sample_N)

    def same(self, other: TokenTable) -> bool:
        return np.array_equal(self.sample_N, other.sample_N) and np.array_equal(self.col_N, other.col_N)

    def grid(self, values_N: np.ndarray, samples: Sequence[int], width: int, fill: int = -1) -> Tensor:
        """The values of given samples as a batch sees them: (B, T) with ``fill`` where there is no token.

        ``samples`` are sample numbers, -1 for a row that is not in the table; ``width`` is T.
        """
        grid_BT = np.full((len(samples), width), fill, dtype=values_N.dtype)
        for row, sample in enumerate(samples):
            first, last = np.searchsorted(self.sample_N, [sample, sample + 1])
            col = self.col_N[first:last]
            inside = col < width
            grid_BT[row, col[inside]] = values_N[first:last][inside]
        return torch.from_numpy(grid_BT)


@dataclass
class Gathered:
    """Values per token, collected batch by batch in any order and put in the order of a :class:`TokenTable`."""

    sample: list[np.ndarray]
    col: list[np.ndarray]
    values: list[np.ndarray]

    @classmethod
    def empty(cls) -> Gathered:
        return cls([], [], [])

    def add(self, sample_M: np.ndarray, col_M: np.ndarray, values_M: np.ndarray) -> None:
        self.sample.append(sample_M)
        self.col.append(col_M)
        self.values.append(values_M)

    def table(self) -> tuple[TokenTable, np.ndarray]:
        """Table and values; those of a token that was seen twice (a layer called twice) are added up."""
        sample, col, values = (np.concatenate(parts) for parts in (self.sample, self.col, self.values))
        key, place = np.unique(sample.astype(np.int64) << 32 | col.astype(np.int64), return_inverse=True)
        total = np.zeros((len(key), *values.shape[1:]), dtype=values.dtype)
        np.add.at(total, place, values)
        return TokenTable(key >> 32, key & 0xFFFFFFFF), total


def passes(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], max_tokens: int
) -> Iterator[tuple[list[int], Batch]]:
    """(sample numbers, batch on the model's device) over all samples."""
    device = next(model.parameters()).device
    for group in adapter.batches(samples, max_tokens):
        yield group, adapter.collate([samples[i] for i in group]).to(device)


def forward(model: nn.Module, adapter: Adapter, batch: Batch) -> Positions:
    """One pass over a collated batch, counted."""
    adapter.meter.count(model, batch.num_tokens)
    hidden_ND, head = adapter.hidden_and_head(model, batch)
    return Positions(hidden_ND, batch.targets_N, batch.sample_N, batch.num_samples, head)


def pictured(samples: Sequence[Sample]) -> Tensor:
    """Rows of a batch of ``samples`` that have an image, (images,): a vision tower sees these alone, in this order."""
    return torch.tensor([row for row, sample in enumerate(samples) if sample.image is not None], dtype=torch.long)


def placed(
    batch: Batch, lead: Sequence[int], what: str, images_I: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(row_M, col_M, real_M) of the tokens of a tensor with leading dimensions ``lead``, flattened.

    Understood are (B, T) and (B, any places), (B·T,) and (targets,); padding is not real. With ``images_I``, the rows
    of the samples that have an image, the tensor is that of a vision tower: (images, any places).

    Raises:
        UserError: the tokens cannot be attributed, as in a layer that sees a routed subset.
    """
    device = batch.targets_N.device
    shape = tuple(lead)
    total = int(np.prod(shape))
    if images_I is not None:
        if shape[0] != len(images_I):
            raise UserError(
                f"'{what}' sees tokens of shape {shape} in a batch of {len(images_I)} images, which cannot be traced "
                "to images: leave this tower out with scope=layers;scope.tower=language."
            )
        places = total // max(1, shape[0])
        col_M = torch.arange(places, device=device).repeat(shape[0])
        return images_I.to(device).repeat_interleave(places), col_M, torch.ones(total, dtype=torch.bool, device=device)
    mask_BT = batch.inputs.get("attention_mask")
    if len(shape) == 1 and total == batch.targets_N.numel():
        return batch.sample_N, batch.cols_N, torch.ones(total, dtype=torch.bool, device=device)
    if shape[0] != batch.num_samples:
        if mask_BT is None or total != mask_BT.numel():
            raise UserError(
                f"'{what}' sees tokens of shape {shape} in a batch of {batch.num_samples} samples, which cannot be "
                "traced to samples: leave it out of the selection of layers."
            )
        shape = tuple(mask_BT.shape)
    places = total // shape[0]
    row_M = torch.arange(shape[0], device=device).repeat_interleave(places)
    col_M = torch.arange(places, device=device).repeat(shape[0])
    if mask_BT is not None and tuple(mask_BT.shape) == (shape[0], places):
        return row_M, col_M, mask_BT.reshape(-1).bool()
    return row_M, col_M, torch.ones(total, dtype=torch.bool, device=device)


def placed_calls(
    batch: Batch, samples: Sequence[Sample], found: Sequence[tuple[Call, Tensor, Tensor]]
) -> Iterator[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """(layer, x_MI, d_MO, row_M, col_M) for the real tokens of recorded calls; chunks of a head are joined.

    ``samples`` are those of the batch.
    """
    by_layer: dict[str, list[tuple[Tensor, Tensor]]] = {}
    images_I = pictured(samples)
    towered = {call.layer.name for call, _, _ in found if call.layer.images}
    for call, x, d in found:
        by_layer.setdefault(call.layer.name, []).append((x, d))
    for name, parts in by_layer.items():
        chunks = [p for p in parts if p[0].ndim == 2]
        if len(chunks) == len(parts) > 1 and sum(len(x) for x, _ in chunks) == batch.targets_N.numel():
            parts = [(torch.cat([x for x, _ in chunks]), torch.cat([d for _, d in chunks]))]  # noqa: PLW2901
        for x, d in parts:
            row_M, col_M, real_M = placed(batch, d.shape[:-1], name, images_I if name in towered else None)
            yield name, x.flatten(0, -2)[real_M], d.flatten(0, -2)[real_M], row_M[real_M], col_M[real_M]


def token_states(
    model: nn.Module,
    adapter: Adapter,
    samples: Sequence[Sample],
    modules: Mapping[str, nn.Module],
    *,
    max_tokens: int = 4096,
) -> tuple[TokenTable, dict[str, np.ndarray]]:
    """Outputs of modules (blocks, say) at every token: the table, and (N, D) float32 per module.

    Raises:
        UserError: the modules do not see the same tokens.
    """
    seen: dict[str, Tensor] = {}

    def hook_of(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, __: object, output: object) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            assert isinstance(first, Tensor)
            seen[name] = first

        return hook

    gathered = {name: Gathered.empty() for name in modules}
    handles = [module.register_forward_hook(hook_of(name)) for name, module in modules.items()]
    try:
        with evaluating(model):
            for group, batch in passes(model, adapter, samples, max_tokens):
                forward(model, adapter, batch)
                numbers = np.asarray(group)
                for name, states in seen.items():
                    row, col, real = (t.cpu().numpy() for t in placed(batch, states.shape[:-1], name))
                    values = states.flatten(0, -2).float().cpu().numpy()
                    gathered[name].add(numbers[row[real]], col[real], values[real])
    finally:
        for handle in handles:
            handle.remove()
    tables = {name: part.table() for name, part in gathered.items()}
    first = next(iter(tables.values()))[0]
    for name, (table, _) in tables.items():
        if not table.same(first):
            raise UserError(f"'{name}' sees other tokens than '{next(iter(tables))}': cluster each on its own.")
    return first, {name: values for name, (_, values) in tables.items()}
