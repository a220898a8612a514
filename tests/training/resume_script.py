"""Run by ``test_training_resume.py`` as a process of its own: trainings that are killed, against ones that are not.

``python resume_script.py FOLDER`` prints one JSON object: per case the signals that the killed runs died of, the steps
at which the following runs went on, and whether the weights at the end are those of a run that was never killed.
Every run is a fork of this process, which imports once and starts no threads.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import nn

from expunge.data.samples import Sample
from expunge.methods.registry import Context, get_method
from expunge.models.tiny import init_classifier, init_text
from expunge.progress import Progress
from expunge.training.loop import TrainOptions, fit
from tiny_text import tiny_adapter, tiny_dataset, tiny_model

torch.set_num_threads(1)
DATA = tiny_dataset()
Run = Callable[[Path, Progress], nn.Module]


def text(optimizer: str) -> Run:
    def run(work: Path, progress: Progress) -> nn.Module:
        loaded = init_text(DATA["retain"], "tiny-test")
        options = TrainOptions(
            epochs=4, batch_size=8, learning_rate=1e-2, optimizer=optimizer, checkpoint_every=2, micro_tokens=200
        )
        fit(loaded.model, loaded.adapter, DATA["retain"], options, seed=1, work=work, progress=progress)
        return loaded.model

    return run


def dropout(work: Path, progress: Progress) -> nn.Module:
    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, nn.Dropout(0.3))
    options = TrainOptions(epochs=4, batch_size=8, learning_rate=1e-2, checkpoint_every=2)
    fit(model, tiny_adapter(), DATA["retain"], options, seed=1, work=work, progress=progress)
    return model


def pictures(count: int, seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    shape = (16, 16, 3)
    return [
        Sample(id=f"{seed}-{i}", subject=str(i % 3), target=i % 3, image=rng.integers(0, 256, shape, dtype=np.uint8))
        for i in range(count)
    ]


def resnet(work: Path, progress: Progress) -> nn.Module:
    """Batch normalisation: buffers must come back too."""
    loaded = init_classifier(3, image_size=16)
    options = TrainOptions(epochs=4, batch_size=6, learning_rate=1e-2, checkpoint_every=2)
    fit(loaded.model, loaded.adapter, pictures(18, 0), options, seed=1, work=work, progress=progress)
    return loaded.model


def flagship(**values: Any) -> Run:
    """Text; everything that keeps a memory of its own is switched on."""

    def run(work: Path, progress: Progress) -> nn.Module:
        model = tiny_model()
        fit(model, tiny_adapter(), DATA.private, TrainOptions(epochs=3, batch_size=8, learning_rate=1e-2))
        method = get_method("cluster")
        settings = {"steps": 15, "checkpoint_every": 2, "negations": 3, "harden": 1e-3, "control": 0.2}
        settings |= {"control_every": 4, "worst": 0.5, "average": 0.4, "heal_from": 0.5, **values}
        context = Context(
            model, tiny_adapter(), DATA["forget"][:3], DATA["retain"], DATA["holdout"], DATA["forget"][3:],
            base=tiny_model, seed=2, work=work, progress=progress,
        )  # fmt: skip
        return method(context, method.configure(settings)).model

    return run


def flagship_resnet(work: Path, progress: Progress) -> nn.Module:
    """A proxy with batch normalisation, which a restart takes from the work folder."""
    loaded = init_classifier(3, image_size=16)
    forget, retain = pictures(6, 1), pictures(18, 2)
    fit(loaded.model, loaded.adapter, [*forget, *retain], TrainOptions(epochs=1, batch_size=8, learning_rate=1e-2))
    method = get_method("cluster")
    options = method.configure({"steps": 8, "checkpoint_every": 2, "negations": 2, "proxy_epochs": 1.0, "reach": 1.0})
    context = Context(
        loaded.model, loaded.adapter, forget, retain, base=lambda: init_classifier(3, image_size=16).model, seed=2,
        work=work, progress=progress,
    )  # fmt: skip
    return method(context, options).model


CASES: dict[str, tuple[str, int, Run]] = {
    "adamw": ("training", 12, text("adamw")),
    "muon": ("training", 12, text("muon")),
    "sgd": ("training", 12, text("sgd")),
    "sophia": ("training", 12, text("sophia")),
    "dropout": ("training", 12, dropout),
    "batch-norm": ("training", 12, resnet),
    "flagship": ("cluster", 15, flagship()),
    "flagship-rank": ("cluster", 15, flagship(rank=2, checkpoint_every=3)),
    "flagship-kfac": ("cluster", 15, flagship(optimizer="kfac", refresh=4)),
    "flagship-proxy": ("cluster", 8, flagship_resnet),
}


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def in_child(task: str, run: Run, folder: Path, *, at_step: int = 0, at_rename: int = 0) -> tuple[int, list[int]]:
    """(signal that ended it, steps of ``task`` that it did) of a fork that kills itself where it is told to."""
    note = folder / "note.jsonl"
    note.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        renames = 0
        rename = Path.rename

        def perhaps(self: Path, target: Any) -> Path:
            nonlocal renames
            renames += "checkpoint" in self.name
            if renames == at_rename and "checkpoint" in self.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        Path.rename = perhaps  # type: ignore[method-assign]

        def event(kind: str, **fields: Any) -> None:
            if kind == "step" and fields["task"] == task:
                with note.open("a") as file:
                    file.write(f"{fields['step']}\n")
                if fields["step"] == at_step:
                    os.kill(os.getpid(), signal.SIGKILL)

        code = 1
        try:
            (folder / "digest").write_text(digest(run(folder / "work", Progress(event=event))))
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"the run of {folder.name} failed")
    steps = [int(line) for line in note.read_text().split()] if note.exists() else []
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), steps


def case(name: str, root: Path) -> dict[str, Any]:
    task, steps, run = CASES[name]
    rng = random.Random(name)
    straight = root / f"{name}-straight"
    straight.mkdir(parents=True)
    in_child(task, run, straight)
    killed = root / f"{name}-killed"
    killed.mkdir()
    first = rng.randrange(3, steps // 2 + 1)
    # A random step, then inside the writing of a checkpoint (between its two renames), then another random step.
    deaths = [
        in_child(task, run, killed, at_step=first),
        in_child(task, run, killed, at_rename=2),
        in_child(task, run, killed, at_step=rng.randrange(steps - 2, steps)),
        in_child(task, run, killed),
    ]
    result = {
        "signals": [d[0] for d in deaths],
        "first_steps": [d[1][0] for d in deaths],
        "last_step": deaths[-1][1][-1],
        "equal": (straight / "digest").read_text() == (killed / "digest").read_text(),
        "left": sorted(p.name for p in (killed / "work").iterdir()) if (killed / "work").exists() else [],
    }
    shutil.rmtree(straight)
    shutil.rmtree(killed)
    return result


if __name__ == "__main__":
    print(json.dumps({name: case(name, Path(sys.argv[1])) for name in sys.argv[2:] or CASES}))
