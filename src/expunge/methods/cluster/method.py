"""The flagship: cluster-driven unlearning in edit mode.

1. Proxy: where a base is kept, a short retraining from it on the retain set; it has never seen the forget data.
2. Targets: ensemble of distributions that a model without the data could have, calibrated on never-seen text.
3. Where: token clusters by spectral clustering, ranked by their exact additive influence (curvature K-FAC).
4. Start: the original's weights, a little way towards the proxy.
5. Edit: Jensen-Shannon and reverse KL to the targets on the chosen tokens and layers, retain loss beside it, a
   closed loop that moves the forget loss to the never-seen loss, healing with the forget targets kept in.

Where whole classes go from a classifier, their rows of the head are placed in closed form instead, see ``classes.py``.
No formal guarantee comes with an edit: what it reached must be measured.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError, unknown
from expunge.methods.cluster.classes import comparable, place_rows
from expunge.methods.cluster.edit import Edit, EditPlan, kept_statistics
from expunge.methods.cluster.options import MEMBERS, ClusterOptions
from expunge.methods.cluster.targets import (
    Targets,
    cap_true_token,
    counterfactual,
    ensemble,
    log_probs,
    other_names,
)
from expunge.methods.registry import Context, Outcome
from expunge.methods.retrain import from_scratch
from expunge.models.adapter import evaluating
from expunge.models.lora import is_lora
from expunge.models.losses import mean_losses
from expunge.training.loop import Feed, TrainOptions, fit, train
from expunge.training.terms import Teacher

State = dict[str, Tensor]
SCRATCH_LIMIT = 1.3
BLOCK_ELEMENTS = 1 << 28  # numbers of one member's distributions held at once: 1 GiB


def weights(model: nn.Module) -> State:
    """A copy of all parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def blend(model: nn.Module, first: State, second: State, share: float, spared: Collection[str] = ()) -> None:
    """Set the parameters, but for the spared ones, to share·first + (1 − share)·second."""
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in second and n not in spared and p.requires_grad:
                p.copy_(share * first[n] + (1 - share) * second[n].to(p.device))


def proxy_model(context: Context, options: ClusterOptions) -> nn.Module:
    """The base, or random weights, briefly trained on the retain set; kept in the work folder for a restart."""
    model = context.base() if context.base is not None else from_scratch(context.model, context.seed + 1)
    kept = context.work / "proxy.safetensors" if context.work is not None else None
    if kept is not None and kept.exists():
        everything, state = {**dict(model.named_parameters()), **dict(model.named_buffers())}, load_file(kept)
        with torch.no_grad():
            for n, held in state.items():
                everything[n].copy_(held)
        return context.helpers.add("proxy", model, context.retain, "stands for a model without the data")
    settings = TrainOptions(
        epochs=options.proxy_epochs if context.base is not None else options.scratch_epochs,
        batch_size=4,
        learning_rate=options.proxy_rate,
        other_learning_rate=options.proxy_rate / 5,
        optimizer="muon",
        micro_tokens=options.micro_tokens,
        precision=options.precision,
    )
    work = context.work / "proxy" if context.work is not None else None
    seed = context.seed + 1
    fit(model, context.adapter, context.retain, settings, seed=seed, work=work, progress=context.progress, name="proxy")
    if kept is not None and work is not None:
        part = kept.with_suffix(".part")
        part.parent.mkdir(parents=True, exist_ok=True)  # a training shorter than a checkpoint leaves no folder
        # Batch normalisation keeps its statistics in buffers.
        buffers = {n: b.detach().clone() for n, b in model.named_buffers()}
        save_file(weights(model) | buffers, part)
        part.rename(kept)
        shutil.rmtree(work, ignore_errors=True)
    return context.helpers.add("proxy", model, context.retain, "stands for a model without the data")


def chosen_members(context: Context, options: ClusterOptions, has_proxy: bool) -> list[str]:
    """The ensemble's members: what was asked for, or the best that this request allows."""
    if options.members != "auto":
        names = options.members.split("+")
        for name in names:
            if name not in MEMBERS:
                raise unknown("target member", name, MEMBERS)
            if name == "base" and context.base is None:
                raise UserError("target member 'base' needs the base model: give --base, or leave it out.")
            if name == "proxy" and not has_proxy:
                raise UserError("target member 'proxy' needs retain samples, and proxy_epochs above 0.")
        return names
    if has_proxy:
        return ["proxy", "blend"] if context.base is not None else ["proxy"]
    if context.base is not None:
        return ["base", "counterfactual", "blend"]
    return ["counterfactual", "original"] if any(s.names for s in context.forget) else ["original"]


@dataclass
class Sources:
    """Who can be asked about the forget samples, and what the answers are bounded by.

    ``anchor`` is the model without the data that bounds the others: the proxy, else the base, else nobody.
    """

    context: Context
    options: ClusterOptions
    anchor: nn.Module | None
    has_proxy: bool
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.own = self.ask(self.context.model)
        self.targets = [targets_n for _, targets_n in self.own]
        if self.anchor is not None:
            self.bound = self.ask(self.anchor)
            self.caps = [log_nV.gather(1, t[:, None])[:, 0] for log_nV, t in self.bound]
            return
        limit = self.options.cap
        self.caps = [torch.full(t.shape, math.log(limit)) for t in self.targets]
        self.bound = list(zip(self.capped([log_nV for log_nV, _ in self.own]), self.targets, strict=True))
        self.notes.append(
            f"nothing bounds the targets: true tokens are capped at {limit}, and only never-seen text says how far is "
            "far enough"
        )

    def ask(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        return log_probs(model, self.context.adapter, self.context.forget)

    def capped(self, raw: Sequence[Tensor]) -> list[Tensor]:
        return [cap_true_token(r, t, c) for r, t, c in zip(raw, self.targets, self.caps, strict=True)]

    def member(self, name: str) -> list[Tensor] | None:
        """Log-probabilities (n, V) of one member for each forget sample; None where it has nothing to say."""
        context = self.context
        if name == "proxy" or (name == "base" and not self.has_proxy):
            return [log_nV for log_nV, _ in self.bound]
        if name == "base":
            assert context.base is not None
            return [log_nV for log_nV, _ in self.ask(context.base())]
        if name == "original":
            return self.capped([log_nV for log_nV, _ in self.own])
        if name == "blend":
            return self._blend()
        known = [*context.unseen, *context.retain]
        people = other_names(known, np.random.default_rng(context.seed), self.options.people)
        if not people or not any(s.names for s in context.forget):
            self.notes.append("no names of subjects are known: the counterfactual member is left out")
            return None
        return self.capped(counterfactual(context.model, context.adapter, context.forget, self.bound, people))

    def _blend(self) -> list[Tensor] | None:
        if self.anchor is None or self.context.base is None:
            raise UserError("target member 'blend' needs the base model: give --base, or leave it out.")
        if is_lora(self.context.model):
            self.notes.append("the weights are a LoRA adapter's: the blend member is left out")
            return None
        model = self.context.model
        original = weights(model)
        blend(model, original, weights(self.anchor), 0.5)
        raw = [log_nV for log_nV, _ in self.ask(model)]
        blend(model, original, original, 1.0)
        return self.capped(raw)


def never_seen_level(sources: Sources, unseen_samples: Sequence[Sample]) -> float:
    """The mean loss on the forget answers that a model without them should have, nats per token.

    The original's loss on never-seen text, plus how much harder the forget texts are than those for the anchor, which
    has seen neither: requests differ in difficulty, and a retrained model shows it.
    """
    context = sources.context
    level = float(np.mean(mean_losses(context.model, context.adapter, unseen_samples)))
    if sources.anchor is None:
        return level
    forget = [-float(log_nV.gather(1, t[:, None]).mean()) for log_nV, t in sources.bound if len(t)]
    unseen = mean_losses(sources.anchor, context.adapter, unseen_samples)
    return level + float(np.mean(forget)) - float(np.mean(unseen))


def build_targets(context: Context, options: ClusterOptions, anchor: nn.Module | None, has_proxy: bool) -> Targets:
    """Ask the members about the forget samples and calibrate their ensemble on never-seen text.

    Whole distributions are held for a block of samples at a time; a request of more than one block is calibrated on
    samples spread over all of it.
    """
    blocks = cut(context)
    if len(blocks) == 1:
        return _targets_of(context, options, anchor, has_proxy)
    every = len(blocks)
    spread = _targets_of(replace(context, forget=context.forget[::every]), options, anchor, has_proxy)
    fixed = replace(options, sharpness=spread.sharpness)
    parts = [_targets_of(replace(context, forget=block), fixed, anchor, has_proxy) for block in blocks]
    spread.kept = {name: entry for part in parts for name, entry in part.kept.items()}
    return spread


def cut(context: Context) -> list[list[Sample]]:
    """The forget samples in blocks whose distributions fit ``BLOCK_ELEMENTS`` numbers per member."""
    with evaluating(context.model):
        vocab = context.adapter.positions(context.model, context.forget[:1]).vocab
    room = max(1, BLOCK_ELEMENTS // vocab)
    blocks: list[list[Sample]] = [[]]
    used = 0
    for sample in context.forget:
        tokens = context.adapter.num_targets(sample)
        if blocks[-1] and used + tokens > room:
            blocks.append([])
            used = 0
        blocks[-1].append(sample)
        used += tokens
    return blocks


def _targets_of(context: Context, options: ClusterOptions, anchor: nn.Module | None, has_proxy: bool) -> Targets:
    sources = Sources(context, options, anchor, has_proxy)
    asked = {name: sources.member(name) for name in chosen_members(context, options, has_proxy)}
    members = {name: found for name, found in asked.items() if found is not None}
    if not members:
        members["original"] = sources.capped([log_nV for log_nV, _ in sources.own])
    level = None
    if not context.unseen:
        sources.notes.append("no never-seen text was given (--holdout): neither targets nor edit could be calibrated")
    elif not (known := comparable(context)):
        sources.notes.append(
            "no never-seen sample is of a class that nobody was trained on, as those to forget will be: the targets "
            "could not be calibrated"
        )
    elif options.sharpness is None:
        level = never_seen_level(sources, known)
    targets = ensemble(context.forget, members, sources.targets, level, options.sharpness)
    targets.notes = [f"targets: {' + '.join(members)}", *sources.notes, *targets.notes]
    return targets


def anchor_of(context: Context, options: ClusterOptions) -> tuple[nn.Module | None, bool]:
    """(the model without the data that bounds the targets, whether it is a proxy).

    Raises:
        UserError: the base is another kind of model than the original.
    """
    if context.base is None:
        return (proxy_model(context, options), True) if _from_random(context, options) else (None, False)
    wants_proxy = bool(options.proxy_epochs and context.retain)
    anchor = proxy_model(context, options) if wants_proxy else context.base()
    own, other = weights(context.model), weights(anchor)
    if not is_lora(context.model) and (own.keys() != other.keys() or any(own[n].shape != other[n].shape for n in own)):
        raise UserError("the base does not have the original's shape: give the very model it was trained from.")
    return anchor, wants_proxy


def _from_random(context: Context, options: ClusterOptions) -> bool:
    return bool(options.scratch_epochs and context.retain and not is_lora(context.model))


def stands_in(context: Context, proxy: nn.Module, notes: list[str]) -> bool:
    """Whether a proxy from random weights knows enough of the language to bound anything: on never-seen text its
    loss is at most ``SCRATCH_LIMIT`` times the original's. Where a base was pretrained on much more, it does not."""
    if not context.unseen:
        return True
    own, its = (float(np.mean(mean_losses(m, context.adapter, context.unseen))) for m in (context.model, proxy))
    if its > SCRATCH_LIMIT * own:
        notes.append(
            f"a proxy from random weights was tried and dropped: loss {its:.2f} on unseen text against {own:.2f}"
        )
        return False
    notes.append("a model trained from random weights on the retain set stands in for the base")
    return True


def run(context: Context, options: ClusterOptions) -> Outcome:
    """Edit ``context.model`` in place; see the module's description."""
    from expunge.methods.cluster.localise import Scope, choose_scope

    model, adapter = context.model, context.adapter
    options = options.settled(adapter.modality, model)
    if options.members == "auto" and place_rows(context):
        note = (
            "whole classes go: their rows of the head became the mean of rows that nobody was trained on, and nothing "
            "else moved; the features before the head still hold what was learnt (members=proxy+blend edits those too)"
        )
        return Outcome(model, [note], {"steps": 0}, removes_from_weights=False)
    anchor, has_proxy = anchor_of(context, options)
    notes: list[str] = []
    if context.base is None and anchor is not None and not stands_in(context, anchor, notes):
        anchor, has_proxy = None, False
    targets = build_targets(context, options, anchor, has_proxy)
    targets.notes += notes
    seen: Sequence[Sample] = context.retain if options.retain in ("kl", "both") else ()
    protected: Sequence[Sample] = [*seen, *context.earlier]
    teacher = Teacher.of(model, adapter, protected) if protected else None
    scope: Scope = choose_scope(context, options, targets)

    if context.base is None:
        targets.notes.append("no base was given: blind to what the original knew before the private data; the edit "
                             "starts from the original's own weights")  # fmt: skip
    elif anchor is not None and options.start < 1 and not is_lora(model):
        blend(model, weights(model), weights(anchor), options.start, scope.spared)
    del anchor
    feeds = {"forget": Feed(context.forget)}
    if context.retain and options.retain != "none":
        feeds["retain"] = Feed(context.retain)
    else:
        targets.notes.append("no retain samples were used: nothing holds the rest of the model in place")
    if context.earlier:
        feeds["earlier"] = Feed(context.earlier)
    memory: dict[str, Any] = {}
    plan = EditPlan({r: f.lengths(adapter) for r, f in feeds.items()}, options, context.seed, memory)
    edit = Edit(adapter, options, targets, teacher, context.forget, context.retain, context.unseen, plan, memory)
    with scope.frozen(model), kept_statistics(model):
        edit.project = scope.projection(options)
        log = train(
            model,
            adapter,
            feeds,
            edit.terms(),
            plan,
            options,
            seed=context.seed,
            optimizers=scope.optimizers(model, options, context),
            work=context.work,
            progress=context.progress,
            name="cluster",
            compute=edit.compute,
            on_step=edit.on_step,
            around=scope.around,
            memory=memory,
        )
    record: dict[str, Any] = {
        "steps": len(log.steps),
        "log": log.steps,
        "target_sharpness": targets.sharpness,
        "target_loss": targets.loss,
        "control": edit.trace[-1] if edit.trace else None,
        "scope": scope.record,
    }
    return Outcome(model, [*targets.notes, *scope.notes], record)
