"""Protocols by name, and running one: a folder with results.json, results.md and a figure, resumable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge.completeness.protocols import binui, scoreui
from expunge.completeness.protocols.approximate import approximate
from expunge.completeness.protocols.binui import Protocol
from expunge.completeness.protocols.fake import fake
from expunge.completeness.protocols.figure import draw
from expunge.completeness.protocols.tables import Line, Outcome
from expunge.completeness.protocols.world import BRIEF, ProtocolOptions, World, make_world
from expunge.errors import UserError, unknown
from expunge.files import digest_folder, plain
from expunge.options import configure
from expunge.progress import Progress
from expunge.runs import Run
from expunge.stats import Estimate


@dataclass(frozen=True)
class Entry:
    """One protocol; ``order`` names the column that tables and figures are sorted by.

    ``brief``: texts are learnt in the few passes of :data:`BRIEF`, unless the user says how many.
    """

    name: str
    run: Protocol
    order: str
    modalities: frozenset[str] = frozenset({"text", "classifier"})
    brief: bool = True
    rows: str = "score"  # what stands in the first column

    @property
    def summary(self) -> str:
        return (self.run.__doc__ or "").strip().split("\n")[0]


PROTOCOLS: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("binui", binui.binui, "auc"),
        Entry("scoreui", scoreui.scoreui, "spearman.trajectory"),
        Entry("shift", binui.shifted_shadows, "auc"),
        Entry("incremental", binui.incremental, "auc"),
        Entry("architecture", binui.architectures, "auc"),
        Entry("shadows", binui.number_of_shadows, "auc"),
        Entry("scoring", binui.scoring_functions, "auc"),
        Entry("approximate", approximate, "level.forget", rows="served"),
        Entry("fake", fake, "alarm.forget", frozenset({"text"}), brief=False),
    )
}


def get_protocol(name: str) -> Entry:
    """By name.

    Raises:
        UserError: no such protocol; the nearest name is suggested.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def run_protocol(
    name: str,
    *,
    out: Path | str,
    data: str = "people",
    data_dir: Path | str | None = None,
    data_options: Mapping[str, Any] | None = None,
    model: str | None = None,
    init: str | None = None,
    seed: int = 0,
    shadows: int | None = None,
    groups: int | None = None,
    quick: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a protocol into ``out/NAME`` and return the content of its results.json.

    Models are kept in ``out/models`` under keys of their content, so that protocols with the same ``out`` share them
    and an interrupted run goes on with those that it has. A finished run is read, not repeated.

    Args:
        shadows: shadow models per group. groups: disjoint groups of them. quick: a smaller form, under a minute.
        options: any other field of :class:`ProtocolOptions`.

    Raises:
        UserError: unknown protocol or option, data of a modality that it does not work on, or another run in ``out``.
    """
    entry = get_protocol(name)
    given = {"shadows": shadows, "groups": groups}
    usual = {"epochs": BRIEF[data]} if entry.brief and data in BRIEF else {}
    values = usual | dict(options or {}) | {k: v for k, v in given.items() if v is not None}
    chosen: ProtocolOptions = configure(ProtocolOptions, values, "option of a protocol")
    chosen = chosen.quick() if quick else chosen
    folder = Path(out)
    world = make_world(
        data,
        folder,
        chosen,
        data_dir=data_dir,
        data_options=data_options,
        model=model,
        init=init,
        quick=quick,
        seed=seed,
        progress=progress,
    )
    if world.dataset.modality not in entry.modalities:
        raise UserError(
            f"protocol '{name}' works on {' and '.join(sorted(entry.modalities))} models, and '{data}' is a "
            f"{world.dataset.modality} dataset: choose other data."
        )
    config: dict[str, Any] = {
        "protocol": name,
        "data": data,
        "data_options": dict(data_options or {}),
        "model": model,
        "init": init,
    }
    config |= {"seed": seed, "quick": quick, "options": asdict(chosen)}
    digests = {"data": world.dataset.digest()}
    if model is not None and Path(model).is_dir():
        digests["model"] = digest_folder(Path(model))
    with Run.open(folder / name, "protocol", config, digests, seeds=[seed]) as run:
        if not run.done:
            if world.progress.event is None:
                world.progress.event = run.event
            outcome = entry.run(world)
            results = plain(results_of(entry, world, outcome))
            run.write_json("results.json", results)
            run.write_text("results.md", markdown(results, entry.rows))
            draw(results, entry.order, run.path(f"figures/{name}.png"))
            run.finish(notes=outcome.notes, figures={"models trained": world.store.trained})
        found: dict[str, Any] = run.read_json("results.json")
    return found


def results_of(entry: Entry, world: World, outcome: Outcome) -> dict[str, Any]:
    """The content of results.json before :func:`expunge.files.plain`."""
    options, dataset = world.options, world.dataset
    return {
        "schema": "expunge.protocol/1",
        "protocol": entry.name,
        "summary": entry.summary,
        "dataset": {
            "name": dataset.name,
            "source": dataset.source,
            "digest": dataset.digest(),
            "modality": dataset.modality,
            "samples": {role: len(samples) for role, samples in dataset.roles.items()},
        },
        "seed": world.seed,
        "options": asdict(options),
        "shadow_set": len(world.cut[0]),
        "population": len(world.cut[1]),
        "lines": [line.record() for line in _sorted(outcome.lines, entry.order)],
        "left_out": outcome.left_out,
        "facts": outcome.facts,
        "notes": outcome.notes,
    }


def _sorted(lines: Sequence[Line], order: str) -> list[Line]:
    """Settings in the order in which they came, the best score of each first."""
    places = {setting: i for i, setting in enumerate(dict.fromkeys(line.setting for line in lines))}
    nothing = Estimate(float("-inf"))
    return sorted(lines, key=lambda line: (places[line.setting], -line.metrics.get(order, nothing).value))


# -- for people ----------------------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any], rows: str) -> str:
    """results.md: one table per setting, best score first."""
    data, options = results["dataset"], results["options"]
    said = [
        f"# Protocol {results['protocol']} on {data['name']}",
        "",
        results["summary"],
        "",
        f"{options['targets']} target(s), {options['groups']} group(s) of {options['shadows']} shadow(s), seed "
        f"{results['seed']}; samples: {', '.join(f'{n} {role}' for role, n in data['samples'].items())}; "
        f"shadow set {results['shadow_set']}, population {results['population']}. Brackets: 95 % of a bootstrap over "
        "targets, groups and subjects together.",
        "",
    ]
    settings = dict.fromkeys(line["setting"] for line in results["lines"])
    for setting in settings:
        own = [line for line in results["lines"] if line["setting"] == setting]
        columns = list(dict.fromkeys(name for line in own for name in line["metrics"]))
        said += [f"## {setting}", "", f"| {rows} | {' | '.join(columns)} | note |", "|---" * (len(columns) + 2) + "|"]
        for line in own:
            cells = [_shown(line["metrics"].get(column)) for column in columns]
            said.append(f"| {line['score']} | {' | '.join(cells)} | {line['note']} |")
        said += ["", f"n = {own[0]['metrics'][columns[0]]['n']} samples: {own[0]['metrics'][columns[0]]['note']}.", ""]
    for name, reason in results["left_out"].items():
        said.append(f"- {name} left out: {reason}")
    said += [f"- {note}" for note in results["notes"]]
    for name, fact in results["facts"].items():
        if not any(isinstance(value, Mapping) for value in fact.values()):
            said.append(f"- {name}: {', '.join(f'{k} {_number(v)}' for k, v in fact.items())}")
    return "\n".join(said).rstrip() + "\n"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _shown(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric["value"] is None:
        return ""
    if metric["low"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"
