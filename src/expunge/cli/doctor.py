"""``expunge doctor``."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import expunge
from expunge.cli.common import Json, emit, table
from expunge.record import digest_code

GIB = 2**30


def command(json: Json = False) -> int:
    """Show versions, devices, free memory and disk, and what is installed.

    Ends with exit code 1 if something that Expunge needs is missing or too old.

    Examples:
      expunge doctor
      expunge doctor --json
    """
    report = examine()
    emit(report, _text(report), json)
    return 1 if report["problems"] else 0


def examine() -> dict[str, Any]:
    """Everything that the verb prints. Memory and disk in bytes; None where the system does not tell."""
    packages, problems = _packages()
    devices, threads = _devices(problems)
    return {
        "schema": "expunge.doctor/1",
        "expunge": expunge.__version__,
        "code": digest_code(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": threads,
        "devices": devices,
        "memory_free": _free_memory(),
        "disk_free": shutil.disk_usage(Path.cwd()).free,
        "offline": os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"),
        "packages": packages,
        "problems": problems,
    }


def _packages() -> tuple[list[dict[str, Any]], list[str]]:
    """What Expunge requires, and its extras, with the versions that are installed."""
    from packaging.requirements import Requirement

    found: list[dict[str, Any]] = []
    problems: list[str] = []
    try:
        declared = requires("expunge") or []
    except PackageNotFoundError:
        return found, ["expunge runs from a folder that is not installed: 'pip install -e .' mends it"]
    for need in map(Requirement, declared):
        found_extra = re.search(r"""extra == ["']([\w-]+)["']""", str(need.marker or ""))
        extra = found_extra[1] if found_extra else None
        if need.marker and extra is None and not need.marker.evaluate():
            continue
        try:
            have = version(need.name)
        except PackageNotFoundError:
            have = None
        fits = have is not None and need.specifier.contains(have, prereleases=True)
        found.append(
            {"name": need.name, "needed": str(need.specifier), "installed": have, "extra": extra, "fits": fits}
        )
        if not fits and extra is None:
            problems.append(f"{need.name}{need.specifier} is needed, {have or 'nothing'} is installed")
    return found, problems


def _devices(problems: list[str]) -> tuple[list[dict[str, Any]], int | None]:
    """The devices on which PyTorch computes (memory in bytes), each tried with one small product; its threads."""
    try:
        import torch
    except ImportError as error:
        problems.append(f"PyTorch cannot be imported: {error}")
        return [], None
    devices: list[dict[str, Any]] = [{"name": "cpu", "model": platform.processor() or platform.machine()}]
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        devices.append(
            {"name": f"cuda:{i}", "model": torch.cuda.get_device_name(i), "memory": total, "memory_free": free}
        )
    if torch.backends.mps.is_available():
        devices.append({"name": "mps", "model": "Apple GPU"})
    for device in devices:
        try:
            ones = torch.ones(8, 8, device=device["name"])
            device["works"] = bool((ones @ ones == 8).all())
        except RuntimeError as error:
            device["works"] = False
            problems.append(f"{device['name']} does not compute: {str(error).splitlines()[0]}")
    return devices, torch.get_num_threads()


def _free_memory() -> int | None:
    """Bytes that new work may use."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:  # other Unix systems tell the whole memory only
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _text(report: dict[str, Any]) -> str:
    def gib(size: int | None) -> str:
        return "unknown" if size is None else f"{size / GIB:.1f} GiB"

    rows = [
        ("expunge", f"{report['expunge']} (code {report['code'][:12]})"),
        ("python", f"{report['python']} at {sys.executable}"),
        ("platform", report["platform"]),
        ("processors", f"{report['processors']}, PyTorch uses {report['threads']} threads"),
        ("memory free", gib(report["memory_free"])),
        ("disk free here", gib(report["disk_free"])),
        ("model hub", "not asked (HF_HUB_OFFLINE)" if report["offline"] else "asked only for hub names"),
    ]
    for device in report["devices"]:
        memory = f", {gib(device['memory_free'])} of {gib(device['memory'])} free" if "memory" in device else ""
        rows.append(
            ("device", f"{device['name']}: {device['model']}{memory}, {'works' if device['works'] else 'FAILS'}")
        )
    packages = [
        (p["name"] + (f" [{p['extra']}]" if p["extra"] else ""), p["installed"] or "not installed", p["needed"])
        for p in report["packages"]
    ]
    problems = "\n".join(f"problem: {problem}" for problem in report["problems"]) or "Nothing is missing."
    return f"{table(rows)}\n{table(packages, ('package', 'installed', 'needed'))}\n{problems}"
