"""A worker and a controller that behave like those of the original LLaVA code, without a model.

They reproduce behavior that clients depend on: the worker registers before it listens, waits for a permit before it
sends headers, and never sends a finish reason; the controller calls with ``requests`` and splits at NUL.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import requests
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

WORDS = ("the", "scan", "shows", "a", "clear", "lung", "and", "no", "sign", "of", "any", "mass")


def continuation(prompt: str, max_new_tokens: int) -> list[str]:
    """The words that "the model" adds. They depend only on the text so far, as in greedy decoding."""
    written = prompt.rpartition("ASSISTANT:")[2].split()
    return [f" {WORDS[index % len(WORDS)]}" for index in range(len(written), len(written) + max_new_tokens)]


def worker_app(name: str, delay_s: float) -> FastAPI:
    app = FastAPI()
    permit = threading.Semaphore(1)

    def stream(params: dict):
        text = params["prompt"]
        try:
            for word in continuation(text, min(int(params.get("max_new_tokens", 256)), 1024)):
                time.sleep(delay_s)
                text += word
                yield json.dumps({"text": text, "error_code": 0}).encode() + b"\0"
        finally:
            permit.release()

    @app.post("/worker_generate_stream")
    async def generate_stream(request: Request):
        params = await request.json()
        while not permit.acquire(blocking=False):
            time.sleep(0.01)
        return StreamingResponse(stream(params))

    @app.post("/worker_get_status")
    async def get_status(request: Request):
        return {"model_names": [name], "speed": 1, "queue_length": 1 - permit._value}

    return app


def run_worker(port: str, controller: str, name: str, delay_s: str) -> None:
    address = f"http://127.0.0.1:{port}"

    def beat() -> None:
        while True:
            time.sleep(0.5)
            answer = requests.post(
                f"{controller}/receive_heart_beat", json={"worker_name": address, "queue_length": 0}, timeout=5
            )
            if not answer.json()["exist"]:
                register()

    def register() -> None:
        status = {"model_names": [name], "speed": 1, "queue_length": 0}
        body = {"worker_name": address, "check_heart_beat": True, "worker_status": status}
        assert requests.post(f"{controller}/register_worker", json=body).status_code == 200

    register()
    threading.Thread(target=beat, daemon=True).start()
    uvicorn.run(worker_app(name, float(delay_s)), host="127.0.0.1", port=int(port), log_level="warning")


def controller_app() -> FastAPI:
    app = FastAPI()
    workers: dict[str, dict] = {}

    @app.post("/register_worker")
    async def register_worker(request: Request):
        data = await request.json()
        status = data["worker_status"]
        workers[data["worker_name"]] = {key: status[key] for key in ("model_names", "speed", "queue_length")}

    @app.post("/receive_heart_beat")
    async def receive_heart_beat(request: Request):
        data = await request.json()
        return {"exist": data["worker_name"] in workers}

    @app.post("/list_models")
    async def list_models():
        return {"models": sorted({name for status in workers.values() for name in status["model_names"]})}

    @app.post("/get_worker_address")
    async def get_worker_address(request: Request):
        model = (await request.json())["model"]
        return {"address": next((url for url, status in workers.items() if model in status["model_names"]), "")}

    @app.post("/worker_generate_stream")
    async def worker_generate_stream(request: Request):
        params = await request.json()
        address = next(iter(workers))

        def stream():
            response = requests.post(f"{address}/worker_generate_stream", json=params, stream=True, timeout=5)
            for chunk in response.iter_lines(decode_unicode=False, delimiter=b"\0"):
                if chunk:
                    yield chunk + b"\0"

        return StreamingResponse(stream())

    return app


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:]
    if kind == "worker":
        run_worker(*arguments)
    else:
        uvicorn.run(controller_app(), host="127.0.0.1", port=int(arguments[0]), log_level="warning")
