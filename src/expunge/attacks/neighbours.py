"""Neighbours of the forget samples among texts that may be learnt: by topic, and by the frame of the sentence.

Relearning attacks learn them in place of the forgotten. Related public text is enough (Hu et al. 2025,
arXiv:2406.13356), and questions of the same syntax do more than questions on the same topic (Yoon et al. 2026,
arXiv:2602.03379).

Shape suffixes: F forget samples, P samples of the pool.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from expunge.attacks.context import text_of
from expunge.attacks.exam import Exam
from expunge.data.samples import Sample
from expunge.metrics.rouge import longest_common_subsequence

PIECE = re.compile(r"\w+|[^\w\s]")
SLOT = "_"
FRAME_SHARE = 0.1  # a word that the texts of at least this share of the subjects have belongs to the frame

Frame = tuple[str, ...]


def pool(exam: Exam) -> list[Sample]:
    """What may be learnt in place of the forgotten: retain and auxiliary samples of other subjects, each text once.

    Nothing that a recovery attack measures is among them, nor a text that names a forget subject. The order depends
    on contents and the exam's seed alone; an empty list when there is nothing.
    """
    subjects = {s.subject for s in exam.forget}
    names = {name.casefold() for s in exam.forget for name in s.names}
    measured = {s.digest() for s in (*exam.forget, *exam.holdout)}
    found: dict[str, Sample] = {}
    for sample in (*exam.trained, *exam.samples.get("retain", []), *exam.aux):
        digest, text = sample.digest(), text_of(sample).casefold()
        if sample.subject in subjects or digest in measured or any(name in text for name in names):
            continue
        found.setdefault(digest, sample)
    order = exam.rng("neighbours", "pool").permutation(len(found))
    digests = sorted(found)
    return [found[digests[i]] for i in order]


def topical(forget: Sequence[Sample], candidates: Sequence[Sample], count: int) -> list[Sample]:
    """The ``count`` candidates with the largest TF-IDF cosine to any forget sample, nearest first; ties in order."""
    if not candidates:
        return []
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\w+|[^\w\s]")
    rows = vectorizer.fit_transform([text_of(s) for s in (*forget, *candidates)])
    similarity_FP = (rows[: len(forget)] @ rows[len(forget) :].T).toarray()
    return nearest(similarity_FP.max(0), candidates, count)


def syntactic(forget: Sequence[Sample], candidates: Sequence[Sample], count: int) -> list[Sample]:
    """The ``count`` candidates whose frame is most like that of any forget sample, by :func:`frame_similarity`."""
    if not candidates:
        return []
    found = frames([*forget, *candidates])
    wanted = sorted(set(found[: len(forget)]))
    best: dict[Frame, float] = {}  # questions share few frames, so each is compared once
    for frame in found[len(forget) :]:
        if frame not in best:
            best[frame] = max(frame_similarity(frame, other) for other in wanted)
    return nearest(np.array([best[f] for f in found[len(forget) :]]), candidates, count)


def nearest(similarity_P: np.ndarray, candidates: Sequence[Sample], count: int) -> list[Sample]:
    """The ``count`` candidates of the largest similarity; of equal ones the earlier first."""
    # Rounded, so that the last bits of a sum cannot decide between candidates that are equally near.
    order = np.argsort(-np.round(similarity_P, 9), kind="stable")[:count]
    return [candidates[i] for i in order]


def frames(samples: Sequence[Sample]) -> list[Frame]:
    """The question (a document: its text) of each sample with names and content words masked by one slot per run.

    Content words are those that the questions of few subjects share (under ``FRAME_SHARE`` of the subjects, or one);
    numbers and the sample's own names always are. So no list of words is needed, and any language is treated alike.

    >>> ask = lambda who, what: Sample(id=who, subject=who, prompt=f"Where was {who} {what}?", target="x")
    >>> frames([ask("Ada", "born"), ask("Bo", "born"), ask("Cy", "lost")])[2]
    ('where', 'was', '_', '?')
    """
    pieces = [[p.casefold() for p in PIECE.findall(s.prompt or str(s.target))] for s in samples]
    holders: dict[str, set[str]] = {}
    for sample, words in zip(samples, pieces, strict=True):
        for word in set(words):
            holders.setdefault(word, set()).add(sample.subject)
    enough = max(2.0, FRAME_SHARE * len({s.subject for s in samples}))
    common = {w for w, who in holders.items() if len(who) >= enough and not w.isdigit()}
    found = []
    for sample, words in zip(samples, pieces, strict=True):
        own = {p.casefold() for name in sample.names for p in PIECE.findall(name)}
        masked = [w if w in common and w not in own else SLOT for w in words]
        found.append(tuple(w for i, w in enumerate(masked) if w != SLOT or i == 0 or masked[i - 1] != SLOT))
    return found


def frame_similarity(first: Frame, second: Frame) -> float:
    """2 |LCS| / (|first| + |second|) in words, from 0 to 1: one minus the insert-delete distance, normalized."""
    total = len(first) + len(second)
    return 2 * longest_common_subsequence(first, second) / total if total else 1.0
