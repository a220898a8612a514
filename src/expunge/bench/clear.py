"""CLEAR's scores of a model of text and images, on every dataset that asks as CLEAR does: captions, names of faces.

The six sets are found by what is asked with a picture (:func:`expunge.metrics.clear.kind_of`), so that the published
data, the embedded people and files of one's own are measured alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from expunge.bench.desk import Desk, quality_over, rouge_of
from expunge.bench.measuring import Measured
from expunge.data.samples import Role
from expunge.metrics.clear import (
    FORGET,
    REAL,
    RETAIN,
    TABLES,
    ClearScore,
    Kind,
    clear_forget,
    clear_forget_quality,
    clear_js_published,
    clear_real,
    clear_retain,
    clear_set,
    face_recognition,
    kind_of,
    rouge_with_image,
)
from expunge.metrics.tofu import TofuSet

SETS: Mapping[Role, Mapping[str, Kind]] = {
    "forget": {"forget": "caption", "forget_facerec": "face"},
    "retain": {"retain": "caption", "retain_facerec": "face"},
    "utility": {"real_faces": "face", "real_world": "question"},
}
SCORES: Mapping[str, tuple[Role, tuple[str, ...], Callable[..., ClearScore]]] = {
    "clear_real": ("utility", REAL, clear_real),
    "clear_retain": ("retain", RETAIN, clear_retain),
    "clear_forget": ("forget", FORGET, clear_forget),
}
NO_PICTURES = "no forget sample shows a picture and asks for its caption or the name on it, with wrong answers beside"


def clear(desk: Desk) -> None:
    """Real, Retain, Forget with the gap to the references, Forget Quality in both forms, faces, ROUGE with the picture.

    What has no probes is skipped with its reason. The three scores are of the parts that the published tables are made
    of, without ROUGE: the same in every suite, and not 0 as soon as one set is never named word by word. ROUGE with the
    picture stands beside them.
    """
    own = sets_of(desk.own)
    if not own.keys() & set(FORGET):
        desk.skipped["clear"] = NO_PICTURES
        return
    theirs = [sets_of(r) for r in desk.references]
    for name, (role, wanted, score) in SCORES.items():
        sets = {n: own[n] for n in wanted if n in own}
        if not sets:
            desk.skipped[name] = missing(desk.own, role)
            continue
        found = score(
            sets,
            theirs,
            TABLES,
            level=desk.options.level,
            resamples=desk.options.resamples,
            seed=desk.seed,
        )
        desk.metrics[name] = found.value
        if found.gap is not None:
            desk.metrics[f"{name}.gap"] = found.gap
    for role, names in SETS.items():
        faces = next((own[n] for n, kind in names.items() if kind == "face" and n in own), None)
        if faces is not None:
            desk.metrics[f"face_recognition.{role}"] = face_recognition(faces, level=desk.options.level)
    quality(desk, own, theirs)
    seen(desk)


def sets_of(own: Measured) -> dict[str, TofuSet]:
    """CLEAR's sets among what was measured; a sample without wrong answers is in none, for its truth ratio is unknown.

    Pictures of the real world that are all of one subject are each their own unit of resampling.
    """
    found: dict[str, TofuSet] = {}
    for role, names in SETS.items():
        signals = [*own.signals.get(role, []), *own.probes.get(role, [])]
        for name, kind in names.items():
            asked = [s for s in own.samples.get(role, []) if kind_of(s) == kind and s.probes_of("perturbed")]
            if asked and role in own.probes:  # the suite decides whose probes are measured
                items = clear_set(name, asked, signals, rouge_of(own, role))
                alone = name == "real_world" and len(set(items.groups or ())) == 1
                found[name] = replace(items, groups=None) if alone else items
    return found


def missing(own: Measured, role: Role) -> str:
    """Why a role has none of CLEAR's sets."""
    if role not in own.samples:
        return f"the dataset has no {role} samples"
    probed = any(kind_of(s) in SETS[role].values() and s.probes_of("perturbed") for s in own.samples[role])
    if probed:
        return f"the wrong answers of {role} were not measured: suite=standard does"
    return f"no {role} sample asks for what is on a picture, with wrong answers beside"


def quality(desk: Desk, own: Mapping[str, TofuSet], theirs: Sequence[Mapping[str, TofuSet]]) -> None:
    """Forget Quality on the captions, or on the names where there are no captions."""
    if not theirs:
        desk.skipped["clear_forget_quality"] = desk.skipped["clear_js_published"] = "no reference model"
        return
    name = next(n for n in FORGET if n in own)
    found = [clear_forget_quality(own[name], r[name], level=desk.options.level) for r in theirs]
    distance, _, p_value = quality_over(found)
    desk.metrics["clear_forget_quality.ks_distance"] = distance
    desk.metrics["clear_forget_quality.p_value"] = p_value
    published = [clear_js_published(own[name], r[name]) for r in theirs]
    value = float(np.mean([p.value for p in published]))
    desk.metrics["clear_js_published"] = replace(published[0], value=value)


def seen(desk: Desk) -> None:
    """ROUGE of the answers to pictures, and what the right picture adds to it."""
    if not desk.own.swapped:
        reason = "of one subject alone no picture can be swapped for another's" if desk.own.generated else ""
        desk.skipped["rouge_with_image"] = reason or "no generations were asked for (generations=0)"
    for role, others in desk.own.swapped.items():
        asked = [s for s in desk.own.samples[role] if s.id in others]
        found = rouge_with_image(
            [str(s.target) for s in asked],
            [desk.own.generated[role][s.id] for s in asked],
            [others[s.id] for s in asked],
            [s.subject for s in asked],
            level=desk.options.level,
            seed=desk.seed,
        )
        desk.metrics[f"rouge_with_image.{role}"] = found.rouge
        desk.metrics[f"rouge_with_image.gain.{role}"] = found.gain
