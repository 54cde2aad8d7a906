"""What both kinds of workers share: one model with its names, request slots, and draining at shutdown."""

from __future__ import annotations

from babydoctor.conversation import Template, get_template
from babydoctor.serve.api.admission import RequestSlots
from babydoctor.serve.api.errors import ApiError, model_not_found
from babydoctor.serve.api.protocol import WorkerStatus
from babydoctor.serve.metrics import WorkerMetrics
from babydoctor.serve.settings import ServeSettings


class SingleModelBackend:
    """The part of a worker's backend that does not depend on where the model runs.

    Args:
        name: the model's name for clients; ``worker.aliases`` adds more.
        template: the template in which clients send prompts.
        num_running: requests that are answered at the same time.
    """

    def __init__(self, settings: ServeSettings, name: str, template: str, num_running: int) -> None:
        self.settings = settings
        self.metrics = WorkerMetrics()
        self.name = name
        self.slots = RequestSlots(num_running, settings.limits.max_queue)
        self.draining = False
        self._template = get_template(template)
        self.metrics.gauge("queue_length", "Requests running and waiting", lambda: self.slots.taken)

    def model_names(self) -> list[str]:
        return list(dict.fromkeys((self.name, *self.settings.worker.aliases)))

    def template(self, model: str) -> Template:
        self._check_model(model)
        return self._template

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            model_names=self.model_names(),
            speed=self.settings.worker.speed,
            queue_length=self.slots.taken,
            template=self._template.name,
            draining=self.unready() is not None,
        )

    def _check_model(self, model: str) -> None:
        if model and model not in (names := self.model_names()):
            raise model_not_found(model, names)

    def unready(self) -> str | None:
        """The reason why no request can be answered now; None if requests can be answered."""
        raise NotImplementedError

    def _check_not_draining(self) -> None:
        if self.draining:
            raise draining_error()

    async def _nothing(self) -> None:
        pass


def draining_error() -> ApiError:
    return ApiError("draining", "The worker is shutting down.")
