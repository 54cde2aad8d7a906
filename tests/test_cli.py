"""The command line: it starts fast, prints no noise and explains errors."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from babydoctor.cli.main import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120)


def test_help_is_fast_and_prints_no_warnings() -> None:
    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(5):
        before = used()
        result = run("--help")
        seconds.append(used() - before)
        assert result.returncode == 0 and result.stderr == ""
    assert min(seconds) < 0.5, seconds
    for command in ("doctor", "demo", "data", "plan", "train", "eval", "chat", "merge", "import", "export", "serve"):
        assert f"  {command} " in result.stdout, command
    for command in ("controller", "worker", "web", "bench"):
        assert f"  {command} " in result.stdout, command


def test_importing_the_commands_loads_nothing_heavy() -> None:
    code = (
        "import sys; from babydoctor.cli.main import build_app; build_app();"
        "print([m for m in ('torch', 'transformers', 'gradio', 'datasets', 'matplotlib', 'fastapi', 'deepspeed')"
        " if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothere.yaml"], "no configuration file nothere.yaml"),
        (["chat", "nothere", "x"], "nothere is not a run directory"),
        (["merge", "nothere", "--out", "x"], "nothere is not a run directory"),
    ],
)
def test_a_user_error_prints_one_paragraph(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.stderr


def test_doctor_finds_no_problem_on_this_machine() -> None:
    result = run("doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    for name in ("torch", "bitsandbytes", "bfloat16"):
        assert any(line.startswith(name) and " ok " in line for line in result.stdout.splitlines()), result.stdout
