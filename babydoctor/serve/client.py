"""Ask a controller or a worker, over either wire. For `demo --check`, benchmarks and scripts; no torch."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import httpx

from babydoctor.conversation import get_template, prompt_text, render_prompt
from babydoctor.schema import IMAGE_TOKEN, Turn, UserError
from babydoctor.serve.api.errors import ERROR_NONE
from babydoctor.serve.api.protocol import Chunk, StreamDecoder

TIMEOUT = httpx.Timeout(30, connect=5)


class AskError(UserError):
    """The server answered with an error; the message is the server's."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="server_refused")


class Client:
    """One server.

    Args:
        url: of a controller or a worker, without ``/v1``.
        api_key: where the server asks for one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT, trust_env=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Names of the models that can be asked."""
        return [card["id"] for card in _document(self._http.get("/v1/models"))["data"]]

    def template(self, model: str) -> str:
        """Name of the model's conversation template."""
        return str(_document(self._http.post("/worker_get_conv_template", json={"model": model}))["conv"]["name"])

    def stream_llava(
        self, model: str, prompt: str, images: list[bytes], *, max_new_tokens: int = 256, temperature: float = 0.0
    ) -> Iterator[Chunk]:
        """LLaVA's wire: chunks whose text is the prompt and all that came so far.

        Raises:
            AskError: the server refuses, or the answer breaks off with an error.
        """
        body = {
            "model": model,
            "prompt": prompt,
            "images": [base64.b64encode(image).decode() for image in images],
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "stop": "</s>",
        }
        decoder = StreamDecoder()
        with self._http.stream("POST", "/worker_generate_stream", json=body) as response:
            if response.status_code != 200:
                response.read()
                _document(response)
            for data in response.iter_bytes():
                for chunk in decoder.feed(data):
                    if chunk.error_code != ERROR_NONE:
                        raise AskError(chunk.text)
                    yield chunk

    def ask_llava(self, model: str, question: str, image: bytes | None = None, **sampling: float) -> str:
        """One question on LLaVA's wire; the prompt is built here, as its clients do."""
        text = question if image is None else f"{IMAGE_TOKEN}\n{question}"
        prompt = prompt_text(render_prompt([Turn("user", text)], get_template(self.template(model))))
        answer = prompt
        for chunk in self.stream_llava(model, prompt, [] if image is None else [image], **sampling):  # type: ignore[arg-type]
            answer = chunk.text
        return answer[len(prompt) :]

    def stream_openai(
        self, model: str, question: str, image: bytes | None = None, *, max_tokens: int = 256, temperature: float = 0.0
    ) -> Iterator[str]:
        """OpenAI's wire: pieces of the answer.

        Raises:
            AskError: the server refuses, or the answer breaks off with an error.
        """
        content: list[dict[str, object]] = [{"type": "text", "text": question}]
        if image is not None:
            url = f"data:application/octet-stream;base64,{base64.b64encode(image).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
        }
        with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                _document(response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise AskError(event["error"]["message"])
                for choice in event["choices"]:
                    if piece := choice["delta"].get("content"):
                        yield piece

    def ask_openai(self, model: str, question: str, image: bytes | None = None) -> str:
        """One question on OpenAI's wire."""
        return "".join(self.stream_openai(model, question, image))


def _document(response: httpx.Response) -> dict:
    if response.status_code != 200:
        try:
            message = str(response.json()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"the server answered {response.status_code}"
        raise AskError(message)
    return dict(response.json())
