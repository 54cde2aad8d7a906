"""``babydoctor doctor``: check what works on this machine, and say how to fix what does not."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Optional

import typer

from babydoctor.cores import num_cores


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(doctor)


def doctor(
    configs: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Argument(metavar="[CONFIG]...", help="YAML files of stages: also check that base and template fit"),
    ] = None,
) -> None:
    """Check what works on this machine and say how to fix what does not; exit status 1 if something is broken."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colors = {"ok": "green", "absent": "yellow", "broken": "red"}
    table = Table(box=None, pad_edge=False)
    for column in ("", "state", "found", "fix"):
        table.add_column(column, overflow="fold")
    findings = [*examine(), *(_stage(config) for config in configs or ())]
    for finding in findings:
        hint = "" if finding.state == "ok" else finding.hint
        state = f"[{colors[finding.state]}]{finding.state}[/]"
        table.add_row(finding.name, state, escape(finding.detail), escape(hint))
    Console().print(table)
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Finding:
    """The result of one check. ``state`` is ``ok``, ``absent`` (optional and not installed) or ``broken``."""

    name: str
    state: str
    detail: str
    hint: str = ""
    """How to fix it."""


REINSTALL = "remove .venv and install again with `source scripts/setup.sh train`, or `pip install 'babydoctor[train]'`"


def examine() -> Iterator[Finding]:
    """Run all checks in order. An exception in a check becomes a finding."""
    for name, check in _CHECKS:
        try:
            yield check()
        except Exception as error:
            yield Finding(name, "broken", f"{type(error).__name__}: {error}", REINSTALL)


def _stage(path: Path) -> Finding:
    """Whether a stage's configuration is valid and the tokenizer of its base has the tokens of its template."""
    from babydoctor.config import load_config
    from babydoctor.plan.model import base_models
    from babydoctor.plan.template import check_base_template
    from babydoctor.schema import UserError

    try:
        config = load_config(path)
        base = base_models(config)[0]
        note = check_base_template(config.data.template, base)
    except UserError as error:
        return Finding(str(path), "broken", str(error))
    if note:
        return Finding(str(path), "absent", note, "give the folder of the base, or download it first")
    return Finding(str(path), "ok", f"template {config.data.template} fits {base}")


def _python() -> Finding:
    good = sys.version_info >= (3, 11)
    return Finding("Python", "ok" if good else "broken", platform.python_version(), "" if good else "use 3.11 or later")


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    detail = f"{num_cores()} cores, {total:.0f} GiB"
    return Finding("cores and memory", "ok", detail)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    if free < 5:
        return Finding(
            "disk", "broken", f"{free:.1f} GiB free here", "free 5 GiB for the demo, 200 GiB for all three sets"
        )
    return Finding("disk", "ok", f"{free:.0f} GiB free here (demo 2, the three real sets about 200)")


def _torch() -> Finding:
    import torch

    matrix = torch.randn(64, 64)
    assert torch.isfinite(matrix @ matrix).all()
    return Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(
            "GPU",
            "absent",
            "no CUDA device: the tiny preset runs, 7B does not",
            "install a driver and a CUDA build of torch",
        )
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    torch.ones(8, device="cuda").sum().item()
    return Finding("GPU", "ok", ", ".join(f"{d.name} {d.total_memory / 2**30:.0f} GiB" for d in devices))


def _bfloat16() -> Finding:
    import torch

    from babydoctor.plan.hardware import choose_device

    device = choose_device("auto")
    matrix = torch.randn(64, 64, dtype=torch.bfloat16, device=device)
    assert torch.isfinite(matrix @ matrix).all()
    return Finding("bfloat16", "ok", f"on {device}")


def _transformers() -> Finding:
    import transformers

    return Finding("transformers", "ok", transformers.__version__)


def _bitsandbytes() -> Finding:
    import torch

    try:
        from babydoctor.model.nf4 import Quantization, quantize_linear

        layer = quantize_linear(torch.randn(64, 64), Quantization())
    except ImportError as error:
        return Finding("bitsandbytes", "broken", str(error), "pip install 'babydoctor[train]'")
    inputs = torch.randn(2, 64)
    assert torch.isfinite(layer(inputs)).all()
    return Finding("bitsandbytes", "ok", f"{version('bitsandbytes')}, an NF4 layer works")


def _optional(package: str, use: str, install: str) -> Callable[[], Finding]:
    def check() -> Finding:
        try:
            return Finding(package, "ok", version(package))
        except PackageNotFoundError:
            return Finding(package, "absent", f"only needed for {use}", install)

    return check


def _required(package: str) -> Callable[[], Finding]:
    def check() -> Finding:
        try:
            return Finding(package, "ok", version(package))
        except PackageNotFoundError:
            return Finding(package, "broken", "not installed", f"pip install {package}")

    return check


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "on", "yes"):
        return Finding(
            "hub", "absent", "HF_HUB_OFFLINE is set: models and data come from folders", "unset it to download"
        )
    import socket

    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError as error:
        return Finding(
            "hub", "absent", f"huggingface.co cannot be reached ({error})", "give local folders instead of hub ids"
        )
    return Finding("hub", "ok", "huggingface.co can be reached")


_CHECKS: tuple[tuple[str, Callable[[], Finding]], ...] = (
    ("Python", _python),
    ("cores and memory", _memory),
    ("disk", _disk),
    ("torch", _torch),
    ("GPU", _gpu),
    ("bfloat16", _bfloat16),
    ("transformers", _transformers),
    ("peft", _required("peft")),
    ("accelerate", _required("accelerate")),
    ("bitsandbytes", _bitsandbytes),
    ("datasets", _optional("datasets", "data sets from the hub", "pip install 'babydoctor[train]'")),
    ("tensorboard", _optional("tensorboard", "tracking.tensorboard=true", "pip install 'babydoctor[train]'")),
    ("deepspeed", _optional("deepspeed", "several GPUs with ZeRO", "pip install 'babydoctor[deepspeed]'")),
    ("wandb", _optional("wandb", "tracking.wandb_project", "pip install 'babydoctor[wandb]'")),
    ("gradio", _optional("gradio", "the web UI", "pip install babydoctor")),
    ("hub", _hub),
)
