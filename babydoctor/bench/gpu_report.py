"""The report of ``bench gpu``: one JSON file, the same as Markdown, and its figures in the guides."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babydoctor.markers import has_section, markdown_table, markers, write_section
from babydoctor.schema import UserError

if TYPE_CHECKING:
    from babydoctor.bench.paths import PathResult
    from babydoctor.bench.serve_figures import Figures, Report
    from babydoctor.bench.train import StageResult

GIB = 2**30
SECTION = "gpu report"
"""The section of a document that holds the figures; see ``markers.py``."""


def write_record(file: Path, kind: str, record: Mapping[str, Any]) -> None:
    """Append one result as a line of JSON, at once, so that what is measured survives a later failure."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"kind": kind, **record}) + "\n")


def stage_record(result: StageResult, ceiling: float) -> dict[str, Any]:
    """A training stage. Rates are per second, sizes in bytes."""
    names = ("stage", "samples_per_s", "tokens_per_s", "mfu", "hardware_utilization", "data_wait_share", "peak_bytes")
    return {name: getattr(result, name) for name in names} | {
        "predicted_bytes": result.predicted_bytes,
        "matmul_flops_per_s": ceiling,
        "micro_batch_tokens": result.plan.micro_batch_tokens,
        "gradient_checkpointing": result.plan.gradient_checkpointing,
    }


def path_record(stage: str, result: PathResult) -> dict[str, Any]:
    """A fast path of training, with it and without it."""
    names = ("samples_per_s", "samples_per_s_without", "gain", "peak_bytes", "peak_bytes_without")
    values = {name: getattr(result, name) for name in names}
    return {"stage": stage, "path": result.path.name, "without": result.path.without, **values}


def serve_record(report: Report, row: Figures) -> dict[str, Any]:
    """Serving one number of users. Rates are per second."""
    names = ("num_users", "tokens_per_s", "decode_tokens_per_s", "first_token_p50_s", "per_token_p50_s")
    return {name: getattr(row, name) for name in names} | {
        "model": report.preset,
        "through": report.through,
        "share_of_ceiling": report.share_of_ceiling(row),
        "memory_bytes_per_s": report.memory_bytes_per_s,
        "peak_bytes": report.peak_bytes,
    }


def read_report(file: Path) -> dict[str, Any]:
    """A report that ``bench gpu`` wrote.

    Raises:
        UserError: the file cannot be read or is not a GPU report.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; `babydoctor bench gpu` writes it") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}; `babydoctor bench gpu` writes it") from error
    if not isinstance(report, dict) or not {"environment", "sections", "records"} <= report.keys():
        raise UserError(f"{file} is not a GPU report; `babydoctor bench gpu` writes one")
    return report


def render_report(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    where = report["environment"]
    lines = [
        f"{where.get('device_name', '?')}, driver {where.get('driver', '-')}, torch {where.get('torch', '?')}, "
        f"transformers {where.get('transformers', '?')}, bitsandbytes {where.get('bitsandbytes') or 'missing'}, "
        f"liger-kernel {where.get('liger_kernel') or 'missing'}; commit {where.get('commit') or '?'}, "
        f"{report['date']}; `{report['command']}`",
    ]
    if missing := where.get("missing"):
        lines += ["", f"Not installed, so not used: {', '.join(missing)}."]
    for kind, build in (("train", _train_table), ("serve", _serve_table), ("paths", _paths_table)):
        records = [record for record in report["records"] if record["kind"] == kind]
        if records:
            lines += ["", *build(records)]
    lines += ["", *markdown_table(("section", "result", "seconds"), (_section_row(s) for s in report["sections"]))]
    return "\n".join(lines) + "\n"


def _train_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ("stage", "samples/s", "tokens/s", "MFU", "with recomputation", "peak GiB", "planned", "micro-batch")
    rows = (
        (
            r["stage"],
            f"{r['samples_per_s']:.1f}",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['mfu']:.0%}",
            f"{r['hardware_utilization']:.0%}",
            f"{r['peak_bytes'] / GIB:.2f}",
            f"{r['predicted_bytes'] / GIB:.2f}",
            f"{r['micro_batch_tokens']} tokens, checkpointing {r['gradient_checkpointing']}",
        )
        for r in records
    )
    note = f"MFU is held against {records[0]['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s, measured in the same run."
    return [*markdown_table(heads, rows), "", note]


def _serve_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ("model", "users", "tokens/s", "decoding tokens/s", "of the bandwidth ceiling", "first token [s]")
    rows = (
        (
            r["model"],
            str(r["num_users"]),
            f"{r['tokens_per_s']:.0f}",
            f"{r['decode_tokens_per_s']:.0f}",
            f"{r['share_of_ceiling']:.0%}",
            f"{r['first_token_p50_s']:.3f}",
        )
        for r in records
    )
    return [*markdown_table(heads, rows), "", f"Memory bandwidth {records[0]['memory_bytes_per_s'] / 1e9:,.0f} GB/s."]


def _paths_table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    heads = ("stage", "fast path", "instead of", "samples/s", "without", "gain")
    rows = (
        (
            r["stage"],
            r["path"],
            r["without"],
            f"{r['samples_per_s']:.2f}",
            f"{r['samples_per_s_without']:.2f}",
            f"{r['gain']:+.0%}",
        )
        for r in records
    )
    return markdown_table(heads, rows)


def _section_row(section: Mapping[str, Any]) -> tuple[str, str, str]:
    return section["name"], section["result"], f"{section['seconds']:.0f}"


def fill_documents(file: Path, documents: Sequence[Path]) -> list[Path]:
    """Put the report between the markers of each document that has them; returns those documents.

    Raises:
        UserError: no document has the markers.
    """
    text = render_report(read_report(file))
    filled = [document for document in documents if has_section(document, SECTION)]
    for document in filled:
        write_section(document, SECTION, text, option="--into")
    if not filled:
        raise UserError(f"none of {', '.join(map(str, documents))} has the lines {' and '.join(markers(SECTION))}")
    return filled
