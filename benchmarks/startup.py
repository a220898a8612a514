"""How fast `expunge --help` answers, beside an empty Python started in turn with it.

python benchmarks/startup.py [--runs 20] [--limit 0.3]     exit code 1 when the median passes the limit (seconds)
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

SIDES = {
    "expunge --help": [str(Path(sys.executable).with_name("expunge")), "--help"],
    "expunge ls --help": [str(Path(sys.executable).with_name("expunge")), "ls", "--help"],
    "python -c pass": [sys.executable, "-c", "pass"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--limit", type=float, default=0.3, help="seconds")
    options = parser.parse_args()
    for command in SIDES.values():
        seconds(command)  # byte code and disk cache
    # In turn, so that a change of the machine's load meets all sides alike.
    measured = [{name: seconds(command) for name, command in SIDES.items()} for _ in range(options.runs)]
    median = {name: statistics.median(row[name] for row in measured) for name in SIDES}
    for name in SIDES:
        fastest = min(row[name] for row in measured)
        ratio = median[name] / median["python -c pass"]
        print(f"{name:18}  min {fastest * 1e3:6.0f} ms  median {median[name] * 1e3:6.0f} ms  {ratio:4.1f} x python")
    return int(median["expunge --help"] > options.limit)


if __name__ == "__main__":
    sys.exit(main())
