"""Everything that needs the model itself: one pass per text, generations, the two attacks. Comparing comes after.

Shape suffixes: L target tokens of a sample, R references.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from expunge.attacks.quantization import quantized
from expunge.attacks.relearning import relearn, split
from expunge.data.samples import ROLES, Dataset, Modality, Role, Sample
from expunge.errors import UserError
from expunge.methods.retrain import from_scratch
from expunge.metrics.clear import kind_of, swapped
from expunge.metrics.tofu import wanted
from expunge.metrics.vision import jensen_shannon
from expunge.models.adapter import Adapter, Batch, Head, Positions
from expunge.models.am_softmax import embeddings
from expunge.models.snapshot import TokenDistributions, snapshot
from expunge.options import option
from expunge.progress import Progress
from expunge.signals.distribution import class_probabilities, total_variation
from expunge.signals.forward import collect
from expunge.signals.record import Signals

CUTS: tuple[Role, ...] = ("forget", "retain", "holdout")
GENERATED_ROLES: tuple[Role, ...] = ("forget", "retain", "utility")
SPLIT_SEED = 0  # one split for every model, so that relearning is compared on the same samples
DEFAULTS: dict[str, dict[str, int]] = {
    "quick": {"generations": 0, "limit": 200, "relearn_steps": 0, "quantize_bits": 0},
    "standard": {"generations": 30, "limit": 200, "relearn_steps": 50, "quantize_bits": 4},
    "full": {"generations": 400, "limit": 0, "relearn_steps": 50, "quantize_bits": 4},
}


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What to measure of a model. Where a field is none, the suite decides.

    quick: likelihoods, membership, distances, probes of forget. standard: also probes of the other roles,
    generations, relearning, quantization. full: more generations, and true-positive rates of the membership attacks.
    """

    suite: str = option("standard", "how much is measured", "", ("quick", "standard", "full"))
    generations: int | None = option(None, "most samples per role that are answered for ROUGE and KFR; 0 = none")
    max_new_tokens: int = option(64, "longest generated answer")
    limit: int | None = option(None, "most samples of each role but forget; 0 = all")
    relearn_steps: int | None = option(None, "steps of the relearning attack; 0 = leave it out")
    relearn_learning_rate: float = option(5e-4, "constant AdamW rate of the relearning attack")
    relearn_share: float = option(0.2, "share of the forget samples that are learnt again; the others are measured")
    quantize_bits: int | None = option(None, "bits of the quantization attack; 0 = leave it out")
    min_k: float = option(20.0, "percent of the least likely tokens in Min-K% and Min-K%++", "Shi et al. 2024")
    resamples: int = option(1000, "bootstrap draws behind each interval")
    level: float = option(0.95, "confidence level of the intervals")
    auditable_gap: float = option(0.5, "nats per token by which a reference's loss must exceed the original's")
    max_tokens: int = option(4096, "padded tokens in one pass")
    verdicts: bool = option(True, "judge forget samples by the rule of bench/verdicts.py; an audit calibrates its own")

    def resolved(self) -> EvaluateOptions:
        """The same with every none filled in.

        Raises:
            UserError: the suite is unknown, or a number is out of range.
        """
        if self.suite not in DEFAULTS:
            raise UserError(f"suite '{self.suite}' is unknown: give {', '.join(DEFAULTS)}.")
        filled: dict[str, Any] = {k: v for k, v in DEFAULTS[self.suite].items() if getattr(self, k) is None}
        done = replace(self, **filled)
        for name in ("generations", "limit", "relearn_steps", "quantize_bits"):
            if getattr(done, name) < 0:
                raise UserError(f"{name} = {getattr(done, name)} is negative: give 0 to leave it out, or more.")
        for name in ("max_new_tokens", "resamples", "max_tokens"):
            if getattr(done, name) < 1:
                raise UserError(f"{name} = {getattr(done, name)} is too small: give at least 1.")
        return done


@dataclass(frozen=True)
class Pass:
    """What one pass over the forget set leaves: signals, distributions, distances to the references."""

    signals: list[Signals]
    tv: list[NDArray[np.float32]]  # (L, R) per sample; R = 0 without references
    store: TokenDistributions | None


@dataclass
class Measured:
    """One model, measured once. ``signals`` by role are those of the samples, ``probes`` those of their probes."""

    modality: Modality
    samples: dict[Role, list[Sample]]
    signals: dict[Role, list[Signals]]
    forget: Pass
    probes: dict[Role, list[Signals]] = field(default_factory=dict)
    generated: dict[Role, dict[str, str]] = field(default_factory=dict)  # sample id -> answer
    swapped: dict[Role, dict[str, str]] = field(default_factory=dict)  # the same with another subject's picture
    predicted: dict[str, int] = field(default_factory=dict)  # likeliest class, by forget sample id
    perplexity: dict[str, float] = field(default_factory=dict)  # of the forget answers, under the model itself
    randomness: dict[str, float] = field(default_factory=dict)  # 1 - JS to random weights, by forget sample id
    embedded: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # by id, of people with several pictures
    relearned: list[Signals] = field(default_factory=list)  # of the forget samples that were not learnt again
    quantized: Pass | None = None
    quantized_signals: dict[Role, list[Signals]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def without_store(self) -> Measured:
        """The same without the stored distributions, which only references need."""
        attacked = None if self.quantized is None else replace(self.quantized, store=None)
        return replace(self, forget=replace(self.forget, store=None), quantized=attacked)

    def on_samples_of(self, other: Measured) -> Measured:
        """The part of this that was measured on the other's samples, in their order.

        Raises:
            UserError: the other was measured on a sample that this was not.
        """
        picks: dict[Role, list[int]] = {}
        for role, samples in other.samples.items():
            place = {s.id: i for i, s in enumerate(self.samples.get(role, []))}
            lost = [s.id for s in samples if s.id not in place]
            if lost:
                raise UserError(
                    f"the references were not measured on {role} sample '{lost[0]}': use one dataset and one 'limit' "
                    "for all models."
                )
            picks[role] = [place[s.id] for s in samples]
        part = replace(
            self,
            samples={role: [self.samples[role][i] for i in own] for role, own in picks.items()},
            signals={role: [self.signals[role][i] for i in own] for role, own in picks.items()},
            forget=replace(self.forget, signals=[self.forget.signals[i] for i in picks["forget"]]),
        )
        if self.quantized is not None:
            part.quantized = replace(self.quantized, signals=[self.quantized.signals[i] for i in picks["forget"]])
            part.quantized_signals = {
                role: [own[i] for i in picks[role]] for role, own in self.quantized_signals.items() if role in picks
            }
        by_id = {s.id: s for s in self.relearned}
        part.relearned = [by_id[s.id] for s in other.relearned] if all(s.id in by_id for s in other.relearned) else []
        return part


def spread(samples: Sequence[Any], most: int) -> list[Any]:
    """At most ``most`` samples or rows of them (0 = all), evenly over the sequence, so that no subject is preferred."""
    if not most or len(samples) <= most:
        return list(samples)
    return [samples[i * len(samples) // most] for i in range(most)]


def evenly(samples: Sequence[Sample], most: int) -> list[Sample]:
    """At most ``most`` samples (0 = all), as many of each kind of question, spread over each; the order stays.

    Questions about pictures come in turns (caption, name, caption, …): every second sample would be of one kind. Those
    with wrong answers beside them are a kind of their own, since only they have a truth ratio.
    """
    kinds: dict[tuple[str, bool], list[Sample]] = {}
    for sample in samples:
        probed = sample.image is not None and bool(sample.probes_of("perturbed"))
        kinds.setdefault((kind_of(sample), probed), []).append(sample)
    left, picked = most or len(samples), set[str]()
    for turn, own in enumerate(sorted(kinds.values(), key=len)):  # a small kind leaves its share to the others
        share = min(len(own), -(-left // (len(kinds) - turn)))
        left -= share
        picked |= {s.id for s in spread(own, share)} if share else set()
    return [s for s in samples if s.id in picked]


def chosen(dataset: Dataset, options: EvaluateOptions) -> dict[Role, list[Sample]]:
    """The samples of each role that are measured; roles without samples are left out."""
    limit = options.limit or 0
    picked = {role: evenly(dataset[role], 0 if role == "forget" else limit) for role in ROLES}
    return {role: samples for role, samples in picked.items() if samples}


def take(
    model: nn.Module,
    adapter: Adapter,
    dataset: Dataset,
    options: EvaluateOptions,
    stores: Sequence[TokenDistributions] = (),
    progress: Progress | None = None,
) -> Measured:
    """Measure a model. Every text goes through it once; ``stores`` are the references' distributions on forget.

    Raises:
        UserError: the dataset has nothing to forget, an option is out of range, or a reference does not fit.
    """
    options = options.resolved()
    dataset.check()
    progress = progress or Progress()
    samples = chosen(dataset, options)
    tokens = options.max_tokens
    forget = forget_pass(model, adapter, samples["forget"], stores, tokens)
    signals: dict[Role, list[Signals]] = {"forget": forget.signals}
    for role, own in samples.items():
        if role != "forget":
            signals[role] = collect(model, adapter, own, max_tokens=tokens)
    found = Measured(dataset.modality, samples, signals, forget)
    _probes(found, model, adapter, options)
    _randomness(found, model, adapter)
    _embeddings(found, model, adapter)
    _generations(found, model, adapter, options, progress)
    _relearning(found, model, adapter, options, progress)
    _quantization(found, model, adapter, options, stores)
    broken = sum(not np.isfinite(s.log_prob_L).all() for own in signals.values() for s in own)
    if broken:
        found.skipped["loss"] = f"{broken} sample(s) without a finite loss: the model is broken there"
    return found


def forget_pass(
    model: nn.Module, adapter: Adapter, samples: Sequence[Sample], stores: Sequence[TokenDistributions], tokens: int
) -> Pass:
    """One forward pass: its hidden states serve the signals and the distances to all references."""
    device = next(model.parameters()).device
    store = snapshot(model, adapter, samples, max_tokens=tokens)
    store.head.module.to(device)
    try:
        replay = Replay(inner=adapter, store=store, device=device)
        signals = collect(model, replay, samples, max_tokens=tokens)
        distances = total_variation(model, replay, samples, stores, max_tokens=tokens) if stores else []
    finally:
        store.head.module.cpu()
    return Pass(signals, distances or [np.zeros((len(s), 0), dtype=np.float32) for s in signals], store)


def distances_of(
    store: TokenDistributions, adapter: Adapter, samples: Sequence[Sample], others: Sequence[TokenDistributions]
) -> list[NDArray[np.float32]]:
    """Total variation between stored distributions, (L, R) per sample; on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    store.head.module.to(device)
    try:
        replay = Replay(inner=adapter, store=store, device=device)
        return total_variation(nn.Linear(1, 1, device=device), replay, samples, others)
    finally:
        store.head.module.cpu()


@dataclass
class Replay(Adapter):
    """An adapter that gives back stored states instead of running the model."""

    inner: Adapter | None = None
    store: TokenDistributions | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        assert self.inner is not None and self.store is not None
        self.modality = self.inner.modality
        self.truncated = self.inner.truncated

    @property
    def _inner(self) -> Adapter:
        assert self.inner is not None
        return self.inner

    def encode(self, sample: Sample) -> Any:
        return self._inner.encode(sample)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return self._inner.collate(samples)

    def hidden_and_head(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Head]:
        return self._inner.hidden_and_head(model, batch)

    def num_tokens(self, sample: Sample) -> int:
        return self._inner.num_tokens(sample)

    def num_targets(self, sample: Sample) -> int:
        return self._inner.num_targets(sample)

    def save(self, folder: Any) -> None:
        self._inner.save(folder)

    def positions(self, model: nn.Module, samples: Sequence[Sample]) -> Positions:
        """The stored states of these samples; no work is counted, since none is done."""
        assert self.store is not None
        hidden = [self.store.hidden[s.id] for s in samples]
        lengths = torch.tensor([len(h) for h in hidden])
        return Positions(
            torch.cat(hidden).to(self.device),
            torch.cat([self.store.targets[s.id] for s in samples]).to(self.device),
            torch.arange(len(samples)).repeat_interleave(lengths).to(self.device),
            len(samples),
            self.store.head,
        )


def _probes(found: Measured, model: nn.Module, adapter: Adapter, options: EvaluateOptions) -> None:
    roles: tuple[Role, ...] = ("forget",) if options.suite == "quick" else ("forget", "retain", "utility")
    for role in roles:
        own = found.samples.get(role, [])
        texts = [t for t in wanted(own) if t.id not in {s.id for s in own}]
        if texts:
            found.probes[role] = collect(model, adapter, texts, max_tokens=options.max_tokens)


def _randomness(found: Measured, model: nn.Module, adapter: Adapter) -> None:
    """The classes that a classifier sees in forget, and how close it is to random weights, the same for every model."""
    if found.modality != "classifier":
        return
    samples = found.samples["forget"]
    own = class_probabilities(model, adapter, samples)
    found.predicted = {s.id: int(best) for s, best in zip(samples, own.argmax(axis=1), strict=True)}
    try:
        teacher = from_scratch(model, SPLIT_SEED)
    except (AttributeError, TypeError):
        found.skipped["zrf"] = "the model cannot be built anew from its configuration"
        return
    random = class_probabilities(teacher, adapter, samples)
    found.randomness = {s.id: float(1 - js) for s, js in zip(samples, jensen_shannon(own, random), strict=True)}


def _embeddings(found: Measured, model: nn.Module, adapter: Adapter) -> None:
    """What a classifier's head reads of the pictures of people (subjects) with several in one role."""
    if found.modality != "classifier":
        return
    for role in CUTS:
        counts = Counter(s.subject for s in found.samples.get(role, []))
        several = [s for s in found.samples.get(role, []) if counts[s.subject] > 1]
        if several:
            rows = embeddings(model, adapter, several)
            found.embedded |= {s.id: row_D for s, row_D in zip(several, rows, strict=True)}


def _generations(
    found: Measured, model: nn.Module, adapter: Adapter, options: EvaluateOptions, progress: Progress
) -> None:
    reason = ""
    if not adapter.can_generate:
        reason = f"a {adapter.modality} model does not generate text"
    elif not options.generations:
        reason = "no generations were asked for (generations=0)"
    if reason:
        for name in ("rouge_l", "kfr", "krr", "ls"):
            found.skipped[name] = reason
        return
    progress.log("message", text="generating answers")
    for role in GENERATED_ROLES:
        asked = evenly(found.samples.get(role, []), options.generations or 0)
        asked = [s for s in asked if s.prompt or s.image is not None]  # a document has no question to answer
        if not asked:
            continue
        answers = adapter.generate(model, asked, options.max_new_tokens)
        found.generated[role] = {s.id: a for s, a in zip(asked, answers, strict=True)}
        pictured = [s for s in asked if s.image is not None]
        if role != "utility" and len({s.subject for s in pictured}) > 1:
            answers = adapter.generate(model, swapped(pictured), options.max_new_tokens)
            found.swapped[role] = {s.id: a for s, a in zip(pictured, answers, strict=True)}
    if not found.generated:
        for name in ("rouge_l", "kfr", "krr", "ls"):
            found.skipped[name] = "no sample has a prompt to answer"
    answered = found.generated.get("forget", {})
    own = [replace(s, target=answered[s.id], probes=()) for s in found.samples["forget"] if answered.get(s.id)]
    if own:
        heard = collect(model, adapter, own, max_tokens=options.max_tokens)
        found.perplexity = {s.id: float(np.exp(min(s.loss, 700.0))) for s in heard if len(s)}


def _relearning(
    found: Measured, model: nn.Module, adapter: Adapter, options: EvaluateOptions, progress: Progress
) -> None:
    if not options.relearn_steps:
        found.skipped["relearn"] = "relearning was not asked for (relearn_steps=0)"
        return
    if len({s.digest() for s in found.samples["forget"]}) < 2:
        found.skipped["relearn"] = "fewer than two different forget samples: none would be left to measure"
        return
    learned, others = split(found.samples["forget"], options.relearn_share, SPLIT_SEED)
    attacked = relearn(
        model,
        adapter,
        learned,
        steps=options.relearn_steps,
        learning_rate=options.relearn_learning_rate,
        micro_tokens=options.max_tokens,
        progress=progress,
    )
    found.relearned = collect(attacked, adapter, others, max_tokens=options.max_tokens)


def _quantization(
    found: Measured,
    model: nn.Module,
    adapter: Adapter,
    options: EvaluateOptions,
    stores: Sequence[TokenDistributions],
) -> None:
    if not options.quantize_bits:
        found.skipped["quant"] = "quantization was not asked for (quantize_bits=0)"
        return
    rounded = quantized(model, options.quantize_bits)
    found.quantized = forget_pass(rounded, adapter, found.samples["forget"], stores, options.max_tokens)
    roles: tuple[Role, ...] = ("retain", "holdout")
    for role in roles:
        if role in found.samples:
            found.quantized_signals[role] = collect(
                rounded, adapter, found.samples[role], max_tokens=options.max_tokens
            )
