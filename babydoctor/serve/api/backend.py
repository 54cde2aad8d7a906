"""What the routes need of a worker's engine or of a controller's choice of workers."""

from __future__ import annotations

from typing import Any, Protocol

from babydoctor.conversation import Template
from babydoctor.serve.api.protocol import AttentionRequest, CountTokenRequest, GenerateRequest
from babydoctor.serve.api.streaming import AnswerStream
from babydoctor.serve.metrics import HttpMetrics
from babydoctor.serve.settings import ServeSettings


class Backend(Protocol):
    """What answers the requests."""

    @property
    def settings(self) -> ServeSettings: ...

    @property
    def metrics(self) -> HttpMetrics: ...

    def model_names(self) -> list[str]: ...

    def template(self, model: str) -> Template:
        """The template of a model. Raises ``ApiError`` if nobody serves it."""

    def unready(self) -> str | None:
        """Why no request can be answered now; None if one can."""

    async def open(self, request: GenerateRequest) -> AnswerStream:
        """Begin an answer. Raises ``ApiError``. Cancelling it releases everything."""

    async def attention(self, request: AttentionRequest) -> dict[str, Any]: ...

    async def count_tokens(self, request: CountTokenRequest) -> int: ...

    async def model_details(self, model: str) -> dict[str, Any]: ...
