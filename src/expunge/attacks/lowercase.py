"""Lowercase: a text that was learnt letter by letter suffers when its capitals go (Carlini et al. 2021)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from expunge.attacks.context import measured
from expunge.attacks.exam import Checkpoint, Exam
from expunge.attacks.registry import Finding, NoOptions, attack
from expunge.data.samples import Sample
from expunge.signals.record import Signals


def lowered(sample: Sample) -> Sample:
    """The sample with its answer in lower case; the prompt, which is not judged, stays."""
    return replace(sample, id=f"{sample.id}/lowercase", target=str(sample.target).lower(), probes=())


def lowercase_score(signals: Signals, lower: Signals) -> float:
    """-loss(x) / loss(lower(x)); nan where a side has no token, or the lower-case text is certain."""
    return -signals.loss / lower.loss if len(signals) and len(lower) and lower.loss > 0 else math.nan


@attack(
    name="lowercase",
    family="membership",
    tier="quick",
    access="log-probabilities",
    paper="Carlini et al. 2021, Extracting Training Data from Large Language Models (arXiv:2012.07805), section 5.2",
    formula="-loss(x) / loss(lower(x))",
    passes=1.0,
    modalities={"text", "multimodal"},
)
def lowercase(exam: Exam, checkpoint: Checkpoint, options: NoOptions) -> Finding:
    """Loss of the text against the loss of the same text in lower case.

    Near 0 when lower case alone makes a known text strange, -1 when case makes no difference, as on a text that was
    never seen. A text without capitals is its own lower case and gets nan: the score would be -1 whatever the model
    knows.
    """
    roles = measured(exam)
    scores = {role: _scores(checkpoint, samples) for role, samples in roles.items()}
    same = sum(_plain(s) for samples in roles.values() for s in samples)
    notes = [f"{same} text(s) have no capital letter and cannot be judged by lower case"] if same else []
    return Finding(scores={"lowercase": scores}, notes=notes)


def _plain(sample: Sample) -> bool:
    return str(sample.target) == str(sample.target).lower()


def _scores(checkpoint: Checkpoint, samples: Sequence[Sample]) -> list[float]:
    told = [s for s in samples if not _plain(s)]
    pairs = zip(checkpoint.signals(told), checkpoint.signals([lowered(s) for s in told]), strict=True)
    found = iter([lowercase_score(*pair) for pair in pairs])
    return [math.nan if _plain(s) else next(found) for s in samples]
