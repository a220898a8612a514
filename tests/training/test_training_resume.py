"""Runs killed with SIGKILL, at random steps and while a checkpoint is written, end with the bits of an unbroken one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

FAST = ["adamw", "muon", "sophia", "dropout", "flagship", "flagship-proxy"]
MORE = ["sgd", "batch-norm", "flagship-rank", "flagship-kfac"]


def check(names: Sequence[str], folder: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("killing a run needs a system with fork and SIGKILL")
    command = [sys.executable, str(Path(__file__).with_name("resume_script.py")), str(folder), *names]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=threads, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    assert list(outcomes) == list(names)
    for name, found in outcomes.items():
        assert found["signals"] == [signal.SIGKILL] * 3 + [0], f"{name} was killed three times"
        assert found["first_steps"][0] == 1 and min(found["first_steps"][1:]) > 1, f"{name} went on, not anew"
        assert found["equal"], f"{name}: other bits after a restart"
        assert found["left"] == (["proxy.safetensors"] if "flagship" in name else []), name


def test_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    check(FAST, tmp_path)


@pytest.mark.slow
def test_more_killed_runs_end_with_the_same_bits(tmp_path: Path) -> None:
    check(MORE, tmp_path)
