"""Rehearsal of inference: ``chat``, ``eval`` and both APIs must give the same greedy answer."""

from __future__ import annotations

import json
import socket
import time

import httpx

from babydoctor.bench.rehearse.commands import Process, StepError, cli, shown
from babydoctor.bench.rehearse.context import Context, Row, remove
from babydoctor.bench.rehearse.sizes import GIB
from babydoctor.eval.tasks import CAPTION_PROMPT
from babydoctor.files import split_lines
from babydoctor.schema import UserError
from babydoctor.serve.client import Client

NUM_QUESTIONS = 10


def chat(context: Context) -> None:
    """``babydoctor chat`` with the first held-out image."""
    tokens = str(context.size.answer_tokens)
    arguments = cli("chat", context.run, CAPTION_PROMPT, "--image", context.image, "--max-new-tokens", tokens)
    finished = context.execute("chat", arguments)
    answer = finished.stdout.strip()
    (context.work / "chat.txt").write_text(answer, encoding="utf-8")
    context.compare("chat: answer", repr(answer), [] if answer else ["it is empty"])


def evaluate(context: Context) -> None:
    """``babydoctor eval``: ten questions of ROCO. The first one is also asked by ``chat``."""
    out = context.work / "eval"
    remove(out)
    arguments = cli("eval", context.run, "--task", "roco", "--data", context.held_out, "--out", out)
    arguments += ["--max-questions", str(NUM_QUESTIONS), "--max-new-tokens", str(context.size.answer_tokens)]
    arguments += ["--images-as", "right", "--resamples", "100", "--batch-size", str(context.size.eval_batch_size)]
    context.execute(f"eval, {NUM_QUESTIONS} questions", arguments)
    lines = split_lines((out / "predictions-right.jsonl").read_text(encoding="utf-8"))
    predictions = {row["id"]: row for row in map(json.loads, lines)}
    failed = [row["finish_reason"] for row in predictions.values() if row["finish_reason"].startswith("error")]
    faults = [f"failed: {failed[0]}"] if failed else []
    if len(predictions) != NUM_QUESTIONS:
        faults.append(f"{len(predictions)} answers")
    context.compare("eval: answers", f"{len(predictions) - len(failed)} of {NUM_QUESTIONS} questions answered", faults)
    _compare_with_chat(context, "eval = chat", predictions[context.image.stem]["answer"])


def serve(context: Context) -> None:
    """``babydoctor serve``: start controller and worker, and ask over both APIs."""
    ports = [_free_port() for _ in range(2)]
    url = f"http://127.0.0.1:{ports[0]}"
    arguments = cli("serve", context.run, f"controller.port={ports[0]}", f"worker.port={ports[1]}", "--no-page")
    context.console.print(f"  $ {shown(arguments, context.work)}", markup=False, soft_wrap=True)
    row = Row(context.step, "serve")
    context.rows.append(row)
    process = Process(arguments, context.work / "logs" / f"{len(context.rows):02d}-serve", context.size.num_threads)
    try:
        answers = _ask_both(context, process, url)
    except (StepError, UserError, httpx.HTTPError) as error:
        finished = process.stop()
        row.ok, row.seconds, row.note = False, finished.seconds, str(error).splitlines()[0]
        raise StepError(f"{error}\n{finished.tail()}") from error
    except BaseException:
        process.stop()
        raise
    finished = process.stop()
    row.seconds, row.peak_bytes = finished.seconds, finished.peak_bytes
    row.note = ", ".join(f"{what} {seconds:.1f} s" for what, (seconds, _) in answers.items())
    context.console.print(f"    {row.note}, peak {row.peak_bytes / GIB:.2f} GiB", style="dim")
    context.compare(
        "serve: stop", f"exit status {finished.status}", ["SIGTERM ends it badly"] if finished.status else []
    )
    for name, (_, answer) in answers.items():
        if answer is not None:
            _compare_with_chat(context, f"{name} = chat", answer)


def _ask_both(context: Context, process: Process, url: str) -> dict[str, tuple[float, str | None]]:
    """Seconds until ready, and seconds and text of the answer over each API."""
    image, tokens = context.image.read_bytes(), context.size.answer_tokens
    begun = time.monotonic()
    with Client(url) as client:
        model = _wait_until_ready(context, process, client)
        ready = time.monotonic()
        llava = client.ask_llava(model, CAPTION_PROMPT, image, max_new_tokens=tokens)
        between = time.monotonic()
        openai = "".join(client.stream_openai(model, CAPTION_PROMPT, image, max_tokens=tokens))
        end = time.monotonic()
    return {
        "ready": (ready - begun, None),
        "LLaVA protocol": (between - ready, llava),
        "OpenAI API": (end - between, openai),
    }


def _wait_until_ready(context: Context, process: Process, client: Client) -> str:
    """Wait until the controller lists a model; returns its name."""
    while True:
        finished = process.poll()
        if finished is not None:
            raise StepError(f"the servers ended: {finished.error()}")
        if time.monotonic() - process.begun > context.size.limit_s:
            raise StepError(f"not ready after {context.size.limit_s:.0f} s")
        try:
            if models := client.models():
                return models[0]
        except (httpx.HTTPError, UserError):
            pass
        time.sleep(0.1)


def _compare_with_chat(context: Context, label: str, answer: str) -> None:
    path = context.work / "chat.txt"
    if not path.is_file():
        context.compare(label, repr(answer.strip()), ["chat has given no answer to compare with"])
        return
    expected = path.read_text(encoding="utf-8")
    equal = answer.strip() == expected
    context.compare(label, "the same answer" if equal else repr(answer.strip()), [] if equal else [f"not {expected!r}"])


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
