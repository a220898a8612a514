"""Provenance of a trained artefact: what it was made from, so that "it never saw the data" is evidence or is refused.

A manifest stands beside its artefact (:data:`MANIFEST`) and names: the artefact by digest; every training record by
salted digest; every part that could carry information about data (tokenizer, statistics, gate, constants), each with
the records it was fitted on; the code; and the artefacts it started from, by digest, whose own manifests continue the
chain. :func:`never_saw` walks the chain to its roots. Whatever it cannot look at is a refusal, not an assumption.

Digests are salted, and the salt stands in the manifest: whoever holds a record can look it up, nobody can read one
back, and a short record can be guessed. Destroying the salt ends all of that.

What a manifest says is what its maker says: it is evidence under honest logging, never proof against the maker.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expunge.data.duplicates import words
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.files import digest_file, digest_folder, write_json

MANIFEST = "provenance.json"
SCHEMA = "expunge.provenance/1"
PARTS = ("tokenizer", "statistics", "gate", "constants")
HEX = r"^[0-9a-f]{64}$"

Finding = Literal["never-saw", "saw", "unknown"]


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)


class Part(Frozen):
    """One thing beside the weights. ``fitted_on`` are salted digests of the texts it was fitted on; None: unknown.

    An empty tuple says that it was fitted on nothing (a constant from a paper, the tokenizer of the base).
    """

    digest: str = Field(pattern=HEX)
    fitted_on: tuple[str, ...] | None = None
    source: str = ""


class Mechanism(Frozen):
    """How private training hid its records: :class:`expunge.training.private.PrivateOptions`, and what follows.

    ``noise``: standard deviation on the sum of clipped gradients, in units of ``clip``.
    """

    kind: Literal["private-training"] = "private-training"
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    group: int = Field(ge=1)
    clip: float = Field(gt=0)
    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    records: int = Field(ge=1, description="published number that sums were divided by")
    noise: float = Field(gt=0)


class Manifest(Frozen):
    """``provenance.json``. ``made_from``: digests of the artefacts this one started from; empty for random weights.

    ``ancestors``: the manifests of these and of what they were made from, as far as they were known, so that the chain
    outlives the folders. Each has a salt of its own, which must be destroyed here too if it is destroyed there.
    """

    schema_: Literal["expunge.provenance/1"] = Field(default="expunge.provenance/1", alias="schema")
    kind: str = Field(description="base, original, reference, shadow, zone, tokenizer, ...")
    artefact: str = Field(pattern=HEX, description="SHA-256 of the artefact, as digest_folder gives it")
    salt: str = Field(pattern=r"^[0-9a-f]{32,}$")
    records: tuple[str, ...] | None = Field(description="salted digests of the training records; None: not known")
    normalised: tuple[str, ...] = Field(
        default=(), description="salted digests of the records' words, which see through other punctuation and case"
    )
    made_from: tuple[str, ...] = ()
    parts: Mapping[str, Part] = {}
    code: str = Field(pattern=HEX, description="SHA-256 of the code that trained it")
    notes: tuple[str, ...] = ()
    mechanism: Mechanism | None = Field(default=None, description="that hid the records; None: nothing did")
    ancestors: tuple[Manifest, ...] = ()

    def chain(self) -> list[Manifest]:
        """The manifest and its ancestors, each without ancestors of its own."""
        return [m.model_copy(update={"ancestors": ()}) for m in (self, *self.ancestors)]

    def digest(self) -> str:
        """SHA-256 of the manifest itself, whatever is known of its ancestors."""
        content = json.dumps(self.model_dump(mode="json", exclude={"ancestors"}), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def holds(self, sample: Sample) -> str | None:
        """Where the manifest says that the sample was used: "records", the name of a part, or None for nowhere."""
        own, plain = salted(sample.digest(), self.salt), normalised_digest(sample, self.salt)
        if own in (self.records or ()) or (plain is not None and plain in self.normalised):
            return "records"
        return next((name for name, part in self.parts.items() if own in (part.fitted_on or ())), None)


class Clearance(Frozen):
    """The answer of :func:`never_saw`: a finding, the one sentence for it, and how far the chain was followed."""

    finding: Finding
    sentence: str
    artefact: str = Field(default="", description="digest of what was asked about")
    records: int = 0
    links: int = 0
    manifests: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        return self.finding == "never-saw"


def salted(digest: str, salt: str) -> str:
    """SHA-256 of ``salt/digest``: what a manifest holds of each sample."""
    return hashlib.sha256(f"{salt}/{digest}".encode()).hexdigest()


def normalised_digest(sample: Sample, salt: str) -> str | None:
    """Salted digest of the sample's words; None for an image or a class label, which have none."""
    if sample.image is not None or not isinstance(sample.target, str):
        return None
    plain = [words(sample.prompt), words(sample.target)]
    return salted(hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).hexdigest(), salt)


def describe(
    *,
    kind: str,
    artefact: Path | str,
    records: Sequence[Sample] | None,
    code: str,
    made_from: Iterable[Path | str] = (),
    parts: Mapping[str, Part] | None = None,
    salt: str | None = None,
    notes: Iterable[str] = (),
) -> Manifest:
    """The manifest of an artefact that was just trained.

    ``artefact`` and ``made_from`` are folders, or digests of them. ``records=None`` says honestly that nobody knows
    what it was trained on, which is the case of every model from a hub.

    Raises:
        UserError: a folder without model files.
    """
    key = salt or secrets.token_hex(16)
    plain = {d for s in records or () if (d := normalised_digest(s, key)) is not None}
    return Manifest(
        kind=kind,
        artefact=_digest_of(artefact),
        salt=key,
        records=None if records is None else tuple(sorted({salted(s.digest(), key) for s in records})),
        normalised=tuple(sorted(plain)),
        made_from=tuple(_digest_of(a) for a in made_from),
        parts=dict(parts or {}),
        code=code,
        notes=tuple(notes),
    )


def fitted(content: bytes | str, texts: Sequence[Sample] | None, salt: str, source: str = "") -> Part:
    """A part with its digest, fitted on ``texts`` (None: nobody knows; empty: on nothing)."""
    raw = content.encode() if isinstance(content, str) else content
    known = None if texts is None else tuple(sorted({salted(s.digest(), salt) for s in texts}))
    return Part(digest=hashlib.sha256(raw).hexdigest(), fitted_on=known, source=source)


def _digest_of(artefact: Path | str) -> str:
    text = str(artefact)
    if len(text) == 64 and all(c in "0123456789abcdef" for c in text):
        return text
    try:
        return digest_folder(Path(artefact))
    except FileNotFoundError as error:
        raise UserError(
            f"'{artefact}' holds no model files, so it has no digest: give the folder of a model."
        ) from error


# -- files ------------------------------------------------------------------------------------------------------------


def save_manifest(manifest: Manifest, folder: Path) -> Path:
    """Write :data:`MANIFEST` into ``folder``, which is beside the artefact, not inside it: its digest stays."""
    return write_json(Path(folder) / MANIFEST, manifest.model_dump(mode="json"))


def read_manifest(path: Path) -> Manifest:
    """A manifest from its file, or from the folder that holds it.

    Raises:
        UserError: no file, no JSON, another schema, or a wrong field (the first is named).
    """
    file = Path(path) / MANIFEST if Path(path).is_dir() else Path(path)
    try:
        return Manifest.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"'{file}' is not there: nothing says what the artefact was trained on.") from error
    except (UnicodeDecodeError, ValidationError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": "no UTF-8"}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"'{file}' cannot be read as {SCHEMA}: {where}: {first['msg']}.") from error


def lineage_of(model: Path) -> list[Manifest]:
    """What is known of a model folder: the manifest beside it and its ancestors' ones, the model's own first.

    Empty when there is none, or when the one that is there is of another model (it was copied, or trained further).

    Raises:
        UserError: a manifest is there and cannot be read.
    """
    folder = Path(model).expanduser()
    beside = folder.resolve().parent / MANIFEST
    if not (folder.is_dir() and beside.is_file()):
        return []
    found = read_manifest(beside)
    return found.chain() if found.artefact == _digest_of(folder) else []


def tokenizer_digest(folder: Path) -> str | None:
    """SHA-256 of the tokenizer in a model folder; None for a model without one."""
    known = (folder / name for name in ("tokenizer.json", "tokenizer.model"))
    return next((digest_file(path) for path in known if path.is_file()), None)


# -- the question ------------------------------------------------------------------------------------------------------


def never_saw(artefact: str, manifests: Sequence[Manifest], records: Sequence[Sample]) -> Clearance:
    """Whether the artefact of that digest, and everything it was made from, never saw any of the records.

    "saw" as soon as one manifest of the chain holds one of them, by content or by its words; "unknown" when a link or
    what a part was fitted on is missing; "never-saw" only when everything was looked at.

    Raises:
        UserError: no records were given, or the chain runs in a circle.
    """
    if not records:
        raise UserError("no records were given to look for: name the forget samples.")
    by_artefact: dict[str, Manifest] = {}
    for manifest in manifests:
        if by_artefact.setdefault(manifest.artefact, manifest) != manifest:
            raise UserError(f"two manifests speak of one artefact ({manifest.artefact[:12]}): keep the true one.")
    chain = _chain(artefact, by_artefact)
    gaps = [_missing(digest, by_artefact.get(digest)) for digest in chain]
    read = tuple(by_artefact[d].digest() for d in chain if d in by_artefact)

    def answer(finding: Finding, sentence: str) -> Clearance:
        return Clearance(
            finding=finding,
            sentence=sentence,
            artefact=artefact,
            records=len(records),
            links=len(chain),
            manifests=read,
        )

    for digest in chain:
        own = by_artefact.get(digest)
        seen = [place for sample in records if own is not None and (place := own.holds(sample)) is not None]
        if own is not None and seen:
            where = "was trained on" if seen[0] == "records" else f"has a {seen[0]} fitted on"
            return answer("saw", f"the {own.kind} {where} {len(seen)} of the {len(records)} record(s)")
    open_gaps = [gap for gap in gaps if gap]
    if open_gaps:
        return answer("unknown", open_gaps[0])
    count = len(records)
    return answer(
        "never-saw",
        f"by the manifests of {len(chain)} artefact(s), none of the {count} record(s) was trained on or fitted to",
    )


def _chain(artefact: str, manifests: Mapping[str, Manifest]) -> list[str]:
    """Digests of the artefact and all its ancestors, each once, the artefact first."""
    found: dict[str, None] = {}

    def walk(digest: str, path: tuple[str, ...]) -> None:
        if digest in path:
            raise UserError(f"the manifests run in a circle at {digest[:12]}: an artefact cannot be made from itself.")
        if digest in found:
            return
        found[digest] = None
        if digest in manifests:
            for parent in manifests[digest].made_from:
                walk(parent, (*path, digest))

    walk(artefact, ())
    return list(found)


def _missing(digest: str, manifest: Manifest | None) -> str:
    """What the manifest leaves open, in a sentence; empty when nothing."""
    if manifest is None:
        return f"nothing is known of what artefact {digest[:12]} was trained on: it has no manifest"
    if manifest.records is None:
        return f"the maker of the {manifest.kind} {digest[:12]} does not know what it was trained on"
    blind = [name for name, part in manifest.parts.items() if part.fitted_on is None]
    if blind:
        return f"nothing is known of what the {blind[0]} of the {manifest.kind} {digest[:12]} was fitted on"
    needed = [name for name in PARTS if manifest.kind == "zone" and name not in manifest.parts]
    return f"the manifest of the zone {digest[:12]} does not name its {needed[0]}" if needed else ""
