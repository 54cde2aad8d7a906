"""The GPU check's report: it is written after each section, ends at its time limit, and goes into documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from babydoctor.bench import gpu_check
from babydoctor.bench.gpu_check import CheckSection, list_sections, run_gpu_check
from babydoctor.bench.gpu_report import fill_documents, read_report
from babydoctor.cli.main import build_app
from babydoctor.schema import UserError

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- gpu report: begin -->", "<!-- gpu report: end -->"


def test_a_section_that_fails_or_hangs_does_not_affect_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"kind": "serve", "num_users": 1})
    program = "import sys, time; print('begun'); {}"

    def sections(preset: str, device: str, figures: Path) -> list[CheckSection]:
        write = f"open({str(figures)!r}, 'a').write({line!r} + chr(10)); sys.exit(3)"
        return [
            CheckSection("fails", (sys.executable, "-c", program.format(write))),
            CheckSection("hangs", (sys.executable, "-c", program.format("time.sleep(600)")), 0.5),
            CheckSection("passes", (sys.executable, "-c", program.format("pass"))),
        ]

    monkeypatch.setattr(gpu_check, "list_sections", sections)
    monkeypatch.setattr(gpu_check, "render_report", lambda report: f"{len(report['sections'])} sections\n")
    begun = time.monotonic()
    assert not run_gpu_check(tmp_path, minutes=1, preset="mini", device="cpu")
    assert time.monotonic() - begun < 55
    report = read_report(tmp_path / "gpu-report.json")
    assert [(s["name"], s["result"]) for s in report["sections"]] == [
        ("fails", "failed with status 3"),
        ("hangs", "cut off"),
        ("passes", "passed"),
    ]
    assert report["records"] == [{"kind": "serve", "num_users": 1}] and "torch" in report["environment"]
    assert (tmp_path / "gpu-fails.log").read_text() == "begun\n"


def test_every_section_is_a_command_that_exists(tmp_path: Path) -> None:
    app = build_app()
    for device in ("cpu", "cuda"):
        for section in list_sections("7b", device, tmp_path / "figures"):
            if "babydoctor" in section.arguments[2]:
                result = CliRunner().invoke(app, [*section.arguments[3:], "--help"])
                assert result.exit_code == 0, (section.name, result.output)


def test_the_script_measures_one_stage(tmp_path: Path) -> None:
    """The real script, stopped early, reports what it measured until then."""
    command = ["bash", "scripts/gpu_check.sh", "--device", "cpu", "--preset", "mini", "--minutes", "0.3"]
    environment = os.environ | {"PYTHON": sys.executable}
    begun = time.monotonic()
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    report = read_report(tmp_path / "gpu-report.json")
    assert time.monotonic() - begun < 120, "the deadline was not kept"
    assert report["sections"][0]["name"] == "tests" and len(report["sections"]) == 10, done.stderr
    assert {section["result"] for section in report["sections"]} <= {"passed", "cut off", "no time left"}, done.stdout
    assert "| section |" in (tmp_path / "gpu-report.md").read_text()


def test_figures_go_between_the_markers(tmp_path: Path) -> None:
    record = {
        "kind": "train", "stage": "align", "samples_per_s": 44.9, "tokens_per_s": 13000.0, "mfu": 0.458,
        "hardware_utilization": 0.458, "peak_bytes": 2**34, "predicted_bytes": 2**34, "matmul_flops_per_s": 7.5e14,
        "micro_batch_tokens": 2560, "gradient_checkpointing": "none",
    }  # fmt: skip
    report = {"environment": {"device_name": "NVIDIA A10"}, "sections": [], "records": [record]}
    file, document = tmp_path / "gpu-report.json", tmp_path / "README.md"
    file.write_text(json.dumps(report | {"date": "2026-01-01", "command": "bash scripts/gpu_check.sh"}))
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert fill_documents(file, [document, tmp_path / "absent.md"]) == [document]
    text = document.read_text()
    assert "old" not in text and "NVIDIA A10" in text and "| align | 44.9 | 13,000 | 46% |" in text
    assert text.startswith("before\n") and text.endswith("after\n")
    assert fill_documents(file, [document]) == [document] and document.read_text() == text
    with pytest.raises(UserError, match="gpu report: begin"):
        fill_documents(file, [tmp_path / "absent.md"])
    file.write_text("{}")
    with pytest.raises(UserError, match="is not a GPU report"):
        read_report(file)
