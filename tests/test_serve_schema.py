"""The OpenAPI documents are valid, have examples, and describe the servers' replies to any input (schemathesis)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import requests
import schemathesis
from helpers.serving import Server, start_controller, stop_all, tiny_worker, wait_until
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import checks

CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]

BOUNDED = settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
    database=None,
)


def load(url: str) -> schemathesis.schemas.BaseSchema:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A controller in front of the shared worker. Workers that are registered by chance expire soon."""
    log = tmp_path_factory.mktemp("schema") / "controller.log"
    server = start_controller(log, "controller.heart_beat_expiry_s=1", "controller.connect_timeout_s=0.3")
    try:
        wait_until(lambda: requests.get(f"{server.url}/healthz", timeout=2).ok, 60, "the controller")
        body = {"worker_name": tiny_worker().url, "check_heart_beat": False, "worker_status": None}
        assert requests.post(f"{server.url}/register_worker", json=body, timeout=5).ok
        yield server
    finally:
        stop_all([server])


@pytest.fixture(scope="module")
def worker_schema() -> schemathesis.schemas.BaseSchema:
    return load(tiny_worker().url)


@pytest.fixture(scope="module")
def controller_schema(controller: Server) -> schemathesis.schemas.BaseSchema:
    return load(controller.url)


def check_all(schema: schemathesis.schemas.BaseSchema) -> int:
    """Send generated requests to every operation; returns how many there were."""
    num_requests = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @BOUNDED
            @given(case=operation.as_strategy(generation_mode=mode))
            def send(case: schemathesis.Case) -> None:
                nonlocal num_requests
                num_requests += 1
                if isinstance(case.body, dict) and isinstance(case.body.get("max_new_tokens"), int):
                    case.body["max_new_tokens"] = min(2, case.body["max_new_tokens"])
                response = case.call(timeout=20)
                assert response.status_code != 500, case.as_curl_command()
                case.validate_response(response, checks=CHECKS)

            # An operation without parameters cannot be called wrongly.
            with contextlib.suppress(Unsatisfiable):
                send()
    return num_requests


def test_the_worker_follows_its_openapi_document(worker_schema: schemathesis.schemas.BaseSchema):
    assert check_all(worker_schema) > 100


def test_the_controller_follows_its_openapi_document(controller_schema: schemathesis.schemas.BaseSchema):
    assert check_all(controller_schema) > 100


@pytest.mark.parametrize("which", ["worker", "controller"])
def test_the_documents_have_examples(which: str, controller: Server):
    url = tiny_worker().url if which == "worker" else controller.url
    document = requests.get(f"{url}/openapi.json", timeout=5).json()
    assert "examples" in document["components"]["schemas"]["GenerateRequest"]
    assert "examples" in document["components"]["schemas"]["ChatRequest"]
    assert {"/worker_generate_stream", "/v1/chat/completions", "/v1/models", "/healthz"} <= document["paths"].keys()
