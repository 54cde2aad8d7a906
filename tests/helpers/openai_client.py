"""OpenAI's client for the shared worker."""

from __future__ import annotations

import openai
import pytest

from helpers.serving import tiny_worker


@pytest.fixture(scope="session")
def client() -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tiny_worker().url}/v1", api_key="none", max_retries=0)
