"""What is measured only where there are pictures: membership and tug of war of classifiers, CLEAR, modality matrix.

Shape suffix: N samples.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expunge.bench.clear import clear
from expunge.bench.desk import Desk, Floats, losses, mean_over, numbers, probs
from expunge.bench.measuring import CUTS, Measured, spread
from expunge.data.pictures import read_picture
from expunge.data.samples import Image, Role, Sample
from expunge.metrics.clear import Faces, centroid_hits, face_centroid
from expunge.metrics.modality import Asked, Change, by_modality, modality_matrix
from expunge.metrics.vision import (
    Efficacy,
    average_gap,
    feature,
    gap_to_reference,
    membership_accuracy,
    mia_efficacy,
    tug_of_war,
)

THUMBNAILS = 16  # forget samples whose picture is kept in the record, for the report to show beside the answers
LARGEST = 64  # pixels of their longer side


def images(desk: Desk) -> None:
    """The metrics of classifiers, or CLEAR's and the row of the modality matrix; nothing for a model of texts alone."""
    if desk.own.modality == "classifier":
        classifier(desk)
    elif desk.own.modality == "multimodal":
        clear(desk)
        crossing(desk)


def thumbnails(desk: Desk, rows: Sequence[dict[str, Any]]) -> None:
    """Put a small picture into the rows of some forget samples that the model answered, a classifier its class."""
    pictured = {s.id: s.image for s in desk.own.samples["forget"] if s.image is not None}
    own = [row for row in rows if row["role"] == "forget" and row["id"] in pictured]
    for row in own:
        if row["id"] in desk.own.predicted:
            row["generated"] = f"class {desk.own.predicted[row['id']]}"
    for row in spread([row for row in own if "generated" in row], THUMBNAILS):
        if (picture := data_uri(pictured[row["id"]])) is not None:
            row["image"] = picture


def data_uri(image: Image) -> str | None:
    """The picture as a PNG, at most ``LARGEST`` pixels a side, that a page can hold; None for a vector of features."""
    from PIL import Image as Pillow

    pixels = image if isinstance(image, np.ndarray) else read_picture(Path(image), f"'{image}'")
    if min(pixels.shape[:2]) < 2:
        return None
    flat = pixels[:, :, 0] if pixels.shape[2:] == (1,) else pixels
    picture = Pillow.fromarray(np.ascontiguousarray(flat)).convert("RGB")
    picture.thumbnail((LARGEST, LARGEST))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


# -- classifiers ---------------------------------------------------------------------------------------------------


def classifier(desk: Desk) -> None:
    """U-MIA and MIA efficacy by SVC on confidences; with references tug of war, its MIA form, and the average gap."""
    randomness(desk)
    faces(desk)
    missing = [role for role in CUTS if role not in desk.own.signals]
    if missing:
        for name in ("u_mia", "mia_efficacy", "tow", "average_gap"):
            desk.skipped[name] = f"the dataset has no {' and no '.join(missing)} samples"
        return
    level, draws, seed = desk.options.level, desk.options.resamples, desk.seed
    forget, holdout = (feature(desk.own.signals[role]) for role in ("forget", "holdout"))
    groups: dict[str, list[str]] = {role: desk.subjects(role) for role in CUTS}
    desk.metrics["u_mia"] = membership_accuracy(
        forget, holdout, groups["forget"], groups["holdout"], level=level, resamples=draws, seed=seed
    )
    own = efficacy(desk, desk.own)
    desk.metrics["mia_efficacy.forget"], desk.metrics["mia_efficacy.attack"] = own.efficacy, own.attack
    if not desk.references:
        for name in ("mia_efficacy.gap", "tow", "average_gap"):
            desk.skipped[name] = "no reference model"
        return
    outside_N = mean_over([efficacy(desk, r).outside_N for r in desk.references])
    desk.metrics["mia_efficacy.gap"] = gap_to_reference(
        own.outside_N, outside_N, groups["forget"], definition="mia_efficacy-svc-confidence-gap/1", level=level
    )
    right = hits(desk.own)
    theirs: dict[str, Floats] = {role: mean_over([hits(r)[role] for r in desk.references]) for role in CUTS}
    desk.metrics["tow"] = tug_of_war(right, theirs, groups, level=level, resamples=draws, seed=seed)
    if not (np.isfinite(own.outside_N).any() and np.isfinite(outside_N).any()):
        desk.skipped["tow_mia"] = desk.skipped["average_gap"] = "the membership attack had nothing to go by"
        return
    desk.metrics["tow_mia"] = tug_of_war(
        {**right, "forget": own.outside_N},
        {**theirs, "forget": outside_N},
        groups,
        definition="tow-mia/1",
        level=level,
        resamples=draws,
        seed=seed,
    )
    desk.metrics["average_gap"] = average_gap(
        {**right, "mia": own.outside_N},
        {**theirs, "mia": outside_N},
        {**groups, "mia": groups["forget"]},
        level=level,
        resamples=draws,
        seed=seed,
    )


def randomness(desk: Desk) -> None:
    """Zero retrain forgetting, and how far it is from the references'."""
    ids = [s.id for s in desk.own.samples["forget"]]
    if not desk.own.randomness:
        return
    own_N = numbers(desk.own.randomness, ids)
    desk.metrics["zrf.forget"] = desk.mean(own_N, desk.subjects("forget"), "zrf-bits/1")
    if desk.references:
        theirs_N = mean_over([numbers(r.randomness, ids) for r in desk.references])
        desk.metrics["zrf.gap"] = gap_to_reference(
            own_N, theirs_N, desk.subjects("forget"), definition="zrf-bits-gap/1", level=desk.options.level
        )


def faces(desk: Desk) -> None:
    """Whether a person is still found among the enrolled ones, in each role, and how far that is from the references'.

    Of each person (subject) in a role, the first half of the pictures is enrolled, all roles together, and the others
    are asked about.
    """
    by_person: dict[tuple[Role, str], list[Sample]] = {}
    for role in CUTS:
        for sample in desk.own.samples.get(role, []):
            if sample.id in desk.own.embedded:
                by_person.setdefault((role, sample.subject), []).append(sample)
    if not by_person:
        desk.skipped["face_centroid"] = "nobody (no subject) has several pictures in one role"
        return
    enrolled = [s for own in by_person.values() for s in own[: len(own) // 2]]
    for role in CUTS:
        asked = [s for (where, _), own in by_person.items() if where == role for s in own[len(own) // 2 :]]
        if not asked:
            continue
        own, others = as_faces(desk.own, enrolled), as_faces(desk.own, asked)
        desk.metrics[f"face_centroid.{role}"] = face_centroid(own, others, desk.options.level)
        if desk.references:
            theirs_N = mean_over([centroid_hits(as_faces(r, enrolled), as_faces(r, asked)) for r in desk.references])
            desk.metrics[f"face_centroid.gap.{role}"] = gap_to_reference(
                centroid_hits(own, others), theirs_N, others.people, definition="face_centroid-gap/1",
                level=desk.options.level,
            )  # fmt: skip


def as_faces(measured: Measured, samples: Sequence[Sample]) -> Faces:
    """These pictures as the model sees them."""
    rows_ND = np.stack([measured.embedded[s.id] for s in samples])
    return Faces([s.id for s in samples], [s.subject for s in samples], rows_ND)


def hits(measured: Measured) -> dict[str, Floats]:
    """1 where the arg-max is the true class, per role."""
    return {role: feature(measured.signals[role], "correctness") for role in CUTS}


def efficacy(desk: Desk, measured: Measured) -> Efficacy:
    """MIA efficacy of one model on the desk's samples."""
    confidence = [feature(measured.signals[role]) for role in CUTS]
    names = [desk.subjects(role) for role in CUTS]
    return mia_efficacy(*confidence, *names, level=desk.options.level, resamples=desk.options.resamples, seed=desk.seed)


# -- text with images ----------------------------------------------------------------------------------------------


def crossing(desk: Desk) -> None:
    """How the probability of forget and retain answers moved, with a picture and without, and how far to the reference.

    One run is one row of the modality matrix; datasets that ask in one modality alone have none.
    """
    asked = {s.image is None for s in desk.own.samples["forget"]}
    if len(asked) < 2:
        desk.skipped["modality"] = "all forget samples are asked in one modality"
        return
    if desk.original is None:
        desk.skipped["modality"] = "the original model was not given"
        return
    rows: dict[str, Mapping[Asked, Change]] = {}
    roles: tuple[Role, ...] = ("forget", "retain")
    for role in roles:
        if role in desk.own.samples:
            samples = desk.own.samples[role]
            before = np.exp(-desk.original.losses(role, [s.id for s in samples]))
            theirs = mean_over([np.exp(-losses(r.signals[role])) for r in desk.references]) if desk.references else None
            rows[role] = by_modality(samples, before, probs(desk.own.signals[role]), theirs)
    cells = modality_matrix(
        {"run": rows["forget"]},
        {"run": rows.get("retain", {})},
        level=desk.options.level,
        resamples=desk.options.resamples,
        seed=desk.seed,
    )
    for cell in cells:
        desk.metrics[f"modality.{cell.asked}.forget"] = cell.forget
        if cell.retain is not None:
            desk.metrics[f"modality.{cell.asked}.retain"] = cell.retain
        if cell.closed is not None:
            desk.metrics[f"modality.{cell.asked}.closed"] = cell.closed
