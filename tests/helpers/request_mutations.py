"""Valid requests of every route, and seeded damage to them: values, keys, JSON text, headers and paths."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from helpers.serving import PROMPT, bare_base64, data_url, generation, png, user_message

TEXTS = (
    *("", " ", "\0", "a", "x" * 3000, "\ud800", "🩻", "<image>", "<image><image>", "[INST]", "[/INST]", "</s>", "<s>"),
    *("data:", "data:,", "data:image/png;base64,AAAA", "data:image/png,%ff", "http://127.0.0.1:1/a.png", "file:///etc"),
    *("NaN", "1e999", "null", "-1", "user", "assistant", "system", "text", "image_url", "json_schema", "json_object"),
    *("../../etc/passwd", "ghost", "é" * 40, "AAAA", "=", "%", "{}", "\u202e", "' OR 1=1", "\r\nX-Injected: 1"),
)
NUMBERS = (0, -0.0, 1, -1, 2, 0.5, 3.7, 1e308, -1e308, 2**31, 2**63, -(2**63) - 1, 10**400, math.nan, math.inf)
MAX_TOKENS_KEYS = ("max_new_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens", "n")
CONTENT_TYPES = ("", "text/plain", "application/json; charset=utf-16", "multipart/form-data", "\xff")


@dataclass(frozen=True)
class Sent:
    """One request. ``body`` None: no body."""

    part: str
    method: str
    path: str
    body: Any = None
    raw: bytes | None = None
    """The bytes of the body, if they are not ``body`` as JSON."""
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})

    @property
    def data(self) -> bytes | None:
        if self.raw is not None:
            return self.raw
        return None if self.body is None else json.dumps(self.body).encode()


def api_seeds(run: str = "tiny") -> list[Sent]:
    """Requests that a worker and a controller answer, of every POST route and some GET routes."""
    image, chat = png(), {"model": run, "max_tokens": 2, "temperature": 0}
    messages = [user_message("Which modality is this?", image)]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    item = {"role": "user", "content": [{"type": "input_text", "text": "a"}]}
    picture = {"type": "input_image", "image_url": data_url(image)}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    every: list[tuple[str, Any]] = [
        ("/worker_generate_stream", generation(image, max_new_tokens=2)),
        ("/worker_generate_stream", generation(max_new_tokens=2, stop=["a", "b"], seed=3, top_k=4, logprobs=True)),
        ("/worker_generate", generation(max_new_tokens=2, resume_ids=[4, 5], token_ids=True, echo=False)),
        ("/worker_generate", generation(max_new_tokens=2, turns=[{"role": "user", "text": "a"}], system="b")),
        ("/count_token", {"model": run, "prompt": PROMPT}),
        ("/model_details", {"model": run}),
        ("/worker_get_conv_template", {"model": run}),
        ("/worker_attention", {"model": run, "prompt": PROMPT, "answer": "A", "images": [bare_base64(image)]}),
        ("/worker_get_status", None),
        ("/v1/chat/completions", chat | {"messages": messages, "stream": True, "stop": ["x"]}),
        ("/v1/chat/completions", chat | {"messages": talk, "n": 2, "logprobs": True, "top_logprobs": 2}),
        ("/v1/chat/completions", chat | {"messages": talk[:2], "continue_final_message": True, "logit_bias": {"5": 1}}),
        (
            "/v1/chat/completions",
            chat
            | {"messages": talk[:1]}
            | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}},
        ),
        ("/v1/completions", chat | {"prompt": ["a", "b"], "echo": True, "logprobs": 1, "stream": True}),
        ("/v1/completions", chat | {"prompt": "a", "stream_options": {"include_usage": True}}),
        ("/v1/responses", {"model": run, "input": [item], "max_output_tokens": 2, "instructions": "b"}),
        (
            "/v1/responses",
            {"model": run, "input": [item | {"content": [*item["content"], picture]}], "max_output_tokens": 2}
            | {"stream": True, "text": {"format": {"type": "json_object"}}},
        ),
    ]
    seeds = [Sent(part, "POST", path, body) for path, body in every for part in ("worker", "controller")]
    worker_name = "http://127.0.0.1:1"
    status = {"model_names": ["ghost"], "speed": 1, "queue_length": 0}
    own: list[tuple[str, Any]] = [
        ("/register_worker", {"worker_name": worker_name, "check_heart_beat": True, "worker_status": status}),
        ("/receive_heart_beat", {"worker_name": worker_name, "queue_length": 0}),
        ("/unregister_worker", {"worker_name": worker_name, "queue_length": 0}),
        ("/get_worker_address", {"model": run}),
        ("/list_models", None),
        ("/refresh_all_workers", None),
    ]
    seeds += [Sent("controller", "POST", path, body) for path, body in own]
    for path in ("/v1/models", "/v1/models/tiny", "/readyz", "/metrics", "/workers", "/openapi.json"):
        seeds += [Sent(part, "GET", path) for part in ("worker", "controller")]
    return seeds


def mutate(sent: Sent, rng: np.random.Generator) -> Sent:
    """The request with one to three faults."""
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        kind = rng.random()
        if kind < 0.75 and sent.body is not None:
            sent = replace(sent, body=_limited(_damaged(copy.deepcopy(sent.body), rng), rng))
        elif kind < 0.87 and sent.data:
            sent = replace(sent, raw=_damaged_bytes(sent.data, rng))
        elif kind < 0.93:
            headers = {} if rng.random() < 0.3 else {"Content-Type": str(rng.choice(CONTENT_TYPES))}
            if rng.random() < 0.3:
                headers["X-Request-Id"] = str(rng.choice(["x" * 5000, "é", "a\tb"]))
            sent = replace(sent, headers=headers)
        elif kind < 0.96:
            sent = replace(sent, method=str(rng.choice(["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])))
        else:
            ending = str(rng.choice(["/", "/a", "?a=%ff", "%00", "//", "/../..", "%2e%2e", ";a", "?" + "a" * 3000]))
            sent = replace(sent, path=sent.path + ending)
    return sent


def _damaged(value: Any, rng: np.random.Generator) -> Any:
    """A JSON value with a change somewhere inside, more often at deeper levels."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if keys and rng.random() < 0.8:
        key = keys[int(rng.integers(len(keys)))]
        kind = rng.random()
        if kind < 0.12:
            del value[key]
        elif kind < 0.2 and isinstance(value, dict):
            value[str(rng.choice(TEXTS))] = _wild(rng)
        elif kind < 0.25 and isinstance(value, dict):
            value[str(key) + str(rng.choice(["", " ", "s", "\0"]))] = value.pop(key)
        elif kind < 0.3 and isinstance(value, list):
            value[:] = value * int(rng.choice([2, 3, 100]))
        else:
            value[key] = _damaged(value[key], rng)
        return value
    kind = rng.random()
    if isinstance(value, str) and kind < 0.5:
        place = int(rng.integers(len(value) + 1))
        return value[:place] + str(rng.choice(TEXTS)) + value[place + int(rng.integers(0, 3)) :]
    if kind < 0.6:
        return [value]
    return {"a": value} if kind < 0.65 else _wild(rng)


def _wild(rng: np.random.Generator) -> Any:
    kind = int(rng.integers(8))
    if kind < 3:
        return str(rng.choice(TEXTS))
    if kind < 5:
        return NUMBERS[int(rng.integers(len(NUMBERS)))]
    deep: Any = 1
    for _ in range(int(rng.choice([1, 5, 40]))):
        deep = [deep]
    return (None, True, {}, [], deep, {"a": deep}, [{}])[int(rng.integers(7))]


def _limited(value: Any, rng: np.random.Generator) -> Any:
    """The same request with a short answer, except for a few. With long answers the run would take hours."""
    if isinstance(value, dict):
        for key in MAX_TOKENS_KEYS:
            number = value.get(key)
            if isinstance(number, int | float) and not isinstance(number, bool) and number > 8 and rng.random() < 0.95:
                value[key] = 8
        if "model" in value and not any(key in value for key in MAX_TOKENS_KEYS) and rng.random() < 0.95:
            value["max_new_tokens" if "images" in value or "stop" in value else "max_tokens"] = 4
    return value


def _damaged_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.choice([1, 2, 8]))):
        place = int(rng.integers(len(changed) + 1))
        kind = int(rng.integers(5))
        if kind == 0:
            changed[place : place + 1] = bytes([int(rng.integers(256))])
        elif kind == 1:
            del changed[place : place + int(rng.integers(1, 40))]
        elif kind == 2:
            changed[place:place] = rng.choice([b'"', b"{", b"]", b",", b"\\", b"\\ud800", b"\xff", b"\0", b"9" * 5000])
        elif kind == 3:
            del changed[place:]
        else:
            changed[place:place] = changed[max(0, place - 50) : place]
    return bytes(changed)
