"""Evaluation on a made-up dataset: what must come out for the original, for references and for broken models."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expunge.attacks.membership import auc_gap, loss_score, min_k_score
from expunge.attacks.quantization import quantized
from expunge.attacks.relearning import relearn, split
from expunge.bench.evaluate import EvaluateOptions, Evaluation, References, evaluate
from expunge.bench.verdicts import position_of, verdict_of
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.metrics.memorization import privleak
from expunge.models.adapter import Batch
from expunge.models.classifier import ClassifierAdapter
from expunge.models.images import Preprocess
from expunge.models.text import TextAdapter
from expunge.signals.forward import collect
from tiny_text import learned, tiny_adapter, tiny_dataset, tiny_model, tiny_tokenizer

DATA = tiny_dataset(people=9, forget=3, holdout=4, utility=2)
OPTIONS = EvaluateOptions(suite="full", max_new_tokens=6, resamples=100, relearn_steps=8)


@dataclass
class World:
    """An original, two retrained references, and their evaluations."""

    adapter: TextAdapter
    original: nn.Module
    models: list[nn.Module]
    references: References
    first: Evaluation


@pytest.fixture(scope="module")
def world() -> World:
    adapter = tiny_adapter()
    original = learned(DATA.private, seed=0, epochs=45)
    models = [learned(DATA["retain"], seed=s, epochs=45) for s in (1, 2)]
    references = References(adapter, DATA, OPTIONS)
    for model in models:
        references.add(model)
    return World(adapter, original, models, references, evaluate(original, adapter, DATA, references=references))


def look(found: Evaluation, name: str) -> float:
    return found.metrics[name].value


# -- two-sided comparison --------------------------------------------------------------------------------------------


def test_identity_closes_no_gap_and_still_remembers(world: World) -> None:
    start = json.loads(json.dumps(world.first.summary()))
    copied = copy.deepcopy(world.original)
    found = evaluate(copied, world.adapter, DATA, references=world.references, original=start)
    assert look(found, "tv.gap_closed") == 0.0
    assert look(found, "tv.forget") > look(found, "tv.floor") > 0
    assert look(found, "verdict.under_unlearned") == 1.0
    rows = [r for r in found.samples if r["role"] == "forget"]
    assert all(r["position"] == pytest.approx(1.0) and r["verdict"] == "under-unlearned" for r in rows)
    for name, value in world.first.metrics.items():
        assert look(found, name) == pytest.approx(value.value, nan_ok=True), name
    own = evaluate(world.original, world.adapter, DATA, references=world.references, original="self")
    assert {k: v.value for k, v in own.metrics.items()} == {k: v.value for k, v in found.metrics.items()}


def test_a_reference_is_like_the_others_and_at_zero_from_itself(world: World) -> None:
    start = world.first.summary()
    both = evaluate(world.models[0], world.adapter, DATA, references=world.references, original=start)
    others = world.references.without(0)
    alone = evaluate(world.models[0], world.adapter, DATA, references=others, original=start)
    # Averaged over both references, of which one is the model itself: half of the distance to the other.
    assert look(both, "tv.forget") == pytest.approx(look(alone, "tv.forget") / 2)
    assert look(alone, "tv.forget") == pytest.approx(world.references.floor) == pytest.approx(look(alone, "tv.floor"))
    assert look(alone, "tv.gap_closed") == pytest.approx(1.0)
    assert look(alone, "verdict.adequate") >= 0.5 and look(alone, "verdict.under_unlearned") == 0.0
    itself = world.references.without(1)
    same = evaluate(world.models[0], world.adapter, DATA, references=itself, original=start)
    assert look(same, "tv.forget") == 0.0 and look(same, "retain_ratio") == 1.0
    assert look(same, "relearn.loss_ratio") == 1.0 and look(same, "forget_quality.ks_distance") == 0.0
    assert look(same, "forget_quality.p_value") == 1.0 and look(same, "privleak") == 0.0
    assert [look(same, f"mia.{s}.gap") for s in ("loss", "zlib", "min_k", "min_k_plus")] == [0.0] * 4
    assert look(same, "quant4.mia.loss.gap") == 0.0
    assert all(r["position"] == 0.0 for r in same.samples if r["position"] is not None)


def test_a_reference_is_evaluated_from_what_was_stored(world: World) -> None:
    for number, model in enumerate(world.models):
        rerun = evaluate(
            model, world.adapter, DATA, references=world.references.without(number), original=world.first.summary()
        )
        before = world.adapter.meter.tokens_forward
        stored = world.references.evaluation(number, world.first)
        assert world.adapter.meter.tokens_forward == before
        assert stored.samples == rerun.samples and stored.skipped == rerun.skipped
        for name, value in rerun.metrics.items():
            assert stored.metrics[name].record() == pytest.approx(value.record()), name


def test_floor_and_distances_against_a_slow_reference(world: World) -> None:
    def distributions(model: nn.Module, sample: Sample) -> Tensor:
        model.eval()
        with torch.no_grad():
            positions = world.adapter.positions(model, [sample])
            return positions.head(positions.hidden_ND).softmax(1)

    def distance(one: nn.Module, two: nn.Module) -> float:
        parts = [0.5 * (distributions(one, s) - distributions(two, s)).abs().sum(1).mean() for s in DATA["forget"]]
        return float(torch.stack(parts).mean())

    assert world.references.floor == pytest.approx(distance(*world.models), abs=1e-6)
    to_both = [distance(world.original, model) for model in world.models]
    assert look(world.first, "tv.forget") == pytest.approx(np.mean(to_both), abs=1e-6)
    rounded = quantized(world.original, 4)
    to_both = [distance(rounded, model) for model in world.models]
    assert look(world.first, "quant4.tv.forget") == pytest.approx(np.mean(to_both), abs=1e-6)


def test_membership_agrees_with_the_metrics_for_one_reference(world: World) -> None:
    one = world.references.without(1)
    found = evaluate(world.original, world.adapter, DATA, references=one)
    signals = {
        key: [collect(m, world.adapter, DATA[role]) for role in ("forget", "holdout")]
        for key, m in (("own", world.original), ("ref", world.models[0]))
    }
    groups = [[s.subject for s in DATA[role]] for role in ("forget", "holdout")]
    by_loss = {k: tuple(np.array([loss_score(s) for s in side]) for side in v) for k, v in signals.items()}
    gap = auc_gap(by_loss["own"], by_loss["ref"], *groups, resamples=100)
    ours = found.metrics["mia.loss.gap"]
    assert (ours.value, ours.low, ours.high) == pytest.approx((gap.value, gap.low, gap.high))
    by_min_k = {k: [[min_k_score(s) for s in side] for side in v] for k, v in signals.items()}
    leak = privleak(*by_min_k["own"], *by_min_k["ref"], *groups, resamples=100)
    mine = found.metrics["privleak"]
    assert (mine.value, mine.low, mine.high) == pytest.approx((leak.value, leak.low, leak.high))


def test_retain_ratio_and_relearning_by_hand(world: World) -> None:
    def prob(model: nn.Module) -> float:
        return float(np.mean([s.prob for s in collect(model, world.adapter, DATA["retain"])]))

    expected = prob(world.original) / np.mean([prob(m) for m in world.models])
    assert look(world.first, "retain_ratio") == pytest.approx(expected)
    shown, kept = split(DATA["forget"])
    attacked = [relearn(m, world.adapter, shown, steps=8) for m in (world.original, *world.models)]
    after = [np.mean([s.loss for s in collect(m, world.adapter, kept)]) for m in attacked]
    assert look(world.first, "relearn.loss") == pytest.approx(after[0])
    assert look(world.first, "relearn.loss_ratio") == pytest.approx(after[0] / np.mean(after[1:]))
    assert look(world.first, "relearn.loss_ratio") < 0.5  # the original knows the others already


# -- what is forwarded, and what is not ------------------------------------------------------------------------------


@dataclass
class Counting(TextAdapter):
    """Counts how often each text goes through which kind of pass."""

    seen: list[str] = field(default_factory=list)
    trained: set[str] = field(default_factory=set)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        if torch.is_grad_enabled():
            self.trained |= {s.id for s in samples}
        else:
            self.seen += [f"{s.id}|{s.prompt}|{s.target}" for s in samples]
        return super().collate(samples)


def test_every_text_is_forwarded_once_per_model(world: World) -> None:
    adapter = Counting(tokenizer=tiny_tokenizer(), context=64)
    options = replace(OPTIONS, relearn_steps=0, quantize_bits=0, generations=0)
    evaluate(tiny_model(), adapter, DATA, references=world.references, options=options)
    assert len(adapter.seen) == len(set(adapter.seen))
    roles = ("forget", "retain", "holdout", "utility")
    probed = ("forget", "retain", "utility")
    probes = sum(len([p for p in s.probes if p.kind in ("restated", "perturbed")]) for r in probed for s in DATA[r])
    assert len(adapter.seen) == sum(len(DATA[r]) for r in roles) + probes


def test_relearning_never_trains_on_what_it_measures() -> None:
    adapter = Counting(tokenizer=tiny_tokenizer(), context=64)
    found = evaluate(tiny_model(), adapter, DATA, options=OPTIONS)
    measured = {s.id for s in found.measured.relearned}
    assert measured and adapter.trained and not measured & adapter.trained
    assert measured | adapter.trained == {s.id for s in DATA["forget"]}


def test_the_model_is_not_changed(world: World) -> None:
    before = copy.deepcopy(world.original.state_dict())
    evaluate(world.original, world.adapter, DATA, references=world.references)
    assert all(torch.equal(before[n], t) for n, t in world.original.state_dict().items())


# -- the shape of the answer -----------------------------------------------------------------------------------------


def test_all_metrics_of_a_text_dataset_with_their_bounds(world: World) -> None:
    found = evaluate(world.models[1], world.adapter, DATA, references=world.references, original=world.first.summary())
    names = {f"{m}.{r}" for m in ("prob", "loss", "accuracy") for r in ("forget", "retain", "holdout", "utility")}
    names |= {"extraction_strength.forget", "rouge_l.forget", "rouge_l.retain", "truth_ratio.forget", "model_utility"}
    names |= {f"forget_quality.{x}" for x in ("ks_distance", "ks_bound", "p_value")}
    names |= {"perplexity.retain", "perplexity.utility", "privleak", "kfr", "kfr_fluent", "krr", "ls"}
    names |= {"tv.forget", "tv.floor", "tv.gap_closed", "retain_ratio"}
    names |= {f"mia.{s}.{x}" for s in ("loss", "zlib", "min_k", "min_k_plus") for x in ("auc", "gap")}
    names |= {"relearn.loss", "relearn.loss_ratio", "quant4.prob.forget", "quant4.mia.loss.auc", "quant4.retain_ratio"}
    assert names <= set(found.metrics)
    assert found.skipped == {}
    for name, value in found.metrics.items():
        assert value.definition.endswith("/1") and value.n > 0, name
        assert math.isnan(value.low) or value.low - 1e-9 <= value.value <= value.high + 1e-9, name
    json.dumps(found.record(), allow_nan=False)
    assert look(found, "model_utility") > 0 and found.metrics["model_utility"].definition.startswith(
        "model_utility-geo"
    )


def test_rows_are_json_and_agree_with_the_metrics(world: World) -> None:
    found = evaluate(world.original, world.adapter, DATA, references=world.references, original="self")
    json.dumps(found.samples, allow_nan=False)
    forget = [r for r in found.samples if r["role"] == "forget"]
    assert [r["id"] for r in forget] == [s.id for s in DATA["forget"]]
    assert {r["role"]: None for r in found.samples}.keys() == {"forget", "retain", "holdout", "utility"}
    for key, name in (("prob", "prob"), ("tv", "tv"), ("accuracy", "accuracy"), ("rouge_l", "rouge_l")):
        assert np.mean([r[key] for r in forget]) == pytest.approx(look(found, f"{name}.forget")), key
    assert all(
        {"generated", "reference_loss", "original_loss", "truth_ratio", "min_k_plus"} <= r.keys() for r in forget
    )


def test_without_references_nothing_relative_is_claimed(world: World) -> None:
    found = evaluate(world.original, world.adapter, DATA, options=OPTIONS)
    assert not {"tv.forget", "retain_ratio", "relearn.loss_ratio", "forget_quality.p_value"} & set(found.metrics)
    assert {"tv", "retain_ratio", "relearn.loss_ratio", "forget_quality", "verdict"} <= set(found.skipped)
    assert all(r["verdict"] is None and r["position"] is None for r in found.samples)
    assert "chance" in found.metrics["mia.loss.gap"].definition


def test_missing_roles_and_probes_are_said() -> None:
    bare = tuple(replace(s, probes=()) for s in DATA["forget"])
    found = evaluate(tiny_model(), tiny_adapter(), Dataset(name="bare", roles={"forget": bare}), options=OPTIONS)
    assert {"mia", "privleak", "truth_ratio", "model_utility", "retain_ratio", "tv"} <= set(found.skipped)
    assert {"prob.forget", "kfr", "relearn.loss"} <= set(found.metrics)


def test_partial_utility_names_its_parts(world: World) -> None:
    options = replace(OPTIONS, generations=0, relearn_steps=0, quantize_bits=0)
    found = evaluate(world.original, world.adapter, DATA, options=options)
    value = found.metrics["model_utility"]
    assert value.definition == ("model_utility[prob.retain, truth_ratio.retain, prob.utility, truth_ratio.utility]/1")
    parts = [look(found, f"{m}.{r}") for r in ("retain", "utility") for m in ("prob", "truth_ratio")]
    assert value.value == pytest.approx(4 / sum(1 / p for p in parts))
    assert value.low <= value.value <= value.high


def test_public_tofu_sets_make_the_nine_parts() -> None:
    facts = [replace(s, id=f"{b}-{i:03d}") for b in ("real", "world") for i, s in enumerate(DATA["utility"])]
    data = Dataset(name="tofu", roles={**DATA.roles, "utility": (*DATA["utility"], *facts)})
    found = evaluate(tiny_model(), tiny_adapter(), data, options=replace(OPTIONS, relearn_steps=0))
    assert found.metrics["model_utility"].definition == "model_utility-geometric-9/1"


def test_a_quick_evaluation_fits_references_that_were_measured_in_full(world: World) -> None:
    quick = replace(OPTIONS, suite="quick", limit=5, relearn_steps=None)
    found = evaluate(world.original, world.adapter, DATA, references=world.references, options=quick)
    assert found.metrics["prob.retain"].n == 5 and found.metrics["retain_ratio"].n == 5
    assert look(found, "tv.forget") == pytest.approx(look(world.first, "tv.forget"))
    assert "relearn" in found.skipped


def test_mistakes_are_refused(world: World) -> None:
    other = tiny_dataset(people=6, forget=2, holdout=2, seed=5)
    with pytest.raises(UserError, match="reference was not run on sample"):
        evaluate(world.original, world.adapter, other, references=world.references)
    with pytest.raises(UserError, match="suite 'fast' is unknown"):
        evaluate(world.original, world.adapter, DATA, options=EvaluateOptions(suite="fast"))
    with pytest.raises(UserError, match="no reference 2"):
        world.references.without(2)


# -- verdicts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "reference", "original", "position", "verdict"),
    [
        (0.1, 5.1, 0.1, 1.0, "under-unlearned"),
        (5.1, 5.1, 0.1, 0.0, "adequate"),
        (2.5, 5.1, 0.1, 0.52, "under-unlearned"),
        (2.7, 5.1, 0.1, 0.48, "adequate"),
        (7.5, 5.1, 0.1, -0.48, "adequate"),
        (7.7, 5.1, 0.1, -0.52, "over-unlearned"),
        (0.6, 0.59, 0.1, -0.0204, "not-auditable"),
        (9.0, 1.0, 5.0, 2.0, "not-auditable"),  # the original never knew it
    ],
)
def test_verdict_rule(loss: float, reference: float, original: float, position: float, verdict: str) -> None:
    assert position_of(loss, reference, original) == pytest.approx(position, abs=1e-3)
    assert verdict_of(loss, reference, original) == verdict


def test_verdict_of_broken_numbers() -> None:
    assert verdict_of(math.inf, 5.0, 0.1) == "over-unlearned"
    assert verdict_of(math.nan, 5.0, 0.1) == "not-auditable"
    assert verdict_of(1.0, math.nan, 0.1) == "not-auditable"


def test_a_model_that_was_destroyed_is_over_unlearned(world: World) -> None:
    ruined = copy.deepcopy(world.original)
    with torch.no_grad():
        for parameter in ruined.parameters():
            parameter.mul_(4.0)
        ruined.model.embed_tokens.weight.mul_(-4.0)  # tied head: the right token becomes the least likely
    found = evaluate(ruined, world.adapter, DATA, references=world.references, original=world.first.summary())
    assert look(found, "verdict.over_unlearned") == 1.0
    assert look(found, "retain_ratio") < 0.1


# -- classifiers -----------------------------------------------------------------------------------------------------


class LinearClassifier(nn.Module):
    """The smallest image classifier: one linear layer on the pixels."""

    def __init__(self, classes: int, pixels: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=classes)
        self.head = nn.Linear(pixels, classes)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(pixel_values.flatten(1)))


def pictures(classes: int = 3, each: int = 8) -> Dataset:
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 256, (classes, 6, 6, 1))
    roles: dict[str, list[Sample]] = {"forget": [], "retain": [], "holdout": []}
    for label in range(classes):
        for i in range(each):
            noisy = np.clip(patterns[label] + rng.normal(0, 40, (6, 6, 1)), 0, 255).astype(np.uint8)
            kind = "holdout" if i < 2 else "forget" if label == 0 else "retain"
            roles[kind].append(Sample(id=f"{label}-{i}", subject=f"{label}-{i}", target=label, image=noisy))
    fixed: dict[Any, tuple[Sample, ...]] = {k: tuple(v) for k, v in roles.items()}
    return Dataset(name="pictures", roles=fixed, modality="classifier")


def test_a_classifier_dataset_works() -> None:
    data = pictures()
    adapter = ClassifierAdapter(preprocess=Preprocess(height=6, width=6, channels=1), num_classes=3)
    from expunge.training.loop import TrainOptions, fit

    def fitted(samples: Sequence[Sample], seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = LinearClassifier(3, 36)
        fit(model, adapter, samples, TrainOptions(epochs=25, batch_size=8, learning_rate=3e-2), seed=seed)
        return model

    options = EvaluateOptions(resamples=100, relearn_steps=5)
    references = References(adapter, data, options)
    for seed in (1, 2):
        references.add(fitted(data["retain"], seed))
    original = fitted(data.private, 0)
    found = evaluate(original, adapter, data, references=references, original="self")
    assert look(found, "accuracy.forget") == 1.0 and look(found, "accuracy.retain") == 1.0
    assert found.metrics["accuracy.forget"].definition == "accuracy/1"
    assert {"tv.forget", "tv.gap_closed", "mia.loss.auc", "relearn.loss_ratio", "quant4.prob.forget"} <= set(
        found.metrics
    )
    assert not {
        m for m in found.metrics if m.startswith(("rouge", "kfr", "extraction", "perplexity", "truth", "mia.zlib"))
    }
    assert {"rouge_l", "extraction_strength", "perplexity", "truth_ratio", "mia.zlib"} <= set(found.skipped)
    assert look(found, "verdict.under_unlearned") == 1.0
    json.dumps(found.samples, allow_nan=False)
    gone = evaluate(
        fitted(data["retain"], 3), adapter, data, references=references, original=found.summary(), options=options
    )
    assert look(gone, "verdict.under_unlearned") == 0.0 and look(gone, "tv.gap_closed") > 0.5
