"""Many models at once equal the same models trained one after another, in stacks and in other processes."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from expunge.data.registry import load_dataset
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.models.load import Loaded
from expunge.models.tiny import init_classifier, init_text
from expunge.progress import Progress
from expunge.training import many
from expunge.training.loop import TrainOptions, fit
from expunge.training.many import Job, load_weights, train_many
from expunge.training.stacked import obstacle, train_stack, width

torch.set_num_threads(1)
OPTIONS = TrainOptions(epochs=2, batch_size=16, learning_rate=1e-2, checkpoint_every=0)


@cache
def digits() -> list[Sample]:
    found = load_dataset("digits", options={"private": 120, "holdout": 60, "utility": 0})
    return [*found.private, *found["holdout"]]


@cache
def loaded(arch: Any, seed: int = 0) -> Loaded:
    return init_classifier(10, 8, 1, arch, seed, **({"hidden_sizes": (20, 12)} if arch == "mlp" else {}))


def model_of(arch: str, seed: int) -> nn.Module:
    return copy.deepcopy(loaded(arch, seed).model)


def jobs_of(arch: str, sizes: list[int]) -> list[Job]:
    rng = np.random.default_rng(1)
    return [
        Job(
            f"{arch}{i}",
            lambda i=i: model_of(arch, i),  # type: ignore[misc]
            [digits()[j] for j in rng.choice(len(digits()), size, replace=False)],
            10 + i,
            f"{arch} {i}",
        )
        for i, size in enumerate(sizes)
    ]


def alone(jobs: list[Job], adapter: Any, options: TrainOptions) -> list[nn.Module]:
    """The slow reference: one after another, by the loop that every other training goes through."""
    models = [job.make() for job in jobs]
    for job, model in zip(jobs, models, strict=True):
        fit(model, adapter, job.samples, options, seed=job.seed)
    return models


def largest_difference(one: nn.Module, other: nn.Module) -> float:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    return max(float((mine[name].double() - theirs[name].double()).abs().max()) for name in mine)


# -- stacks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "changes", "bound"),
    [
        ("mlp", {}, 1e-5),
        ("mlp", {"clip": 0.05, "schedule": "linear"}, 1e-5),
        ("mlp", {"optimizer": "sgd", "clip": 0.0}, 1e-6),
        ("resnet", {"optimizer": "sgd", "epochs": 1}, 1e-5),
        ("resnet", {"optimizer": "sgd", "clip": 0.3, "epochs": 1}, 1e-5),
        ("vit", {"optimizer": "sgd", "epochs": 1}, 1e-5),
    ],
)
def test_a_stack_equals_one_after_another(arch: str, changes: dict[str, Any], bound: float) -> None:
    options = replace(OPTIONS, **changes)
    jobs = jobs_of(arch, [70, 75, 70])  # five steps; the last batch has 6 or 11 samples, at places of its own
    adapter = loaded(arch).adapter
    expected, models = alone(jobs, adapter, options), [job.make().eval() for job in jobs]
    train_stack(models, adapter, [j.samples for j in jobs], options, [j.seed for j in jobs], [j.name for j in jobs])  # type: ignore[arg-type]
    for before, one, other in zip(jobs, expected, models, strict=True):
        assert 100 * largest_difference(one, other) < 100 * bound < largest_difference(before.make(), other)
        assert not other.training and all(p.is_contiguous() and p.grad is None for p in other.parameters())
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    storages = {p.untyped_storage().data_ptr() for m in models for p in m.parameters()}
    assert len(storages) == sum(1 for m in models for _ in m.parameters())  # nothing is shared afterwards


def test_batch_norm_of_a_stack_is_each_models_own() -> None:
    jobs, adapter = jobs_of("resnet", [40, 40]), loaded("resnet").adapter
    options = replace(OPTIONS, epochs=1, optimizer="sgd")
    expected, models = alone(jobs, adapter, options), [job.make() for job in jobs]
    train_stack(models, adapter, [j.samples for j in jobs], options, [j.seed for j in jobs], ["a", "b"])  # type: ignore[arg-type]
    for one, other in zip(expected, models, strict=True):
        mine, theirs = dict(one.named_buffers()), dict(other.named_buffers())
        assert any("running_var" in name for name in mine)
        for name, value in mine.items():
            assert theirs[name] == pytest.approx(value.numpy(), abs=1e-5), name
            assert "num_batches" not in name or int(theirs[name]) == 3
    first, second = (dict(m.named_buffers()) for m in models)
    assert any(float((first[n] - second[n]).abs().max()) > 1e-3 for n in first if "running_mean" in n)


def test_what_is_not_stacked() -> None:
    model, adapter, samples = model_of("mlp", 0), loaded("mlp").adapter, digits()
    assert obstacle(model, adapter, samples, OPTIONS) is None
    for changes, word in (
        ({"optimizer": "muon"}, "adamw or sgd"),
        ({"precision": "bf16"}, "fp32"),
        ({"weight_decay": 0.1}, "weight decay"),
        ({"micro_tokens": 8}, "one pass"),
    ):
        assert word in str(obstacle(model, adapter, samples, replace(OPTIONS, **changes)))  # type: ignore[arg-type]
    model.get_parameter("classifier.bias").requires_grad_(False)
    assert "frozen" in str(obstacle(model, adapter, samples, OPTIONS))
    noisy = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
    assert "dropout" in str(obstacle(noisy, adapter, samples, OPTIONS))
    assert obstacle(model, init_text(texts(), "tiny-test").adapter, samples, OPTIONS) == "only classifiers are stacked"


def test_width_of_a_stack() -> None:
    small, large = nn.Linear(100, 100), nn.Linear(1500, 1000)
    assert [width(small, n) for n in (1, 4, 8, 16, 1000)] == [1, 1, 2, 4, 16]
    assert width(large, 1000) == 1


def test_a_stack_that_diverges_says_which_model() -> None:
    jobs, adapter = jobs_of("mlp", [30, 30]), loaded("mlp").adapter
    models = [job.make() for job in jobs]
    with torch.no_grad():
        models[1].get_parameter("classifier.bias").fill_(float("inf"))
    with pytest.raises(UserError, match="second diverged at step 1 of 4"):
        train_stack(models, adapter, [j.samples for j in jobs], OPTIONS, [0, 1], ["first", "second"])  # type: ignore[arg-type]


# -- the work folder and the helpers -------------------------------------------------------------------------------


@cache
def texts() -> list[Sample]:
    options = {"people": 4, "forget": 1, "holdout": 4, "utility": 2, "questions": 2}
    return list(load_dataset("people", options=options).private)


def text_jobs(start: Loaded) -> list[Job]:
    own = texts()
    return [
        Job(f"text{i}", lambda: copy.deepcopy(start.model), own[: len(own) - i], i, f"text {i}", "base")
        for i in range(3)
    ]


def equal_bits(jobs: list[Job], one: dict[str, Path], other: dict[str, Path]) -> bool:
    pairs = [(load_weights(j.make(), one[j.key]), load_weights(j.make(), other[j.key])) for j in jobs]
    return all(largest_difference(a, b) == 0 for a, b in pairs)


def test_helpers_give_the_same_bits(tmp_path: Path) -> None:
    stacked, adapter = jobs_of("mlp", [60] * 9), loaded("mlp").adapter
    here = train_many(stacked, adapter, OPTIONS, tmp_path / "a", processes=1)
    there = train_many(stacked, adapter, OPTIONS, tmp_path / "b", processes=2)
    assert equal_bits(stacked, here, there)
    reference = alone(stacked, adapter, OPTIONS)
    for job, model in zip(stacked, reference, strict=True):
        assert largest_difference(model, load_weights(job.make(), here[job.key])) < 1e-5
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == sorted(f"{j.key}.safetensors" for j in stacked)


def test_other_models_are_trained_as_fit_does(tmp_path: Path) -> None:
    start = init_text(texts(), "tiny-test")
    jobs = text_jobs(start)
    options = TrainOptions(epochs=2, batch_size=4, checkpoint_every=0)  # the learning rate follows from the size
    found = train_many(jobs, start.adapter, options, tmp_path, processes=2)
    for job, model in zip(jobs, alone(jobs, start.adapter, options), strict=True):
        assert largest_difference(model, load_weights(job.make(), found[job.key])) == 0


def test_one_process_without_stacks_is_fit(tmp_path: Path) -> None:
    jobs, adapter = jobs_of("resnet", [40, 30]), loaded("resnet").adapter
    found = train_many(jobs, adapter, OPTIONS, tmp_path, stacked=False, processes=1)
    for job, model in zip(jobs, alone(jobs, adapter, OPTIONS), strict=True):
        assert largest_difference(model, load_weights(job.make(), found[job.key])) == 0


def test_the_lot_as_a_helper_reads_it(tmp_path: Path) -> None:
    jobs, adapter = jobs_of("resnet", [20, 20]), loaded("resnet").adapter
    lot = many._Lot(tmp_path, adapter, OPTIONS, [jobs], True)
    lot.write()
    found = many._Lot.read(tmp_path)
    assert found.options == OPTIONS and found.stacked and lot.steps(0) == found.steps(0) == 8
    for mine, theirs in zip(jobs, found.parts[0], strict=True):
        assert (mine.key, mine.seed, mine.name) == (theirs.key, theirs.seed, theirs.name)
        assert [s.digest() for s in mine.samples] == [s.digest() for s in theirs.samples]
        assert largest_difference(mine.make(), theirs.make()) == 0
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.pkl"))
    (tmp_path / "claims").mkdir()
    assert lot.claim(0) and not found.claim(0)


def test_what_is_there_is_not_trained_again(tmp_path: Path) -> None:
    jobs, adapter = jobs_of("mlp", [40, 40, 40]), loaded("mlp").adapter
    found = train_many(jobs[:2], adapter, OPTIONS, tmp_path, processes=1)
    times = [found[j.key].stat().st_mtime_ns for j in jobs[:2]]
    (tmp_path / "claims").mkdir()  # as a killed run leaves it
    (tmp_path / "claims" / "0").touch()
    again = train_many([*jobs, jobs[0]], adapter, OPTIONS, tmp_path, processes=1)
    assert [found[j.key].stat().st_mtime_ns for j in jobs[:2]] == times and again[jobs[2].key].is_file()
    assert train_many(jobs, adapter, OPTIONS, tmp_path) == again


def test_a_helper_that_dies_costs_nothing_but_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs, adapter = jobs_of("mlp", [40] * 3), loaded("mlp").adapter
    here = train_many(jobs, adapter, OPTIONS, tmp_path / "a", processes=1)
    monkeypatch.setattr(many.sys, "executable", "/bin/false")
    said: list[str] = []
    there = train_many(
        jobs, adapter, OPTIONS, tmp_path / "b", processes=2,
        progress=Progress(event=lambda kind, **more: said.append(str(more.get("text")))),
    )  # fmt: skip
    assert equal_bits(jobs, here, there) and any("stopped early (exit code 1)" in text for text in said)


def test_helpers_are_called_when_the_rest_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(many._Crew, "_call", lambda self: called.append(self.most))
    monkeypatch.setattr(many, "cores", lambda: 2)
    monkeypatch.setattr(many, "LOOK_S", 0.0)
    jobs, adapter = jobs_of("mlp", [40] * 4), loaded("mlp").adapter
    train_many(jobs, adapter, OPTIONS, tmp_path / "short")  # a fraction of a second: no helper is worth it
    assert called == []
    monkeypatch.setattr(many, "START_S", 0.0)
    train_many(jobs, adapter, OPTIONS, tmp_path / "long")
    assert set(called) == {1}
    train_many(jobs[:1], adapter, OPTIONS, tmp_path / "one", stacked=False)
    assert set(called) == {1}


KILLED = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from test_many import OPTIONS, jobs_of, loaded, many
from dataclasses import replace
saved = many._save_weights
def save(model, file):
    saved(model, file)
    print(file.name, flush=True)
    time.sleep(30)
many._save_weights = save
many.train_many(jobs_of("mlp", [40] * 3), loaded("mlp").adapter, OPTIONS, Path(sys.argv[1]), processes=1)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    code = KILLED.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline().startswith("mlp0")
        os.kill(process.pid, signal.SIGKILL)
    jobs, adapter = jobs_of("mlp", [40] * 3), loaded("mlp").adapter
    assert (tmp_path / "claims").is_dir() and not (tmp_path / "mlp1.safetensors").exists()
    first = (tmp_path / "mlp0.safetensors").stat().st_mtime_ns
    found = train_many(jobs, adapter, OPTIONS, tmp_path, processes=1)
    assert found["mlp0"].stat().st_mtime_ns == first and not (tmp_path / "claims").exists()
    whole = train_many(jobs, adapter, OPTIONS, tmp_path / "whole", processes=1)
    assert equal_bits(jobs, whole, found)


@pytest.mark.slow
def test_a_helper_goes_when_its_caller_is_gone(tmp_path: Path) -> None:
    """The caller claims everything, so the helper's one part is long; the caller's death ends it."""
    long = replace(OPTIONS, epochs=20_000)
    jobs, adapter = jobs_of("mlp", [40]), loaded("mlp").adapter
    lot = many._Lot(tmp_path, adapter, long, [jobs], True)
    lot.write()
    lot.claims.mkdir()
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-m', 'expunge.training.many', sys.argv[1]]);"
        "print(p.pid, flush=True); p.wait()"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None
        helper = int(caller.stdout.readline())
        deadline = time.monotonic() + 60
        while not (lot.claims / "0").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        caller.kill()
    while time.monotonic() < deadline and Path(f"/proc/{helper}").exists():
        time.sleep(0.05)
    assert not Path(f"/proc/{helper}").exists() and not lot.done(0)


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give 1 or more"):
        train_many(jobs_of("mlp", [20]), loaded("mlp").adapter, OPTIONS, tmp_path, processes=0)
    assert json.dumps(train_many([], loaded("mlp").adapter, OPTIONS, tmp_path)) == "{}"
