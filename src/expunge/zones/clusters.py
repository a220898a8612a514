"""Clusters of subjects by where their records lie among public ones.

Centres are k-means centres (Lloyd 1982) of public subjects, in the standardised states of the middle layer. A private
subject belongs to the centre nearest to the mean of its own records: a function of these records and of public
artefacts, in which no other private subject has a say.

Shape suffixes: D hidden width, K clusters, R records of a subject.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.cluster import KMeans

from expunge.data.samples import Sample, subjects
from expunge.errors import UserError
from expunge.zones.linear_algebra import one_thread
from expunge.zones.text_stats import layer_of, spread
from expunge.zones.zone import Array, Block, FrozenBase, Record, record_of

DEPTH = 0.5


def fit_centres(base: FrozenBase, public: Sequence[Sample], clusters: int, seed: int) -> dict[str, Array]:
    """``cluster.mean``, ``cluster.deviation`` (D,) and ``cluster.centres`` (K, D) float32, from public samples.

    Raises:
        UserError: fewer public subjects than clusters.
    """
    people = sorted(subjects(public))
    if len(people) < clusters:
        raise UserError(
            f"{clusters} clusters were asked for, and the public texts have {len(people)} subjects: give at most as "
            "many clusters, or more public texts."
        )
    mean_D, deviation_D = spread(public, base, layer_of(base, DEPTH))
    arrays: dict[str, Array] = {"cluster.mean": mean_D, "cluster.deviation": deviation_D}
    records = [record_of(s, base.adapter, (), s.digest()) for s in sorted(public, key=lambda s: s.id)]
    places = {who: [place_of(r, base, arrays)[0] for r in records if r.owners[0] == who] for who in people}
    middles_SD = np.array([np.mean(places[who], axis=0, dtype=np.float64) for who in people])
    with one_thread():
        found = KMeans(clusters, n_init=4, random_state=seed).fit(middles_SD)
    arrays["cluster.centres"] = found.cluster_centers_.astype(np.float32)
    return arrays


def place_of(record: Record, base: FrozenBase, arrays: Mapping[str, Array]) -> tuple[Array, str]:
    """Mean standardised state (D,) float32 over the record's positions, and a fingerprint of the raw states."""
    states_TD = base.states(record)[0][layer_of(base, DEPTH)].cpu().numpy()
    normal_TD = (states_TD - arrays["cluster.mean"]) / arrays["cluster.deviation"]
    place_D: Array = normal_TD.mean(axis=0, dtype=np.float64).astype(np.float32)
    return place_D, hashlib.sha256(np.ascontiguousarray(states_TD).tobytes()).hexdigest()


def cluster_of(block: Block, arrays: Mapping[str, Array]) -> int:
    """The nearest centre to the mean of the block's records; the first of several."""
    middle_D = np.mean([row.tensors["place"] for row in block.sorted()], axis=0, dtype=np.float64)
    return int(np.square(arrays["cluster.centres"] - middle_D).sum(1).argmin())
