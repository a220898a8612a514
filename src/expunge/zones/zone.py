"""The seam of all zones: records in, rows by subject, adjusted log-probabilities out; what is removed was never there.

A zone consists of **blocks**, one per subject; a block of **rows**, one per record; a row of tensors that are a
function of that record alone and of public artefacts (:meth:`Zone.extract`: one record per forward pass, never a
batch). A kind that has to compute something from all the rows of a block (ridge weights, an adapter) does so in
:meth:`Zone.solve`, a deterministic function of the sorted rows. Nothing depends on another block. Hence
``remove`` leaves exactly the zone that would have been built without the record: :meth:`Zone.digest` is equal.

A new kind is one file with ``@zone("name", summary=..., source=..., options=Options)`` on a subclass of
:class:`Zone` that says how to prepare public artefacts (``prepare``), extract a row, solve a block (optional) and
adjust predictions. Routing, removal, digests, encryption and files are the same for all.

Facts about several subjects: a record may have several owners and stands in the block of each. It goes when *any*
of them goes, from all blocks: as long as one copy stays, the fact about the one who asked to be forgotten stays.
What others lose thereby is listed in :attr:`Removed.shared`, so that it can be taught again in other words.

Shape suffixes: B sequences, T positions of this pass, S positions so far (S >= T), D hidden width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import hmac
import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError, unknown
from expunge.models.text import Encoded, TextAdapter

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One training example as a zone keeps it.

    ``owners[0]`` is the sample's own subject, the others are whom it also speaks of.
    ``ids[first:]`` are the tokens to be known, ``ids[:first]`` what comes before them. ``names`` are the token
    sequences that name the subject, full names first. ``digest`` is the salted digest of the content, so that the
    record can be spoken of without its text.
    """

    id: str
    owners: tuple[str, ...]
    ids: tuple[int, ...]
    first: int
    names: tuple[tuple[int, ...], ...] = ()
    full_names: int = 0  # how many of ``names``, from the front, are full names
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A record and what was extracted from it; ``source`` fingerprints the unrounded states behind the tensors."""

    record: Record
    tensors: Mapping[str, Array]
    source: str = ""


@dataclass
class Block:
    """All rows of one subject, and what was solved from them."""

    subject: str
    rows: dict[str, Row] = field(default_factory=dict)  # by record id
    solved: dict[str, Array] = field(default_factory=dict)

    def sorted(self) -> list[Row]:
        """Rows in the order of their salted digests: the only order that anything may depend on."""
        return [self.rows[k] for k in sorted(self.rows, key=lambda k: (self.rows[k].record.digest, k))]


@dataclass(frozen=True, kw_only=True)
class Public:
    """Everything of a zone that is not in its blocks; fitted on public texts only.

    ``texts`` are the SHA-256 contents (:meth:`Sample.digest`) of these texts: the evidence that none was private.
    """

    arrays: Mapping[str, Array]
    constants: Mapping[str, Any]
    texts: frozenset[str]

    def digest(self) -> str:
        """SHA-256 over arrays, constants and the list of texts."""
        state = hashlib.sha256(json.dumps([self.constants, sorted(self.texts)], sort_keys=True).encode())
        for line in _tensor_lines(self.arrays):
            state.update(line)
        return state.hexdigest()


@dataclass(frozen=True, slots=True)
class Routes:
    """Which block each position may read: ``block_BT`` indexes ``subjects``, -1 where all stay closed.

    ``opened`` has the blocks that are read anywhere, ascending, each with its flat positions (M,), row · T + column.
    """

    subjects: Sequence[str]
    block_BT: Array
    opened: Mapping[int, Array]

    @classmethod
    def of(cls, subjects: Sequence[str], block_BT: Array) -> Routes:
        """With the positions of each block that is opened."""
        found: dict[int, list[int]] = {}
        for place, number in enumerate(block_BT.ravel().tolist()):
            if number >= 0:
                found.setdefault(number, []).append(place)
        return cls(subjects, block_BT, {number: np.array(found[number]) for number in sorted(found)})


@dataclass(frozen=True, slots=True)
class Seen:
    """One pass of the frozen base, as a zone gets to see it.

    ``hidden`` has the embeddings and the output of each layer, (B, T, D) each; ``ids_BS`` and ``mask_BS`` cover all
    positions so far, of which this pass computed the last T; an id of -1 is an embedding that is no token.
    """

    base: nn.Module
    ids_BS: Tensor
    mask_BS: Tensor
    hidden: Sequence[Tensor]
    log_probs_BTV: Tensor
    routes: Routes

    def lines(self, place_M: Array) -> list[Array]:
        """The ids up to each flat position, its own included and padding left out."""
        ids_BS, mask_BS = self.ids_BS.cpu().numpy(), self.mask_BS.cpu().numpy().astype(bool)
        num = self.log_probs_BTV.shape[1]
        before = ids_BS.shape[1] - num
        found = []
        for b, t in (divmod(place, num) for place in place_M.tolist()):
            end = before + t + 1
            found.append(ids_BS[b, :end][mask_BS[b, :end]])
        return found

    def states(self, layers: Sequence[int], place_M: Array) -> Array:
        """States of these layers side by side at flat positions, (M, layers · D) float32."""
        # A view where the states lie in main memory: one token needs few of the steps that gathering by torch takes.
        whole = [self.hidden[layer].detach().flatten(0, 1).float().cpu().numpy() for layer in layers]
        found_MC: Array = np.concatenate([states_PD[place_M] for states_PD in whole], axis=1)
        return found_MC


@dataclass(frozen=True, slots=True)
class Removed:
    """What a removal took away: record ids by subject, and records that other owners lost with it."""

    records: tuple[str, ...]
    subjects: tuple[str, ...]  # whose block is gone altogether
    shared: Mapping[str, tuple[str, ...]]  # record id -> the other owners


class FrozenBase:
    """The base and its adapter, for records one at a time. Raises UserError for what is no text model."""

    def __init__(self, model: nn.Module, adapter: Any) -> None:
        if not isinstance(adapter, TextAdapter):
            raise UserError(f"a zone needs a causal language model, not a {adapter.modality} model: give a text model.")
        self.model, self.adapter = model, adapter

    @torch.no_grad()
    def states(self, record: Record) -> tuple[tuple[Tensor, ...], Tensor]:
        """Hidden states (T, D) of embeddings and each layer, and log-probabilities (T, V), of the record alone.

        One record per pass: in a batch, padding and other shapes move the last bits, and with them the rows.
        """
        ids_1T = torch.tensor([record.ids], device=next(self.model.parameters()).device)
        model: Any = self.model
        out = model(input_ids=ids_1T, use_cache=False, output_hidden_states=True)
        self.adapter.meter.count(self.model, ids_1T.numel())
        return tuple(h[0].float() for h in out.hidden_states), out.logits[0].float().log_softmax(-1)


class Zone(ABC):
    """A removable memory; see the module's docstring. Subclasses are registered with :func:`zone`."""

    kind: ClassVar[str] = ""

    def __init__(self, options: Any, public: Public, base_digest: str, salt: str) -> None:
        """``salt`` (hexadecimal) keys the digests of records; it is kept with the keys, not with the zone."""
        self.options, self.public, self.base_digest, self.salt = options, public, base_digest, salt
        self.blocks: dict[str, Block] = {}
        self.sealed: dict[str, bytes] = {}  # blocks that nobody has the key of, by salted name
        self.keys: dict[str, bytes] = {}  # by salted name; see expunge.zones.storage
        self.kept: dict[str, Array] = {}  # what a kind keeps beside its blocks: sealed like one of them
        self.noise: dict[str, str] = {}  # seeds of the noise in it: for who checks, never for who serves
        self.version = 0  # counts changes, for whoever caches something of the blocks

    # -- what a kind defines -----------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def prepare(cls, base: FrozenBase, public: Sequence[Sample], options: Any, seed: int) -> Public:
        """Statistics, gate and constants from public samples alone."""

    @abstractmethod
    def extract(self, record: Record, base: FrozenBase) -> tuple[dict[str, Array], str]:
        """The tensors of the record's row, and a fingerprint of the unrounded states that they came from."""

    @abstractmethod
    def adjust(self, seen: Seen) -> Tensor:
        """Log-probabilities (B, T, V) with what the routed blocks know; closed positions stay as the base's."""

    def solve(self, block: Block, base: FrozenBase) -> dict[str, Array]:
        """What is computed from all rows of a block; a function of ``block.sorted()`` and public artefacts."""
        return {}

    # -- records -----------------------------------------------------------------------------------------------------

    def record_digest(self, content: str) -> str:
        """Salted digest of a content digest (HMAC-SHA-256)."""
        return hmac.new(bytes.fromhex(self.salt), content.encode(), hashlib.sha256).hexdigest()

    def record(self, sample: Sample, adapter: TextAdapter, owners: Iterable[str] = ()) -> Record:
        """The sample as a record of its subject and of the other ``owners``."""
        return record_of(sample, adapter, owners, self.record_digest(sample.digest()))

    def add(self, records: Sequence[Record], base: FrozenBase) -> None:
        """Put records in, each extracted alone; the result does not depend on their order.

        Raises:
            UserError: an id that is there already, an owner without a name, or a record among the public texts.
        """
        public = {self.record_digest(text) for text in self.public.texts}
        there = {row_id for block in self.blocks.values() for row_id in block.rows}
        for record in records:
            if record.id in there:
                raise UserError(f"record '{record.id}' is in the zone already: remove it first, or give another id.")
            if record.digest in public:
                raise UserError(
                    f"record '{record.id}' is among the texts that the zone's statistics were fitted on, so removing "
                    "it would leave a trace: build the zone with public texts that hold no private record."
                )
            if not record.owners or not all(record.owners):
                raise UserError(f"record '{record.id}' has no subject: name the one whom it is about.")
            there.add(record.id)
        touched = set()
        for record in records:
            row = Row(record, *self.extract(record, base))
            for owner in record.owners:
                self.blocks.setdefault(owner, Block(owner)).rows[record.id] = row
                touched.add(owner)
        self._settle(touched, base)

    def remove(self, *, subject: str | None = None, ids: Iterable[str] = (), base: FrozenBase | None = None) -> Removed:
        """Take out a subject, or single records; a block without rows goes altogether.

        ``base`` is needed by kinds that solve blocks, when a block loses some of its rows.

        Raises:
            UserError: no such subject or record.
        """
        if subject is not None and subject not in self.blocks:
            raise unknown("subject", subject, self.blocks)
        gone = dict.fromkeys(ids)
        if subject is not None:
            gone |= dict.fromkeys(sorted(self.blocks[subject].rows))
        known = {row_id: row.record for block in self.blocks.values() for row_id, row in block.rows.items()}
        for row_id in gone:
            if row_id not in known:
                raise unknown("record", row_id, known)
        touched = set()
        for row_id in gone:
            for owner in known[row_id].owners:
                del self.blocks[owner].rows[row_id]
                touched.add(owner)
        empty = sorted(owner for owner in touched if not self.blocks[owner].rows)
        for owner in empty:
            del self.blocks[owner]
        self._settle(touched, base)
        others = {i: tuple(o for o in known[i].owners if o != subject) for i in gone if len(known[i].owners) > 1}
        return Removed(tuple(gone), tuple(empty), others)

    def _settle(self, touched: Iterable[str], base: FrozenBase | None) -> None:
        """Solve changed blocks again; they get new keys, so that the old ones can go with what they cover."""
        from expunge.zones.storage import block_name

        touched = sorted(touched)
        for owner in touched:
            self.keys.pop(block_name(self.salt, owner), None)
            if owner in self.blocks and type(self).solve is not Zone.solve:
                if base is None:
                    raise UserError(
                        f"a zone of kind {self.kind} solves a block again when a record goes: give the base."
                    )
                self.blocks[owner].solved = self.solve(self.blocks[owner], base)
        self.version += 1

    @property
    def record_ids(self) -> set[str]:
        return {row_id for block in self.blocks.values() for row_id in block.rows}

    def digest(self) -> str:
        """SHA-256 over the sorted rows and solved tensors of all blocks, the public artefacts, and the base.

        Two zones with equal digests answer alike. Keyed by the salt through the records' digests.
        """
        state = hashlib.sha256(json.dumps([self.kind, asdict(self.options), self.base_digest]).encode())
        state.update(self.public.digest().encode())
        for line in self.lines():
            state.update(line)
        return state.hexdigest()

    def lines(self) -> Iterable[bytes]:
        """The content of the blocks as bytes, sorted by subject and record: what :meth:`digest` runs over."""
        for owner in sorted(self.blocks):
            yield json.dumps(["block", owner]).encode()
            for row in self.blocks[owner].sorted():
                yield json.dumps(asdict(row.record), sort_keys=True).encode()
                yield from _tensor_lines(row.tensors)
            yield from _tensor_lines(self.blocks[owner].solved)
        yield from _tensor_lines(self.kept)

    def check(self, base: FrozenBase) -> list[str]:
        """Ids of records whose row is not what extracting the record alone gives, byte for byte.

        Rows from batched passes, from another base, or edited by hand are found here.
        """
        wrong = set()
        for block in self.blocks.values():
            for row_id, row in block.rows.items():
                tensors, source = self.extract(row.record, base)
                if source != row.source or list(_tensor_lines(tensors)) != list(_tensor_lines(row.tensors)):
                    wrong.add(row_id)
        return sorted(wrong)


def _tensor_lines(arrays: Mapping[str, Array]) -> Iterable[bytes]:
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        yield json.dumps([name, str(value.dtype), list(value.shape)]).encode() + value.tobytes()


def name_tokens(names: Iterable[str], adapter: TextAdapter) -> tuple[tuple[int, ...], ...]:
    """Token sequences of each name, as it begins a text and as it follows a space."""
    found: dict[tuple[int, ...], None] = {}
    for name in names:
        for text in (name, " " + name):
            ids = tuple(adapter.tokenizer(text, add_special_tokens=False)["input_ids"])
            if ids:
                found[ids] = None
    return tuple(found)


def record_of(sample: Sample, adapter: TextAdapter, owners: Iterable[str], digest: str) -> Record:
    """The tokens that a model would see of the sample, and the names of its subject."""
    coded: Encoded = adapter.cached(sample)
    full = name_tokens(sample.names[:1] or (sample.subject,), adapter)
    return Record(
        id=sample.id,
        owners=(sample.subject, *sorted({*owners} - {sample.subject})),
        ids=coded.ids,
        first=coded.first,
        names=(*full, *name_tokens(sample.names[1:], adapter)),
        full_names=len(full),
        digest=digest,
    )


def shared_owners(samples: Sequence[Sample]) -> dict[str, tuple[str, ...]]:
    """Record id → other subjects whose full name its text mentions; found before the zone is built.

    A matter of the records, not of the zone: the same record has the same owners in the zone that is built without.
    """
    full = {s.subject: (s.names[0] if s.names else s.subject) for s in samples}
    found = {}
    for s in samples:
        text = f"{s.prompt} {s.target}"
        others = tuple(o for o, name in full.items() if o != s.subject and len(name) > 3 and name in text)
        if others:
            found[s.id] = others
    return found


@dataclass(frozen=True)
class ZoneKind:
    """A registered kind."""

    name: str
    build: type[Zone]
    options: type[Any]
    summary: str
    source: str


_ZONES: dict[str, ZoneKind] = {}


def zone(name: str, *, summary: str, source: str, options: type[Any]) -> Callable[[type[Zone]], type[Zone]]:
    """Class decorator that registers a kind of zone."""

    def wrap(build: type[Zone]) -> type[Zone]:
        build.kind = name
        _ZONES[name] = ZoneKind(name, build, options, summary, source)
        return build

    return wrap


def all_zones() -> dict[str, ZoneKind]:
    """Every kind by name, from the modules of this package."""
    package = importlib.import_module("expunge.zones")
    for found in pkgutil.iter_modules(package.__path__, "expunge.zones."):
        importlib.import_module(found.name)
    return dict(sorted(_ZONES.items()))


def get_zone(name: str) -> ZoneKind:
    """By name.

    Raises:
        UserError: no such kind; the nearest is suggested.
    """
    kinds = all_zones()
    if name not in kinds:
        raise unknown("zone", name, kinds)
    return kinds[name]
