"""The README is executed: its commands run on a tiny model, its file tree and its targets exist."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expunge.cli.main import VERBS, invoke

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, content) of every block of code; a command that goes on after a backslash is one line."""
    return [(language, re.sub(r" *\\\n *", " ", body)) for language, body in BLOCK.findall(page)]


BLOCKS = blocks(README)
SHELL = [body for language, body in BLOCKS if language == "sh" and body.startswith("expunge ")]
PYTHON = [body for language, body in BLOCKS if language == "python"]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and files as the README supposes them: ``my-model``, ``forget.jsonl``, ..."""
    import torch

    from expunge.data.files import load_files
    from expunge.models.load import save_model
    from expunge.models.tiny import init_text

    folder = tmp_path_factory.mktemp("readme")
    (sample,) = (json.loads(body) for language, body in BLOCKS if language == "json")
    for role, count in (("forget", 4), ("retain", 8), ("holdout", 6), ("public", 16)):
        rows = [
            {**sample, "id": f"{role}-{i}", "subject": f"{role} {i}", "prompt": f"Where does {role} {i} live?"}
            for i in range(count)
        ]
        (folder / f"{role}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_files(forget=folder / "forget.jsonl", retain=folder / "retain.jsonl")
    for seed, name in enumerate(("my-model", "unlearned", "retrained-1", "retrained-2", "base")):
        torch.manual_seed(seed)
        save_model(init_text(data.private, "tiny-test", seed=seed), folder / name)
    (table,) = (body for language, body in BLOCKS if language == "csv")
    (folder / "table.csv").write_text(table)
    return folder


def execute(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def copied(workshop: Path, folder: Path) -> Path:
    for file in workshop.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


@pytest.mark.parametrize("body", SHELL, ids=lambda body: " ".join(body.split()[:2]))
def test_commands_run(body: str, workshop: Path, tmp_path: Path) -> None:
    folder = copied(workshop, tmp_path)
    for line in body.splitlines():
        done = execute(["sh", "-ec", line], folder)
        if "--json" in line:
            assert isinstance(json.loads(done.stdout), dict)
    if "--out runs/erase-17" in body:
        assert (folder / "runs/erase-17/model/config.json").is_file()
    if "--out runs/audit" in body:
        audit = json.loads((folder / "runs/audit/audit.json").read_text())
        assert len(audit["vector"]) == 4 and not audit["failed"] and sum(audit["completeness"]["counts"].values()) == 4


@pytest.mark.parametrize("body", PYTHON, ids=["erase"])
def test_python_runs(body: str, workshop: Path, tmp_path: Path) -> None:
    folder = copied(workshop, tmp_path)
    execute([sys.executable, "-c", body], folder)
    assert (folder / "runs/erase-17/model/config.json").is_file()


def test_it_opens_with_demo_and_test_and_the_targets_exist() -> None:
    assert re.match(r"# Expunge\n\n```sh\nmake demo .*\nmake test .*\n```\n", README)
    for target in ("demo", "test", "lint", "check"):
        done = execute(["make", "--dry-run", target], ROOT)
        assert "expunge demo" in done.stdout if target == "demo" else done.stdout
    assert os.access(ROOT / ".ci/run", os.X_OK)


def test_erasing_takes_fewer_than_ten_lines() -> None:
    for body in (SHELL[0], PYTHON[0]):
        assert "erase-17" in body and len(body.splitlines()) < 10


def test_the_file_tree_is_the_file_tree() -> None:
    (tree,) = (body for _, body in BLOCKS if body.startswith("src/expunge/"))
    shown = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.startswith("  ")}
    package = ROOT / "src/expunge"
    rooms = {p.name for p in package.iterdir() if (p / "__init__.py").is_file()}
    modules = {p.name for p in package.glob("*.py") if not p.name.startswith("_")}
    assert shown == rooms | modules
    for line in tree.splitlines():
        assert len(line.split()) > 1 or line == "src/expunge/", f"no purpose: {line}"
        if not line.startswith(("  ", "src")):
            assert (ROOT / line.split()[0]).is_dir()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).is_file(), target
    assert page.name == "README.md" or f"docs/{page.name}" in README, "the README links every page"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_name_verbs_and_options_that_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In blocks and in running text; placeholders stay placeholders."""
    verbs = {verb.name: verb for verb in VERBS}
    text = page.read_text(encoding="utf-8")
    lines = [line for language, body in blocks(text) if language == "sh" for line in body.splitlines()]
    lines += re.findall(r"`(expunge [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in (ln for ln in lines if ln.startswith("expunge ") and not ln.startswith("expunge --")):
        name = line.split()[1]
        if name == "VERB":
            continue
        assert name in verbs, line
        capsys.readouterr()
        invoke(name, verbs[name].command(), ["--help"])
        shown = capsys.readouterr().out
        for option in re.findall(r"(?<=\s)--[a-z][\w-]*", line):
            assert re.search(rf"{option}\b", shown), f"{line}: {option}"
