"""Adaptive RMU: the random direction is as long as the original's hidden states times a factor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from expunge.data.samples import Sample
from expunge.methods.registry import Context, Outcome, method
from expunge.methods.rmu import States, SteeringOptions, padded, steer
from expunge.options import option


@dataclass(frozen=True, kw_only=True)
class AdaptiveRmuOptions(SteeringOptions):
    """Adaptive RMU."""

    beta: float = option(5.0, "length of the target vectors, in lengths of the original's states", "paper: β = 5")


@method(
    name="adaptive-rmu",
    options=AdaptiveRmuOptions,
    paper="Dang et al. 2024, arXiv:2408.06223, adaptive RMU",
    formula="E_f ‖h_ℓ − β·‖h_ℓ,o‖·u‖² + α · E_r ‖h_ℓ − h_ℓ,o‖²",
    wants=frozenset({"retain"}),
    changes="some",
)
def adaptive_rmu(context: Context, options: AdaptiveRmuOptions) -> Outcome:
    """RMU whose target vectors are β times as long as the original's states, token by token.

    A fixed length does nothing where states are longer than it (deep layers); this one fits every layer and model. The
    paper's retain weight was chosen for a retain corpus unlike the forget texts; where both share their form it holds
    everything (a model of 0.3 million parameters forgot nothing of ``people``), and a hundredth of it forgets.
    """

    def lengths(states: States) -> Callable[[Sequence[Sample], int], Tensor]:
        norms = states.take(context.model, context.forget, lambda states_TD: states_TD.norm(dim=1))
        return lambda samples, places: options.beta * padded(norms, samples, places)[..., None]

    return steer(context, options, "adaptive-rmu", lengths)
