"""The audit part of the report: what it says, what it tolerates, what it refuses, and that texts stay texts."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import math
import random
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import audit_synthetic as synthetic
import pytest
import report_synthetic
from test_report_page import EVIL, Page

from expunge.errors import UserError
from expunge.report import AUDIT_SCHEMA, audit_schema, write_report
from expunge.report.audit_charts import AUDIT_CHARTS, bins_of, uniform_band
from expunge.report.audit_schema import Audit, Drill, load_audit, load_drill
from expunge.report.audit_view import AuditReport, plural
from expunge.report.dots import CHANCE, HEIGHT, PAD, RELATIVE, UNIT, WIDTH, Marks, axis_of, dots
from expunge.report.schema import Measure


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = synthetic.write_audit(tmp_path_factory.mktemp("audit"))
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def report_of(content: dict[str, Any]) -> AuditReport:
    return AuditReport(Audit.model_validate(content))


def page_of(folder: Path, content: dict[str, Any] | None = None, lines: list[dict[str, Any]] | None = None) -> Page:
    return Page(write_report(synthetic.write_audit(folder, content, lines)).read_text(encoding="utf-8"))


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_verdict_stands_on_top_with_its_reasons(html: str) -> None:
    text = " ".join("".join(Page(html).text).split())
    assert re.findall(r'<section id="(\w+)"', html) == [
        "limits",
        "audit",
        "certificate",
        "completeness",
        "attacks",
        "drill",
    ]
    assert text.index("Failed: privacy and robustness. Passed: effectiveness. Not shown: utility.") < 400
    assert "The standard suite examined 60 forget samples (beside them 120 retain, 60 holdout and 50 utility)" in text
    assert "compared with its original, 2 retrained references and 3 shadow models that never saw the data" in text
    assert (
        "of 56 that can be judged, 9 under-unlearned, 41 adequate, 6 over-unlearned. Of 4 nothing can be said" in text
    )
    assert "corrected for 13 tests" in text
    for axis, state in (("Effectiveness", "passed"), ("Privacy", "failed"), ("Utility", "not shown")):
        tile = html[html.index(f"<h3>{axis}</h3>") :].split("</li>", maxsplit=1)[0]
        assert f"</span> {state}</p>" in tile
    privacy = html[html.index("<h3>Privacy</h3>") :].split("</li>", maxsplit=1)[0]
    assert "worst case: reference_ratio AUC 0.740 [0.680, 0.800], reference 0.500, corrected p " in privacy
    assert "worst of 6 tests" in privacy and "<svg" in privacy
    assert "soft_prompt" in html[html.index('id="limits"') :].split("</section>", maxsplit=1)[0]


def test_structure_and_policy(html: str, run: Path) -> None:
    page = Page(html)
    tags = page.tags
    assert not re.search(r"https?:|//[a-z]+\.[a-z]", html) and "@import" not in html
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        assert not any(name.startswith("on") for name in attributes)
        href = attributes.get("href")
        if href:
            assert href[1:] in ids if href.startswith("#") else href in ("audit.json", "drill.jsonl", "results.md")
        for reference in re.findall(r"url\(#([^)]+)\)", " ".join(v or "" for v in attributes.values())):
            assert reference in ids
    assert all(a.get("scope") for t, a in tags if t == "th")
    assert all(a.get("role") == "img" and a.get("aria-label") for t, a in tags if t == "svg")
    assert html.count('<table class="grid') == html.count("<caption>")
    policy = next(a["content"] for t, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy and len(page.scripts) == 2
    assert {path.stem for path in (run / "figures").glob("*.svg")} == AUDIT_CHARTS
    for name in AUDIT_CHARTS:
        ET.parse(run / "figures" / f"{name}.svg")


def test_attacks_are_grouped_worst_first_and_complete(html: str) -> None:
    table = html[html.index('<table class="grid sortable attacks">') :].split("</table>", maxsplit=1)[0]
    groups = re.findall(r'<th scope="colgroup"[^>]*>([^<]*)</th>', table)
    assert groups == [
        "Membership: AUC, forget against holdout",
        "Extraction: mean over samples",
        "Recovery: mean over samples",
        "What was to be kept: mean over samples",
    ]
    names = re.findall(r'<th scope="row"><span class="name">([^<]*)</span>', table)
    assert sorted(names) == sorted(synthetic.SCORES)
    assert names[:3] == ["reference_ratio", "lira.offline", "recall"]  # more is left (smallest p first), then less
    assert table.count('class="dots" role="img"') == len(names)
    assert "standard · log-probabilities · 38 s" in table
    assert "needs llm" in html and "the loss is not a number at step 3" in html
    assert html.count('<th scope="col">at 0.1 %</th>') == 1


def test_without_script_the_worst_fifty_are_there(html: str) -> None:
    plain = html[html.index('<div id="drill-plain">') :].split('<script type="application/json"', maxsplit=1)[0]
    rows = re.findall(r"<details><summary>(forget-\d+)</summary>", plain)
    assert len(rows) == 50 and set(rows[:9]) == {f"forget-{i:03d}" for i in range(41, 50)}
    assert "<b>Answer, audited</b>" in plain and "hidden" not in plain.split(">")[0]


def test_packed_samples_hold_the_numbers_of_the_file(html: str, run: Path) -> None:
    data = json.loads(Page(html).scripts[0])
    lines = {line["id"]: line for line in map(json.loads, (run / "drill.jsonl").read_text().splitlines())}
    assert data["total"] == len(lines) == len(data["samples"]) == synthetic.FORGET
    for sample in data["samples"]:
        line = lines[sample["id"]]
        assert (sample["target"], sample["answers"]) == (line["target"], line["answers"])
        assert sample["tokens"]["text"] == line["tokens"]["text"]
        assert sample["tokens"]["audited"] == pytest.approx(line["tokens"]["audited"], rel=5e-3)
        for name, five in zip(data["scores"], sample["scores"], strict=True):
            given = line["scores"][name]
            wanted = [given[key] for key in ("audited", "original", "reference", "low", "high")]
            assert five == pytest.approx(wanted, rel=1e-4)
        assert [n[0] for n in sample["neighbours"]] == [n["id"] for n in line["neighbours"]]


def _hostile() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    content, lines = synthetic.audit(), synthetic.drill()[38:45]
    content |= {"suite": EVIL, "notes": [EVIL], "skipped": {EVIL: EVIL}, "failed": {EVIL: EVIL}, "cost": {EVIL: 1.0}}
    content["checkpoints"][0] |= {"path": EVIL}
    content["checkpoints"][1]["name"] = EVIL
    content["figures"] = {EVIL: {EVIL: synthetic.estimate(1.0)}}
    content["fitness"] |= {"unfit": True, "sentence": EVIL}
    content["completeness"] |= {"calibration": EVIL, "notes": [EVIL], "counts": {EVIL: 3, "adequate": 4}}
    for row in content["subjects"]:
        row |= {"subject": EVIL, "verdict": EVIL}
    for entry in content["vector"]:
        entry["sentence"] = EVIL
    for row in content["scores"]:
        row.update(dict.fromkeys(("attack", "score", "family", "tier", "access", "axis", "verdict"), EVIL))
        row["models"][EVIL] = row["models"].pop("original")
        row["tpr"] = {EVIL: synthetic.estimate(0.3)}
    for line in lines:
        line.update(dict.fromkeys(("subject", "prompt", "target", "verdict"), EVIL))
        line["id"] += EVIL
        line["answers"] = {EVIL: EVIL, "audited": EVIL}
        line["losses"] = {EVIL: 1.0, "audited": 2.0}
        line["tokens"] = {"text": [EVIL, EVIL], "audited": [-0.1, -3], "original": [0, 0], "reference": [-4, -4]}
        line["scores"] = {EVIL: {"audited": 1.0}}
        line["neighbours"] = [{"id": EVIL, "target": EVIL}]
        line["details"] = {EVIL: {EVIL: EVIL, "list": [EVIL, {EVIL: 1}]}}
    return content, lines


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = page_of(tmp_path, *_hostile())
    assert len(page.scripts) == 2 and not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert json.loads(page.scripts[0])["samples"][0]["prompt"] == EVIL
    markdown = (tmp_path / "results.md").read_text(encoding="utf-8")
    bare = re.sub(r"`[^`]*`", "", markdown)
    assert not re.search(r"(?<!\\)<(?!br>)", bare) and not re.search(r"(?<!\\)\]\(", bare)
    for path in (tmp_path / "figures").glob("*.svg"):
        ET.parse(path)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def _live(page: Path, profile: Path) -> str:
    """The page's own document after its script ran."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", "--dump-dom"]
    done = subprocess.run([str(BROWSER), *flags, page.as_uri()], capture_output=True, timeout=60, check=True)
    return done.stdout.decode("utf-8")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to run the page's script in")
def test_in_a_browser_hostile_text_stays_text(tmp_path: Path) -> None:
    content, lines = _hostile()
    live = _live(write_report(synthetic.write_audit(tmp_path, content, lines)), tmp_path / "profile")
    shown = live[live.index('<article id="drill-sample"') :].split("</article>")[0]
    assert "<img" not in shown and "&lt;img src=x" in shown
    assert "<title>owned" not in live and live.count("<script") == 2


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to run the page's script in")
def test_in_a_browser_the_worst_sample_is_open_with_its_tokens(run: Path, tmp_path: Path) -> None:
    live = _live(run / "report.html", tmp_path / "profile")
    lines = [Drill.model_validate_json(line) for line in (run / "drill.jsonl").read_text().splitlines()]
    worst = min((line for line in lines if line.verdict == "under-unlearned"), key=lambda line: line.p_under or 1.0)
    shown = live[live.index('<article id="drill-sample"') :].split("</article>")[0]
    assert f"<h3>{worst.id} " in shown
    tokens = worst.tokens
    assert tokens is not None and tokens.original is not None and tokens.reference is not None
    marks = re.findall(r'<span class="tok ([^"]*)"[^>]*title="log p: [^"]*"[^>]*>', shown)
    assert len(marks) == len(tokens.text)
    for mark, own, before, other in zip(marks, tokens.audited, tokens.original, tokens.reference, strict=True):
        assert own is not None and before is not None and other is not None
        if before - other < 0.5:
            assert mark == "blank"
            continue
        share = (own - other) / (before - other)
        assert ("left" in mark.split()) == (share >= 0) and ("much" in mark.split()) == (share >= 0.75)
    assert shown.count("▲ above") + shown.count("▼ below") + shown.count("within") == len(synthetic.SCORES) - 1
    assert live.count('<li><button type="button"') == synthetic.FORGET
    assert re.search(r'<div id="drill-plain" hidden', live)


# -- what is missing or broken -------------------------------------------------------------------------------------


def test_a_bare_audit_says_what_it_lacks(tmp_path: Path) -> None:
    page = page_of(tmp_path, {"schema": "expunge.audit/1"}, [])
    text = " ".join("".join(page.text).split())
    assert "Not shown: effectiveness, privacy, robustness and utility." in text
    assert "No retrained reference was given" in text and "No shadow model was given" in text
    assert "The original was not given" in text
    assert not list((tmp_path / "figures").glob("*.svg"))


def test_an_unfit_split_is_the_first_warning() -> None:
    content = synthetic.audit()
    assert not any("unfit" in text for text in report_of(content).warnings())
    content["fitness"] |= {"unfit": True, "blind_auc": synthetic.estimate(0.91, 0.03), "sentence": "Dates differ."}
    first = report_of(content).warnings()[0]
    assert first == "The split is unfit for membership attacks: Dates differ (AUC 0.910 [0.880, 0.940])."


def test_what_only_hides_is_said(html: str, run: Path) -> None:
    sentence = (
        "Under attack: 22 of 56 auditable samples are under-unlearned in at least one view (as served 9, relearnt 21)"
    )
    assert sentence in html
    write_report(run)
    assert "Under attack: 22 of 56 auditable samples" in (run / "results.md").read_text()
    assert '"view":"relearnt"' in html.replace(" ", "")


def test_too_few_shadows_are_said() -> None:
    content = synthetic.audit()
    content["completeness"] |= {"smallest_p": 0.5, "shadows": 1}
    found = [text for text in report_of(content).warnings() if "smallest p-value" in text]
    assert found == [
        "The smallest p-value that 1 shadow can give is 0.50, above the level 0.05: no sample can be called "
        "under-unlearned."
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "expunge.audit/9"}, "has schema 'expunge.audit/9', and this version of Expunge reads"),
        ({"scores": [{"attack": "a"}]}, "field 'scores.0.score' is wrong"),
        ({"vector": [{"axis": "speed"}]}, "field 'vector.0.axis' is wrong"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        write_report(synthetic.write_audit(tmp_path, {**synthetic.audit(), **change}))


def test_a_cut_audit_file_is_refused(tmp_path: Path) -> None:
    synthetic.write_audit(tmp_path)
    (tmp_path / "audit.json").write_text('{"schema": "expunge.aud', encoding="utf-8")
    with pytest.raises(UserError, match="is not JSON"):
        write_report(tmp_path)
    (tmp_path / "audit.json").unlink()
    assert load_audit(tmp_path) is None
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path)


def test_damaged_lines_are_counted_and_missing_fields_taken(tmp_path: Path) -> None:
    synthetic.write_audit(tmp_path, lines=[{"id": "a"}, {"id": "b", "p_under": math.nan, "prompt": None}])
    with (tmp_path / "drill.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"subject": "no id"}\n{"id": "c", "losses": 3}\n{"id": "cut o')
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "3 line(s) could not be read" in "".join(page.text)
    data = json.loads(page.scripts[0])
    assert [s["id"] for s in data["samples"]] == ["a", "b"] and data["samples"][1]["p_under"] is None


def test_the_published_schemas_accept_what_an_audit_writes() -> None:
    schemas = audit_schema()
    for name, content in (("audit.json", synthetic.audit()), ("drill.jsonl", synthetic.drill()[0])):
        schema = schemas[name]
        assert set(content) == set(schema["properties"]), name
        assert set(schema.get("required", [])) <= set(content)
    assert schemas["audit.json"]["properties"]["schema"]["const"] == AUDIT_SCHEMA


def test_a_large_audit_keeps_the_worst(tmp_path: Path) -> None:
    rng = random.Random(5)
    verdicts = ["under-unlearned", "over-unlearned", "adequate", "not-auditable"]
    lines = [
        {
            "id": f"s{i}",
            "verdict": rng.choice(verdicts),
            "p_under": round(rng.random(), 2),
            "p_over": round(rng.random(), 2),
            "position": round(rng.gauss(0, 1), 1),
        }
        for i in range(400)
    ]
    synthetic.write_audit(tmp_path, lines=lines)
    audit = load_audit(tmp_path)
    assert audit is not None
    record = load_drill(tmp_path, audit, limit=120)

    def concern(line: dict[str, Any]) -> tuple[int, float, float]:
        p = line["p_over"] if line["verdict"] == "over-unlearned" else line["p_under"]
        return verdicts.index(line["verdict"]), p, -line["position"]

    assert [d.id for d in record.worst] == [line["id"] for line in sorted(lines, key=concern)][:120]
    assert record.total == 400 and sum(record.counts.values()) == 400
    assert "holds the 120 worst of 400 forget samples" in " ".join(AuditReport(audit, record).warnings())


def test_long_texts_and_token_lists_are_cut(tmp_path: Path) -> None:
    line = copy.deepcopy(synthetic.drill()[0])
    line["target"] = "x" * 9000
    line["tokens"] = {"text": ["t"] * 2000, "audited": [-1.0] * 2000, "original": [-1.0] * 3, "reference": None}
    data = json.loads(page_of(tmp_path, lines=[line]).scripts[0])
    sample = data["samples"][0]
    assert sample["target"].endswith("(5000 more characters)")
    assert len(sample["tokens"]["text"]) == len(sample["tokens"]["audited"]) == 600
    assert sample["tokens"]["more"] == 1400 and sample["tokens"]["original"] is None


# -- together with a study; Markdown -------------------------------------------------------------------------------


def test_an_audit_beside_results_comes_first(tmp_path: Path) -> None:
    report_synthetic.write_run(tmp_path, report_synthetic.small())
    page = write_report(synthetic.write_audit(tmp_path)).read_text(encoding="utf-8")
    sections = re.findall(r'<section id="(\w+)"', page)
    first = ["limits", "audit", "certificate", "completeness", "attacks", "drill", "warnings", "verdicts"]
    assert sections[:8] == first
    assert "board" in sections and Page(page).scripts and page.count("About the metrics below") == 1
    ids = [a["id"] for _, a in Page(page).tags if "id" in a]
    assert len(ids) == len(set(ids))
    markdown = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert markdown.index("## Verdict of the audit") < markdown.index("## Results")
    (tmp_path / "audit.json").unlink()
    write_report(tmp_path)
    assert not {path.stem for path in (tmp_path / "figures").glob("*.svg")} & AUDIT_CHARTS


def test_markdown_holds_every_score(run: Path) -> None:
    content = json.loads((run / "audit.json").read_text())
    text = (run / "results.md").read_text(encoding="utf-8")
    rows = [[p.strip() for p in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    by_name = {row[0].replace("\\", ""): row for row in rows if len(row) == 8}
    for row in content["scores"]:
        name, verdict, audited, reference, *_, original, _ = by_name[row["score"]]
        assert verdict == row["verdict"], name
        numbers = re.fullmatch(r"(\S+) \[(\S+), (\S+)\] \(n = (\d+)\)", audited)
        assert numbers is not None, audited
        wanted = [row["models"]["audited"][key] for key in ("value", "low", "high", "n")]
        assert [float(x) for x in numbers.groups()] == pytest.approx(wanted, rel=1e-3)
        both = [row["models"][f"reference-{i}"]["value"] for i in range(2)]
        assert float(reference.split()[0]) == pytest.approx(sum(both) / 2, rel=1e-3)
        assert float(original.split()[0]) == pytest.approx(row["models"]["original"]["value"], rel=1e-3)
    assert "What is known about" not in text  # prompts of people stay out of the summary


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    pages = [write_report(synthetic.write_audit(tmp_path / name)) for name in ("a", "b")]
    assert pages[0].read_bytes() == pages[1].read_bytes()


# -- marks on an axis, band of chance ------------------------------------------------------------------------------


def _x(share: float) -> float:
    return PAD + (WIDTH - 2 * PAD) * share


def test_marks_stand_where_the_values_are() -> None:
    marks = Marks(Measure(value=0.75, low=0.7, high=0.8), 0.5, [Measure(value=0.5)], Measure(value=1.0))
    svg = ET.fromstring(str(dots(CHANCE, marks)))
    circle, rest = svg.find("circle"), [e for e in svg if e.get("class") == "reference"]
    assert circle is not None and float(circle.get("cx", "")) == pytest.approx(_x(0.75), abs=0.06)
    assert [float(e.get("x1", "")) for e in rest] == pytest.approx([_x(0.5)], abs=0.06)
    line = next(e for e in svg if e.get("class") == "audited" and e.tag == "line")
    assert [float(line.get(k, "")) for k in ("x1", "x2")] == pytest.approx([_x(0.7), _x(0.8)], abs=0.06)
    assert svg.get("aria-label") == "audited 0.750 [0.700, 0.800], reference 0.500, original 1.00"
    assert svg.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"


def test_a_relative_axis_runs_from_reference_to_original() -> None:
    far = Marks(Measure(value=-1.0), -3.0, [Measure(value=-3.0)], Measure(value=1.0))  # half way
    svg = ET.fromstring(str(dots(RELATIVE, far)))
    circle = svg.find("circle")
    assert circle is not None and float(circle.get("cx", "")) == pytest.approx(_x(1.5 / 3), abs=0.06)
    beyond = dots(RELATIVE, Marks(Measure(value=30.0), -3.0, [], Measure(value=1.0)))
    assert "<circle" not in beyond and 'path class="audited"' in beyond
    turned = ET.fromstring(str(dots(RELATIVE, Marks(Measure(value=1.0), 3.0, [], Measure(value=2.0)))))
    triangle = [e for e in turned if e.get("class") == "audited"]
    assert triangle[0].tag == "circle" and float(triangle[0].get("cx", "")) == pytest.approx(_x(1.0), abs=0.06)
    assert dots(RELATIVE, Marks(Measure(value=1.0), 2.0, [], Measure(value=2.0))) == ""
    assert dots(RELATIVE, Marks(Measure(value=1.0), None, [], Measure(value=2.0))) == ""
    assert dots(UNIT, Marks(None, 0.5, [], None)) == ""


def test_the_axis_of_a_group() -> None:
    inside = Marks(Measure(value=0.2, low=-0.1, high=0.4), 0.1, [Measure(value=0.1)], Measure(value=0.9))
    outside = Marks(Measure(value=-2.0), 0.1, [Measure(value=0.1)], Measure(value=0.9))
    assert axis_of("auc", [outside]) is CHANCE
    assert axis_of("mean", [inside]) is UNIT and axis_of("mean", [inside, outside]) is RELATIVE


@pytest.mark.parametrize(("count", "bins"), [(20, 5), (56, 11), (400, 20)])
def test_the_band_of_chance_is_binomial(count: int, bins: int) -> None:
    assert bins_of(count) == bins
    mass = [math.comb(count, k) * (1 / bins) ** k * (1 - 1 / bins) ** (count - k) for k in range(count + 1)]
    below = [sum(mass[: k + 1]) for k in range(count + 1)]
    low = next(k for k in range(count + 1) if below[k] >= 0.025 - 1e-12)
    high = next(k for k in range(count + 1) if below[k] >= 0.975 - 1e-12)
    assert uniform_band(count, bins) == (low, high)


def test_rates_are_taken_bare_or_by_model() -> None:
    content = synthetic.audit()
    content["scores"] = content["scores"][:2]
    content["scores"][1]["tpr"] = {"0.01": synthetic.estimate(0.25)}
    rates = dict(report_of(content).rates)
    by_model = {rate: (own, reference) for rate, own, reference in rates["loss"]}
    own, reference = by_model["0.1"]
    wanted = content["scores"][0]["tpr"]["0.1"]
    assert own is not None and own.value == wanted["audited"]["value"]
    assert reference == pytest.approx((wanted["reference-0"]["value"] + wanted["reference-1"]["value"]) / 2)
    assert [(rate, own.value if own else None) for rate, own, _ in rates["min_k"]] == [
        *(("0.001", None), ("0.01", 0.25), ("0.1", None)),
    ]


def test_plural_takes_the_noun() -> None:
    assert plural(2, "shadow model that never saw the data") == "2 shadow models that never saw the data"
