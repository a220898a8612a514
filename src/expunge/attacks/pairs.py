"""Membership scores from the signals of two models: against one that never saw the sample, and against the original.

The first kind takes the difficulty of a text out of its loss. The second asks what unlearning has changed: its score
is the trace that a sample was in the forget request, which an exact retrain leaves as well.

Models with different tokenizers are compared in bits per byte, and the note says so; what needs the same tokens in
both (EZ-MIA, WBC) is then left out. Shape suffix: L target tokens of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.membership import ALL, WORDS, read
from expunge.attacks.registry import Finding, NoOptions, attack
from expunge.data.samples import Role
from expunge.errors import UserError
from expunge.options import option
from expunge.signals.record import Signals

LOSS_FLOOR = 1e-6  # nats per token; below this both models know the text by heart
WINDOWS = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)  # tokens; the paper's (arXiv:2601.02751)
SMOOTHING = 0.01  # nats per token: a shift below this is rounding, not memory

Floats = NDArray[np.float64]
PairScore = Callable[[Signals, Signals, bool], float]  # own signals, the other model's, whether tokens are the same


# -- scores of one sample under two models -------------------------------------------------------------------------


def log_prob(signals: Signals, per_byte: bool) -> float:
    """Mean log-probability in nats per target token, or per UTF-8 byte; nan per byte for a text that was cut."""
    if not per_byte:
        return -signals.loss
    return math.nan if signals.truncated else -signals.bits_per_byte * math.log(2)


def ratio_score(ours: Signals, theirs: Signals, same_tokens: bool) -> float:
    """Minus loss over the other model's loss (Carlini et al. 2021)."""
    own, other = log_prob(ours, not same_tokens), log_prob(theirs, not same_tokens)
    return own / max(-other, LOSS_FLOOR)


def difference_score(ours: Signals, theirs: Signals, same_tokens: bool) -> float:
    """The other model's loss minus ours (Watson et al. 2022): nats per token, or bits per byte."""
    gap = log_prob(ours, not same_tokens) - log_prob(theirs, not same_tokens)
    return gap if same_tokens else gap / math.log(2)


def logit_difference_score(ours: Signals, theirs: Signals, same_tokens: bool) -> float:
    """Difference of log(p / (1 - p)) with p the geometric mean of the token (or byte) probabilities."""
    return _logit(log_prob(ours, not same_tokens)) - _logit(log_prob(theirs, not same_tokens))


def _logit(log_p: float) -> float:
    log_p = min(log_p, -1e-12)  # a loss of exactly 0 would be infinitely sure
    return log_p - math.log(-math.expm1(log_p))


def ez_score(ours: Signals, theirs: Signals, smoothing: float = SMOOTHING) -> float:
    """log of (rise + s) / (fall + s) of log p against the other model, at the tokens that our model gets wrong.

    The paper's ratio of sums is undefined where no token fell or no token is wrong, which is where a text is known
    best. So both are means with one pseudo-token that carries the mean rise and fall of the whole text, plus ``s``
    nats: a text known by heart then scores by how far all of it rose, above any that has wrong tokens left.
    """
    if not len(ours):
        return math.nan
    shift_L = ours.log_prob_L.astype(np.float64) - theirs.log_prob_L
    rise_L, fall_L = np.maximum(shift_L, 0.0), np.maximum(-shift_L, 0.0)
    wrong_L = ~ours.hit_L
    weight = 1.0 + float(wrong_L.sum())
    rise = (rise_L[wrong_L].sum() + rise_L.mean()) / weight
    fall = (fall_L[wrong_L].sum() + fall_L.mean()) / weight
    return math.log((rise + smoothing) / (fall + smoothing))


def window_score(ours: Signals, theirs: Signals, windows: Sequence[int] = WINDOWS) -> float:
    """Mean over window sizes of the share of windows in which our model's summed loss is the lower one.

    Sizes that the text cannot hold are left out; a text of one token is one window.
    """
    if not len(ours):
        return math.nan
    gain_L = ours.log_prob_L.astype(np.float64) - theirs.log_prob_L
    sums = np.concatenate([[0.0], np.cumsum(gain_L)])
    sizes = [w for w in windows if w <= len(ours)] or [len(ours)]
    won = [np.count_nonzero(sums[w:] > sums[:-w]) / (len(ours) - w + 1) for w in sizes]
    return sum(won) / len(won)


# -- whom to compare with ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class AgainstOptions:
    """Options of attacks that compare with models that never saw the forget samples."""

    against: str = option(
        "auto",
        "which models: auto = shadows, else the base, else references, so that all checkpoints meet the same ones",
        choices=("auto", "shadows", "base", "references", "all"),
    )


def rivals(exam: Exam, checkpoint: Checkpoint, against: str) -> list[Checkpoint]:
    """The models that this one is compared with, itself never among them."""
    kinds = {"shadows": exam.shadows, "base": [exam.base] if exam.base else [], "references": exam.references}
    others = exam.others(checkpoint)
    groups = [[c for c in kind if c in others] for kind in kinds.values()]
    if against == "all":
        return others
    if against == "auto":
        return next((group for group in groups if group), [])
    return groups[list(kinds).index(against)]


def same_tokens(first: Checkpoint, second: Checkpoint, ours: Sequence[Signals], theirs: Sequence[Signals]) -> bool:
    """Whether both models read the same target tokens: one vocabulary, and equal ids for every sample."""
    vocabularies = [_vocabulary(c) for c in (first, second)]
    if first.adapter is not second.adapter and vocabularies[0] != vocabularies[1]:
        return False
    return all(np.array_equal(a.ids_L, b.ids_L) for a, b in zip(ours, theirs, strict=True))


def _vocabulary(checkpoint: Checkpoint) -> Any:
    tokenizer = getattr(checkpoint.adapter, "tokenizer", None)
    return tokenizer.get_vocab() if tokenizer is not None else None


def compared(
    exam: Exam, checkpoint: Checkpoint, against: Sequence[Checkpoint], name: str, score: PairScore, *, tokens: bool
) -> Finding:
    """The score of every measured sample, averaged over the models ``against``.

    ``tokens``: the score needs the same tokens in both models; others are left out, with a note.
    """
    if not against:
        return Finding(notes=[f"{name}: there is no other model to compare {checkpoint.name} with"])
    own = read(exam, checkpoint)
    columns: dict[Role, list[Floats]] = {role: [] for role in own}
    notes = []
    for other in against:
        theirs = read(exam, other)
        same = all(same_tokens(checkpoint, other, own[role], theirs[role]) for role in own)
        if not same:
            how = "left out" if tokens else "compared in bits per byte"
            notes.append(f"{name}: {other.name} has other tokens than {checkpoint.name} and was {how}")
        if same or not tokens:
            for role in own:
                pairs = zip(own[role], theirs[role], strict=True)
                columns[role].append(np.array([score(a, b, same) for a, b in pairs], dtype=np.float64))
    if not all(columns.values()):
        return Finding(notes=notes)
    return Finding({name: {role: np.mean(found, axis=0).tolist() for role, found in columns.items()}}, notes=notes)


# -- against a model that never saw the sample ---------------------------------------------------------------------


@attack(
    name="reference_ratio",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="Carlini et al. 2021, arXiv:2012.07805",
    formula="-loss / loss of a model that never saw the sample",
    options=AgainstOptions,
    passes=1.0,  # of each other model, once for all pair attacks
    needs=("other",),
    modalities=ALL,
)
def reference_ratio(exam: Exam, checkpoint: Checkpoint, options: AgainstOptions) -> Finding:
    """Loss over the loss of a model that never saw the sample.

    Takes the difficulty of the text out: near -1 for what the other model finds as easy, near 0 for what only this one
    knows. Models with other tokens are compared in bits per byte.
    """
    against = rivals(exam, checkpoint, options.against)
    return compared(exam, checkpoint, against, "reference_ratio", ratio_score, tokens=False)


@attack(
    name="reference_difference",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="Watson et al. 2022, arXiv:2111.08440",
    formula="loss of a model that never saw the sample - loss",
    options=AgainstOptions,
    passes=1.0,  # of each other model, once for all pair attacks
    needs=("other",),
    modalities=ALL,
)
def reference_difference(exam: Exam, checkpoint: Checkpoint, options: AgainstOptions) -> Finding:
    """How much lower the loss is than that of a model that never saw the sample.

    Difficulty calibration, in nats per token (bits per byte between models with other tokens). Above 0 the text is
    easier here than for the mean of the other models.
    """
    against = rivals(exam, checkpoint, options.against)
    return compared(exam, checkpoint, against, "reference_difference", difference_score, tokens=False)


@dataclass(frozen=True, kw_only=True)
class EZOptions(AgainstOptions):
    """Options of EZ-MIA."""

    smoothing: float = option(SMOOTHING, "nats per token added to rise and fall, above 0; the paper adds nothing")

    def __post_init__(self) -> None:
        if not self.smoothing > 0:
            raise UserError(f"smoothing {self.smoothing} is not above 0: give for example 0.01.")


@attack(
    name="ez_mia",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="EZ-MIA 2026, arXiv:2601.12104; smoothed here",
    formula="log (mean rise + s) / (mean fall + s) of log p against the other model, over wrongly predicted tokens",
    options=EZOptions,
    passes=1.0,  # of each other model, once for all pair attacks
    needs=("other",),
    modalities=WORDS,
)
def ez_mia(exam: Exam, checkpoint: Checkpoint, options: EZOptions) -> Finding:
    """Whether even the tokens that the model gets wrong are likelier than under a model that never saw the sample.

    Only error tokens count, those that are not the arg-max: there memory shows first. The paper's ratio of sums is
    undefined, or 0, for a text without error tokens or without a fall, which are those known best; here both sums are
    means with one pseudo-token of the text's own mean shift, plus ``smoothing``. Models with other tokens are left
    out.
    """
    against = rivals(exam, checkpoint, options.against)
    score: PairScore = lambda ours, theirs, same: ez_score(ours, theirs, options.smoothing)  # noqa: E731
    return compared(exam, checkpoint, against, "ez_mia", score, tokens=True)


@attack(
    name="wbc",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="WBC 2026, arXiv:2601.02751",
    formula="mean over window sizes 2 to 40 of the share of windows whose summed loss is below the other model's",
    options=AgainstOptions,
    passes=1.0,  # of each other model, once for all pair attacks
    needs=("other",),
    modalities=WORDS,
)
def wbc(exam: Exam, checkpoint: Checkpoint, options: AgainstOptions) -> Finding:
    """In how many windows of the text the model beats one that never saw it.

    Window-based comparison: a share of wins instead of a sum of losses, so that one odd token decides nothing. 1 means
    lower loss in every window, 0.5 is chance. Models with other tokens are left out.
    """
    against = rivals(exam, checkpoint, options.against)
    return compared(exam, checkpoint, against, "wbc", lambda a, b, same: window_score(a, b), tokens=True)


# -- against the original ------------------------------------------------------------------------------------------


def update(exam: Exam, checkpoint: Checkpoint, name: str, score: PairScore) -> Finding:
    """A pair score with the roles exchanged: how much better the original knows the sample than this checkpoint."""
    assert exam.original is not None  # declared as a need
    found = compared(exam, checkpoint, [exam.original], name, lambda a, b, same: score(b, a, same), tokens=False)
    note = f"{name} shows what was in the forget request, not what is left: an exact retrain shows it too"
    return Finding(found.scores, notes=[*found.notes, note])


@attack(
    name="update_loss",
    family="membership",
    tier="quick",
    access="both checkpoints",
    paper="Chen et al. 2021, arXiv:2005.02205",
    formula="loss after unlearning - loss of the original",
    needs=("original",),
    modalities=ALL,
    two_sided=False,
)
def update_loss(exam: Exam, checkpoint: Checkpoint, options: NoOptions) -> Finding:
    """Trace of the request: how far the loss has risen since the original.

    It finds what was in the forget request, not what is left: an exact retrain shows it as well, and so does every good
    method. Read it beside the reference's: a clearly higher AUC means that the forgetting left a mark of its own.
    """
    return update(exam, checkpoint, "update_loss", difference_score)


@attack(
    name="update_logit",
    family="membership",
    tier="quick",
    access="both checkpoints",
    paper="Chen et al. 2021, arXiv:2005.02205, on the logit scale of Carlini et al. 2022, arXiv:2112.03570",
    formula="logit p of the original - logit p after unlearning, p = exp(-loss)",
    needs=("original",),
    modalities=ALL,
    two_sided=False,
)
def update_logit(exam: Exam, checkpoint: Checkpoint, options: NoOptions) -> Finding:
    """Trace of the request on the logit scale, where a fall from near certainty counts for more.

    As ``update_loss``, with log(p / (1 - p)): it finds what was in the forget request, also in an exact retrain.
    """
    return update(exam, checkpoint, "update_logit", logit_difference_score)
