"""The loop: micro-batches equal the large batch, on terms of every kind; divergence, events, precision, refusals."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.progress import Progress
from expunge.training import loop
from expunge.training.batching import EpochPlan
from expunge.training.loop import Feed, Trainer, TrainOptions, fit, train
from expunge.training.terms import Teacher, Term, View, kl_C, nll_N
from tiny_text import tiny_adapter, tiny_dataset, tiny_model

torch.set_num_threads(1)
DATA = tiny_dataset()
FORGET, RETAIN = DATA["forget"], DATA["retain"]
REFUSED = [replace(s, id=s.id + "/no", target="who is " * (1 + i % 4)) for i, s in enumerate(FORGET)]


def whole_logits(model: nn.Module, sample: Sample) -> tuple[Tensor, Tensor]:
    """Logits (n, V) at the target positions of one sample and the targets, by the model's own forward pass."""
    coded: Any = tiny_adapter().encode(sample)
    ids = torch.tensor([coded.ids])
    logits = model(input_ids=ids).logits[0]
    return logits[coded.first - 1 : -1], ids[0, coded.first :]


def log_prob(model: nn.Module, sample: Sample) -> Tensor:
    logits, targets = whole_logits(model, sample)
    return logits.log_softmax(1)[range(len(targets)), targets]


def reference(model: nn.Module, original: nn.Module, picks: dict[str, list[int]]) -> Tensor:
    """What the four terms of the test add up to, from the definitions, one sample at a time."""
    retain = [RETAIN[i] for i in picks["retain"]]
    tokens = sum(len(log_prob(model, s)) for s in retain)
    nll = -sum(log_prob(model, s).sum() for s in retain) / tokens
    kl = torch.zeros(())
    for s in retain:
        with torch.no_grad():
            old = whole_logits(original, s)[0].softmax(1)
        kl = kl + (old * (old.log() - whole_logits(model, s)[0].log_softmax(1))).sum() / tokens
    dpo = npo = torch.zeros(())
    for i in picks["forget"]:
        lost = log_prob(model, FORGET[i]).sum() - log_prob(original, FORGET[i]).sum().detach()
        won = log_prob(model, REFUSED[i]).sum() - log_prob(original, REFUSED[i]).sum().detach()
        dpo = dpo - logsigmoid(0.3 * (won - lost)) / len(picks["forget"])
        npo = npo - logsigmoid(-0.3 * lost) / len(picks["forget"])
    total: Tensor = nll + 0.5 * kl + 2.0 * dpo + 1.5 * npo
    return total


def trainer_of(model: nn.Module, original: nn.Module, micro_tokens: int) -> Trainer:
    adapter = tiny_adapter()
    teacher = Teacher.of(original, adapter, RETAIN, sums=[*FORGET, *REFUSED])

    def change(view: View) -> Tensor:
        own_B = view.log_prob_B()
        return own_B - teacher.log_prob_B(view.samples, own_B)

    def dpo_B(view: View) -> Tensor:
        assert view.partner is not None
        return -logsigmoid(0.3 * (change(view.partner) - change(view)))

    terms = [
        Term("nll", "retain", "token", nll_N),
        Term("kl", "retain", "token", lambda view: teacher.compare(view, kl_C), 0.5),
        Term("dpo", "forget", "sample", dpo_B, 2.0),
        Term("npo", "forget", "sample", lambda view: -logsigmoid(-0.3 * change(view)), 1.5),
    ]
    feeds = {"forget": Feed(FORGET, REFUSED), "retain": Feed(RETAIN)}
    options = TrainOptions(micro_tokens=micro_tokens)
    return Trainer(model, adapter, feeds, terms, options, [], 1, Accelerator(cpu=True))


@pytest.mark.parametrize("micro_tokens", [1, 30, 57, 100_000])
def test_any_micro_batches_have_the_gradient_of_the_definitions(micro_tokens: int) -> None:
    model, original = tiny_model(1), tiny_model(0)
    picks = {"forget": [4, 0, 3, 1], "retain": [2, 9, 5, 11, 0]}
    other = copy.deepcopy(model)
    total = reference(other, original, picks)
    total.backward()
    values = trainer_of(model, original, micro_tokens).gradients(picks)
    assert values["nll"] + 0.5 * values["kl"] + 2 * values["dpo"] + 1.5 * values["npo"] == pytest.approx(
        float(total.detach())
    )
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        assert float((p.grad - q.grad).abs().max()) <= 1e-6 * max(1.0, float(q.grad.abs().max())), name
    mean = np.mean([-float(log_prob(other, RETAIN[i]).detach().mean()) for i in picks["retain"]])
    assert values["retain_nll"] == pytest.approx(mean, rel=1e-5)


def test_a_pass_never_holds_more_tokens_than_asked_for() -> None:
    model = tiny_model()
    trainer = trainer_of(model, tiny_model(), 60)
    seen: list[int] = []
    collate = trainer.adapter.collate

    def counted(samples: Sequence[Sample]) -> Any:
        batch = collate(samples)
        seen.append(batch.num_tokens)
        return batch

    trainer.adapter.collate = counted  # type: ignore[method-assign]
    trainer.gradients({"forget": [0, 1, 2, 3], "retain": list(range(12))})
    assert len(seen) > 1 and max(seen) <= 60, "partners count too"


def test_partners_stay_beside_their_samples_in_every_micro_batch() -> None:
    seen: list[tuple[str, str]] = []

    def pair_B(view: View) -> Tensor:
        assert view.partner is not None
        seen.extend((a.id, b.id) for a, b in zip(view.samples, view.partner.samples, strict=True))
        return view.log_prob_B() - view.partner.log_prob_B()

    trainer = trainer_of(tiny_model(), tiny_model(), 40)
    trainer.gradients({"forget": [5, 2, 0, 4]}, [Term("pair", "forget", "sample", pair_B)])
    assert sorted(seen) == sorted((FORGET[i].id, REFUSED[i].id) for i in (5, 2, 0, 4))


def test_a_term_without_samples_in_this_step_takes_no_part() -> None:
    model = tiny_model()
    trainer = trainer_of(model, tiny_model(), 4096)
    assert set(trainer.gradients({"retain": [0, 1]})) == {"nll", "kl", "retain_nll"}
    assert trainer.gradients({}) == {}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def fitted(seed: int = 0, model: nn.Module | None = None, **set_to: Any) -> tuple[nn.Module, loop.Log]:
    model = tiny_model() if model is None else model
    options = TrainOptions(**{"epochs": 2, "batch_size": 8, "learning_rate": 1e-2} | set_to)
    return model, fit(model, tiny_adapter(), RETAIN, options, seed=seed)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd", "sophia"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_optimizer_and_precision_learns(optimizer: str, precision: str) -> None:
    model, log = fitted(
        epochs=12, optimizer=optimizer, precision=precision, learning_rate=2e-2, other_learning_rate=2e-2
    )
    assert log.steps[-1]["nll"] < 0.6 * log.steps[0]["nll"]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert log.last("nll", 3) == pytest.approx(np.mean([s["nll"] for s in log.steps[-3:]]))


def test_micro_batches_train_the_same_model() -> None:
    large, _ = fitted(optimizer="sgd", learning_rate=1e-1)
    small, _ = fitted(optimizer="sgd", learning_rate=1e-1, micro_tokens=20)
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_seeds() -> None:
    first, again, other = fitted(seed=3)[0], fitted(seed=3)[0], fitted(seed=4)[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_the_world_outside_keeps_its_random_numbers_and_the_model_its_mode() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    model, _ = fitted(model=tiny_model().eval())
    assert torch.equal(torch.rand(3), wanted) and not model.training
    assert all(p.grad is None for p in model.parameters())


def test_clipping_bounds_the_step() -> None:
    def moved(clip: float) -> float:
        model = tiny_model()
        before = weights(model)
        fitted(model=model, epochs=0.01, optimizer="sgd", learning_rate=1.0, warmup=0.0, clip=clip)
        return float(sum((p.detach() - before[n]).square().sum() for n, p in model.named_parameters())) ** 0.5

    assert moved(1e-3) == pytest.approx(1e-3, rel=1e-3)
    assert moved(0.0) > 1e-2


@pytest.mark.parametrize(("rate", "clip"), [(1e30, 0.0), (1e38, 1.0)])
def test_divergence_is_said_in_one_sentence(rate: float, clip: float) -> None:
    model = tiny_model().eval()
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=r"training diverged.*not finite; use a smaller learning rate") as raised:
        fitted(model=model, epochs=3, optimizer="sgd", learning_rate=rate, clip=clip, warmup=0.0)
    assert "\n" not in str(raised.value) and not model.training
    assert torch.equal(torch.get_rng_state(), state)


def one_step(term: Term, options: TrainOptions) -> None:
    adapter, feeds = tiny_adapter(), {"train": Feed(RETAIN)}
    plan = EpochPlan({"train": feeds["train"].lengths(adapter)}, {"train": 4}, 0.01, "train")
    assert plan.steps == 1
    train(tiny_model(), adapter, feeds, [term], plan, options)


def test_divergence_of_the_very_last_step_is_seen() -> None:
    options = TrainOptions(learning_rate=1e38, optimizer="sgd", clip=0.0, warmup=0.0)
    with pytest.raises(UserError, match="weight is not finite"):
        one_step(Term("nll", "train", "token", nll_N, 1e4), options)


def test_gradients_that_are_not_finite_are_seen_though_the_loss_is() -> None:
    def root_N(view: View) -> Tensor:
        return (view.log_prob_N() * 0).abs().sqrt()  # value 0, slope infinite

    with pytest.raises(UserError, match="the gradient is not finite"):
        one_step(Term("root", "train", "token", root_N), TrainOptions(learning_rate=1e-3))


def test_events_and_stopping() -> None:
    events: list[tuple[str, dict[str, Any]]] = []
    adapter, feeds = tiny_adapter(), {"train": Feed(RETAIN)}
    plan = EpochPlan({"train": feeds["train"].lengths(adapter)}, {"train": 8}, 4, "train")

    def halt(trainer: Trainer) -> None:
        if trainer.step == 5:
            trainer.stop = "enough"

    log = train(
        tiny_model(), adapter, feeds, [Term("nll", "train", "token", nll_N)], plan, TrainOptions(learning_rate=1e-3),
        progress=Progress(event=lambda kind, **fields: events.append((kind, fields))), name="mine", on_step=halt,
    )  # fmt: skip
    assert [e[1]["step"] for e in events if e[0] == "step"] == [1, 2, 3, 4, 5] and len(log.steps) == 5
    assert all({"task", "steps", "nll", "train_nll"} <= set(e[1]) for e in events if e[0] == "step")
    assert events[-1] == ("stopped", {"task": "mine", "step": 5, "reason": "enough"})


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", 0), ("batch_size", 0), ("learning_rate", -1e-3), ("learning_rate", float("nan")), ("warmup", 1.5),
     ("clip", -1), ("micro_tokens", 0), ("weight_decay", -0.1), ("checkpoint_every", -1)],
)  # fmt: skip
def test_numbers_that_cannot_be(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} = .* cannot be: give"):
        TrainOptions(**{name: value})  # type: ignore[arg-type]


# -- checkpoints of another run ----------------------------------------------------------------------------------------


def stopped(work: Path, samples: Sequence[Sample], seed: int = 0, options: TrainOptions | None = None) -> None:
    """A training that is interrupted after its third step, with a checkpoint of the second."""

    def halt(kind: str, **fields: Any) -> None:
        if kind == "step" and fields["step"] == 3:
            raise KeyboardInterrupt

    options = options or TrainOptions(epochs=2, batch_size=8, learning_rate=1e-2, checkpoint_every=2)
    progress = Progress(event=halt)
    try:
        fit(tiny_model(), tiny_adapter(), samples, options, seed=seed, work=work, progress=progress)
    except KeyboardInterrupt:
        return


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path, RETAIN)
    assert (tmp_path / "checkpoint" / "state.json").exists()
    again = TrainOptions(epochs=2, batch_size=8, learning_rate=2e-2, checkpoint_every=2)
    changed = [replace(RETAIN[0], target="ada likes teal"), *RETAIN[1:]]
    for arguments in ({"samples": RETAIN, "seed": 1}, {"samples": RETAIN, "options": again}, {"samples": changed}):
        with pytest.raises(UserError, match="is of another training: delete it, or choose a new --out"):
            stopped(tmp_path, **arguments)  # type: ignore[arg-type]
    assert sorted(p.name for p in (tmp_path / "checkpoint").iterdir()) == [
        "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip


def test_the_checkpoint_goes_when_the_training_is_done(tmp_path: Path) -> None:
    stopped(tmp_path, RETAIN)
    options = TrainOptions(epochs=2, batch_size=8, learning_rate=1e-2, checkpoint_every=2)
    resumed, straight = tiny_model(7), tiny_model()
    log = fit(resumed, tiny_adapter(), RETAIN, options, work=tmp_path)
    assert log.steps == fit(straight, tiny_adapter(), RETAIN, options).steps, "the log is whole"
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), straight.parameters(), strict=True))
    assert not list(tmp_path.iterdir())
