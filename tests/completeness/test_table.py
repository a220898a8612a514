"""Tables of readings: every format, every bad input with its sentence, every oddity with its note."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from expunge.completeness.readings import Form
from expunge.completeness.table import columns_of, read_table, write_table
from expunge.errors import UserError

GOOD = """id,unlearned,original,shadow,shadow_2,subject,label
a,1.5,0.5,2.0,2.25,Ann,0
b,0.5,0.25,1.75,2.0,Ann,1
c,1.25,0.75,1.5,,,
"""


def table(folder: Path, text: str, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_a_table_becomes_readings(tmp_path: Path) -> None:
    found = read_table(table(tmp_path, GOOD), "text")
    r = found.readings
    assert r.ids == ["a", "b", "c"] and r.subjects == ["Ann", "Ann", "c"] and r.num_shadows == 2
    assert r.unlearned_N.tolist() == [1.5, 0.5, 1.25]
    assert r.original_N is not None and r.original_N.tolist() == [0.5, 0.25, 0.75]
    np.testing.assert_array_equal(r.shadow_KN, [[2.0, 1.75, 1.5], [2.25, 2.0, math.nan]])
    np.testing.assert_array_equal(r.label_N, [0, 1, math.nan])
    assert r.complete().tolist() == [True, True, False]
    assert found.notes == ()


def test_column_order_case_and_spaces_do_not_matter(tmp_path: Path) -> None:
    text = "Label, Shadow_10 ,ORIGINAL,shadow_2,Id,Unlearned\n0,2,.5,2.5,a,1\n1,3,.75,3.5,b,2\n"
    r = read_table(table(tmp_path, text), "text").readings
    assert r.ids == ["a", "b"] and r.shadow_KN.tolist() == [[2.5, 3.5], [2, 3]], "shadows by number, not by letter"


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + GOOD,
        GOOD.replace(",", ";"),
        GOOD.replace(",", "\t"),
        GOOD.replace("\n", "\r\n"),
        "\n" + GOOD + "\n\n",
        GOOD.replace(",", ";").replace(".", ","),
        GOOD.replace("1.5,0.5", '"1.5","0.5"'),
        GOOD.replace("1.5,,,", "1.5,NaN,,"),
    ],
    ids=["BOM", "semicolon", "tab", "CRLF", "empty lines", "decimal comma", "quotes", "NaN"],
)
def test_spreadsheets_have_many_ways_to_say_the_same(tmp_path: Path, text: str) -> None:
    expected, found = (read_table(table(tmp_path, t), "text") for t in (GOOD, text))
    for name, column in columns_of(expected.readings).items():
        np.testing.assert_array_equal(np.array(columns_of(found.readings)[name]), np.array(column), err_msg=name)
    assert any("decimal comma" in n for n in found.notes) == (";" in text and "0,5" in text)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_writing_and_reading_keep_every_bit(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    rng = np.random.default_rng(0)
    text = "id,unlearned,original,shadow,label\n" + "".join(
        f'"x, {i}",{rng.random()!r},{rng.random()!r},{rng.random()!r},{i % 2}\n' for i in range(20)
    )
    first = read_table(table(tmp_path, text, "first.csv"), "classifier").readings
    again = read_table(write_table(tmp_path / name, columns_of(first)), "classifier").readings
    assert list(again.ids) == list(first.ids)
    for one, other in (
        (first.unlearned_N, again.unlearned_N),
        (first.original_N, again.original_N),
        (first.shadow_KN, again.shadow_KN),
        (first.label_N, again.label_N),
    ):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_json_array_and_missing_keys(tmp_path: Path) -> None:
    rows = [{"id": 1, "unlearned": 1, "original": 0.5, "shadow": 2}, {"id": 2, "original": "0.25", "shadow": 3}]
    found = read_table(table(tmp_path, json.dumps(rows), "t.json"), "text")
    assert found.readings.ids == ["1", "2"] and np.isnan(found.readings.unlearned_N[1])


def test_without_original(tmp_path: Path) -> None:
    text = "id,unlearned,shadow\na,1,2\nb,2,3\n"
    with pytest.raises(UserError, match=r"no column 'original'.*or give an anchor"):
        read_table(table(tmp_path, text), "text")
    assert read_table(table(tmp_path, text), "text", original=False).readings.original_N is None


HEAD = "id,unlearned,original,shadow\n"
WRONG: dict[str, tuple[str, Form, str]] = {
    "empty file": ("", "text", "is empty"),
    "header only": (HEAD, "text", "is empty"),
    "missing shadow": ("id,unlearned,original\na,1,2\n", "text", "no column 'shadow'"),
    "misspelt column": ("id,unlearnd,original,shadow\na,1,2,3\n", "text", r"no column 'unlearned' \(is it 'unlearnd'"),
    "no header": ("a,1,2,3\nb,1,2,3\n", "text", "no column 'id'.*first line"),
    "doubled column": ("id,unlearned,original,shadow,shadow\na,1,2,3,4\n", "text", "column 'shadow' twice"),
    "shadow and shadow_1": ("id,unlearned,original,shadow,shadow_1\na,1,2,3,4\n", "text", "both 'shadow' and"),
    "doubled id": (HEAD + "a,1,2,3\nb,1,2,3\na,4,5,6\n", "text", r"id 'a' twice \(lines 2 and 4\)"),
    "empty id": (HEAD + ",1,2,3\n", "text", "line 2, column 'id' is empty"),
    "word for a number": (HEAD + "a,1,two,3\n", "text", "line 2, column 'original' is 'two', not a number"),
    "comma and point": (HEAD + 'a,1.5,"1,234.5",3\n', "text", "decimal point and no other sign"),
    "bare decimal comma": (HEAD + "a,1,5,0,5,2\n", "text", "6 cells, but the header has 4.*decimal point"),
    "short row": (HEAD + "a,1,2\n", "text", "line 2 has 3 cells"),
    "open quote": (HEAD + 'a,"1,2,3\n', "text", "no valid row"),
    "probability above 1": (
        HEAD + "a,.5,1.2,.3\nb,.5,7,.3\n",
        "classifier",
        r"'original' is 1.2 \(and 1 more\).*0 and",
    ),
    "negative probability": (HEAD + "a,-.5,.2,.3\n", "classifier", "'unlearned' is -0.5"),
    "negative loss": (HEAD + "a,1,2,-3\n", "text", "'shadow' is -3.*negate log-likelihoods"),
    "nothing measured": (HEAD + "a,,1,2\nb,,2,3\n", "text", "'unlearned' holds no number"),
    "label 2": ("id,unlearned,original,shadow,label\na,1,2,3,2\n", "text", "'label' is 2: labels are 1"),
    "label as a word": ("id,unlearned,original,shadow,label\na,1,2,3,yes\n", "text", "'yes', not a number"),
    "shadow is the unlearned": (HEAD + "a,1,2,1\nb,3,4,3\n", "text", "'shadow' and 'unlearned' are identical"),
    "shadow is the original": (HEAD + "a,1,2,2\nb,3,4,4\n", "text", "'shadow' and 'original' are identical"),
    "shadow twice": (
        "id,unlearned,original,shadow,shadow_2\na,1,2,3,3\nb,1,2,4,4\n",
        "text",
        "'shadow_2' and 'shadow'",
    ),
    "unknown form": (HEAD + "a,1,2,3\n", "tezt", "did you mean 'text'"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_tables_get_one_sentence(tmp_path: Path, name: str) -> None:
    text, form, message = WRONG[name]
    with pytest.raises(UserError, match=message) as refused:
        read_table(table(tmp_path, text), form)
    assert "\n" not in str(refused.value) and str(refused.value).endswith((".", "?"))


def test_bad_files_get_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_table(tmp_path / "none.csv", "text")
    with pytest.raises(UserError, match=r"ends in '\.xlsx': allowed are \.csv"):
        read_table(table(tmp_path, "", "t.xlsx"), "text")
    (tmp_path / "latin.csv").write_bytes("id,unlearned\nÄ,1\n".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_table(tmp_path / "latin.csv", "text")
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_table(table(tmp_path, '{"id": 1}\n{"id"\n', "t.jsonl"), "text")
    with pytest.raises(UserError, match="line 1 is no object"):
        read_table(table(tmp_path, "[1]", "t.json"), "text")
    with pytest.raises(UserError, match="'unlearned' is 'True', not a number"):
        read_table(table(tmp_path, '{"id": 1, "unlearned": true, "original": 1, "shadow": 1}', "t.jsonl"), "text")
    with pytest.raises(UserError, match=r"let the name end in \.csv"):
        write_table(tmp_path / "t.xls", {"id": ["a"]})


ODD: dict[str, tuple[str, Form, str]] = {
    "constant shadow": (HEAD + "a,1,.5,3\nb,2,.6,3\n", "text", "column 'shadow' has the same number in every row"),
    "constant unlearned": (HEAD + "a,9,.5,3\nb,9,.6,4\n", "text", "column 'unlearned' has the same number"),
    "one row": (HEAD + "a,1,2,3\n", "text", "one row only"),
    "one class": ("id,unlearned,original,shadow,label\na,1,.5,3,1\nb,2,.5,4,1\n", "text", "all labels are 1: no AUC"),
    "no label": ("id,unlearned,original,shadow,label\na,1,.5,3,\nb,2,.5,4,\n", "text", "there is no label"),
    "other columns": ("id,unlearned,original,shadow,note\na,1,.5,3,x\nb,2,.5,4,y\n", "text", "left out: note"),
    "nothing unlearned": (HEAD + "a,1,1,3\nb,2,2,4\n", "text", "'unlearned' and 'original' are identical"),
    "wrong form": (HEAD + "a,.5,.9,.1\nb,.4,.8,.2\n", "text", "is 'text' the right form"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_tables_get_a_note(tmp_path: Path, name: str) -> None:
    text, form, message = ODD[name]
    notes = read_table(table(tmp_path, text), form).notes
    assert any(message in note for note in notes), notes


def test_an_infinite_reading_is_none(tmp_path: Path) -> None:
    readings = read_table(table(tmp_path, HEAD + "a,inf,.9,1.5\nb,.4,.8,2\n"), "text").readings
    assert np.isnan(readings.unlearned_N[0]) and readings.complete().tolist() == [False, True]


def test_an_ordinary_table_gets_no_note(tmp_path: Path) -> None:
    text = "id,unlearned,original,shadow,label\na,1,.5,3,1\nb,2,.6,4,0\n"
    assert read_table(table(tmp_path, text), "text").notes == ()
