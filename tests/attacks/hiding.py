"""A model that hides what it knows: what recovery attacks must tell from one that was retrained."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import torch

from attack_cases import exam, retrain
from expunge.attacks.exam import Checkpoint


@cache
def hiding() -> Checkpoint:
    """The original after ascent on forget until its loss is that of a retrained model. Not to be changed."""
    adapter, model = exam().audited.adapter, copy.deepcopy(exam().audited.model)
    forget = exam().forget
    wanted = -np.mean([s.loss for s in retrain().signals(forget)])
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.05)
    for _ in range(300):
        log_prob = adapter.positions(model, forget).log_prob_N().mean()
        if float(log_prob.detach()) < wanted:
            break
        optimizer.zero_grad()
        log_prob.backward()
        optimizer.step()
    return Checkpoint.of(model.eval(), adapter)
