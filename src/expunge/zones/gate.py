"""The gate of the router: a logistic model on the features of :mod:`expunge.zones.router`, fitted on public texts.

Fitted on surrogates (public people under made-up names) and calibrated on public subjects that the fit did not use:
the threshold is the smallest at which at most ``false_open`` of their texts open any block at any position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expunge.data.samples import Sample
from expunge.stats import clopper_pearson
from expunge.zones.router import FEATURES, Router
from expunge.zones.surrogates import Surrogates
from expunge.zones.text_stats import inverse_frequency, public_ids, vocabulary_size
from expunge.zones.zone import Array, Block, FrozenBase, Row, record_of

RIDGE = 1e-2  # penalty on the weights, per example: keeps separable data finite
CHANCE = 0.2  # a block never opens below this probability, however quiet the calibration texts are


def routing(
    base: FrozenBase, public: Sequence[Sample], made: Surrogates, false_open: float
) -> tuple[dict[str, Array], dict[str, float]]:
    """idf and gate weights, and the constants of the router, from public samples.

    The constants say how the calibration went: ``false_open`` of ``calibrated`` texts with the upper end of its 95 %
    Clopper-Pearson interval, and ``open_stored``, the share of the surrogates' own and paraphrased questions that open.
    """
    idf_V = inverse_frequency(public_ids(public, base), vocabulary_size(base))
    router = Router(idf_V, np.zeros(len(FEATURES) + 1, dtype=np.float32), 0.0, typical_mass(public, base, idf_V))
    router.index(blocks_of(made.stored, base))
    here, others = [], []
    asked = [(s, s.subject) for s in questions(made.stored)]
    for sample, subject in [*asked, *((s, "") for s in questions(made.fit))]:
        features_SF = _at_question(router, sample, base)
        own = router.subjects.index(subject) if subject else -1
        if own >= 0:
            here.append(features_SF[own])
        order_S = np.argsort(-features_SF[:, 2], kind="stable")[:4]  # the nearest others are all that matters
        others += [features_SF[s] for s in order_S if s != own]
    router.gate_F1 = fit_logistic(np.array(here), np.array(others))
    texts = [base.adapter.cached(s).ids for s in questions(made.calibrate)]
    highest_N = np.sort([float(router.best(ids).max()) for ids in texts])
    allowed = int(false_open * len(texts))
    # Strictly above the (allowed + 1)-th largest, so that at most `allowed` texts open.
    router.threshold = float(
        max(np.nextafter(highest_N[-1 - min(allowed, len(texts) - 1)], np.inf), np.log(CHANCE / (1 - CHANCE)))
    )
    opened = int((highest_N >= router.threshold).sum())
    stored = [
        float(router.best(base.adapter.cached(s).ids)[router.subjects.index(who)]) >= router.threshold
        for s, who in asked
    ]
    constants = {
        "threshold": router.threshold,
        "typical": router.typical,
        "false_open": opened / len(texts),
        "false_open_high": clopper_pearson(opened, len(texts)).high,
        "calibrated": len(texts),
        "open_stored": float(np.mean(stored)),
    }
    return {"idf": idf_V, "gate": router.gate_F1}, constants


def blocks_of(samples: Sequence[Sample], base: FrozenBase) -> dict[str, Block]:
    """Blocks without tensors, which is all that a router looks at."""
    blocks: dict[str, Block] = {}
    for s in samples:
        record = record_of(s, base.adapter, (), s.digest())
        blocks.setdefault(s.subject, Block(s.subject)).rows[s.id] = Row(record, {})
    return blocks


def questions(samples: Sequence[Sample]) -> list[Sample]:
    """The samples and their paraphrase probes, which ask the same in other words."""
    return [q for s in samples for q in (s, *(s.as_probe(p, i) for i, p in enumerate(s.probes_of("paraphrase"))))]


def typical_mass(public: Sequence[Sample], base: FrozenBase, idf_V: Array) -> float:
    """Mean idf² mass of the public prompts (of documents: of the whole text)."""
    bags = []
    for s in public:
        coded = base.adapter.cached(s)
        bags.append(sorted(set(coded.ids[: coded.first] if s.prompt else coded.ids)))
    return float(np.mean([np.square(idf_V[b], dtype=np.float64).sum() for b in bags]))


def _at_question(router: Router, sample: Sample, base: FrozenBase) -> Array:
    """Features (S, F) where the answer begins; of a document after its first half."""
    coded = base.adapter.cached(sample)
    end = coded.first if sample.prompt else max(1, len(coded.ids) // 2)
    return router.read(router.start(), coded.ids[:end])[0].features_SF


def fit_logistic(here_NF: Array, others_NF: Array, steps: int = 50) -> Array:
    """Weights and constant (F + 1,) float32 of a ridge-penalised logistic regression, both classes weighing the same.

    Newton's method from zero, deterministic; weights are kept at or above 0, because more of any feature can only
    speak for the subject (projected steps).
    """
    x = np.vstack([here_NF, others_NF]).astype(np.float64)
    x = np.hstack([x, np.ones((len(x), 1))])
    y = np.r_[np.ones(len(here_NF)), np.zeros(len(others_NF))]
    weight = np.where(y == 1, 0.5 / max(1, len(here_NF)), 0.5 / max(1, len(others_NF)))
    penalty = np.full(x.shape[1], RIDGE)
    penalty[-1] = 1e-6
    w = np.zeros(x.shape[1])
    free = np.ones(x.shape[1], dtype=bool)
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -500, 500)))
        gradient = x.T @ (weight * (p - y)) + penalty * w
        # A weight at its bound stays there while the gradient pushes outwards.
        free = (w > 0) | (gradient < 0)
        free[-1] = True
        hessian = (x[:, free] * (weight * p * (1 - p))[:, None]).T @ x[:, free] + np.diag(penalty[free])
        step = np.zeros_like(w)
        step[free] = np.linalg.solve(hessian, gradient[free])
        trial = w - step
        trial[:-1] = np.maximum(trial[:-1], 0)
        if np.abs(trial - w).max() < 1e-10:
            w = trial
            break
        w = trial
    found: Array = w.astype(np.float32)
    return found
