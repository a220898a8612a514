"""docs/leaderboard.md from finished studies: ``python -m expunge.cli.leaderboard_page docs/leaderboard.md RUN…``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from expunge.bench.plan import StudyOptions, everything
from expunge.data.samples import Modality
from expunge.errors import UserError
from expunge.files import write_text
from expunge.report.markdown import rank_lines
from expunge.report.schema import parse_results
from expunge.runs import read_config

HEAD = """# Leaderboard

Every method of this project against models that were retrained without the forget set. Distances are two-sided: 0 is
the retrained model, 1 the original of the same seed; less than 0 does not exist. `behaviour` is what the model says of
the forget set, `distribution` the total variation beyond the floor between retrained models, `membership` the loss
attack, `robustness` what relearning and 4-bit quantization bring back, `utility` the largest relative difference in
probability on retain and utility samples. The rank is taken within each seed and axis and averaged over the five axes;
cost (share of retraining's FLOPs) does not enter. `in the weights: no` marks guards and modules beside the weights: who
takes them off has the original.

Small models on two CPU cores: the order at seven billion parameters may be another. Defaults are the papers', with the
learning rate raised for small models by one rule (docs/methods.md), unless the command says `--tune`. The defaults of
`cluster` were chosen on populations of `people` and nobody else's were: only studies with `--tune` give all the same
chance. Where a method's own default does nothing here (a distance of 1 on every axis), its page in docs/papers.md and
docs/log.md say why.

TOFU is cut to slices that two cores can do: 4 of 40 private authors are forgotten (10 %, TOFU's forget10), 1 of 20
(5 %, forget05) and 1 of 60 (1.7 %, in place of forget01); base, holdout and the first author to go are the same in all
three.
"""
LEFT_OUT = {
    "device",
    "dtype",
    "template",
    "context",
    "lora",
    "data_seed",
    "command",
    "evaluate",
    "calibration",
    "precision",
}
DEFAULTS = {f.name: f.default for f in fields(StudyOptions)}


def page(folders: Sequence[Path]) -> str:
    """One section per study.

    Raises:
        UserError: a folder without results that can be compared.
    """
    parts = [HEAD]
    for folder in folders:
        results = parse_results(json.loads((folder / "results.json").read_text(encoding="utf-8")), str(folder))
        lines = rank_lines(results)
        if not lines:
            raise UserError(f"'{folder}' has no original and reference to compare with: give a run of 'expunge bench'.")
        size = f"{results.model.parameters or 0:,} parameters"
        counts = ", ".join(f"{n} {role}" for role, n in results.dataset.samples.items())
        held = results.dataset.samples
        forgotten = 100 * held["forget"] / (held["forget"] + held["retain"])
        config = read_config(folder)
        tuned = f", {config['tune']} trials for each method" if config.get("tune") else ", default settings"
        parts += [
            f"\n## {results.dataset.name}, {forgotten:.2g} % to forget, {size}{tuned}\n",
            f"{results.dataset.source or results.dataset.name}: {counts} samples; seeds {results.seeds}.\n",
            f"```\n{command_line(config)}\n```\n",
            "\n".join(lines) + "\n",
        ]
        failed = [w for w in results.warnings if " failed: " in w]
        if failed:
            parts.append("\nFailed:\n\n" + "\n".join(f"- {w}" for w in failed) + "\n")
    return "\n".join(parts)


def command_line(config: Mapping[str, Any]) -> str:
    """The command line that makes the study, as far as its options differ from the defaults."""
    words = ["expunge bench"]
    for name, given in config.items():
        if name in LEFT_OUT or given in (None, False, 0, "", [], {}, ()):
            continue
        if name != "seeds" and given == DEFAULTS.get(name):
            continue
        option = "--" + name.replace("_", "-")
        value: Any = given
        if name == "methods":
            whole = any(set(given) == set(everything(modality)) for modality in get_args(Modality))
            value = "all" if whole else ",".join(given)
        if name == "data_options":
            words += [f"--data-option {k}={v}" for k, v in value.items()]
        elif isinstance(value, (str, int, float)):
            words.append(option if value is True else f"{option} {value}")
    suite = (config.get("evaluate") or {}).get("suite")
    return " ".join([*words, *([f"--suite {suite}"] if suite not in (None, "standard") else [])])


if __name__ == "__main__":
    write_text(Path(sys.argv[1]), page([Path(name) for name in sys.argv[2:]]))
