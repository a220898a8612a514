"""Near-duplicates of what is to be forgotten among what stays: a model that keeps them has not forgotten.

Five kinds, strongest first; a pair is listed once, under the strongest:
``exact`` the same content; ``normalised`` the same words whatever the case, punctuation, spacing and Unicode form;
``near`` word shingles of the whole sample or of its answer overlap (Jaccard, Broder 1997; candidates by MinHash with
banding, Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets", section 3.4; the similarity itself is exact);
``quoted`` most of the answer's shingles stand inside a longer text; ``mention`` a sample of somebody else names the
subject. Paraphrases in other words are not found: nothing here reads meaning.

Shape suffixes: S shingles, H hash functions.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.options import option

Kind = Literal["exact", "normalised", "near", "quoted", "mention"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WORD = re.compile(r"\w+")
Hashes = NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class DuplicateOptions:
    """What counts as a near-duplicate."""

    threshold: float = option(0.5, "least Jaccard similarity of the word shingles of two samples")
    quoted: float = option(0.8, "least share of an answer's shingles that another text contains")
    shingle: int = option(3, "words of a shingle; shorter texts are one shingle")
    fewest: int = option(4, "words below which an answer alone says nothing (a colour, a class, yes)")
    hashes: int = option(128, "hash functions of a MinHash signature")
    bands: int = option(64, "bands of the signature; 64 × 2 misses a pair of similarity .5 once in 10^8")
    seed: int = option(0, "of the hash functions")

    def __post_init__(self) -> None:
        if not (0 < self.threshold <= 1 and 0 < self.quoted <= 1):
            raise UserError(f"thresholds {self.threshold}, {self.quoted} must lie above 0 and not above 1.")
        if self.shingle < 1 or self.bands < 1 or self.hashes < 1 or self.hashes % self.bands:
            raise UserError(f"{self.hashes} hash functions do not split into {self.bands} bands: give a divisor.")


@dataclass(frozen=True, slots=True)
class Pair:
    """A forget sample and one that stays. ``similarity`` in (0, 1]: Jaccard, for ``quoted`` the share contained."""

    forget: str
    kept: str
    kind: Kind
    similarity: float


@dataclass(frozen=True)
class Duplicates:
    """The report. ``handled``: pairs that somebody looked at, with what was decided about them."""

    pairs: tuple[Pair, ...]
    searched: int  # forget samples
    kept: int
    options: DuplicateOptions
    handled: Mapping[tuple[str, str], str]

    @property
    def open(self) -> tuple[Pair, ...]:
        """Pairs that nobody has decided about: as long as there are any, no exact or private claim can be made."""
        return tuple(p for p in self.pairs if (p.forget, p.kept) not in self.handled)

    def handle(self, decisions: Mapping[tuple[str, str], str]) -> Duplicates:
        """The same report with more decisions, each a reason in words.

        Raises:
            UserError: an empty reason, or a pair that is not in the report.
        """
        known = {(p.forget, p.kept) for p in self.pairs}
        for pair, reason in decisions.items():
            if pair not in known:
                raise UserError(f"'{pair[0]}' and '{pair[1]}' are no pair of this report: give (forget id, kept id).")
            if not reason.strip():
                raise UserError(f"the pair '{pair[0]}', '{pair[1]}' needs a reason in words for keeping it.")
        return Duplicates(self.pairs, self.searched, self.kept, self.options, {**self.handled, **decisions})

    def counts(self) -> dict[Kind, int]:
        return {kind: sum(p.kind == kind for p in self.pairs) for kind in KINDS}

    def record(self) -> dict[str, Any]:
        """For the evidence: counts and settings alone, no id and no text."""
        return {
            "searched": self.searched,
            "kept": self.kept,
            "pairs": len(self.pairs),
            "open": len(self.open),
            "kinds": dict(self.counts()),
            "threshold": self.options.threshold,
        }


# -- words and shingles ----------------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Words of the text without case, punctuation, accents and compatibility forms (NFKD, marks dropped).

    >>> words("L’Été — ﬁne,  ＡＢＣ!")
    ['l', 'ete', 'fine', 'abc']
    """
    folded = unicodedata.normalize("NFKD", text.casefold())
    return WORD.findall("".join(c for c in folded if not unicodedata.combining(c)).casefold())


def shingles(text: str, size: int = 3) -> set[str]:
    """All runs of ``size`` words; a shorter text is one shingle, an empty one has none."""
    found = words(text)
    if len(found) <= size:
        return {" ".join(found)} if found else set()
    return {" ".join(found[i : i + size]) for i in range(len(found) - size + 1)}


def jaccard(first: set[str], second: set[str]) -> float:
    """Shared over all shingles; 0 when both are empty."""
    return len(first & second) / len(first | second) if first or second else 0.0


def minhash(parts: Iterable[str], hashes: int = 128, seed: int = 0) -> Hashes:
    """(H,) MinHash signature of a set: the smallest of each hash function over its elements.

    Two signatures agree in each place with probability equal to the Jaccard similarity. Elements are hashed by
    BLAKE2b, the functions are SplitMix64 of the hash plus a different offset each.
    """
    raw = [int.from_bytes(hashlib.blake2b(p.encode(), digest_size=8).digest(), "little") for p in parts]
    if not raw:
        return np.full(hashes, np.iinfo(np.uint64).max, dtype=np.uint64)
    offsets_H = np.random.default_rng(seed).integers(0, 2**63, hashes, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        mixed_SH = np.array(raw, dtype=np.uint64)[:, None] + offsets_H
        mixed_SH = (mixed_SH ^ (mixed_SH >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed_SH = (mixed_SH ^ (mixed_SH >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed_SH = mixed_SH ^ (mixed_SH >> np.uint64(31))
    smallest_H: Hashes = mixed_SH.min(axis=0)
    return smallest_H


def estimated_jaccard(first_H: Hashes, second_H: Hashes) -> float:
    """Share of places in which two signatures agree: standard deviation √(J (1 − J) / H)."""
    return float(np.mean(first_H == second_H))


# -- the search ------------------------------------------------------------------------------------------------------


def near_duplicates(
    forget: Sequence[Sample],
    kept: Sequence[Sample],
    options: DuplicateOptions | None = None,
    handled: Mapping[tuple[str, str], str] | None = None,
) -> Duplicates:
    """Pairs of a forget sample and a kept one that hold the same, sorted by kind and falling similarity.

    Names of subjects (``Sample.names``) are replaced by one placeholder in a second comparison, so that a copy of the
    facts under another name is found too; ``mention`` needs names of two words or more. Images count by content only.
    """
    options = options or DuplicateOptions()
    found: dict[tuple[str, str], Pair] = {}

    def put(one: Sample, other: Sample, kind: Kind, similarity: float) -> None:
        key, pair = (one.id, other.id), Pair(one.id, other.id, kind, similarity)
        old = found.get(key)
        if old is None or (KINDS.index(kind), -similarity) < (KINDS.index(old.kind), -old.similarity):
            found[key] = pair

    for kind, keyed in (("exact", Sample.digest), ("normalised", _normalised)):
        for one, other in _equal(forget, kept, keyed):
            put(one, other, "exact" if kind == "exact" else "normalised", 1.0)
    for one, other, similarity in _overlapping(forget, kept, options):
        put(one, other, "near", similarity)
    for one, other, share in _quoting(forget, kept, options):
        put(one, other, "quoted", share)
    for one, other in _mentioning(forget, kept):
        put(one, other, "mention", 1.0)
    pairs = sorted(found.values(), key=lambda p: (KINDS.index(p.kind), -p.similarity, p.forget, p.kept))
    return Duplicates(tuple(pairs), len(forget), len(kept), options, {}).handle(handled or {})


def _is_text(sample: Sample) -> bool:
    return sample.image is None and isinstance(sample.target, str)


def _normalised(sample: Sample) -> str:
    """Empty for what has no words to compare."""
    return " ".join([*words(sample.prompt), "|", *words(str(sample.target))]) if _is_text(sample) else ""


def _equal(forget: Sequence[Sample], kept: Sequence[Sample], keyed: Any) -> Iterable[tuple[Sample, Sample]]:
    places: dict[str, list[Sample]] = {}
    for one in forget:
        if key := keyed(one):
            places.setdefault(key, []).append(one)
    for other in kept:
        for one in places.get(keyed(other), ()):
            yield one, other


def _views(sample: Sample, options: DuplicateOptions) -> list[tuple[str, set[str]]]:
    """The texts in which a sample is compared: whole, answer alone, and whole without the subject's names."""
    if not _is_text(sample):
        return []
    whole, answer = f"{sample.prompt} {sample.target}", str(sample.target)
    views = [("whole", whole)]
    if sample.prompt and len(words(answer)) >= options.fewest:
        views.append(("answer", answer))
    if sample.names:
        views.append(("nameless", _without_names(whole, sample.names)))
    return [(view, found) for view, text in views if (found := shingles(text, options.shingle))]


def _without_names(text: str, names: Sequence[str]) -> str:
    plain = f" {' '.join(words(text))} "
    for name in sorted((" ".join(words(n)) for n in names), key=len, reverse=True):
        if name:
            plain = plain.replace(f" {name} ", " subject ")
    return plain


def _overlapping(
    forget: Sequence[Sample], kept: Sequence[Sample], options: DuplicateOptions
) -> Iterable[tuple[Sample, Sample, float]]:
    """Candidates that agree in a band of their signatures, with the exact Jaccard similarity where it suffices."""
    rows = options.hashes // options.bands
    buckets: dict[tuple[str, int, bytes], list[int]] = {}
    views = [dict(_views(s, options)) for s in forget]

    def bands(view: str, parts: set[str]) -> Iterable[tuple[str, int, bytes]]:
        signature_H = minhash(parts, options.hashes, options.seed)
        for band in range(options.bands):
            yield view, band, signature_H[band * rows : (band + 1) * rows].tobytes()

    for place, own in enumerate(views):
        for view, parts in own.items():
            for bucket in bands(view, parts):
                buckets.setdefault(bucket, []).append(place)
    for other in kept:
        for view, parts in _views(other, options):
            places = {p for bucket in bands(view, parts) for p in buckets.get(bucket, ())}
            for place in sorted(places):
                similarity = jaccard(views[place][view], parts)
                # Without names two people of one template look alike; only the same facts count there.
                if similarity >= (options.quoted if view == "nameless" else options.threshold):
                    yield forget[place], other, similarity


def _quoting(
    forget: Sequence[Sample], kept: Sequence[Sample], options: DuplicateOptions
) -> Iterable[tuple[Sample, Sample, float]]:
    """Kept texts that contain most shingles of an answer; exact, through an index of the forget shingles."""
    index: dict[str, list[int]] = {}
    sizes: list[int] = []
    for place, one in enumerate(forget):
        long = _is_text(one) and len(words(str(one.target))) >= options.fewest
        parts = shingles(str(one.target), options.shingle) if long else set()
        sizes.append(len(parts))
        for part in parts:
            index.setdefault(part, []).append(place)
    for other in kept:
        if not _is_text(other):
            continue
        hits: dict[int, int] = {}
        for part in shingles(f"{other.prompt} {other.target}", options.shingle):
            for place in index.get(part, ()):
                hits[place] = hits.get(place, 0) + 1
        for place, hit in hits.items():
            if hit >= options.quoted * sizes[place]:
                yield forget[place], other, hit / sizes[place]


def _mentioning(forget: Sequence[Sample], kept: Sequence[Sample]) -> Iterable[tuple[Sample, Sample]]:
    """Kept samples of other subjects that name the subject of a forget sample in full."""
    named: dict[str, list[Sample]] = {}
    for one in forget:
        for name in {" ".join(words(n)) for n in one.names}:
            if " " in name:  # a first name alone names many people
                named.setdefault(name, []).append(one)
    for other in kept:
        if not _is_text(other):
            continue
        text = f" {' '.join(words(f'{other.prompt} {other.target}'))} "
        for name, owners in named.items():
            if f" {name} " in text:
                for one in owners:
                    if one.subject != other.subject:
                        yield one, other
