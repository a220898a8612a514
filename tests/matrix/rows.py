"""One row per method: options that make it fast on the small worlds, and what it then has to reach."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """``forgets``: the forget loss rises. ``keeps``: the retain loss stays far below an untrained model's.

    ``of``: more options in one world. ``quick``: options that end after a few steps, beside ``epochs=1``.
    ``seedless``: nothing in the method is random.
    """

    options: dict[str, Any] = field(default_factory=lambda: {"epochs": 1})
    forgets: bool = False
    keeps: bool = False
    of: dict[str, dict[str, Any]] = field(default_factory=dict)
    quick: dict[str, Any] = field(default_factory=dict)
    seedless: bool = False


STEADY = {"epochs": 6, "batch_size": 3, "learning_rate": 4e-3}
ASCENT = {"vit": {"learning_rate": 1e-3}, "llava": {"learning_rate": 2e-3}}
STEERED = {"epochs": 20, "batch_size": 3, "learning_rate": 1e-2}
BOTTLENECKS = {"epochs": 50, "batch_size": 6, "retain_batch": 18, "gamma": 1.0, "rank": 32}
TABLE: dict[str, Row] = {
    "ga": Row(STEADY, forgets=True),
    "graddiff": Row(STEADY, forgets=True, keeps=True, of=ASCENT),
    "kl": Row(STEADY, forgets=True, keeps=True, of=ASCENT),
    "npo": Row(STEADY, forgets=True, keeps=True, of=ASCENT),
    "simnpo": Row({**STEADY, "epochs": 10}, forgets=True, keeps=True),
    "undial": Row({**STEADY, "epochs": 8}, forgets=True),
    "dpo": Row({**STEADY, "epochs": 16, "learning_rate": 6e-3}, forgets=True, keeps=True),
    "idk": Row(STEADY, forgets=True, keeps=True),
    "idk-nll": Row({**STEADY, "epochs": 10}, forgets=True),
    "wga": Row(STEADY, forgets=True, keeps=True, of=ASCENT),
    "satimp": Row(STEADY | {"gamma": 3.0}, forgets=True, keeps=True, of={"vit": {"gamma": 30, "learning_rate": 2e-3}}),
    "ceu": Row(STEADY, forgets=True, of=ASCENT),
    "altpo": Row(
        {**STEADY, "epochs": 16, "learning_rate": 6e-3},
        forgets=True,
        keeps=True,
        of={"vit": {"epochs": 6, "learning_rate": 1e-3}},
    ),
    "pdu": Row({**STEADY, "epochs": 16, "learning_rate": 6e-3}, forgets=True, keeps=True),
    "entropy": Row(STEADY, forgets=True, keeps=True, of=ASCENT),
    "random-labels": Row(STEADY, forgets=True, keeps=True, of=ASCENT),
    "finetune": Row({"epochs": 2, "batch_size": 6, "learning_rate": 1e-3}, keeps=True),
    "retrain": Row({"epochs": 25, "batch_size": 6, "learning_rate": 1e-2}, forgets=True, keeps=True),
    "reset": Row(
        {"epochs": 25, "batch_size": 6, "learning_rate": 1e-2, "reset_steps": 3, "noise_seed": "07" * 32},
        forgets=True,
        keeps=True,
        quick={"reset_steps": 2, "noise_seed": "07" * 32},
    ),
    "sparsity": Row({"epochs": 6, "batch_size": 6, "learning_rate": 0.05}, keeps=True),
    "boundary": Row(STEADY, forgets=True),
    "forsaken": Row(STEADY, forgets=True, keeps=True),
    "grad-projection": Row(
        {"epochs": 20, "batch_size": 3, "learning_rate": 0.1},
        forgets=True,
        keeps=True,
        of={"resnet": {"learning_rate": 0.3}, "vit": {"learning_rate": 0.07}},
        quick={"variance": 0.8},  # a fresh adapter's second matrix has few inputs
    ),
    "salun": Row(STEADY, forgets=True, keeps=True),
    "sure": Row(STEADY, forgets=True, keeps=True, of=ASCENT),
    "memflex": Row(STEADY, forgets=True, keeps=True, of={"vit": {"learning_rate": 2e-3}}),
    "rmu": Row(
        {**STEERED, "alpha": 3, "coefficient": 6.5, "layer": 1},
        forgets=True,
        keeps=True,
        of={"resnet": {"layer": 2, "alpha": 1}, "vit": {"layer": 2, "alpha": 1, "coefficient": 30}},
    ),
    "adaptive-rmu": Row(
        {**STEERED, "alpha": 20, "layer": 1},
        forgets=True,
        keeps=True,
        of={"resnet": {"layer": 2, "alpha": 5}, "vit": {"layer": 2, "alpha": 1, "beta": 3}},
    ),
    "bad-teacher": Row(
        {"epochs": 10, "batch_size": 4, "retain_share": 1.0, "learning_rate": 3e-3},
        forgets=True,
        keeps=True,
        of={"vit": {"learning_rate": 1e-3}},
    ),
    "task-vector": Row(
        {"epochs": 10, "batch_size": 3, "learning_rate": 8e-3},
        forgets=True,
        keeps=True,
        of={"vit": {"learning_rate": 3e-4, "largest": 4.0, "keep": 0.9}, "llava": {"learning_rate": 4e-3}},
    ),
    "llmu": Row(
        {"epochs": 10, "batch_size": 3, "learning_rate": 4e-3},
        forgets=True,
        keeps=True,
        of={"vit": {"learning_rate": 1e-3, "epochs": 30}, "llava": {"learning_rate": 2e-3}},
    ),
    "kga": Row(
        {"epochs": 20, "batch_size": 3, "learning_rate": 3e-3, "helper_rate": 2e-2, "helper_epochs": 30, "alpha": 1.0},
        forgets=True,
        keeps=True,
        of={"vit": {"learning_rate": 1e-3, "helper_rate": 2e-3}, "resnet": {"helper_rate": 5e-3}},
        quick={"helper_epochs": 3, "epochs": 6},
    ),
    "sku": Row(
        {"epochs": 10, "batch_size": 3, "learning_rate": 4e-3, "keep": 0.85},
        forgets=True,
        keeps=True,
        of={
            "resnet": {"learning_rate": 8e-3, "random": 0.0},  # of three classes, another one is no distraction
            "vit": {"learning_rate": 3e-4, "random": 0.0, "preserving": 0.2, "largest": 4.0},
        },
    ),
    "scrub": Row(
        {"epochs": 6, "batch_size": 3, "learning_rate": 4e-3},
        forgets=True,
        keeps=True,
        of={"vit": {"learning_rate": 1e-3}, "resnet": {"learning_rate": 2e-3}},
    ),
    "twins": Row(
        {"epochs": 30, "batch_size": 3, "learning_rate": 2e-3}, forgets=True, of={"resnet": {"learning_rate": 5e-3}}
    ),
    # Samples that were never learnt have large gradients everywhere: as retain samples they leave nothing at 1.
    "mmunlearner": Row(STEADY, forgets=True, keeps=True, of=ASCENT, quick={"threshold": 1e-3}),
    "relearn": Row({"epochs": 3, "batch_size": 6, "learning_rate": 4e-3}, forgets=True, keeps=True),
    "ssd": Row({}, forgets=True, of={"resnet": {"alpha": 1.2}, "vit": {"alpha": 1.2, "strength": 0.1}}, seedless=True),
    "eco": Row({}, forgets=True, keeps=True),
    "icu": Row({}, forgets=True),
    "whp": Row(
        {"epochs": 8, "batch_size": 3, "learning_rate": 4e-3},
        forgets=True,
        of={"vit": {"reinforce_epochs": 10, "reinforce_learning_rate": 3e-3}},
    ),
    "pcgu": Row(
        {"epochs": 10, "batch_size": 3, "learning_rate": 0.03},
        forgets=True,
        of={"resnet": {"learning_rate": 3.0}, "vit": {"learning_rate": 0.08}, "llava": {"learning_rate": 0.3}},
    ),
    "l-codec": Row(
        {"perturbations": 40, "damping": 1e-4, "budget": 1.0}, forgets=True, quick={"perturbations": 8, "units": 4}
    ),
    "fisher-removal": Row({"budget": 0.3}, forgets=True, keeps=True, quick={"steps": 1, "samples": 6}),
    "fisher-forgetting": Row({"budget": 1.0}, forgets=True, quick={"samples": 6}),
    "fisher-noise": Row({"budget": 1.0}, forgets=True, quick={"samples": 6}),
    "cluster": Row(
        {"steps": 30},
        forgets=True,
        keeps=True,
        of={
            "resnet": {"other_learning_rate": 5e-3, "groups": "all"},
            "vit": {"other_learning_rate": 5e-3, "groups": "all"},
        },
    ),
    "eul": Row(
        {"epochs": 10, "batch_size": 3, "learning_rate": 2e-2},
        forgets=True,
        keeps=True,
        of={"resnet": {**BOTTLENECKS, "epochs": 40}, "vit": BOTTLENECKS},
    ),
    "codeunlearn": Row({"epochs": 12, "codes": 128, "batch_size": 6, "learning_rate": 1e-2}, keeps=True),
    "o3": Row({"epochs": 8, "batch_size": 3}, forgets=True, keeps=True),
}
