"""The report of a run with pictures: forget samples before and after, CLEAR's table, the figure by modality."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_synthetic as synthetic
from test_report_page import EVIL, Page

from expunge.bench.images import data_uri
from expunge.report import write_report
from expunge.report.pictures import LARGEST, METHODS, clear_table, compared, picture_grid
from expunge.report.samples import SampleRecord
from expunge.report.schema import parse_results
from expunge.report.view import View

URI = data_uri(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3))
CLEAR = {"clear_real": 0.4, "clear_retain": 0.9, "clear_forget": 0.2, "clear_forget_quality.ks_distance": 0.3}


def pictured() -> dict[str, Any]:
    """:func:`synthetic.small` with CLEAR's scores and the modality matrix."""
    content = synthetic.small()
    for number, row in enumerate(content["rows"]):
        more = {**CLEAR, "face_recognition.forget": number / 10, "modality.image.closed": 0.1 * number}
        more |= {f"modality.{m}.{w}": 0.02 * number for m in ("image", "text") for w in ("retain", "closed")}
        row["metrics"] |= {k: synthetic.measure(v, 0.05, 12, f"{k}/1") for k, v in more.items()}
    return {**content, "summary": synthetic.summarise(content["rows"])}


def shown(content: dict[str, Any], count: int = 3) -> list[dict[str, Any]]:
    """The samples, the first few of forget with a picture."""
    lines = synthetic.samples(content)
    for line in lines:
        if line["role"] == "forget" and int(line["id"][-3:]) < count:
            line["image"] = URI
    return lines


def view(content: dict[str, Any], lines: list[dict[str, Any]]) -> View:
    return View(parse_results(content), SampleRecord(lines, present=True))


def test_every_picture_stands_beside_the_answers_before_and_after(tmp_path: Path) -> None:
    content = pictured()
    lines = shown(content)
    said = {(line["model"], line["id"]): line["generated"] for line in lines}
    for line in lines:
        if line["model"] == "original/0":
            line["generated"] = said[line["model"], line["id"]] = line["target"].upper()
    grid = picture_grid(view(content, lines))
    assert grid is not None and len(grid.pictures) == 3 and grid.left_out == 0
    assert [name for name, _ in grid.models] == ["original", "retrained", "cluster", "npo"]
    keys = ["original/0", "reference/0", "cluster/0", "npo/0"]
    for picture in grid.pictures:
        for key, answer in zip(keys, picture.answers, strict=True):
            assert answer is not None
            assert " ".join(word for word, _ in answer.words) == said[key, picture.sample]
            assert key != "original/0" or (answer.right and all(known for _, known in answer.words))
    page = Page(write_report(synthetic.write_run(tmp_path, content, lines)).read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert [a["src"] for a in images] == [URI] * 3
    assert all((a["alt"] or "").startswith("Picture of ") for a in images)
    assert images[0]["alt"] == f"Picture of {lines[0]['subject']}"


def test_the_picture_is_the_one_that_was_recorded() -> None:
    from PIL import Image

    assert URI is not None
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(URI.partition(",")[2]))))
    np.testing.assert_array_equal(pixels.ravel(), np.arange(192))


def test_words_are_compared_without_case_and_punctuation() -> None:
    answer = compared("Before the sea stands ann, in GREEN!", "Ann in green, before a hill.")
    assert [word for word, known in answer.words if known] == ["Before", "ann,", "in", "GREEN!"] and not answer.right
    assert compared("ANN lee", "Ann Lee.").right and not compared("Lee Ann", "Ann Lee").right
    assert not compared("", "Ann").words and not compared("!", "?").words[0][1]


def test_a_wrong_class_shares_no_word_with_the_right_one() -> None:
    assert compared("class 9", "class 8").words == [("class", False), ("9", False)]
    assert compared("class 8", "class 8").words == [("class", True), ("8", True)]


def test_a_classifier_shows_its_classes() -> None:
    content = pictured()
    lines = [
        {**line, "prompt": "", "target": 3, "generated": f"class {i % 4}"} for i, line in enumerate(shown(content))
    ]
    grid = picture_grid(view(content, lines))
    assert grid is not None and grid.pictures[0].target == "class 3"
    assert [a.right for a in grid.pictures[0].answers if a] == [
        line["generated"] == "class 3"
        for model in ("original/0", "reference/0", "cluster/0", "npo/0")
        for line in lines
        if line["model"] == model and line["id"] == grid.pictures[0].sample
    ]


def test_many_methods_leave_the_best_few() -> None:
    content = synthetic.results()
    grid = picture_grid(view(content, shown(content)))
    assert grid is not None and len(grid.models) == 2 + METHODS
    assert grid.left_out == len(synthetic.METHODS) - METHODS


@pytest.mark.parametrize(
    "uri",
    [
        "javascript:alert(1)",
        "http://evil.example/a.png",
        "data:image/svg+xml;base64,AAAA",
        'data:image/png;base64,AAAA" onerror="alert(1)',
        "data:image/png;base64," + "A" * LARGEST,
        7,
    ],
)
def test_what_is_no_small_png_is_not_shown(uri: Any) -> None:
    content = pictured()
    lines = [{**line, "image": uri} for line in shown(content)]
    assert picture_grid(view(content, lines)) is None


def test_untrusted_answers_stay_text(tmp_path: Path) -> None:
    content = pictured()
    lines = shown(content)
    for line in lines:
        line |= {"subject": EVIL, "prompt": EVIL, "target": EVIL, "generated": EVIL, "id": line["id"] + EVIL}
    page = Page(write_report(synthetic.write_run(tmp_path, content, lines)).read_text(encoding="utf-8"))
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3 and all(set(a) == {"src", "alt", "width", "height", "loading"} for a in images)
    assert len(page.scripts) == 2 and EVIL[:20] in (images[0]["alt"] or "")


def test_clears_table_begins_with_the_retrained_model(tmp_path: Path) -> None:
    content = pictured()
    table = clear_table(view(content, []))
    assert table is not None
    assert [line.name for line in table.lines[:3]] == ["reference", "original", "base"]
    assert [c.key for c in table.columns] == [
        *("clear_real", "clear_retain", "clear_forget", "clear_forget_quality.ks_distance", "face_recognition.forget")
    ]
    faces = table.lines[0].cells[-1].measure
    assert faces is not None and faces.n == 12 and faces.seeds == 1
    write_report(synthetic.write_run(tmp_path, content, shown(content)))
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    part = text.partition("## CLEAR")[2].partition("\n## ")[0]
    assert re.search(r"^\| reference \(retrained\) \| 0\.4 \[0\.37, 0\.43\] \(n = 12, 1 seed\) \|", part, re.MULTILINE)
    assert clear_table(view(synthetic.small(), [])) is None


def test_the_figure_by_modality_needs_two_methods(tmp_path: Path) -> None:
    content = pictured()
    write_report(synthetic.write_run(tmp_path, content, shown(content)))
    drawn = (tmp_path / "figures" / "modality-retention.svg").read_text(encoding="utf-8")
    assert drawn.count("asked ") == 2 and "npo" in drawn
    one = {**content, "rows": [r for r in content["rows"] if r["method"] != "npo"]}
    one["summary"] = synthetic.summarise(one["rows"])
    write_report(synthetic.write_run(tmp_path, one, shown(one)))
    assert not (tmp_path / "figures" / "modality-retention.svg").exists()
