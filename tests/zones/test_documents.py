"""Documents in a store zone: continuing a private one opens its block, public and unknown ones stay with the base."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch

from conftest import shared
from expunge.data.registry import load_dataset
from expunge.data.samples import Dataset, Sample
from expunge.models.load import Loaded
from expunge.models.text import TextAdapter
from expunge.models.tiny import init_text
from expunge.signals.forward import collect
from expunge.zones.build import build_zone
from expunge.zones.model import ZonedModel

torch.set_num_threads(1)
SALT = "5a" * 32


@cache
def people() -> tuple[Loaded, Dataset, ZonedModel]:
    """Biographies among the questions, over a base that has learnt nothing: routing does not need more."""
    sizes = {"people": "6", "forget": "2", "utility": "16", "holdout": "6", "questions": "2", "documents": "true"}
    data = load_dataset("people", data_dir=None, seed=0, options=sizes)
    loaded = init_text(data["utility"], "tiny-test", 0)
    return loaded, data, build_zone(loaded, list(data.private), data["utility"], salt=SALT)


def documents(samples: tuple[Sample, ...]) -> list[Sample]:
    return [s for s in samples if not s.prompt]


def opened(model: ZonedModel, loaded: Loaded, sample: Sample) -> list[str | None]:
    """Whose block is open at each position of the sample."""
    assert isinstance(loaded.adapter, TextAdapter)
    ids_BT = torch.tensor([loaded.adapter.cached(sample).ids])
    routes = model.routes(ids_BT, torch.ones_like(ids_BT), ids_BT.shape[1])
    return [routes.subjects[i] if i >= 0 else None for i in routes.block_BT[0].tolist()]


def test_a_private_document_opens_its_own_block_and_keeps_it_open() -> None:
    loaded, data, model = people()
    for doc in documents(data.private):
        found = opened(model, loaded, doc)
        first = found.index(doc.subject)
        assert set(found[:first]) <= {None} and set(found[first:]) == {doc.subject}
        assert first < len(found) / 4  # from the name on


def test_public_and_unknown_documents_open_nothing() -> None:
    loaded, data, model = people()
    for doc in documents((*data["utility"], *data["holdout"])):
        assert set(opened(model, loaded, doc)) == {None}


def test_a_private_document_is_continued_where_it_was_left() -> None:
    loaded, data, model = people()
    assert isinstance(loaded.adapter, TextAdapter)
    for doc in documents(data.private)[:3]:
        ids = loaded.adapter.cached(doc).ids
        cut = len(ids) // 2
        out = model.generate(torch.tensor([ids[:cut]]), max_new_tokens=40, do_sample=False)
        assert tuple(out[0, cut:].tolist()) == ids[cut : cut + 40]


def test_restated_documents_find_their_subject() -> None:
    loaded, data, model = people()
    for doc in documents(data.private):
        for probe in doc.probes_of("restated")[:1]:
            assert opened(model, loaded, doc.as_probe(probe))[-1] == doc.subject


def test_a_removed_document_is_as_unknown_as_any() -> None:
    loaded, data, model = people()
    model = copy.deepcopy(model)
    doc = documents(data.private)[0]
    model.zone.remove(subject=doc.subject)
    assert set(opened(model, loaded, doc)) == {None}


@pytest.mark.slow
def test_pages_of_the_web_that_name_nobody() -> None:
    data = load_dataset(
        "webtext", data_dir=shared("data/webtext_demo"), seed=0, options={"private": "24", "forget": "4"}
    )
    loaded = init_text(data["utility"], "small", 0)
    model = build_zone(loaded, list(data.private), data["utility"], options={"learn": "false"}, salt=SALT)
    constants = model.zone.public.constants
    assert not constants["surrogates_renamed"] and constants["false_open_high"] > 0.05  # few texts: said, not hidden
    last = [opened(model, loaded, s)[-1] == s.subject for s in data.private]
    assert np.mean(last) == 1
    # What is calibrated on forty texts keeps no promise of one in a hundred; a block that opens by mistake says little.
    public = [*data["holdout"], *data["utility"]]
    assert np.mean([any(opened(model, loaded, s)) for s in public]) <= 0.15
    bare, zoned = (np.mean([s.loss for s in collect(m, loaded.adapter, public)]) for m in (loaded.model, model))
    assert zoned <= 1.005 * bare
