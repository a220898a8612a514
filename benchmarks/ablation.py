"""What clustering, influence ranking, metrics and each part of the flagship buy.

    python benchmarks/ablation.py --out runs/ablation [--data people|tofu --data-dir PATH] [--seeds 3]

One study with one row per variant, all with the default settings otherwise and none tuned: control arms for where the
edit acts (random groups, k-means groups, all groups, as many groups at random, hard null space, low rank), the
optimizers and curvature metrics, and the parts of the recipe. Resumes where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import expunge

VARIANTS = (
    "cluster",
    # where
    "cluster:reach=1",
    "cluster:reach=0.5",
    "cluster:reach=0.5;random_choice=true",
    "cluster:reach=0.5;groups=kmeans",
    "cluster:reach=0.5;groups=random",
    "cluster:reach=0.5;groups=all",
    "cluster:reach=1;null_space=0.9",
    "cluster:reach=1;rank=8",
    # how
    "cluster:optimizer=adamw;learning_rate=1e-3",
    "cluster:optimizer=kfac",
    "cluster:optimizer=kfac;kfac_metric=gauss-newton",
    "cluster:optimizer=kfac;kfac_metric=fisher;damping=1",
    # what
    "cluster:negations=0",
    "cluster:match=0;reverse=0.3",
    "cluster:js=0",
    "cluster:proxy_epochs=0",
    "cluster:start=1",
    "cluster:heal_from=1",
    "cluster:rounding=0",
)
SHOWN = (
    ("tv.gap_closed", "gap closed"),
    ("mia.loss.gap", "AUC - ref"),
    ("retain_ratio", "retain/ref"),
    ("relearn.loss_ratio", "relearn/ref"),
    ("quant4.retain_ratio", "4 bit retain"),
)


def table(results: Any) -> str:
    """One line per variant with intervals over seeds."""
    lines = ["| variant | " + " | ".join(name for _, name in SHOWN) + " | cost |", "|---" * (len(SHOWN) + 2) + "|"]
    for row in results["summary"]:
        if row["kind"] != "method" or row["study"] != "main":
            continue
        cells = []
        for key, _ in SHOWN:
            found = row["metrics"].get(key)
            cells.append("" if found is None else f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]")
        share = row["cost"].get("share_of_retraining")
        lines.append(f"| {row['method']} | " + " | ".join(cells) + f" | {'' if share is None else f'{share:.0%}'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--data", default="people")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    result = expunge.bench(
        arguments.out,
        data=arguments.data,
        data_dir=arguments.data_dir,
        init="small",
        methods=",".join(VARIANTS),
        seeds=arguments.seeds,
        references=3,
        quiet=False,
    )
    print(table(result.results))


if __name__ == "__main__":
    main()
