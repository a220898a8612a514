"""Registers the flagship, whose parts stand in ``cluster/``."""

from __future__ import annotations

from expunge.methods.cluster.options import ClusterOptions
from expunge.methods.registry import Context, Outcome, method


@method(
    name="cluster",
    options=ClusterOptions,
    paper="Expunge; idea of cluster-driven unlearning: MLR-Bench 2025, rebuilt (docs/methods.md)",
    needs=frozenset(),
    wants=frozenset({"retain", "base", "unseen"}),
    sequential="protect",
    helpers_hold_data=True,  # the proxy is trained on the retain set; it is dropped at the end
    formula="4 JS(q, p) + .12 d²/(1 + |d|/4) on chosen tokens of f + 6 NLL(r); q calibrated ensemble, d = log p/q (y)",
)
def cluster(context: Context, options: ClusterOptions) -> Outcome:
    """Edit towards what a model without the data could say, where the data has its influence."""
    from expunge.methods.cluster.method import run

    return run(context, options)
