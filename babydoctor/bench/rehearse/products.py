"""Rehearsal of merge, export and import: every result must give the run's own answers."""

from __future__ import annotations

from pathlib import Path

from babydoctor.bench.rehearse.answers import differences, read_answer
from babydoctor.bench.rehearse.commands import StepError, cli
from babydoctor.bench.rehearse.context import Context
from babydoctor.eval.tasks import CAPTION_PROMPT

CONTROL = 2.0
"""A lost LoRA must change the logits by at least this many times the tolerance."""


def ask_reference(context: Context) -> None:
    """Record the answer of the run itself, and check that its LoRA affects it."""
    ask(context, "run", context.run, reference=None)
    answer = read_answer(_answer_file(context, "run"))
    if answer.without_lora is None:
        return
    scale = abs(answer.logits).max()
    effect = float(abs(answer.logits - answer.without_lora).max() / scale)
    faults = [] if effect > CONTROL * context.size.tolerance else ["a lost LoRA would not show"]
    context.compare("control: without LoRA", f"logits would differ by {effect:.1%} of the largest", faults)


def merge(context: Context) -> None:
    """``babydoctor merge``: the merged run must answer like the run."""
    out = context.work / "merged"
    with context.product(out, context.work / "merged.partial"):
        context.execute("merge", cli("merge", context.run, "--out", out, *_dtype(context)))
        ask(context, "merged", out)


def export_hf_and_gguf(context: Context) -> None:
    """Export as ``hf``, which is asked through transformers, and as ``gguf``, whose weights are compared with it."""
    hf, gguf, dtype = context.work / "hf", context.work / "gguf", context.size.gguf_dtype
    with context.product(hf, gguf):
        context.execute("export hf", cli("export", context.run, "--format", "hf", "--out", hf, *_dtype(context)))
        ask(context, "hf export", hf, kind="hf")
        arguments = cli("export", context.run, "--format", "gguf", "--dtype", dtype, "--out", gguf)
        context.execute(f"export gguf {dtype}", arguments)
        finished = context.execute_module("compare gguf", "gguf_weights", gguf, hf, dtype)
        context.compare("gguf = hf export", finished.stdout.strip())


def export_llava(context: Context) -> None:
    """Export as ``llava`` and import the result: the imported run must answer like the run."""
    out, imported = context.work / "llava", context.work / "imported"
    with context.product(imported):
        with context.product(out):
            arguments = cli("export", context.run, "--format", "llava", "--out", out, *_dtype(context))
            context.execute("export llava", arguments)
            arguments = cli("import", out, "--vision-tower", context.vision_tower, "--out", imported)
            arguments += ["--template", context.template]  # LLaVA checkpoints do not record it
            context.execute("import", arguments)
        ask(context, "imported", imported)


def ask(context: Context, name: str, model: Path, *, kind: str = "run", reference: str | None = "run") -> None:
    """Ask a model in a process of its own and compare it with the reference."""
    size, out = context.size, _answer_file(context, name)
    out.parent.mkdir(exist_ok=True)
    arguments: list[str | Path] = [kind, model, "--out", out, "--image", context.image, "--question", CAPTION_PROMPT]
    arguments += ["--tokens", str(size.greedy_tokens), "--dtype", size.dtype]
    if reference is not None:
        arguments += ["--reference", _answer_file(context, reference)]
        if not _answer_file(context, reference).is_file():
            raise StepError("the run itself has not been asked; run --only reference")
    context.execute_module(f"ask {name}", "ask_model", *arguments)
    if reference is not None:
        given = read_answer(_answer_file(context, reference))
        context.compare(f"{name} = run", *differences(given, read_answer(out), size.tolerance))


def _answer_file(context: Context, name: str) -> Path:
    return context.work / "answers" / f"{name.replace(' ', '-')}.npz"


def _dtype(context: Context) -> list[str]:
    """The option for the precision of the comparison, if it is not the run's own."""
    return [] if context.size.dtype == "bfloat16" else ["--dtype", context.size.dtype]
