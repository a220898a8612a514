"""How far the model's next-token distributions are from the retrained model's, where they matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expunge.errors import UserError
from expunge.metrics.registry import metric
from expunge.stats import Estimate, bootstrap_mean, hoeffding_mean


def per_sample(values: Sequence[NDArray[Any]]) -> list[float]:
    """Mean over tokens, and over references when there are several, of each sample; nan without tokens."""
    return [float(np.mean(v, dtype=np.float64)) if v.size else float("nan") for v in values]


@metric(
    name="tv",
    definition="tv/1",
    formula="mean over samples of mean over target tokens of 1/2 sum_v |p(v) - p_ref(v)|",
    direction="0 is best; the floor is the same number between two references with other seeds",
    source="total variation distance; averaged over references when there are several",
)
def tv(values: Sequence[NDArray[Any]], subjects: Sequence[str], finite_sample: bool = False) -> Estimate:
    """Mean total variation per target token to the retrained model(s), in [0, 1].

    ``values`` as :func:`expunge.signals.distribution.total_variation` gives them. Sees every change of the output
    distribution on these samples, in either direction, and nothing beyond these samples. ``finite_sample``:
    Hoeffding's bound over subjects (definition tv-hoeffding), valid at every n, in place of the bootstrap.
    """
    if len(values) != len(subjects):
        raise UserError(f"{len(values)} samples but {len(subjects)} subjects were given: each sample needs one.")
    means = per_sample(values)
    if finite_sample:
        return hoeffding_mean(means, subjects, definition="tv-hoeffding/1")
    return bootstrap_mean(means, subjects, definition="tv/1")
