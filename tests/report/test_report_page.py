"""report.html and results.md of a whole run: structure, safety, tolerance, values."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_synthetic as synthetic

from expunge.report import write_report
from expunge.report.studies import CHART_NAMES

VOID = {"meta", "link", "input", "br", "img", "hr"}
EVIL = (
    "</script><script>document.title='owned'</script>--><img src=x onerror=alert(1)>\"'`|\n# [x](http://evil.example/)"
)


class Page(HTMLParser):
    """Tags with attributes, the text of each element by id, and a check that tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        assert not self.open, f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.text.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = synthetic.write_run(tmp_path_factory.mktemp("run"))
    assert write_report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def test_nothing_outside_the_page_is_asked_for(html: str) -> None:
    assert not re.search(r"https?:|//[a-z]+\.[a-z]", html)
    for tag, attributes in Page(html).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith("#") or value in ("results.json", "results.md", "samples.jsonl")
            if value and "url(" in value:
                assert re.fullmatch(r".*url\(#[^)]*\).*", value)
    assert "url(" not in re.sub(r"url\(#", "", html)
    assert "@import" not in html


def test_the_policy_allows_the_pages_own_script_and_no_other(html: str) -> None:
    import base64
    import hashlib

    page = Page(html)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_ids_are_unique_and_links_arrive(html: str) -> None:
    tags = Page(html).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in tags:
        href = attributes.get("href") or ""
        if href.startswith("#"):
            assert href[1:] in ids
        for reference in re.findall(r"url\(#([^)]+)\)", " ".join(v or "" for v in attributes.values())):
            assert reference in ids


def test_tables_and_figures_have_names(html: str) -> None:
    tags = Page(html).tags
    assert all(a.get("scope") for t, a in tags if t == "th")
    assert all(a.get("role") == "img" and a.get("aria-label") for t, a in tags if t == "svg")
    assert html.count('<table class="grid') == html.count("<caption>")
    assert [a.get("lang") for t, a in tags if t == "html"] == ["en"]


def test_every_chart_is_drawn_and_is_xml(run: Path, html: str) -> None:
    drawn = CHART_NAMES - {"modality-retention"}  # this run has no pictures: test_report_pictures.py
    assert {path.stem for path in (run / "figures").glob("*.svg")} == drawn
    for name in drawn:
        root = ET.parse(run / "figures" / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
        assert f'id="fig-{name}"' in html
    assert not list((run / "figures").glob("*.png"))
    assert not [path.name for path in run.rglob("*.tmp")]


def test_the_answer_stands_on_top(html: str) -> None:
    text = "".join(Page(html).text)
    assert "Closest to retraining on the forget set: cluster (total variation gap closed 77 %" in text
    sections = re.findall(r'<section id="(\w+)"', html)
    assert sections[:6] == ["warnings", "verdicts", "ran", "board", "counts", "figures"]
    assert html.index("Closest to retraining") < html.index('id="warnings"')


def test_controls_and_failures_are_marked(html: str) -> None:
    rows = re.findall(r'<tr class="([^"]*)">\s*<th scope="row"><span class="name">([^<]*)</span>', html)
    kinds: dict[str, set[str]] = {}
    for classes, name in rows:
        kinds.setdefault(name, set()).update(classes.split())
    assert "control" in kinds["identity"] and "control" in kinds["random-edit"]
    assert "anchor" in kinds["reference"] and not kinds["cluster"]


def test_sample_rows_survive_embedding(run: Path, html: str) -> None:
    data = json.loads(Page(html).scripts[0])
    lines = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert data["total"] == len(lines) == len(data["rows"])
    assert len(data["texts"]) == synthetic.FORGET + synthetic.RETAIN
    unpacked = {(data["models"][row[1]][0], data["texts"][row[0]][0]): (row[2], row[3], row[4]) for row in data["rows"]}
    for line in lines:
        verdict, generated, loss = unpacked[line["model"], line["id"]]
        assert (verdict, generated) == (line["verdict"], line["generated"])
        assert loss == pytest.approx(line["loss"], rel=1e-4)


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    content = synthetic.results()
    content["title"] = content["dataset"]["name"] = content["command"] = EVIL
    content["warnings"] = [EVIL]
    for entry in content["rows"] + content["summary"]:
        if entry["method"] == "npo":
            entry["method"], entry["notes"] = EVIL, [EVIL]
            entry["properties"] = {"needs": [EVIL]}
        entry["metrics"] = {(EVIL + ".forget" if k == "rouge.forget" else k): m for k, m in entry["metrics"].items()}
        for measure in entry["metrics"].values():
            measure["definition"] = EVIL
    lines = synthetic.samples(content)
    for line in lines:
        line |= {"prompt": EVIL, "target": EVIL, "generated": EVIL, "subject": EVIL, "verdict": EVIL, EVIL: 1.0}
        line["id"] += EVIL
    page = Page(write_report(synthetic.write_run(tmp_path, content, lines)).read_text(encoding="utf-8"))
    assert len(page.scripts) == 2
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert json.loads(page.scripts[0])["texts"][0][3] == EVIL
    markdown = (tmp_path / "results.md").read_text(encoding="utf-8")
    outside = re.sub(r"(?<!\\)`[^`]*`", "", markdown)  # an escaped grave accent opens no code
    assert not re.search(r"(?<!\\)<(?!br>)", outside)
    assert not re.search(r"(?<!\\)\]\(", outside)
    for path in (tmp_path / "figures").glob("*.svg"):
        ET.parse(path)


def test_broken_unicode_does_not_stop_the_report(tmp_path: Path) -> None:
    lines = synthetic.samples(synthetic.small())[:3]
    lines[0]["generated"] = "half a pair \ud83d"
    assert "half a pair ?" in write_report(synthetic.write_run(tmp_path, synthetic.small(), lines)).read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"model": "a/0", "method": "a"}],
        [{"model": "a/0", "method": "a", "metrics": {"prob.forget": 0.5}}],
        [{"model": "o/0", "method": "original", "kind": "original", "metrics": {"tv.forget": {"value": None}}}],
        [{"model": "a/0", "method": "a", "study": "sequential", "position": 1, "metrics": {"prob.request_1": 0.1}}],
        [{"model": "a/0", "method": "a", "study": "size", "position": 10, "metrics": {"prob.forget": 0.1}}],
        [
            {"model": "r/0", "method": "reference", "kind": "reference", "metrics": {"prob.forget": 0.2}},
            {"model": "a/0", "method": "a", "metrics": {"prob.forget": 0.2}, "cost": {"share_of_retraining": 0.1}},
        ],
    ],
)
def test_missing_fields_are_tolerated(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"schema": "expunge.results/1", "rows": rows}))
    Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "samples.jsonl is missing" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_a_run_without_reference_makes_no_claim(tmp_path: Path) -> None:
    content = synthetic.small()
    for key in ("rows", "summary"):
        content[key] = [entry for entry in content[key] if entry["kind"] != "reference"]
    html = write_report(synthetic.write_run(tmp_path, content)).read_text(encoding="utf-8")
    text = "".join(Page(html).text)
    assert "Whether a method is close to retraining cannot be said: no retrained model was measured" in text
    assert "no retrained model was available" in text
    assert "gap closed (" not in text
    assert "nothing is shaded" in text and "--near:" not in html.split("</style>")[1].split("<script")[0]


def test_damaged_lines_are_counted(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, synthetic.small())
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"id": "cut o')
    assert "1 line(s) could not be read" in write_report(tmp_path).read_text(encoding="utf-8")


def test_verdicts_of_earlier_versions_are_counted_under_their_present_names(tmp_path: Path) -> None:
    words = {"under-unlearned": "still-remembered", "adequate": "like-retrained", "over-unlearned": "over-forgotten"}
    lines = synthetic.samples(synthetic.small())
    pages = []
    for name, given in (
        ("now", lines),
        ("then", [{**x, "verdict": words.get(x["verdict"], x["verdict"])} for x in lines]),
    ):
        pages.append(write_report(synthetic.write_run(tmp_path / name, synthetic.small(), given)).read_bytes())
    assert pages[0] == pages[1]


def _markdown_table(text: str, title: str) -> dict[str, dict[str, str]]:
    lines = text.split(f"### {title}\n")[1].strip().splitlines()
    lines = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    split = [[part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    keys = [re.sub(r".*<br>`(.*)`", r"\1", head) for head in split[0]]
    return {row[0].split(" (")[0].replace("\\", ""): dict(zip(keys, row, strict=True)) for row in split[2:]}


def test_markdown_values_are_those_of_results_json(run: Path) -> None:
    content = json.loads((run / "results.json").read_text())
    text = (run / "results.md").read_text(encoding="utf-8")
    tables = [_markdown_table(text, title) for title in ("Forgetting", "Retention", "Privacy", "Robustness", "Cost")]
    checked = 0
    for entry in content["summary"]:
        if entry["study"] != "main":
            continue
        for name, measure in entry["metrics"].items():
            cell = next(table[entry["method"]][name] for table in tables if name in table[entry["method"]])
            numbers = re.fullmatch(r"(\S+) \[(\S+), (\S+)\] \(n = (\d+), (\d+) seeds?\)", cell)
            assert numbers is not None, cell
            wanted = [measure[key] for key in ("value", "low", "high", "n", "seeds")]
            assert [float(x) for x in numbers.groups()] == pytest.approx(wanted, rel=1e-3, abs=1e-12)
            checked += 1
        for name, value in entry["cost"].items():
            assert float(tables[-1][entry["method"]][f"cost.{name}"]) == pytest.approx(value, rel=1e-3)
    assert checked == 13 * 13  # five anchors and controls and eight methods, thirteen metrics each
    assert "harmonic mean" in text.split("## Definitions")[1]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    pages = [write_report(synthetic.write_run(tmp_path / name, synthetic.small())) for name in ("a", "b")]
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_png_on_request_and_stale_figures_go(tmp_path: Path) -> None:
    synthetic.write_run(tmp_path, synthetic.small())
    figures = tmp_path / "figures"
    figures.mkdir()
    (figures / "training-curves.svg").write_text("old")
    (figures / "mine.svg").write_text("not ours")
    write_report(tmp_path, png=True)
    assert (figures / "cost-quality.png").read_bytes().startswith(b"\x89PNG")
    assert not (figures / "training-curves.svg").exists()
    assert (figures / "mine.svg").read_text() == "not ours"
