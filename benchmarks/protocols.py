"""Run protocols one after another into one folder, so that they share models, and print their tables.

python benchmarks/protocols.py --data digits --protocols binui,scoreui --out runs/protocols
python benchmarks/protocols.py --data fashion-mnist --data-dir DIR --protocols binui --quick --out runs/protocols
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from expunge.completeness.protocols import PROTOCOLS, run_protocol
from expunge.data.registry import get_dataset
from expunge.progress import Progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--protocols", default="all", help="names with commas, or all that work on the data")
    parser.add_argument("--model")
    parser.add_argument("--init")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shadows", type=int)
    parser.add_argument("--groups", type=int)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of the protocol")
    parser.add_argument("--data-set", nargs="*", default=[], metavar="KEY=VALUE", help="options of the dataset")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    modality = get_dataset(given.data).modality
    fitting = [name for name, entry in PROTOCOLS.items() if modality in entry.modalities]
    for name in fitting if given.protocols == "all" else given.protocols.split(","):
        begun = time.perf_counter()
        run_protocol(
            name,
            out=given.out,
            data=given.data,
            data_dir=given.data_dir,
            model=given.model,
            init=given.init,
            seed=given.seed,
            shadows=given.shadows,
            groups=given.groups,
            quick=given.quick,
            options=dict(pair.split("=", 1) for pair in given.set),
            data_options=dict(pair.split("=", 1) for pair in given.data_set),
            progress=Progress(quiet=False, every=30.0),
        )
        print((given.out / name / "results.md").read_text(encoding="utf-8"))
        print(f"{name}: {time.perf_counter() - begun:.0f} s\n", flush=True)


if __name__ == "__main__":
    main()
