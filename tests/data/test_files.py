from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from expunge.data.files import load_files, read_samples
from expunge.data.samples import Sample
from expunge.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "Who?", "target": "Ann", "subject": "Ann Lee", "names": ["Ann Lee", "Lee"],
     "paraphrases": ["Which one?"], "restated": ["It is Ann."], "perturbed": ["Bob", "Cy"]},
    {"id": "b", "text": 'A long "document",\nin two lines.'},
    {"question": "How many?", "answer": 42},
]  # fmt: skip


def lines(rows: list[Any]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def write_table(path: Path, rows: list[dict[str, Any]], delimiter: str) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({key for row in rows for key in row}), delimiter=delimiter)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "|".join(v) if isinstance(v, list) else v for key, v in row.items()})
    return path


def check(samples: tuple[Sample, ...], last_id: str) -> None:
    one, two, three = samples
    assert (one.id, one.prompt, one.target, one.subject, one.names) == (
        "a",
        "Who?",
        "Ann",
        "Ann Lee",
        ("Ann Lee", "Lee"),
    )
    assert [(p.kind, p.prompt, p.target) for p in one.probes] == [
        ("paraphrase", "Which one?", "Ann"),
        ("restated", "Who?", "It is Ann."),
        ("perturbed", "Who?", "Bob"),
        ("perturbed", "Who?", "Cy"),
    ]
    assert (two.prompt, two.target, two.subject) == ("", ROWS[1]["text"], "b")
    assert (three.id, three.prompt, three.target) == (last_id, "How many?", "42")


def test_json_lines_and_arrays(tmp_path: Path) -> None:
    check(read_samples(write(tmp_path / "mine.jsonl", lines(ROWS))), "mine-3")
    check(read_samples(write(tmp_path / "mine.json", lines(ROWS)), prefix="forget"), "forget-3")
    check(read_samples(write(tmp_path / "array.json", json.dumps(ROWS, indent=1))), "array-3")
    check(
        read_samples(write(tmp_path / "bom.jsonl", b"\xef\xbb\xbf" + lines(ROWS).replace("\n", "\r\n").encode())),
        "bom-3",
    )
    check(read_samples(write(tmp_path / "gaps.jsonl", "\n" + lines(ROWS).replace("\n", "\n\n"))), "gaps-3")


def test_gzip(tmp_path: Path) -> None:
    check(read_samples(write(tmp_path / "z.jsonl.gz", gzip.compress(lines(ROWS).encode()))), "z-3")
    with pytest.raises(UserError, match="gzip -t"):
        read_samples(write(tmp_path / "broken.jsonl.gz", gzip.compress(b"{}" * 99)[:20]))
    with pytest.raises(UserError, match="gzip -t"):
        read_samples(write(tmp_path / "plain.jsonl.gz", lines(ROWS)))


def test_tables(tmp_path: Path) -> None:
    rows = [
        {("prompt" if k == "question" else "target" if k == "answer" else k): v for k, v in row.items()} for row in ROWS
    ]
    check(read_samples(write_table(tmp_path / "t.csv", rows, ",")), "t-3")  # row 2 spans two lines
    check(read_samples(write_table(tmp_path / "t.tsv", rows, "\t")), "t-3")
    listed = write(tmp_path / "j.csv", 'prompt,target,names\nq,a,"[""x|y"", ""z""]"\n')
    assert read_samples(listed)[0].names == ("x|y", "z")


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow", reason="pyarrow is an extra")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an extra")
    rows = [{"prompt": "q", "target": "a", "names": ["n", "m"]}, {"prompt": "r", "target": "b", "names": None}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    samples = read_samples(tmp_path / "t.parquet")
    assert [(s.id, s.names) for s in samples] == [("t-1", ("n", "m")), ("t-2", ())]
    with pytest.raises(UserError, match="not a readable Parquet"):
        read_samples(write(tmp_path / "bad.parquet", "no"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"expunge\[parquet\]"):
        read_samples(tmp_path / "t.parquet")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1).filter(lambda text: text.strip())


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_any_text_survives_every_format(pairs: list[tuple[str, str]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"prompt": prompt, "target": target} for prompt, target in pairs]
        paths = [
            write(folder / "a.jsonl", lines(rows)),
            write(folder / "b.json", json.dumps(rows)),
            write_table(folder / "d.tsv", rows, "\t"),
            write_table(folder / "c.csv", rows, ","),
        ]
        for path in paths:
            assert [(s.prompt, s.target) for s in read_samples(path)] == pairs


BAD: list[tuple[str, str | bytes, str]] = [
    ("a.jsonl", "", "is empty"),
    ("a.jsonl", "\n \n", "is empty"),
    ("a.json", "[]", "is empty"),
    ("a.csv", "", "is empty"),
    ("a.csv", "prompt,target\n", "is empty"),
    ("a.jsonl", '{"target": "x"}\n{"target": ', r"line 2: not JSON"),
    ("a.json", '[\n{"target": "x"},\n{"target" "y"}]', r"line 3: not JSON"),
    ("a.json", '[{"target": "x"}, 3]', "line 1: expected a JSON object.*a number"),
    ("a.jsonl", '"x"', "expected a JSON object.*a text"),
    ("a.jsonl", "[" * 100_000, "not JSON|nested too deeply"),
    ("a.jsonl", '{"target": "x"}\n{"prompt": "y"}', "line 2: neither text nor target.*has prompt"),
    ("a.jsonl", '{"text": "x", "target": "y"}', "text stands for a whole document"),
    ("a.jsonl", '{"target": "x", "answer": "y"}', "both answer and target"),
    ("a.jsonl", '{"target": " "}', "target is empty"),
    ("a.jsonl", '{"target": ["x"]}', "target is a list; give a text"),
    ("a.jsonl", '{"target": true}', "target is true or false"),
    ("a.jsonl", '{"target": "x", "prompt": {}}', "prompt is an object"),
    ("a.jsonl", '{"target": "x", "names": 3}', "names is a number; give a list"),
    ("a.jsonl", '{"target": "x", "perturbed": [3]}', "perturbed holds a number"),
    (
        "a.jsonl",
        '{"target": "x", "id": 1}\n\n{"target": "y", "id": "1"}',
        "line 3: the id '1' already stands in line 1",
    ),
    ("a.jsonl", '{"target": "x", "image": "none.png"}', "none.png' does not exist; paths are relative"),
    ("a.jsonl", b'{"target": "x"}\n{"target": "\xff"}', "line 2: not UTF-8"),
    ("a.csv", "name,age\nx,3\n", "line 1: the header has no column.*name, age"),
    ("a.csv", "prompt,target\nx\n", "line 2: 1 cells, but the header has 2"),
    ("a.csv", 'prompt,target\nx,"y', "line 2: not a valid table"),
    ("a.xlsx", "x", "unknown kind of file for .*a.xlsx' '.xlsx'"),
    ("a", "x", "unknown kind of file"),
    ("a.jsno", "x", r"did you mean '\.json"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_samples(write(tmp_path / name, content))
    assert str(caught.value).count("\n") == 0


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_samples(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="does not exist"):
        read_samples(tmp_path)


def test_load_files(tmp_path: Path) -> None:
    forget = write(tmp_path / "a.jsonl", lines([{"prompt": "q1", "target": "a1"}]))
    (tmp_path / "other").mkdir()
    retain = write(tmp_path / "other" / "a.jsonl", lines([{"prompt": "q2", "target": "a2"}]))
    data = load_files(forget=forget, retain=str(retain), utility=forget)
    assert {role: [s.id for s in samples] for role, samples in data.roles.items()} == {
        "forget": ["forget-1"], "retain": ["retain-1"], "utility": ["utility-1"],
    }  # fmt: skip
    assert data.modality == "text" and data.notes == ("No holdout file was given.",)


def test_forget_and_retain_must_not_overlap(tmp_path: Path) -> None:
    rows = [{"id": f"s{i}", "prompt": f"q{i}", "target": "a"} for i in range(4)]
    forget = write(tmp_path / "f.jsonl", lines(rows[:3]))
    with pytest.raises(UserError, match=r"2 sample\(s\).*\(s1, s2\)"):
        load_files(forget=forget, retain=write(tmp_path / "r.jsonl", lines(rows[1:])))
    renamed = write(tmp_path / "c.jsonl", lines([{**rows[0], "id": "other"}]))
    with pytest.raises(UserError, match=r"1 sample\(s\).*\(s0\)"):
        load_files(forget=forget, retain=renamed)


def test_images(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "x.png")
    Image.fromarray(np.ones((4, 4, 3), np.uint8)).save(tmp_path / "y.png")
    classes = write(tmp_path / "c.jsonl", lines([{"image": "x.png", "target": 3}]))
    table = write(tmp_path / "d.csv", "image,target\ny.png,7\n")
    data = load_files(forget=classes, retain=table)
    assert data.modality == "classifier" and [s.target for s in data.private] == [3, 7]
    asked = write(tmp_path / "m.jsonl", lines([{"image": "x.png", "prompt": "How many?", "target": "3"}]))
    assert load_files(forget=asked).modality == "multimodal"
    with pytest.raises(UserError, match="class number for target and 'retain-1' a text"):
        load_files(forget=classes, retain=asked)
