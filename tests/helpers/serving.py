"""Real servers for tests: a tiny random run directory, processes on loopback, and clients like other programs'."""

from __future__ import annotations

import atexit
import base64
import contextlib
import functools
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import requests
from PIL import Image

PROMPT = "[INST] <image>\nWhich modality is this? [/INST]"


def build_tiny_run(directory: Path, *, seed: int = 0) -> Path:
    """Write a run directory with random weights and long answers: one token per character, 4 layers, hidden size 64."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from babydoctor.model.babydoctor import BabyDoctor
    from babydoctor.model.run_dir import Manifest, save_trained, write_manifest
    from babydoctor.model.vision import build_projector

    torch.manual_seed(seed)
    alphabet = ["Ġ", "Ċ", *map(chr, range(33, 127))]
    # A random model generates "t", "h" where the tokenizer encodes "th", so its text does not encode to the same ids.
    merges = [("t", "h"), ("i", "n"), ("e", "r"), ("Ġ", "a"), ("Ġ", "s")]
    tokens = ["<unk>", "<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    language_model = LlamaForCausalLM(config)
    with torch.no_grad():
        # Without an end-of-text token answers are as long as a test asks for.
        language_model.lm_head.weight[:3] = 0
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        )
    )
    base, clip = directory / "base", directory / "clip"
    language_model.save_pretrained(base)
    fast.save_pretrained(base)
    vision.save_pretrained(clip)
    model = BabyDoctor(vision, build_projector("linear", 32, 64), language_model)
    run = directory / "tiny"
    run.mkdir()
    save_trained(model, run, str(base))
    manifest = Manifest(
        name="tiny",
        language_model=str(base),
        vision_tower=str(clip),
        template="llava_llama_2",
        image_size=56,
        image_mode="pad",
        image_mean=(0.48, 0.46, 0.41),
        image_std=(0.27, 0.26, 0.28),
        max_length=4096,
        dtype="float32",
    )
    write_manifest(run, manifest)
    return run


@functools.lru_cache
def tiny_run() -> Path:
    """The run directory that all test modules share."""
    folder = Path(tempfile.mkdtemp(prefix="babydoctor-serving-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    run = build_tiny_run(folder)
    add_certainty(run)
    return run


def add_certainty(run: Path) -> None:
    """Add the results of ``eval --familiarity`` and ``eval --confidence`` to a run, to which noise is familiar."""
    from babydoctor.imaging.load import load_image
    from babydoctor.imaging.preprocess import to_pixels
    from babydoctor.model.familiarity import Familiarity, describe_images
    from babydoctor.model.run_dir import load_run, write_manifest

    loaded = load_run(run)
    pixels = np.stack([to_pixels(load_image(png(seed)), loaded.manifest.image) for seed in range(64)])
    features = describe_images(loaded.model, pixels)
    points = Familiarity.fit(features)
    threshold = 1.2 * float(points.distances(features).max())
    replace(points, threshold=threshold).save(run)
    bins = [
        {"low": 0.0, "high": 0.5, "count": 40, "num_right": 12},
        {"low": 0.5, "high": 1.0, "count": 40, "num_right": 38},
    ]
    figures = {
        "familiarity": {"task": "phantom", "threshold": threshold, "false_alarms": 0.05},
        "confidence": {"task": "phantom", "temperature": 1.0, "max_tokens": 8, "bins": bins},
    }
    write_manifest(run, loaded.manifest.model_copy(update=figures))


@functools.lru_cache
def tiny_worker() -> Server:
    """A worker without a controller that several test modules share, with four slots and a queue of three."""
    server = start_worker(tiny_run(), tiny_run().parent / "worker.log", "limits.max_queue=3")
    atexit.register(stop_all, [server])
    return wait_ready(server)


def png(seed: int = 0, size: tuple[int, int] = (80, 60)) -> bytes:
    """An image of noise."""
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def bare_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{bare_base64(data)}"


def user_message(text: str, *images: bytes) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Server:
    """One BabyDoctor process."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def terminate(self, timeout_s: float = 120) -> int:
        self.process.terminate()
        return self.process.wait(timeout_s)

    def log_lines(self) -> list[dict]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def start(arguments: list[str], url: str, log: Path, *, environment: dict[str, str] | None = None) -> Server:
    """Start a server process by its command without waiting for it."""
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", "from babydoctor.cli.main import main; main()", *arguments],
            env=os.environ | own | (environment or {}),
            stdout=file,
            stderr=file,
        )
    return Server(url, process, log)


def wait_until(condition, timeout_s: float = 180, what: str = "condition"):
    """Wait for a true value and return it. The deadline only matters if the test fails."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.RequestException):
            if value := condition():
                return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not come true within {timeout_s} s")


def wait_ready(server: Server, timeout_s: float = 180) -> Server:
    def ready() -> bool:
        assert server.process.poll() is None, server.log.read_text()
        return requests.get(f"{server.url}/readyz", timeout=10).status_code == 200

    wait_until(ready, timeout_s, f"{server.url} ready")
    return server


def start_worker(run: Path, log: Path, *settings: str, port: int | None = None, environment=None) -> Server:
    """Start a worker, without a controller unless a setting names one."""
    port = port or free_port()
    alone = [] if any(s.startswith("worker.controller=") for s in settings) else ["worker.controller=null"]
    arguments = ["worker", str(run), f"worker.port={port}", "engine.max_running=4", *alone, *settings]
    return start(arguments, f"http://127.0.0.1:{port}", log, environment=environment)


def start_controller(log: Path, *settings: str, port: int | None = None, environment=None) -> Server:
    port = port or free_port()
    return start(
        ["controller", f"controller.port={port}", *settings], f"http://127.0.0.1:{port}", log, environment=environment
    )


def llava_stream(url: str, body: dict, *, headers: dict[str, str] | None = None) -> Iterator[dict]:
    """A client like LLaVA's web UI: ``requests`` with NUL as delimiter. The timeout is 60 s instead of 10 s, so that
    tests pass on a busy machine."""
    response = requests.post(
        f"{url}/worker_generate_stream",
        headers=headers or {"User-Agent": "LLaVA Client"},
        json=body,
        stream=True,
        timeout=60,
    )
    with response:
        for chunk in response.iter_lines(decode_unicode=False, delimiter=b"\0"):
            if chunk:
                yield json.loads(chunk.decode())


def llava_answer(url: str, body: dict, **kwargs) -> str:
    """The whole answer, without the prompt."""
    last = None
    for chunk in llava_stream(url, body, **kwargs):
        assert chunk["error_code"] == 0, chunk
        assert chunk["text"].startswith(body["prompt"])
        last = chunk
    assert last is not None
    return last["text"][len(body["prompt"]) :]


def generation(image: bytes | None = None, **fields) -> dict:
    """A request body for the LLaVA API, with greedy decoding."""
    prompt = PROMPT if image is not None else PROMPT.replace("<image>\n", "")
    images = {} if image is None else {"images": [bare_base64(image)]}
    return {"model": "tiny", "prompt": prompt, "temperature": 0, "max_new_tokens": 32, "stop": "</s>"} | images | fields


def queue_length(url: str) -> int:
    return requests.post(f"{url}/worker_get_status", timeout=5).json()["queue_length"]


def num_cancelled(worker: Server) -> int:
    """Number of answers that were canceled because the client had disconnected."""
    text = requests.get(worker.url + "/metrics", timeout=5).text
    match = re.search(r'^babydoctor_answers_total{reason="cancelled"} (\S+)', text, re.M)
    return int(float(match.group(1))) if match else 0


def in_background(function, *args) -> threading.Thread:
    thread = threading.Thread(target=function, args=args, daemon=True)
    thread.start()
    return thread


def stop_all(servers: list[Server]) -> None:
    for server in servers:
        if server.process.poll() is None:
            # A stopped process does not see SIGTERM.
            server.process.send_signal(signal.SIGCONT)
            server.process.terminate()
    for server in servers:
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
