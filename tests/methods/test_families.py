"""Every row against the papers' formulas on the model's own full logits, step by step; identities, signs, pairs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.data.refusals import REFUSALS
from expunge.data.samples import Sample
from expunge.errors import UserError
from expunge.methods.families import FAMILIES, identities, replacement, retain_term
from expunge.methods.forget_terms import wrong_labels
from expunge.methods.registry import Context, Outcome, get_method
from expunge.models.losses import mean_losses
from expunge.models.tiny import init_classifier
from family_cases import FORGET, LOADED, RETAIN, fresh, logits, mean_over_tokens, token_log_probs

RATE = 0.1
SEED = 3


def run(name: str, model: nn.Module, steps: int = 3, **values: Any) -> Outcome:
    """Full-batch SGD without clipping or schedule, so that a step is the gradient."""
    method = get_method(name)
    settings = {
        "epochs": steps, "batch_size": 99, "retain_batch": 99, "optimizer": "sgd", "learning_rate": RATE, "clip": 0.0,
        "schedule": "constant", "warmup": 0.0,
    }  # fmt: skip
    values = {"retain": values.pop("held")} | values if "held" in values else values
    return method(Context(model, LOADED.adapter, FORGET, RETAIN, seed=SEED), method.configure(settings | values))


# -- the slow reference: full logits of one sample at a time -----------------------------------------------------------


def minus_log_sigmoid(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x))


def forget_loss(  # noqa: PLR0911 - one per loss
    name: str, model: nn.Module, old: nn.Module, refusals: Sequence[Sample], beta: float
) -> Tensor:
    """From the papers; ``old`` is the original."""
    own = [token_log_probs(model, s) for s in FORGET]
    before = [token_log_probs(old, s).detach() for s in FORGET]
    if name in ("ga", "graddiff", "kl"):  # minus the training loss
        return mean_over_tokens(own)
    if name in ("idk", "idk-nll"):
        return -mean_over_tokens([token_log_probs(model, s) for s in refusals])
    if name in ("wga", "satimp"):  # Wang et al. 2025: p NLL; Yang et al. 2025: p^5 (1 - p) NLL; the weights held
        weights = [x.exp() if name == "wga" else x.exp() ** 5 * (1 - x.exp()) for x in own]
        return mean_over_tokens([w.detach() * x for w, x in zip(weights, own, strict=True)])
    if name in ("ceu", "entropy", "random-labels"):
        return from_logits(name, model)
    if name == "npo":  # Zhang et al. 2024, eq. 3
        ratio = [(a.sum() - b.sum()).exp() for a, b in zip(own, before, strict=True)]
        return torch.stack([2 / beta * torch.log1p(r**beta) for r in ratio]).mean()
    if name == "simnpo":  # Fan et al. 2024, eq. 4, margin 0
        return torch.stack([2 / beta * minus_log_sigmoid(-beta * a.sum() / len(a)) for a in own]).mean()
    if name == "dpo":  # Rafailov et al. 2023, eq. 7, the refusal wins
        won = [token_log_probs(model, s).sum() - token_log_probs(old, s).sum().detach() for s in refusals]
        lost = [a.sum() - b.sum() for a, b in zip(own, before, strict=True)]
        return torch.stack([minus_log_sigmoid(beta * w - beta * x) for w, x in zip(won, lost, strict=True)]).mean()
    assert name == "undial"  # Dong et al. 2024, eq. 2: adjusted teacher logits, cross entropy
    parts = []
    for s in FORGET:
        z_old, y = logits(old, s)
        z_old = z_old.detach().clone()
        for t in range(len(y)):
            z_old[t, y[t]] -= beta
        q = torch.exp(z_old) / torch.exp(z_old).sum(1, keepdim=True)
        z = logits(model, s)[0]
        parts.append(-(q * (z - torch.log(torch.exp(z).sum(1, keepdim=True)))).sum(1))
    return mean_over_tokens(parts)


def from_logits(name: str, model: nn.Module) -> Tensor:
    """Token by token, from whole distributions."""
    parts = []
    for s in FORGET:
        z, y = logits(model, s)
        if name == "random-labels":  # Graves et al. 2021: the wrong labels stand in the true ones' place
            wrong = wrong_labels(model, LOADED.adapter, [s], None, SEED)[s.id]
            parts.append(torch.stack([torch.logsumexp(z[t], 0) - z[t, wrong[t]] for t in range(len(y))]))
        elif name == "entropy":  # Yuan et al. 2024: KL(p ‖ uniform)
            p = torch.exp(z) / torch.exp(z).sum(1, keepdim=True)
            parts.append((p * torch.log(p * z.shape[1])).sum(1))
        else:  # Yang 2025: the target is p without y, renormalised; the first token is left alone
            values = []
            for t in range(1, len(y)):
                p = torch.softmax(z[t], 0)
                q = torch.tensor([0.0 if v == y[t] else float(p[v].detach()) for v in range(len(p))])
                values.append(-(q / q.sum() * torch.log(p)).sum())
            # A sample keeps its share of the mean over tokens.
            parts.append(torch.stack([len(y) / (len(y) - 1) * v for v in values] + [torch.zeros(())]))
    return mean_over_tokens(parts)


def retain_loss(kind: str, model: nn.Module, old: nn.Module) -> Tensor:
    if kind == "nll":
        return -mean_over_tokens([token_log_probs(model, s) for s in RETAIN])
    parts = []
    for s in RETAIN:
        p_old = torch.exp(logits(old, s)[0].detach())
        p_old = p_old / p_old.sum(1, keepdim=True)
        p = torch.exp(logits(model, s)[0])
        parts.append((p_old * torch.log(p_old / (p / p.sum(1, keepdim=True)))).sum(1))
    return mean_over_tokens(parts)


def refusals_of(seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [replacement(s, LOADED.adapter, rng) for s in FORGET]


CASES = [(row.name, kind) for row in FAMILIES for kind in ("nll", "kl", "none")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_steps_follow_the_formulas(name: str, kind: str) -> None:
    """Three SGD steps (the second and third away from the original) give the values and weights of the reference."""
    model, slow = fresh(), fresh()
    old = copy.deepcopy(slow)
    options = get_method(name).options()
    rate = RATE * {"ga": 0.2, "graddiff": 0.2, "kl": 0.2, "npo": 0.02}.get(name, 1.0)  # sums over tokens run away
    gamma = 5.0 if name == "satimp" else options.gamma  # its weights are small
    outcome = run(name, model, held=kind, learning_rate=rate, alpha=0.7, gamma=gamma)
    momentum: dict[str, Tensor] = {}
    for step in range(3):
        forget = forget_loss(name, slow, old, refusals_of(SEED), getattr(options, "beta", math.nan))
        kept = retain_loss(kind, slow, old) if kind != "none" else None
        assert outcome.record["log"][step]["forget"] == pytest.approx(float(forget.detach()), rel=1e-4)
        slow.zero_grad()
        total = gamma * forget
        if kept is not None:
            assert outcome.record["log"][step]["retain"] == pytest.approx(float(kept.detach()), rel=1e-4, abs=1e-6)
            total = total + 0.7 * kept
        total.backward()
        with torch.no_grad():
            for n, p in slow.named_parameters():
                assert p.grad is not None
                momentum[n] = p.grad.clone() if step == 0 else 0.9 * momentum[n] + p.grad
                p.sub_(rate * momentum[n])
    moved = 0.0
    for (n, p), q, start in zip(model.named_parameters(), slow.parameters(), old.parameters(), strict=True):
        change = q - start
        moved = max(moved, float(change.detach().abs().max()))
        torch.testing.assert_close(p - start, change, rtol=2e-3, atol=2e-5, msg=lambda m, n=n: f"{n}: {m}")
    assert moved > 1e-3


# -- identities at the original ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_identities_at_the_original(beta: float) -> None:
    assert run("npo", fresh(), 1, beta=beta).record["log"][0]["forget"] == pytest.approx(
        2 * math.log(2) / beta, rel=1e-5
    )
    assert run("dpo", fresh(), 1, beta=beta).record["log"][0]["forget"] == pytest.approx(math.log(2), rel=1e-5)
    assert run("kl", fresh(), 1).record["log"][0]["retain"] == pytest.approx(0, abs=1e-5)
    known = {"npo": 2 * math.log(2) / beta, "dpo": math.log(2), "kl": 0.0}
    assert identities(beta) == known


@pytest.mark.parametrize("beta", [0.5, 3.0, 10.0])
def test_undial_at_the_original(beta: float) -> None:
    """CE(q, p) = H(p) + (log-odds of lowering): closed form from p and p_y alone."""
    model, parts = fresh(), []
    with torch.no_grad():
        for sample in FORGET:
            z, y = logits(model, sample)
            p = z.softmax(1)
            p_y = p[range(len(y)), y]
            # q = p with p_y scaled by e^-beta, renormalised by c = 1 - p_y (1 - e^-beta)
            c = 1 - p_y * (1 - math.exp(-beta))
            cross = -(p * p.log()).sum(1) + p_y * p_y.log() * (1 - math.exp(-beta))
            parts.append(cross / c)
    wanted = float(torch.cat(parts).mean())
    assert run("undial", model, 1, beta=beta).record["log"][0]["forget"] == pytest.approx(wanted, rel=1e-5)


def test_the_margin_of_simnpo() -> None:
    model = fresh()
    with torch.no_grad():
        means = [token_log_probs(model, s).mean() for s in FORGET]
    wanted = np.mean([2 / 4.5 * math.log(1 + math.exp(4.5 * float(m) + 0.8)) for m in means])
    got = run("simnpo", model, 1, delta=0.8).record["log"][0]["forget"]
    assert got == pytest.approx(float(wanted), rel=1e-4)


# -- signs -------------------------------------------------------------------------------------------------------------


def nll(model: nn.Module, samples: Sequence[Sample]) -> float:
    return float(np.mean(mean_losses(model, LOADED.adapter, samples)))


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_a_small_step_forgets_and_the_retain_term_keeps(row: Any) -> None:
    before = fresh()
    after = run(row.name, fresh(), 1, held="none", learning_rate=1e-2).model
    refusals = refusals_of(SEED)
    if row.replaces == "answer":
        assert nll(after, refusals) < nll(before, refusals)
    elif row.name == "dpo":
        assert nll(after, refusals) - nll(before, refusals) < nll(after, FORGET) - nll(before, FORGET)
    elif row.name == "undial":
        assert nll(run("undial", fresh(), 1, held="none", learning_rate=1e-2).model, FORGET) > nll(before, FORGET)
    else:
        assert nll(after, FORGET) > nll(before, FORGET)
    held = run(row.name, fresh(), 1, held="nll", learning_rate=1e-2).model
    assert nll(held, RETAIN) < nll(after, RETAIN)


def test_weights_of_the_terms() -> None:
    base = {n: p.detach().clone() for n, p in fresh().named_parameters()}

    def change(**values: Any) -> Tensor:
        model = run("graddiff", fresh(), 1, learning_rate=0.1, **values).model
        return torch.cat([(p.detach() - base[n]).flatten() for n, p in model.named_parameters()])

    forget, kept = change(alpha=0.0), change(gamma=0.0)
    torch.testing.assert_close(change(alpha=2.0, gamma=0.5), 0.5 * forget + 2.0 * kept, rtol=1e-3, atol=1e-6)


# -- replacements ------------------------------------------------------------------------------------------------------


def test_refusals_are_aligned_in_micro_batches() -> None:
    """With pairs torn apart, single-sample passes would not give the same model."""
    whole, cut = run("dpo", fresh(), micro_tokens=100_000).model, run("dpo", fresh(), micro_tokens=1).model
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_replacements_depend_on_the_seed_alone() -> None:
    first, again, other = refusals_of(1), refusals_of(1), refusals_of(2)
    assert first == again and [s.target for s in first] != [s.target for s in other]
    for sample, refusal in zip(FORGET, first, strict=True):
        assert refusal.target in REFUSALS and refusal.prompt == sample.prompt and refusal.id != sample.id
        assert not refusal.probes


@pytest.mark.parametrize("named", [False, True])
def test_a_classifier_gets_another_class(named: bool) -> None:
    loaded = init_classifier(4, image_size=8)
    loaded.adapter.label_ids = {"cat": 2}  # type: ignore[attr-defined]
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    sample = Sample(id="a", subject="c", target="cat" if named else 2, image=image)
    rng = np.random.default_rng(0)
    seen = {replacement(sample, loaded.adapter, rng).target for _ in range(60)}
    assert seen == {0, 1, 3}


# -- notes, guards, defaults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_without_retain_samples_the_rows_say_so(row: Any) -> None:
    method = get_method(row.name)
    options = method.configure({"epochs": 1, "learning_rate": 1e-3})
    notes = method(Context(fresh(), LOADED.adapter, FORGET), options).notes
    assert ("no retain samples were given: nothing holds the rest of the model in place" in notes) == (
        "retain" in method.wants
    )


def test_the_guard_stops_ascent() -> None:
    outcome = run("ga", fresh(), 50, stop_loss=8.0, learning_rate=0.3)
    steps = outcome.record["log"]
    assert 1 < len(steps) < 50 and outcome.notes == [f"stopped after {len(steps)} of 50 steps: forget loss above 8.0"]
    assert np.mean([s["forget_nll"] for s in steps[-3:]]) > 8.0
    assert np.mean([s["forget_nll"] for s in steps[-4:-1]]) <= 8.0
    assert outcome.record["stopped"] == "forget loss above 8.0"


def test_retain_terms_by_kind() -> None:
    assert retain_term("none", 1.0, None) == []
    (term,) = retain_term("nll", 0.3, None)
    assert (term.role, term.unit, term.weight) == ("retain", "token", 0.3)
    with pytest.raises(UserError, match=r"'retain' = ascent: allowed are nll, kl, none"):
        get_method("npo").configure({"retain": "ascent"})


@pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.name)
def test_defaults_of_a_row_are_the_defaults_of_its_options(row: Any) -> None:
    options = get_method(row.name).options()
    for name, value in row.defaults.items():
        assert getattr(options, name) == value
    assert options.learning_rate is None and row.rate in (1e-5, 1e-4)
    with pytest.raises(UserError, match="cannot be: give"):
        replace(options, learning_rate=-1.0)
