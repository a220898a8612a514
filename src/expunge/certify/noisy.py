"""L1 evidence of models that were made with noise: the whole computation once more, and its bytes beside the released.

A private training hides its records from the start, and a reset drowns what was learnt; what either is worth follows
from its options. That the released model came out of this very computation is shown by repeating it from base, data and
the seed of its noise. The seed lies beside the model; without it nothing can be repeated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from expunge.certify.provenance import Clearance, Manifest, describe, lineage_of, never_saw, normalised_digest
from expunge.certify.sections import PrivateTraining, Reset
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.files import digest_folder
from expunge.methods.registry import Context
from expunge.methods.reset import NOISE as RESET_NOISE
from expunge.models.load import Loaded, load_model, save_model
from expunge.noise import read_seed
from expunge.record import RECORD, RunRecord, digest_code, read_record
from expunge.runs import read_config
from expunge.training.private import NOISE, PrivateOptions, train_private


def hidden_by(model: Path) -> list[Manifest] | None:
    """The chain of manifests of a model in the run of its private training, its own first; else None."""
    chain = lineage_of(model)
    trained = bool(chain) and chain[0].mechanism is not None and (model.resolve().parent / RECORD).is_file()
    return chain if trained else None


def of_private(model: Path, chain: Sequence[Manifest], forget: Sequence[Sample]) -> dict[str, Any]:
    """Sections ``private_training`` and ``provenance`` of a privately trained model.

    Raises:
        NoiseGone: the seed was destroyed. UserError: the run that trained the model, its base or its data is not there
            any more, or has changed.
    """
    own, made = chain[0], chain[0].mechanism
    assert made is not None
    options = PrivateOptions(**{f.name: getattr(made, f.name) for f in fields(PrivateOptions)})
    digest, records = _trained_again(model, options, forget)
    section = PrivateTraining(
        artefact=own.artefact,
        replayed=digest,
        mu=options.mu,
        group=max(1, _alike(records, forget)),
        hides=options.group,
        delta=options.delta,
        clipped=True,
    )
    return {"private_training": section, "provenance": _cleared(chain, forget)}


def _trained_again(model: Path, options: PrivateOptions, forget: Sequence[Sample]) -> tuple[str, list[Sample]]:
    """Digest of the model that its own training gives once more, and the records of the training.

    A start of random weights is drawn without the forget samples, so that neither its vocabulary nor its shape can
    come from them.
    """
    from expunge.bench.single import Request, start_of  # the room above, which holds what a training run is

    folder = model.resolve().parent
    record, config = read_record(folder), read_config(folder)
    seed = read_seed(folder / NOISE)
    request = Request(**{f.name: config[f.name] for f in fields(Request) if f.name in config})
    dataset, start = request.dataset(), config["model"]
    if dataset.digest() != record.digests["data"]:
        raise UserError(f"the data of '{folder}' has changed: put it back to repeat the training.")
    if start is not None and (not Path(start).is_dir() or digest_folder(Path(start)) != record.digests.get("model")):
        raise UserError(f"'{start}' is not the model that '{folder}' began with: put it back to repeat the training.")
    loaded = start_of(request, without(dataset, forget), start, config["init"])
    samples = [s for role in config["roles"] for s in dataset[role]]
    with _threads(record):
        train_private(loaded.model, loaded.adapter, samples, options, seed)
    loaded.model = request.served(loaded.model)
    return saved_digest(loaded), samples


def _alike(records: Sequence[Sample], forget: Sequence[Sample]) -> int:
    """Records of a training that are a forget sample, by content or by its words, under whatever id and in any role."""
    salt = ""  # nothing of this is kept
    wanted = {d for s in forget for d in (s.digest(), normalised_digest(s, salt)) if d is not None}
    return sum(s.digest() in wanted or normalised_digest(s, salt) in wanted for s in records)


@contextmanager
def _threads(record: RunRecord) -> Iterator[None]:
    """As many threads as the run had: with others the last bits of a sum may differ."""
    before = torch.get_num_threads()
    torch.set_num_threads(record.environment.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def of_reset(model: Path, original: Path, dataset: Dataset, may_stay: Set[str]) -> dict[str, Any]:
    """Sections ``reset`` and ``provenance`` of a model that method ``reset`` made from a base; else nothing.

    ``may_stay``: ids of near-duplicates that somebody has decided to keep; their words count as their own.

    The method runs once more with tokenizer and configuration of the base: a released folder in which anything else
    came from the original is another one.

    Raises:
        NoiseGone: the seed was destroyed. UserError: the base is not there any more, or has changed.
    """
    from expunge.bench.plan import entry_of  # the room above, which holds what a run is given
    from expunge.bench.single import Request

    folder = model.resolve().parent
    record, config = read_record(folder), read_config(folder)
    if config.get("base") is None:  # around random weights, of a shape that nobody vouches for
        return {}
    base = Path(str(config["base"])).expanduser()
    if not base.is_dir() or digest_folder(base) != record.digests.get("base"):
        raise UserError(f"'{base}' is not the base that '{folder}' had: put it back to repeat the reset.")
    request = Request(**{f.name: config[f.name] for f in fields(Request) if f.name in config})
    more = {"noise_seed": read_seed(folder / RESET_NOISE).hex()} | ({"precision": "bf16"} if request.half else {})
    method, options = entry_of("reset", "reset", config["set"]).whole(more)
    before = load_model(original, **request.training, lora=request.lora_options(), seed=request.seed).model
    start = load_model(base, **request.training)
    context = Context(
        before, start.adapter, dataset["forget"], dataset["retain"], base=lambda: start.model, seed=request.seed
    )
    with _threads(record):
        made = method(context, options).model
    section = Reset(
        artefact=digest_folder(model),
        replayed=saved_digest(Loaded(request.served(made), start.adapter, "")),
        radius=options.radius,
        clip=options.reset_clip,
        learning_rate=options.rate,
        decay=1.0,
        steps=options.reset_steps,
        noise=options.noise,
        delta=options.delta,
    )
    kept = [s for s in dataset["retain"] if s.id not in may_stay]
    own = describe(kind="reset", artefact=model, records=kept, code=digest_code(), made_from=(base,))
    return {"reset": section, "provenance": never_saw(own.artefact, [own, *lineage_of(base)], dataset["forget"])}


def without(dataset: Dataset, forget: Sequence[Sample]) -> Dataset:
    """The dataset without any sample of that content, in whatever role."""
    gone = {s.digest() for s in forget}
    return replace(
        dataset, roles={r: tuple(s for s in own if s.digest() not in gone) for r, own in dataset.roles.items()}
    )


def saved_digest(loaded: Loaded) -> str:
    """Digest of the folder that this model is saved as."""
    with tempfile.TemporaryDirectory() as scratch:
        return digest_folder(save_model(loaded, Path(scratch) / "model"))


def _cleared(chain: Sequence[Manifest], forget: Sequence[Sample]) -> Clearance:
    """Whether anything but the private training itself saw the records: its own are left out of the question."""
    own, *below = chain
    found = never_saw(own.artefact, [own.model_copy(update={"records": (), "normalised": ()}), *below], forget)
    if not found.clean:
        return found
    sentence = f"by the manifests of {found.links} artefact(s), nothing but the private training read the record(s)"
    return found.model_copy(update={"sentence": sentence})
