"""The flagship: cluster-driven unlearning in edit mode.

1. Proxy: where a base is kept, a short retraining from it on the retain set; it has never seen the forget data.
2. Targets: ensemble of distributions that a model without the data could have, calibrated on never-seen text.
3. Where: token clusters by spectral clustering, ranked by their exact additive influence (curvature K-FAC).
4. Start: the original's weights, a little way towards the proxy.
5. Edit: Jensen-Shannon and reverse KL to the targets on the chosen tokens and layers, retain loss beside it, a
   closed loop that moves the forget loss to the never-seen loss, healing with the forget targets kept in.

No formal guarantee comes with an edit: what it reached must be measured.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expunge.data.samples import Sample
from expunge.errors import UserError, unknown
from expunge.methods.cluster.edit import Edit, EditPlan, mean_losses
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
from expunge.training.loop import Feed, TrainOptions, fit, train
from expunge.training.terms import Teacher

State = dict[str, Tensor]


def weights(model: nn.Module) -> State:
    """A copy of all parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def blend(model: nn.Module, first: State, second: State, share: float) -> None:
    """Set the parameters to share·first + (1 − share)·second."""
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n in second and p.requires_grad:
                p.copy_(share * first[n] + (1 - share) * second[n].to(p.device))


def proxy_weights(context: Context, options: ClusterOptions) -> State:
    """The base trained for ``proxy_epochs`` on the retain set; kept in the work folder, so a restart skips it."""
    assert context.base is not None
    kept = context.work / "proxy.safetensors" if context.work is not None else None
    if kept is not None and kept.exists():
        return load_file(kept)
    model = context.base()
    settings = TrainOptions(
        epochs=options.proxy_epochs,
        batch_size=4,
        learning_rate=options.proxy_rate,
        other_learning_rate=options.proxy_rate / 5,
        optimizer="muon",
        micro_tokens=options.micro_tokens,
        precision=options.precision,
    )
    work = context.work / "proxy" if context.work is not None else None
    fit(model, context.adapter, context.retain, settings, seed=context.seed + 1, work=work, progress=context.progress,
        name="proxy")  # fmt: skip
    state = weights(model)
    if kept is not None:
        save_file(state, str(kept) + ".tmp")
        Path(str(kept) + ".tmp").rename(kept)
        shutil.rmtree(context.work / "proxy", ignore_errors=True)  # type: ignore[operator]
    return state


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
                raise UserError("target member 'proxy' needs --base, retain samples and proxy_epochs above 0.")
        return names
    if has_proxy:
        return ["proxy", "blend"]
    if context.base is not None:
        return ["base", "counterfactual", "blend"]
    return ["counterfactual", "original"] if any(s.names for s in context.forget) else ["original"]


@dataclass
class Sources:
    """Who can be asked about the forget samples, and what the answers are bounded by."""

    context: Context
    options: ClusterOptions
    original: State
    base: State | None
    proxy: State | None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.own = self.ask(self.original)
        self.targets = [targets_n for _, targets_n in self.own]
        self.anchor_state = self.proxy if self.proxy is not None else self.base
        if self.anchor_state is not None:
            self.anchor = self.ask(self.anchor_state)
            self.caps = [log_nV.gather(1, t[:, None])[:, 0] for log_nV, t in self.anchor]
            return
        limit = self.options.cap
        self.caps = [torch.full(t.shape, math.log(limit)) for t in self.targets]
        capped = self.capped([log_nV for log_nV, _ in self.own])
        self.anchor = list(zip(capped, self.targets, strict=True))
        self.notes.append(
            "no base was given: blind to what the original knew before the private data; true tokens are capped at "
            f"{limit} and only never-seen text says how far is far enough"
        )

    def ask(self, state: State, other: State | None = None, share: float = 1.0) -> list[tuple[Tensor, Tensor]]:
        """Log-probabilities and targets under given weights; the original's are put back."""
        blend(self.context.model, state, other if other is not None else state, share)
        found = log_probs(self.context.model, self.context.adapter, self.context.forget)
        blend(self.context.model, self.original, self.original, 1.0)
        return found

    def capped(self, raw: Sequence[Tensor]) -> list[Tensor]:
        return [cap_true_token(r, t, c) for r, t, c in zip(raw, self.targets, self.caps, strict=True)]

    def member(self, name: str) -> list[Tensor] | None:
        """Log-probabilities (n, V) of one member for each forget sample; None where it has nothing to say."""
        if name == "proxy" or (name == "base" and self.proxy is None):
            return [log_nV for log_nV, _ in self.anchor]
        if name == "base":
            assert self.base is not None
            return [log_nV for log_nV, _ in self.ask(self.base)]
        if name == "original":
            return self.capped([log_nV for log_nV, _ in self.own])
        if name == "blend":
            if self.anchor_state is None:
                raise UserError("target member 'blend' needs the base model: give --base, or leave it out.")
            return self.capped([log_nV for log_nV, _ in self.ask(self.original, self.anchor_state, 0.5)])
        context = self.context
        known = [*context.unseen, *context.retain]
        people = other_names(known, np.random.default_rng(context.seed), self.options.people)
        if not people or not any(s.names for s in context.forget):
            self.notes.append("no names of subjects are known: the counterfactual member is left out")
            return None
        return self.capped(counterfactual(context.model, context.adapter, context.forget, self.anchor, people))


def build_targets(
    context: Context, options: ClusterOptions, original: State, base: State | None, proxy: State | None
) -> Targets:
    """Ask the members about the forget samples and calibrate their ensemble on never-seen text."""
    sources = Sources(context, options, original, base, proxy)
    asked = {name: sources.member(name) for name in chosen_members(context, options, proxy is not None)}
    members = {name: found for name, found in asked.items() if found is not None}
    if not members:
        members["original"] = sources.capped([log_nV for log_nV, _ in sources.own])
    unseen_loss = None
    if context.unseen:
        unseen_loss = float(np.mean(mean_losses(context.model, context.adapter, context.unseen)))
    else:
        sources.notes.append("no never-seen text was given (--holdout): neither targets nor edit could be calibrated")
    targets = ensemble(context.forget, members, sources.targets, unseen_loss, options.sharpness)
    targets.notes = [f"targets: {' + '.join(members)}", *sources.notes, *targets.notes]
    return targets


def run(context: Context, options: ClusterOptions) -> Outcome:
    """Edit ``context.model`` in place; see the module's description."""
    from expunge.methods.cluster.localise import Scope, choose_scope

    model, adapter = context.model, context.adapter
    original = weights(model)
    base: State | None = None
    proxy: State | None = None
    if context.base is not None:
        base = weights(context.base())
        if base.keys() != original.keys() or any(base[n].shape != original[n].shape for n in base):
            raise UserError("the base does not have the original's shape: give the very model it was trained from.")
        if options.proxy_epochs and context.retain:
            proxy = proxy_weights(context, options)
    targets = build_targets(context, options, original, base, proxy)
    seen: Sequence[Sample] = context.retain if options.retain in ("kl", "both") else ()
    protected: Sequence[Sample] = [*seen, *context.earlier]
    teacher = Teacher.of(model, adapter, protected) if protected else None
    scope: Scope = choose_scope(context, options, targets)

    towards = proxy if proxy is not None else base
    if towards is not None and options.start < 1:
        blend(model, original, towards, options.start)
    elif towards is None:
        targets.notes.append("no base was given: the edit starts from the original's own weights")
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
    with scope.frozen(model):
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
