"""``babydoctor bench gpu``: run all checks and measurements that need a GPU in a few minutes, most important first.

Each section runs in its own process, so a crash or an out-of-memory error ends only that section. No section may run
past the deadline. The report is written after each section, so a later failure does not lose earlier results.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babydoctor.bench.gpu_report import render_report
from babydoctor.cores import num_cores
from babydoctor.files import write_text

ROOT = Path(__file__).parents[2]
STAGES = ("radiology", "align", "instruct")
OPTIONAL = ("bitsandbytes", "liger-kernel", "pytest", "fastapi", "uvicorn", "datasets")

MEMORY_CAP = "22.5GiB"
"""Memory of an A10 in GiB, as an option of ``bench train``."""

TESTS_SHARE = 0.35
"""Largest share of the time for the tests."""


LAST_WORDS_S = 4.0
"""Time that a section gets to write its output after it was told to stop."""


@dataclass(frozen=True)
class CheckSection:
    """One command. Its last argument may be a file for its figures."""

    name: str
    arguments: tuple[str, ...]
    max_share: float = 1.0
    """Largest share of the whole time."""


def list_sections(preset: str, device: str, figures: Path) -> list[CheckSection]:
    """The sections, in the order in which they run."""
    cli = (sys.executable, "-c", "from babydoctor.cli.main import main; main()", "bench")
    common = ("--preset", preset, "--device", device, "--json", str(figures))
    cap = ("--memory-cap", MEMORY_CAP) if device == "cuda" else ()
    steps, users = (("--steps", "4"), "1,8,32,64") if preset == "7b" else (("--steps", "1", "--batch-size", "2"), "1,2")
    asked = ("--requests-per-user", "2", "--rounds", "1", "--max-new-tokens", "64" if preset == "7b" else "8")
    room = ("engine.max_running=64", "engine.max_context=1024", "engine.cached_slots=0")
    without = (*room, "engine.cuda_graphs=false")
    tests = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "--durations=10",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu",
    )
    return [
        CheckSection("tests", (*tests, str(ROOT / "tests" / "test_gpu.py")), TESTS_SHARE),
        *(CheckSection(f"train {stage}", (*cli, "train", "--stage", stage, *steps, *cap, *common)) for stage in STAGES),
        CheckSection("serve bf16", (*cli, "serve", *room, "--engine-only", "--users", users, *asked, *common)),
        CheckSection("serve nf4", (*cli, "serve", *room, "--nf4", "--users", users, *asked, *common)),
        CheckSection(
            "serve bf16 without graphs", (*cli, "serve", *without, "--engine-only", "--users", users, *asked, *common)
        ),
        *(
            CheckSection(f"paths {stage}", (*cli, "paths", "--stage", stage, "--steps", "2", *common))
            for stage in STAGES
        ),
    ]


def run_gpu_check(out: Path, *, minutes: float, preset: str, device: str) -> bool:
    """Run the sections until the time is up, and write ``gpu-report.json`` and ``gpu-report.md`` into ``out``.

    Returns:
        True if every section that ran to its end succeeded. Sections that ran out of time do not count.
    """
    begun = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["bash", "scripts/gpu_check.sh", *sys.argv[3:]]),
        "environment": describe_environment(device),
        "sections": [],
        "records": [],
    }
    if missing := report["environment"]["missing"]:
        print(f"not installed, so not used: {', '.join(missing)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="babydoctor-gpu-") as folder:
        figures = Path(folder) / "figures.jsonl"
        for section in list_sections(preset, device, figures):
            left = minutes * 60 - (time.monotonic() - begun)
            limit = min(left, section.max_share * minutes * 60)
            report["sections"].append(_run_section(section, limit, Path(folder) / "log", out, device))
            if figures.is_file():
                report["records"] = [json.loads(line) for line in figures.read_text(encoding="utf-8").splitlines()]
            write_text(out / "gpu-report.json", json.dumps(report, indent=1) + "\n")
            write_text(out / "gpu-report.md", render_report(report))
    print(render_report(report), flush=True)
    return all(section["result"] in ("passed", "cut off", "no time left") for section in report["sections"])


def _run_section(section: CheckSection, limit_s: float, log: Path, out: Path, device: str) -> dict[str, Any]:
    """Run one section for at most ``limit_s`` seconds. Its output is printed, and recorded if it fails."""
    begun = time.monotonic()
    result, tail = "no time left", ""
    if limit_s > 5:
        print(f"== {section.name} (at most {limit_s:.0f} s)", flush=True)
        with _child(section.arguments, log, device) as process:
            try:
                result = "passed" if process.wait(limit_s) == 0 else f"failed with status {process.returncode}"
            except subprocess.TimeoutExpired:
                result = "cut off"
                with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
                    os.killpg(process.pid, signal.SIGINT)  # pytest then says which tests failed
                    process.wait(LAST_WORDS_S)
        tail = log.read_text(encoding="utf-8", errors="replace")
        print(tail[-3000:], flush=True)
        if result != "passed":
            name = section.name.replace(" ", "-")
            write_text(out / f"gpu-{name}.log", tail)
    return {"name": section.name, "result": result, "seconds": time.monotonic() - begun, "output": tail[-1500:]}


@contextlib.contextmanager
def _child(arguments: Sequence[str], log: Path, device: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child process in its own process group, which is killed at the end of the block."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["BABYDOCTOR_GPU_TESTS_ON"] = device
    with log.open("wb") as file:
        process = subprocess.Popen(
            arguments, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def describe_environment(device: str) -> dict[str, Any]:
    """GPU, driver and versions."""
    import torch

    versions = {name.replace("-", "_"): _version(name) for name in ("torch", "transformers", "peft", *OPTIONAL)}
    known: dict[str, Any] = {**versions, "missing": [name for name in OPTIONAL if _version(name) is None]}
    known["python"] = sys.version.split()[0]
    known["commit"] = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if device == "cuda":
        known["device_name"] = torch.cuda.get_device_name()
        known["memory_bytes"] = torch.cuda.get_device_properties(0).total_memory
        known["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    else:
        known["device_name"] = f"CPU ({num_cores()} cores)"
    return known


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
