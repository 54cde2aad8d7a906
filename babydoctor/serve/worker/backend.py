"""What both kinds of workers have in common: one model under one name, places for requests, an end that drains."""

from __future__ import annotations

from babydoctor.conversation import Template, get_template
from babydoctor.serve.api.admission import Places
from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.api.protocol import WorkerStatus
from babydoctor.serve.metrics import WorkerMetrics
from babydoctor.serve.settings import ServeSettings


class SingleModelBackend:
    """The part of a worker's backend that does not depend on where the model runs.

    Args:
        name: the model's, for clients.
        template: the template in which clients send prompts.
        num_running: requests that are answered at the same time.
    """

    def __init__(self, settings: ServeSettings, name: str, template: str, num_running: int) -> None:
        self.settings = settings
        self.metrics = WorkerMetrics()
        self.name = name
        self.places = Places(num_running, settings.limits.max_queue)
        self.draining = False
        self._template = get_template(template)
        self.metrics.gauge("queue_length", "Requests running and waiting", lambda: self.places.taken)

    def model_names(self) -> list[str]:
        return [self.name]

    def template(self, model: str) -> Template:
        self._check_model(model)
        return self._template

    def status(self) -> WorkerStatus:
        return WorkerStatus(
            model_names=[self.name],
            speed=self.settings.worker.speed,
            queue_length=self.places.taken,
            template=self._template.name,
            draining=self.draining,
        )

    def _check_model(self, model: str) -> None:
        if model not in ("", self.name):
            raise ApiError("model_not_found", "This worker serves another model.", param="model")

    def _check_not_draining(self) -> None:
        if self.draining:
            raise ApiError("draining", "The worker is shutting down.")

    async def _nothing(self) -> None:
        pass
