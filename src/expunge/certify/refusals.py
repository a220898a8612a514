"""Reasons to refuse: what makes a claim false or empty, whatever the rest of the evidence says.

Each rule looks at the evidence and gives a :class:`Refusal` or nothing; the table :data:`RULES` names the levels that
it touches. "refuted" means that the evidence contradicts the claim, "unsupported" that the claim has lost its footing,
"flagged" that the reader must be told.
The rules exist because each of these cases passes some test: the model that did nothing has perfect utility, a random
model has nothing left of anybody, an over-forgotten one defeats every extraction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from expunge.certify.gather import Evidence, Interval, Losses, Staying
from expunge.certify.sections import Released, Replayed
from expunge.stats import clopper_pearson

NOISY = ("private", "reset")  # kinds of model whose L1 rests on a computation that is repeated
Level = Literal["L0", "L1", "L2", "L3", "L4", "L5"]
LEVELS: tuple[Level, ...] = get_args(Level)
FORMAL: tuple[Level, ...] = ("L0", "L1")
EVIDENCE_LEVELS: tuple[Level, ...] = ("L2", "L3", "L4", "L5")
Verdict = Literal["certified", "refuted", "unsupported"]
Weight = Literal["refuted", "unsupported", "flagged"]

SAME_LOSS = 0.01  # of the way from the original to a retrained model: less has not moved
BEYOND = 0.5  # of that way: further off on either side is not like a retrained model, as in the verdicts of a run
LOST_NATS = 0.5  # nats per token by which a working model may fall behind on what stays
LOST_SHARE = 0.5  # share of the yardstick's probability or utility that a working model keeps at least


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the levels in ``levels`` are refuted, unsupported or flagged: one sentence that names nobody."""

    name: str
    levels: tuple[Level, ...]
    weight: Weight
    sentence: str


Rule = Callable[[Evidence], str | None]


def find(evidence: Evidence) -> tuple[Refusal, ...]:
    """Every reason that the evidence gives, in the order of :data:`RULES`."""
    found = []
    for name, levels, weight, rule in RULES:
        sentence = rule(evidence)
        if sentence is not None:
            found.append(Refusal(name, levels, weight, sentence))
    return tuple(found)


# -- nothing was done, too much was done ------------------------------------------------------------------------------


def _identity(e: Evidence) -> str | None:
    if e.kind == "private":  # an original, to which nothing needs to be done if its training hid the records
        return None
    removal = e.sections.removal
    if e.before and e.before == e.after:
        return "the model is byte for byte the one from before: nothing was done."
    if removal is not None and removal.before == removal.after:
        return "the zone is the one from before: nothing was removed."
    if e.kind == "edit" and e.parameters_changed == 0:
        return "no weight differs from the original's: nothing was done."
    return None if e.losses is None else _unmoved(e.losses)


def _unmoved(found: Losses) -> str | None:
    if found.moved == 0:
        return "the model answers for the forget samples exactly as the original does."
    if found.never and found.moved < SAME_LOSS * (min(found.never) - found.original):
        return "the losses on the forget samples are the original's: nothing was forgotten."
    return None


def _broken(e: Evidence) -> str | None:
    for kept in e.staying:
        yardstick = _yardstick(kept)
        if yardstick is None or not math.isfinite(kept.audited.value):
            continue
        high = kept.audited.high if math.isfinite(kept.audited.high) else kept.audited.value
        if kept.unit == "nats" and high < yardstick - LOST_NATS:
            return f"the model has lost what it must keep: {kept.name} is over {LOST_NATS} nats per token worse."
        if kept.unit == "share" and high < LOST_SHARE * yardstick:
            return f"the model has lost what it must keep: {kept.name} is under half of what it should be."
    return None


def _yardstick(kept: Staying) -> float | None:
    """What a model that kept everything reaches: the retrained ones, else the original."""
    known: Iterable[Interval] = kept.references or ((kept.original,) if kept.original else ())
    values = [i.value for i in known if math.isfinite(i.value)]
    return sum(values) / len(values) if values else None


def _utility_unknown(e: Evidence) -> str | None:
    equivalence, change = e.sections.equivalence, e.sections.change
    if equivalence is not None and any(not is_forget(name) for name in equivalence.arms):
        return None
    if change is not None or any(_yardstick(k) is not None for k in e.staying):
        return None
    return "nothing shows that the model still works: measure what must stay beside the original or a retrained model."


def is_forget(name: str) -> bool:
    """Whether a statistic speaks of the forget samples; "model_utility", "prob.retain" do not."""
    return ".forget" in name or name.startswith(("forget", "verdict", "relearn", "privleak"))


def _too_many(count: int, total: int, share: float) -> bool:
    """More than the calls' own error rate explains, at 97.5 % by Clopper-Pearson."""
    return total > 0 and clopper_pearson(count, total).low > share


def _over(e: Evidence) -> str | None:
    """By the calibrated calls; and by the median loss, past every model that never saw the data by half the way.

    The most extreme of these models is the yardstick, for retrained models differ among themselves.
    """
    v, found = e.verdicts, e.losses
    if found is not None and found.never:
        end = max(found.never)
        if end > found.original and found.own > end + BEYOND * (end - found.original):
            return "the losses on the forget samples are far above those of models that never saw them: over-forgotten."
    if v is not None and _too_many(v.over, v.n, v.fdr):
        return f"{v.over} of {v.n} auditable forget samples are over-unlearned: that is itself a trace of them."
    return None


def _under(e: Evidence) -> str | None:
    """By the calibrated calls; and by the median loss, when it lies nearer to the original's than to any other."""
    v, found = e.verdicts, e.losses
    if found is not None and found.never and not (e.kind == "private" and e.before == e.after):
        end = min(found.never)  # an original has no way to go from itself
        if end > found.original and found.own < end - BEYOND * (end - found.original):
            return "the losses on the forget samples are nearer to the original's than to any model's without them."
    if v is not None and _too_many(v.under, v.n, v.fdr):
        return f"{v.under} of {v.n} auditable forget samples are under-unlearned: they are still there."
    return None


# -- zones: what exactness rests on -----------------------------------------------------------------------------------


def _wrong_records(e: Evidence) -> str | None:
    removal = e.sections.removal
    if removal is None:
        return None
    asked, gone = set(removal.requested), set(removal.removed)
    if not asked:
        return "the removal names no requested record: there is nothing to claim about."
    if asked - gone:
        return f"{len(asked - gone)} of {len(asked)} requested record(s) were not removed."
    if gone - asked:
        return (
            f"{len(gone - asked)} record(s) were removed that nobody asked for: the zone is not the one without them."
        )
    return None


def _other_artefact(e: Evidence) -> str | None:
    """Evidence must be about the very model that is released: files of another run are not taken."""
    removal, found = e.sections.removal, e.sections.provenance
    own = {"zone": e.zone_digest, "retrain": e.after}.get(e.kind)
    if removal is not None and own and removal.after != own:
        return "the digests of the removal are those of another model."
    release, known = _release(e), [d for d in (e.zone_digest, e.after) if d]
    if release is not None and release.artefact and known and release.artefact not in known:
        return "the privacy figures are those of another model."
    if found is not None and e.after and found.artefact and found.artefact != e.after:
        return "the chain of manifests is that of another model."
    return None


def _unbound(e: Evidence) -> str | None:
    removal, found = e.sections.removal, e.sections.provenance
    if removal is not None and e.kind == "zone" and not e.zone_digest:
        return "nothing ties the digests of the removal to the released model."
    if found is not None and e.after and not found.artefact:
        return "nothing ties the chain of manifests to the released model."
    release = _release(e)
    if release is not None and not release.artefact:
        return "nothing ties the privacy figures to the released model."
    return None


def _release(e: Evidence) -> Released | None:
    return e.sections.residual or e.sections.reset or e.sections.private_training


def _private_statistics(e: Evidence) -> str | None:
    removal = e.sections.removal
    if removal is not None and removal.statistics == "private":
        return "statistics or gate of the zone were fitted on private data: removing rows leaves a trace in them."
    return None


def _unknown_statistics(e: Evidence) -> str | None:
    removal = e.sections.removal
    if removal is not None and removal.statistics == "unknown":
        return "nothing is known of what the zone's statistics and gate were fitted on."
    return None


def _batched_rows(e: Evidence) -> str | None:
    removal = e.sections.removal
    if removal is not None and removal.rows == "batched":
        return "rows were extracted in batches: they depend on the records that stood beside them."
    return None


def _moved_base(e: Evidence) -> str | None:
    removal = e.sections.removal
    if removal is not None and removal.base_before != removal.base_after:
        return "the base under the zone is not the one that the zone was built on."
    return None


def _saw(e: Evidence) -> str | None:
    found = e.sections.provenance
    if found is not None and found.finding == "saw":
        return f"something that it was made from saw the records: {found.sentence}."
    return None


def _no_provenance(e: Evidence) -> str | None:
    found = e.sections.provenance
    if found is None:
        return "no manifest says what the base was trained on: that it never saw the records is not known."
    return f"{found.sentence}." if found.finding == "unknown" else None


def _duplicates(e: Evidence) -> str | None:
    found = e.sections.duplicates
    if found is not None and found.open:
        return f"{found.open} near-duplicate(s) of what is to be forgotten stay and were not decided about."
    return None


def _no_duplicates(e: Evidence) -> str | None:
    if e.sections.duplicates is None:
        return "nobody looked for near-duplicates of the records among what stays."
    return None


# -- runs -------------------------------------------------------------------------------------------------------------


def _edited(e: Evidence) -> str | None:
    if e.kind == "edit":
        return "the weights of a trained model were edited: no exact or private claim can be made for it."
    if e.kind == "unknown":
        return "nothing says how the model came about: no exact or private claim can be made for it."
    return None


def _unfinished(e: Evidence) -> str | None:
    return None if e.finished else "the run did not end: run its command again to finish it."


def _not_converged(e: Evidence) -> str | None:
    r = e.sections.residual
    if r is not None and (r.residual > r.tolerance or r.reference_residual > r.reference_tolerance):
        return "the optimisation did not converge: a measured residual is above the tolerance that the noise rests on."
    return None


def _brought_in(e: Evidence) -> str | None:
    """Figures of a reset or a private training count for a model that such a run made, and that was made again."""
    release = _release(e)
    own = {"private": e.sections.private_training, "reset": e.sections.reset}.get(e.kind)
    if release is None or (own is None and e.kind not in NOISY and not isinstance(release, Replayed)):
        return None
    if own is not None and release is own and own.replayed is not None:
        return None
    return "nobody repeated what the privacy figures are about, from data and seeds: they are read, and not relied on."


def _other_bytes(e: Evidence) -> str | None:
    release = _release(e)
    if isinstance(release, Replayed) and release.replayed not in (None, release.artefact):
        return (
            "the same computation with the same seeds gives other bytes than the released model's: it was changed "
            "since, or made on another kind of machine."
        )
    return None


def _hidden_only(e: Evidence) -> str | None:
    if e.removes_from_weights is False and e.kind != "zone":  # a zone never put it there
        return "the method hides the data and declares that it stays in the weights."
    return None


def _unfit_split(e: Evidence) -> str | None:
    if e.split_unfit:
        return "forget and holdout samples can be told apart without any model: membership scores mean nothing here."
    return None


RULES: tuple[tuple[str, tuple[Level, ...], Weight, Rule], ...] = (
    ("edited", FORMAL, "unsupported", _edited),
    ("identity", LEVELS, "refuted", _identity),
    ("utility-lost", EVIDENCE_LEVELS, "refuted", _broken),
    ("over-unlearned", EVIDENCE_LEVELS, "refuted", _over),
    ("under-unlearned", LEVELS, "refuted", _under),
    ("wrong-records", LEVELS, "refuted", _wrong_records),
    ("other-artefact", FORMAL, "refuted", _other_artefact),
    ("private-statistics", FORMAL, "refuted", _private_statistics),
    ("batched-rows", FORMAL, "refuted", _batched_rows),
    ("base-changed", FORMAL, "refuted", _moved_base),
    ("base-saw-records", FORMAL, "refuted", _saw),
    ("near-duplicates", FORMAL, "refuted", _duplicates),
    ("not-converged", ("L1",), "refuted", _not_converged),
    ("other-bytes", ("L1",), "refuted", _other_bytes),
    ("hidden-only", ("L5",), "refuted", _hidden_only),
    ("near-duplicates", EVIDENCE_LEVELS, "flagged", _duplicates),
    ("hidden-only", ("L2", "L3", "L4"), "flagged", _hidden_only),
    ("unfinished", LEVELS, "unsupported", _unfinished),
    ("unbound", FORMAL, "unsupported", _unbound),
    ("statistics-unknown", FORMAL, "unsupported", _unknown_statistics),
    ("no-provenance", FORMAL, "unsupported", _no_provenance),
    ("no-duplicate-search", FORMAL, "unsupported", _no_duplicates),
    ("brought-in", ("L1",), "unsupported", _brought_in),
    ("utility-unknown", EVIDENCE_LEVELS, "unsupported", _utility_unknown),
    ("unfit-split", ("L4",), "unsupported", _unfit_split),
)
