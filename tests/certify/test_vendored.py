"""The one file that an auditor takes along: it stands alone, and says what ``expunge verify`` says."""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.certify.certificate_cases import CLAIMS, KEY, OTHER, claim, sign, statement, write_run

from expunge.certify import vendored
from expunge.certify.canonical import canonical
from expunge.certify.verify import verify
from expunge.errors import UserError

SOURCE = Path(str(vendored.__file__))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the copied file, a run, and public keys of two signers."""
    folder = tmp_path_factory.mktemp("auditor")
    (folder / "check.py").write_text(SOURCE.read_text(encoding="utf-8"), encoding="utf-8")
    write_run(folder / "run")
    for name, key in (("a.pem", KEY), ("b.pem", OTHER)):
        pem = key.public.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (folder / name).write_bytes(pem)
    (folder / "old.pem").write_bytes(b"Expires: 2020-01-01T00:00:00Z\n" + (folder / "a.pem").read_bytes())
    return folder


def lasting(content: dict[str, object]) -> dict[str, object]:
    """Valid whenever the test runs."""
    predicate = content["predicate"]
    assert isinstance(predicate, dict)
    predicate |= {"created": "2020-01-01T00:00:00Z", "valid_until": "2099-01-01T00:00:00Z"}
    return content


@pytest.fixture(scope="module")
def alone(place: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("auditors_copy", place / "check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_it_imports_only_the_standard_library_and_cryptography() -> None:
    found = set()
    for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(str(node.module).split(".")[0])
    assert found - set(sys.stdlib_module_names) == {"cryptography"}


def test_it_runs_as_a_script_without_expunge(place: Path) -> None:
    certificate = place / "certificate.json"
    certificate.write_bytes(sign(lasting(statement(place / "run"))))
    code = (
        "import runpy, sys\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    assert not [m for m in sys.modules if m.startswith('expunge')]\n"
    )

    def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        line = f"import sys; sys.argv = {[str(a) for a in (place / 'check.py', *arguments)]!r}\n{code}"
        return subprocess.run([sys.executable, "-I", "-c", line], capture_output=True, text=True, check=False)

    good = script(certificate, "--pub", place / "a.pem", "--model", place / "run" / "model")
    assert good.returncode == 0 and "the model is the certified one" in good.stdout and not good.stderr
    wrong = script(certificate, "--pub", place / "b.pem", "--model", place / "run" / "model")
    assert wrong.returncode == 1 and "no signature is by key" in wrong.stdout
    missing = script(place / "nothing.json", "--pub", place / "a.pem")
    assert missing.returncode == 2 and missing.stderr.startswith("unreadable:") and not missing.stdout
    assert script(certificate).returncode == 2  # no key, no answer


def corpus(place: Path) -> dict[str, bytes]:
    """Certificates that are good, changed, signed by others, cut, of another kind."""
    good = lasting(statement(place / "run"))
    whole = sign(good)
    chance = random.Random(0)
    found = {"good": whole, "both": sign(good, KEY, OTHER), "other": sign(good, OTHER)}
    for number in range(150):
        at = chance.randrange(len(whole))
        found[f"byte-{number}"] = whole[:at] + bytes([whole[at] ^ chance.randrange(1, 256)]) + whole[at + 1 :]
        found[f"cut-{number}"] = whole[: chance.randrange(len(whole))]
    found["level"] = sign({**good, "predicate": {**good["predicate"], "claims": [claim("L7")]}})  # type: ignore[dict-item]
    found["verdict"] = sign({**good, "predicate": {**good["predicate"], "verdict": "certified"}})  # type: ignore[dict-item]
    found["unknown"] = sign({**good, "predicateType": "https://example.org/v1"})
    found["identity"] = sign(lasting(statement(place / "run", CLAIMS)))
    found["old"] = sign({**good, "predicate": {**good["predicate"], "valid_until": "2020-01-02T00:00:00Z"}})  # type: ignore[dict-item]
    found["spaced"] = json.dumps(json.loads(whole)).encode()
    found["kind"] = canonical({**json.loads(whole), "payloadType": "text/plain"})
    found["large"] = whole + b" " * vendored.LIMIT
    found["empty"] = b""
    return found


@pytest.mark.parametrize("keys", [("a.pem",), ("b.pem",), ("a.pem", "b.pem"), ("old.pem",)])
def test_it_says_what_verify_says(
    keys: tuple[str, ...], place: Path, alone: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = place / "one.json", place / "run" / "model"
    codes = set()
    for name, data in corpus(place).items():
        path.write_bytes(data)
        options = [part for key in keys for part in ("--pub", str(place / key))]
        code = alone.main([str(path), "--model", str(model), *options])
        said = capsys.readouterr()
        try:
            found = verify(path, pub=[place / key for key in keys], model=model)
        except UserError as error:
            assert (code, said.err.strip()) == (2, f"unreadable: {error}"), name
        else:
            assert code == found.code, name
            assert said.out.strip() == found.text().rpartition("\n\n")[0], name
        codes.add(code)
    assert codes == ({0, 1, 2} if keys[0] == "a.pem" or (len(keys) == 1 and keys[0] == "b.pem") else {1, 2})
