"""The flagship against every tuned family, on splits that no tuning has seen, with and without a base.

    python benchmarks/flagship.py --out runs/flagship [--data-dir PATH_TO_TOFU] [--tune 5] [--seeds 3]

Four studies (people and a TOFU slice, base given and not given), each with `expunge bench`: three originals, three
references, the same number of trials for every method on validation subjects. Prints, for every method, the figures
that the project holds itself to, and whether each is met. Hours on two cores; it resumes where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import expunge

# metric, name in the table, whether a value passes
GOALS = (
    ("tv.gap_closed", "gap closed", lambda v: v >= 0.60),
    ("mia.loss.gap", "|AUC - ref|", lambda v: v <= 0.05),
    ("retain_ratio", "retain/ref", lambda v: v >= 0.985),
    ("relearn.loss_ratio", "relearn/ref", lambda v: v >= 0.8),
    ("quant4.mia.loss.gap", "4 bit |AUC - ref|", lambda v: v <= 0.05),
    ("quant4.retain_ratio", "4 bit retain/ref", lambda v: v >= 0.985),
)
COST = 0.25


def table(results: Any) -> str:
    """One line per method: value with its interval over seeds, and a star where the goal is met."""
    lines = ["| method | " + " | ".join(name for _, name, _ in GOALS) + " | cost |", "|---" * (len(GOALS) + 2) + "|"]
    for row in results["summary"]:
        if row["study"] != "main" or row["kind"] == "base":
            continue
        cells = []
        for key, _, passes in GOALS:
            found = row["metrics"].get(key)
            if found is None or found["value"] is None:
                cells.append("")
                continue
            star = "*" if passes(found["value"]) else ""
            cells.append(f"{found['value']:.3f}{star} [{found['low']:.3f}, {found['high']:.3f}]")
        share = row["cost"].get("share_of_retraining")
        cells.append("" if share is None else f"{share:.0%}{'*' if share <= COST else ''}")
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/flagship"))
    parser.add_argument("--data-dir", type=Path, help="local copy of TOFU; without it only people is run")
    parser.add_argument("--methods", default="all")
    parser.add_argument("--tune", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    datasets: dict[str, dict[str, Any]] = {"people": {"data": "people"}}
    if arguments.data_dir is not None:
        datasets["tofu"] = {"data": "tofu", "data_dir": arguments.data_dir}
    for name, data in datasets.items():
        for blind in (False, True):
            label = f"{name}-{'blind' if blind else 'base'}"
            result = expunge.bench(
                arguments.out / label,
                **data,
                init="small",
                methods=arguments.methods,
                seeds=arguments.seeds,
                references=3,
                tune=arguments.tune,
                blind=blind,
                quiet=False,
            )
            print(f"\n## {label} (met goals are starred; cost {COST:.0%})\n\n{table(result.results)}\n", flush=True)


if __name__ == "__main__":
    main()
