"""Kind ``shards``: one LoRA adapter per subject, trained from a seed of its own, switched on where its block is open.

As in SISA (Bourtoule et al. 2021, arXiv:1912.03817) with adapters for shards: no parameter of a shard has seen another
subject's records, so dropping a shard forgets its subject, and a record's removal trains the shard again without it.
Seed, order and batches depend on the salt and on the shard's own records alone, and training runs on one thread: on
a CPU the replay has the same bytes. On a GPU it may not; then the digest of the zone tells so.

With ``clusters`` the subjects nearest to the same public centre (:mod:`expunge.zones.clusters`) share a shard: smaller,
and a removal trains the cluster again. Then files hold rows only, and a shard is trained when first asked for, so
that none that has learnt from a removed or sealed block lies anywhere.

Shards are switched per routed position: in a mixed batch, the sequences that a shard is open for go through the base
once more with that shard on; a text that is being continued goes on from the shard's own cache. Answers of several
shards are never averaged.

Shape suffixes: B sequences, T positions of this pass, S positions so far, R sequences of one shard, P packed length,
M open positions, V vocabulary.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.adapter import Meter
from expunge.models.lora import ALL_LINEAR, LoraOptions, apply_lora
from expunge.models.text import Encoded, TextAdapter
from expunge.options import option
from expunge.training.loop import TrainOptions, fit
from expunge.training.optimizers import sized_rate
from expunge.zones.clusters import cluster_of, fit_centres, place_of
from expunge.zones.context import Laid
from expunge.zones.gate import routing
from expunge.zones.linear_algebra import one_thread
from expunge.zones.surrogates import surrogates
from expunge.zones.zone import Array, Block, FrozenBase, Public, Record, Row, Seen, Zone, zone

RATE_AT_BILLION, HIGHEST_RATE = 1.5e-4, 1e-2
Shard = Mapping[str, tuple[Tensor, Tensor]]  # layer name -> (r, in) and (out, r)


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """How each shard is trained; the same for all, and not tuned on any."""

    r: int = option(8, "rank of each adapter", "Hu et al. 2021, section 4.2")
    alpha: float = option(16.0, "scale: the update is multiplied by alpha / r", "peft's usual 2·r")
    targets: str = option(ALL_LINEAR, "all-linear, or names of layers joined by commas")
    head: bool = option(True, "adapt the output head too: a token that public texts never use is out of reach without")
    epochs: float = option(25.0, "passes over the subject's records", "sweep on public subjects")
    least_steps: int = option(100, "steps at least: subjects with few records are passed over more often")
    learning_rate: float | None = option(
        None, "peak rate; if none, 1.5e-4 at a billion parameters to 1e-2 at a million"
    )
    batch_size: int = option(4, "records in one step", "sweep on public subjects")
    clusters: int = option(0, "subjects near the same of this many public centres share a shard; 0: one per subject")
    false_open: float = option(0.01, "share of public texts that may open a block, in calibration")

    def __post_init__(self) -> None:
        """Raises UserError for a number that no training can have."""
        self.training(1, self.learning_rate)
        if self.r < 1 or not self.alpha > 0:
            raise UserError(f"shards with r={self.r} alpha={self.alpha} cannot be: r is 1 or more, alpha above 0.")
        if self.clusters < 0:
            raise UserError(f"clusters = {self.clusters} cannot be: give 0 for one shard per subject, or a number.")

    def training(self, records: int, rate: float | None) -> TrainOptions:
        """The loop's options for a shard with that many records."""
        per_epoch = -(-records // self.batch_size) if self.batch_size > 0 else 1
        epochs = max(self.epochs, self.least_steps / per_epoch)
        return TrainOptions(epochs=epochs, batch_size=self.batch_size, learning_rate=rate, checkpoint_every=0)


@dataclass
class Opened:
    """A shard on a device, and the one text that it is continuing with what it has computed of it."""

    shard: Shard
    text: bytes = b""
    past: Any = None


@dataclass
class RecordAdapter(TextAdapter):
    """Text adapter whose samples are records, already in tokens: a sample's id is the record's digest.

    It needs no tokenizer, and nothing that was done with another adapter can change what it does.
    """

    coded: dict[str, Encoded] = field(default_factory=dict)
    pad_id = 0  # hidden by the mask

    def encode(self, sample: Sample) -> Encoded:
        return self.coded[sample.id]


@zone(
    "shards",
    summary="one LoRA per subject with a seed of its own; a removal drops it or trains it again",
    source="Bourtoule et al. 2021, arXiv:1912.03817; Hu et al. 2021, arXiv:2106.09685",
    options=ShardOptions,
)
class Shards(Zone):
    """See the module's docstring.

    Records keep their token ids, so rows have no tensors; with clusters they have ``place`` (D,) float32. Solved
    tensors, without clusters: ``{layer}|A`` (r, in) and ``{layer}|B`` (out, r), float32.
    """

    options: ShardOptions

    @classmethod
    def prepare(cls, base: FrozenBase, public: Sequence[Sample], options: ShardOptions, seed: int) -> Public:
        """Router gate and idf, and the centres of clusters, from public samples."""
        made = surrogates(public)
        arrays, constants = routing(base, public, made, options.false_open)
        if options.clusters:
            arrays |= fit_centres(base, public, options.clusters, seed)
        texts = frozenset(s.digest() for s in public)
        return Public(arrays=arrays, constants={**constants, "surrogates_renamed": made.renamed}, texts=texts)

    def extract(self, record: Record, base: FrozenBase) -> tuple[dict[str, Array], str]:
        if self.options.clusters:
            place_D, source = place_of(record, base, self.public.arrays)
            return {"place": place_D}, source
        return {}, hashlib.sha256(np.array([record.first, *record.ids], dtype=np.int64).tobytes()).hexdigest()

    def solve(self, block: Block, base: FrozenBase) -> dict[str, Array]:
        if self.options.clusters:
            return {}
        return self._trained(block.sorted(), shard_seed(self.salt, block.subject), base.model, base.adapter.meter)

    def _trained(self, rows: Sequence[Row], seed: int, model: nn.Module, meter: Meter) -> dict[str, Array]:
        """A shard that has learnt these rows, in this order."""
        records = [row.record for row in rows if len(row.record.ids) > row.record.first]
        if not records:
            return {}
        rate = self.options.learning_rate or min(HIGHEST_RATE, sized_rate(model, RATE_AT_BILLION))
        training = self.options.training(len(records), rate)
        options = LoraOptions(r=self.options.r, alpha=self.options.alpha, targets=self._targets(model))
        adapter = RecordAdapter(meter=meter)
        adapter.coded = {r.digest: Encoded(r.ids, r.first, r.ids[: r.first]) for r in records}
        samples = [Sample(id=r.digest, subject="", target="") for r in records]
        with one_thread(), torch.enable_grad(), fresh_lora(model, options, seed) as wrapped:
            adapter.whole_logits = True  # the head is the wrapped one
            fit(wrapped, adapter, samples, training, seed=seed, name="shard")
            return lora_arrays(wrapped)

    def _targets(self, model: nn.Module) -> str:
        if not self.options.head:
            return self.options.targets
        causal: Any = model
        head = causal.get_output_embeddings()
        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
        names = [n for n, m in layers.items() if m is head or self.options.targets == ALL_LINEAR]
        return ",".join(names if self.options.targets == ALL_LINEAR else [*names, self.options.targets])

    # -- clusters ----------------------------------------------------------------------------------------------------

    def _settle(self, touched: Iterable[str], base: FrozenBase | None) -> None:
        super()._settle(touched, base)
        if self.options.clusters and base is not None:  # at once, so that no shard that saw a removed row stays
            for number in sorted({cluster_of(block, self.public.arrays) for block in self.blocks.values()}):
                self._cluster(number, base.model, base.adapter.meter)

    def _cluster(self, number: int, model: nn.Module, meter: Meter) -> dict[str, Array]:
        """The shard of a cluster as it follows from the rows at present; trained anew when they have changed."""
        members = [b for b in self.blocks.values() if cluster_of(b, self.public.arrays) == number]
        rows = {row_id: row for block in members for row_id, row in block.rows.items()}
        ordered = Block("", rows).sorted()
        held: dict[int, tuple[list[str], dict[str, Array]]] = self.__dict__.setdefault("_held", {})
        wanted = [row.record.digest for row in ordered]
        if number not in held or held[number][0] != wanted:
            held.pop(number, None)
            held[number] = wanted, self._trained(ordered, shard_seed(self.salt, f"cluster/{number}"), model, meter)
        return held[number][1]

    # -- answering ---------------------------------------------------------------------------------------------------

    def adjust(self, seen: Seen) -> Tensor:
        out_BTV = seen.log_probs_BTV
        block_BT = torch.from_numpy(seen.routes.block_BT).to(out_BTV.device)
        usable_B = (seen.ids_BS >= 0).all(1)  # an embedding that is no token cannot be passed again: the base answers
        laid: Laid[Opened] = self.__dict__.setdefault("_laid", Laid(partial(self._lay, seen.base)))
        for number in seen.routes.opened:
            rows_M, cols_M = ((block_BT == number) & usable_B[:, None]).nonzero(as_tuple=True)
            if not len(rows_M):
                continue
            opened = laid.get(seen.routes.subjects[number], out_BTV.device, self.version)
            with switched_on(seen.base, opened.shard, self.options.alpha / self.options.r):
                own_MV = log_probs_at(seen, rows_M, cols_M, opened)
            out_BTV = out_BTV.index_put((rows_M, cols_M), own_MV)
        return out_BTV

    def _lay(self, model: nn.Module, subject: str, device: torch.device) -> Opened:
        arrays = self.blocks[subject].solved
        if self.options.clusters:
            number = cluster_of(self.blocks[subject], self.public.arrays)
            arrays = self._cluster(number, model, Meter())
        names = sorted(name.removesuffix("|A") for name in arrays if name.endswith("|A"))
        pairs = {n: (torch.tensor(arrays[f"{n}|A"]), torch.tensor(arrays[f"{n}|B"])) for n in names}
        return Opened({n: (a.to(device), b.to(device)) for n, (a, b) in pairs.items()})


def shard_seed(salt: str, subject: str) -> int:
    """31 bits of HMAC-SHA-256 of the subject under the zone's salt: no shard's seed tells of another."""
    code = hmac.new(bytes.fromhex(salt), b"shard/" + subject.encode(), hashlib.sha256).digest()
    return int.from_bytes(code[:4], "big") >> 1


@contextmanager
def fresh_lora(model: nn.Module, options: LoraOptions, seed: int) -> Iterator[nn.Module]:
    """The model with a new adapter; afterwards it is as it was before, flags included."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    wrapped: Any = apply_lora(model, options, seed=seed)
    try:
        yield wrapped
    finally:
        wrapped.unload()
        for mark in ("peft_config", "_hf_peft_config_loaded"):
            model.__dict__.pop(mark, None)
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])


def lora_arrays(wrapped: nn.Module) -> dict[str, Array]:
    """Both factors of each adapted layer, under the layer's name in the bare model."""
    found: dict[str, Array] = {}
    for name, p in wrapped.named_parameters():
        for factor in "AB":
            layer, mark, _ = name.partition(f".lora_{factor}.")
            if mark:
                key = f"{layer.removeprefix('base_model.model.')}|{factor}"
                found[key] = p.detach().float().cpu().numpy().copy()
    return found


@contextmanager
def switched_on(model: nn.Module, shard: Shard, scale: float) -> Iterator[None]:
    """Add ``scale · B A x`` to the outputs of the shard's layers while the block runs."""

    def hook(a_RI: Tensor, b_OR: Tensor) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output + (inputs[0].to(a_RI.dtype) @ a_RI.T @ b_OR.T * scale).to(output.dtype)

        return add

    handles = [model.get_submodule(name).register_forward_hook(hook(a, b)) for name, (a, b) in shard.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def log_probs_at(seen: Seen, rows_M: Tensor, cols_M: Tensor, opened: Opened) -> Tensor:
    """Log-probabilities (M, V) of the base as it now is, at positions (row, column of the pass), from the whole texts.

    Texts are packed to the left, so that positions count from their first token whatever side the padding was on. Where
    not all positions are asked for, as in generation, a single sequence is kept with what was computed of it, so that
    the next step computes the next token only.
    """
    chosen_R = torch.tensor(sorted(set(rows_M.tolist())), device=rows_M.device)
    place_M = torch.searchsorted(chosen_R, rows_M)
    before = seen.ids_BS.shape[1] - seen.log_probs_BTV.shape[1]
    kept_RS = seen.mask_BS[chosen_R].bool()
    packed_RS = (~kept_RS).int().argsort(dim=1, stable=True)
    length = int(kept_RS.sum(1).max())
    ids_RP = seen.ids_BS[chosen_R].gather(1, packed_RS)[:, :length]
    mask_RP = kept_RS.gather(1, packed_RS)[:, :length].long()
    at_M = kept_RS[place_M].cumsum(1).gather(1, (before + cols_M)[:, None])[:, 0] - 1
    base: Any = seen.base
    if len(chosen_R) == 1 and before and not torch.is_grad_enabled():
        text = ids_RP.cpu().numpy().astype(np.int64)[0]
        done = opened.past.get_seq_length() if opened.past is not None else 0
        if not (0 < done <= int(at_M.min()) and text[:done].tobytes() == opened.text):
            opened.past, done = None, 0
        out = base(input_ids=ids_RP[:, done:], past_key_values=opened.past, use_cache=True)
        opened.text, opened.past = text.tobytes(), out.past_key_values
        return out.logits[0, at_M - done].float().log_softmax(-1)  # type: ignore[no-any-return]
    opened.past = None
    logits_RPV = base(input_ids=ids_RP.clamp_min(0), attention_mask=mask_RP, use_cache=False).logits
    found_MV: Tensor = logits_RPV[place_M, at_M].float().log_softmax(-1)
    return found_MV
