"""``webtext``: web pages or encyclopaedia articles as documents; a subject is one page."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from expunge.data.carve import Sizes, carve
from expunge.data.hub import hub_rows, local_file
from expunge.data.registry import dataset
from expunge.data.samples import Dataset, Sample
from expunge.errors import UserError
from expunge.options import option

HUB = "Skylion007/openwebtext"
SHORTEST = 20  # words; the rest of a page below this is not a sample of its own
PAGE = re.compile(r"page \d{5}")  # a page without a title
HEADING = re.compile(r"(=(?: =)*) ([^=].*[^=]|[^=]) \1")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+|\n+")


@dataclass(frozen=True, kw_only=True)
class WebtextOptions(Sizes):
    """Sizes count pages."""

    source: str = option(
        "c4",
        "local file: c4 (c4_demo.jsonl), wiki (wiki_demo.txt) or wikitext (WikiText-2's valid.txt and test.txt)",
        choices=("c4", "wiki", "wikitext"),
    )
    passage_words: int = option(100, "pages are cut at sentence ends into passages of about this many words")
    passages: int = option(2, "at most this many passages of each page, from its beginning")
    hub: str = option(HUB, "hub dataset with a column 'text', used without --data-dir")
    hub_config: str | None = option(None, "its configuration")


def passages_of(text: str, words: int, most: int) -> list[str]:
    """At most ``most`` passages of whole sentences with about ``words`` words, from the beginning of the text.

    A sentence longer than that is cut. What is left over at the end counts only from 20 words on.
    """
    found: list[list[str]] = [[]]
    for sentence in SENTENCE_END.split(text):
        rest = sentence.split()
        while rest:
            if found[-1] and len(found[-1]) + len(rest) > words:
                found.append([])
            found[-1] += rest[:words]
            rest = rest[words:]
        if len(found) > most:
            break
    kept = [passage for passage in found[:most] if len(passage) >= min(SHORTEST, words)]
    return [" ".join(passage) for passage in kept]


def title_of(text: str) -> str:
    """What an encyclopaedia article is about: the words before its first verb, if the text keeps repeating them."""
    head = re.split(r" (?:is|are|was|were|refers|\()", text[:200], maxsplit=1)[0].strip(" ,;")
    head = re.sub(r"^(?:The|An?) ", "", head)
    named = head[:1].isupper() and head not in ("This", "It") and len(head.split()) <= 5
    return head if named and len(re.findall(rf"\b{re.escape(head)}\b", text)) >= 3 else ""


def read_wikitext(path: Path) -> list[tuple[str, str]]:
    """(title, text) of each article of a WikiText file; headings of sections are left out, spacing is mended.

    A line `` = Title = `` that stands between empty lines begins an article; sections have two or more signs.
    """
    pages: list[tuple[str, list[str]]] = []
    lines = ["", *(line.strip() for line in path.read_text(encoding="utf-8").split("\n")), ""]
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        heading = HEADING.fullmatch(line)
        if heading and len(heading[1]) == 1 and not before and not after:
            pages.append((_mended(heading[2]), []))
        elif line and not heading and pages:
            pages[-1][1].append(_mended(line))
    return [(title, "\n".join(text)) for title, text in pages]


def _mended(text: str) -> str:
    """WikiText separates its tokens by blanks and marks joined signs as @-@, @,@ and @.@."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)\]}%]|'s\b|n't\b)", r"\1", text)
    text = re.sub(r"([(\[{]) ", r"\1", text)
    return re.sub(r"\" ([^\"]*) \"", r'"\1"', text)


def read_pages(options: WebtextOptions, data_dir: Path | None) -> list[tuple[str, str]]:
    """(page name, text) of every page; the title where there is one.

    Raises:
        UserError: the file or the hub is missing, or a row has no text.
    """
    if data_dir is None:
        # Short pages give no sample, hence twice the number that is asked for.
        most = 2 * (options.private + options.holdout + options.utility) + 10
        rows = hub_rows(options.hub, options.hub_config, "train", limit=most)
        if any(not isinstance(row.get("text"), str) for row in rows):
            raise UserError(f"the hub dataset '{options.hub}' has no column 'text': choose another with option hub.")
        return [(f"page {number:05d}", row["text"]) for number, row in enumerate(rows)]
    if options.source == "wikitext":
        paths = [local_file(data_dir, (part,), "webtext") for part in ("valid.txt", "test.txt")]
        articles = [article for path in paths for article in read_wikitext(path)]
        known = [title if "<unk>" not in title else f"page {n:05d}" for n, (title, _) in enumerate(articles)]
        return [(title, text) for title, (_, text) in zip(known, articles, strict=True)]
    name = "c4_demo.jsonl" if options.source == "c4" else "wiki_demo.txt"
    path = local_file(data_dir, (name,), "webtext")
    pages: list[tuple[str, str]] = []
    titles: set[str] = {""}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        text = line
        if options.source == "c4":
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UserError(f"'{path}' line {number}: expected a JSON object with text.") from None
        title = title_of(text) if options.source == "wiki" else ""
        pages.append((f"page {number:05d}" if title in titles else title, text))
        titles.add(title)
    return pages


@dataset(
    name="webtext",
    options=WebtextOptions,
    summary="web pages or encyclopaedia articles, cut into passages",
    origin=f"local c4_demo.jsonl, wiki_demo.txt or WikiText-2; hub: {HUB}",
    licence="C4: ODC-By; Wikipedia and WikiText: CC BY-SA; OpenWebText: CC0 packaging, pages of their authors",
)
def load(options: WebtextOptions, *, data_dir: Path | None, seed: int) -> Dataset:
    """Passages of pages in roles by page. ``seed`` is not used; ``split_seed`` chooses the pages."""
    if options.passage_words < 8 or options.passages < 1:
        raise UserError("dataset webtext: give passage_words of 8 or more and passages of 1 or more.")
    samples: list[Sample] = []
    seen: set[str] = set()
    for number, (name, text) in enumerate(read_pages(options, data_dir)):
        titled = PAGE.fullmatch(name) is None
        for part, passage in enumerate(passages_of(text, options.passage_words, options.passages)):
            if passage not in seen:  # boilerplate that several pages share must not stand in two roles
                seen.add(passage)
                sample_id = f"w{number:05d}-{part}"
                samples.append(Sample(id=sample_id, subject=name, target=passage, names=(name,) if titled else ()))
    source = str(data_dir) if data_dir else f"hub: {options.hub}"
    return Dataset(name="webtext", roles=carve(samples, options, "webtext"), source=source)
