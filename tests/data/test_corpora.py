from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import shared
from expunge.data.carve import Sizes, carve
from expunge.data.medical import DECISIONS
from expunge.data.registry import load_dataset
from expunge.data.samples import ROLES, Dataset, Sample, subjects
from expunge.data.webtext import passages_of, read_wikitext
from expunge.errors import UserError

FOLDERS = {"webtext": "webtext_demo", "medical": "pubmedqa", "legal": "mmlu_professional_law", "code": "mbpp"}


def load(name: str, **options: object) -> Dataset:
    folder = {"humaneval": "humaneval", "wikitext": "wikitext2"}.get(str(options.get("source")), FOLDERS[name])
    return load_dataset(name, data_dir=shared(f"data/{folder}"), options=options)


CASES: list[tuple[str, dict[str, object]]] = [
    ("webtext", {}),
    ("webtext", {"source": "wiki", "private": 15, "holdout": 8, "utility": 7, "passages": 20}),
    ("webtext", {"source": "wikitext", "private": 60, "holdout": 30, "utility": 30}),
    ("medical", {}),
    ("medical", {"form": "decision", "context": True}),
    ("medical", {"form": "document"}),
    ("legal", {}),
    ("legal", {"form": "document", "private": 1000, "forget": 100, "holdout": 200, "utility": 200}),
    ("code", {}),
    ("code", {"source": "humaneval"}),
    ("code", {"source": "humaneval", "form": "document"}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_sources(name: str, options: dict[str, object]) -> None:
    data = load(name, **options)
    own = [subjects(data[role]) for role in ROLES]
    assert len(set().union(*own)) == sum(map(len, own)), "a subject stands in two roles"
    everything = [sample for role in ROLES for sample in data[role]]
    assert len({sample.id for sample in everything}) == len(everything)
    assert len({sample.digest() for sample in everything}) == len(everything), "the same text stands in two places"
    assert all(str(sample.target).strip() for sample in everything)
    documents = options.get("form") == "document" or name == "webtext"
    assert all((sample.prompt == "") == documents for sample in everything)
    assert data.digest() == load(name, **options).digest()
    assert subjects(load(name, **options, split_seed=1)["forget"]) != subjects(data["forget"])


def test_webtext_passages_come_from_the_pages() -> None:
    pages = [json.loads(line)["text"] for line in (shared("data/webtext_demo") / "c4_demo.jsonl").open()]
    joined = [" ".join(page.split()) for page in pages]
    for sample in load("webtext")["forget"]:
        page = joined[int(sample.id[1:6])]
        assert str(sample.target)[:40] in page and 20 <= len(str(sample.target).split()) <= 100


def test_wiki_titles_are_names() -> None:
    data = load("webtext", source="wiki", private=30, holdout=0, utility=0)
    titled = [name for name in subjects(data.private) if not name.startswith("page ")]
    assert {"Anarchism", "Autism", "Alabama", "Aristotle", "Abraham Lincoln", "Apollo"} <= set(titled)
    assert all(sample.names in ((), (sample.subject,)) for sample in data.private)


def test_wikitext_articles() -> None:
    for part in ("valid", "test"):
        pages = read_wikitext(shared("data/wikitext2") / f"{part}.txt")
        assert len(pages) == 60  # Merity et al. 2016, table 1
    text = dict(pages)["Du Fu"]
    assert "= =" not in text and " ," not in text and "@-@" not in text
    assert load("webtext", source="wikitext", private=120, holdout=0, utility=0)["forget"]


@given(st.text("ab. !\n", max_size=400), st.integers(1, 30), st.integers(1, 5))
@settings(max_examples=100, deadline=None)
def test_passages_keep_words_in_order(text: str, words: int, most: int) -> None:
    found = passages_of(text, words, most)
    assert len(found) <= most
    at, plain = 0, " ".join(text.split())
    for passage in found:
        assert min(20, words) <= len(passage.split()) <= words
        for word in passage.split():
            at = plain.index(word, at) + len(word)


def test_medical_decisions_have_wrong_answers_of_the_same_type() -> None:
    for sample in load("medical", form="decision").private:
        assert {str(sample.target), *(probe.target for probe in sample.probes)} == set(DECISIONS)


def test_legal_wrong_answers_are_the_other_options() -> None:
    cases = [json.loads(line) for line in (shared("data/mmlu_professional_law") / "test.jsonl").open()]
    for sample in load("legal").private:
        case = cases[int(sample.id.partition("-")[2])]
        assert str(sample.target) == case["choices"][case["answer"]].strip()
        others = {text.strip() for letter, text in case["choices"].items() if letter != case["answer"]}
        assert {probe.target for probe in sample.probes_of("perturbed")} == others - {str(sample.target)}


def test_code_parses_and_names_its_function() -> None:
    for sample in load("code").private:
        tree = ast.parse(str(sample.target))
        assert "\r" not in str(sample.target)
        assert sample.names[0] in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for sample in load("code", source="humaneval", form="document").private:
        ast.parse(str(sample.target))


def samples(n: int) -> list[Sample]:
    return [Sample(id=f"{i}/{j}", subject=f"s{i}", target=f"t{i}{j}") for i in range(n) for j in range(2)]


@given(st.integers(1, 20), st.integers(0, 10), st.integers(0, 10), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_carve_forgets_the_same_subjects_whatever_else_is_asked_for(a: int, b: int, c: int, seed: int) -> None:
    sizes = Sizes(private=a, forget=1, holdout=b, utility=c, split_seed=seed)
    roles = carve(samples(40), sizes, "x")
    assert [len(roles[role]) for role in ROLES] == [2, 2 * a - 2, 2 * b, 2 * c]
    alone = carve(samples(40), Sizes(private=a, forget=1, holdout=0, utility=0, split_seed=seed), "x")
    assert roles["forget"] == alone["forget"] and roles["retain"] == alone["retain"]


def test_carve_refuses() -> None:
    for sizes in (Sizes(private=0), Sizes(holdout=-1), Sizes(utility=-2), Sizes(private=4, forget=5)):
        with pytest.raises(UserError):
            carve(samples(400), sizes, "x")
    with pytest.raises(UserError, match="has 3 subjects, and private"):
        carve(samples(3), Sizes(private=2, holdout=1, utility=1), "x")


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_missing_and_broken_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="it is not there"):
        load_dataset(name, data_dir=tmp_path)
    for file in ("c4_demo.jsonl", "ori_pqal.json", "test.jsonl", "mbpp.jsonl"):
        (tmp_path / file).write_text('{"other": 3}\n')
    with pytest.raises(UserError, match=r"expected|is not"):
        load_dataset(name, data_dir=tmp_path)


def test_wrong_choice() -> None:
    with pytest.raises(UserError, match="allowed are c4, wiki"):
        load("webtext", source="reddit")
    with pytest.raises(UserError, match="passage_words"):
        load("webtext", passage_words=2)
    with pytest.raises(UserError, match="give one of them"):
        load("legal", corpus="some/corpus")


TEXT = "This page number {} says something of its own, and it says it at great length so that it counts as a passage."
HUB_ROWS: dict[str, Any] = {
    "Skylion007/openwebtext": lambda i: {"text": TEXT.format(i)},
    "my/laws": lambda i: {"text": TEXT.format(i)},
    "qiaojin/PubMedQA": lambda i: {
        "pubid": i, "question": f"Does {i} help?", "context": {"contexts": ["One.", "Two."]},
        "long_answer": f"Yes, {i} does.", "final_decision": "yes",
    },
    "cais/mmlu": lambda i: {"question": f"Case {i}?", "choices": ["w", f"right {i}", "v", "u"], "answer": 1},
    "google-research-datasets/mbpp": lambda i: {"task_id": i, "text": f"Write {i}.", "code": f"def f{i}():\r\n  pass"},
    "openai/openai_humaneval": lambda i: {
        "task_id": f"HumanEval/{i}", "prompt": f"def f{i}():\n", "canonical_solution": f"    return {i}\n",
    },
}  # fmt: skip
SMALL = {"private": 5, "forget": 2, "holdout": 2, "utility": 1}


@pytest.mark.parametrize(
    ("name", "hub", "options", "target"),
    [
        ("webtext", "Skylion007/openwebtext", {}, "This page number"),
        ("legal", "my/laws", {"corpus": "my/laws"}, "This page number"),
        ("legal", "cais/mmlu", {}, "right "),
        ("medical", "qiaojin/PubMedQA", {}, "Yes, "),
        ("code", "google-research-datasets/mbpp", {}, "def f"),
        ("code", "openai/openai_humaneval", {"source": "humaneval"}, "    return "),
    ],
)
def test_hub_rows(
    monkeypatch: pytest.MonkeyPatch, name: str, hub: str, options: dict[str, object], target: str
) -> None:
    """The hub's client is replaced; the columns are those of the hub's pages."""
    asked = []

    def fake(given: str, config: str | None, split: str, streaming: bool) -> Any:
        asked.append((given, split))
        start = 20 * len(asked)
        return (HUB_ROWS[given](start + i) for i in range(20))

    module = ModuleType("datasets")
    module.load_dataset = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    data = load_dataset(name, options={**SMALL, **options})
    assert [len(data[role]) for role in ROLES] == [2, 3, 2, 1]
    assert all(str(sample.target).startswith(target) for sample in data.private)
    assert {given for given, _ in asked} == {hub} and data.source == f"hub: {hub}"
