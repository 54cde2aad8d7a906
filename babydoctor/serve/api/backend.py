"""The interface between the routes and a worker's engine or a controller."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from babydoctor.conversation import Template
from babydoctor.serve.api.protocol import AttentionRequest, CountTokenRequest, GenerateRequest
from babydoctor.serve.api.streaming import AnswerStream
from babydoctor.serve.metrics import HttpMetrics
from babydoctor.serve.settings import ServeSettings


class Backend(Protocol):
    """Answers requests."""

    @property
    def settings(self) -> ServeSettings: ...

    @property
    def metrics(self) -> HttpMetrics: ...

    def model_names(self) -> list[str]: ...

    def template(self, model: str) -> Template:
        """The template of a model. Raises ``ApiError`` if no worker serves it."""

    def unready(self) -> str | None:
        """The reason why no request can be answered now; None if requests can be answered."""

    async def open(self, request: GenerateRequest) -> AnswerStream:
        """Start an answer. Raises ``ApiError``. Canceling the call releases all resources."""

    def attention(self, request: AttentionRequest) -> AsyncGenerator[dict[str, Any], None]:
        """Messages of ``AttentionProgress``, then one of ``AttentionReply``. Raises ``ApiError``. Closing the generator
        ends the work."""

    async def count_tokens(self, request: CountTokenRequest) -> int: ...

    async def model_details(self, model: str) -> dict[str, Any]: ...
