"""Fixtures that several test modules share. Tests run offline and on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with the golden references and the real data; tests that need it are skipped without it."""
    folder = Path(os.environ.get("BABYDOCTOR_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "golden").is_dir():
        pytest.skip(f"the golden references are not at {folder} (set BABYDOCTOR_SHARED)")
    return folder


@pytest.fixture(scope="session")
def golden(shared_dir: Path) -> Path:
    """References made with the original LLaVA code."""
    return shared_dir / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` where there is no CUDA device."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
