"""The engine's compiled CPU operator against PyTorch's operations, in bfloat16 and int8."""

# Fixtures are imported by name.
# ruff: noqa: F401, F811
from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine_models import build_model, build_request, settings, tokenizer, tokens_of

from babydoctor.engine.cpu import check, library
from babydoctor.engine.cpu.check import LARGEST_DIFFERENCE, difference_from_pytorch, operator_works
from babydoctor.engine.cpu.decoder import CpuDecoder, PackedProduct
from babydoctor.engine.cpu.library import load_operator
from babydoctor.engine.engine import Engine
from babydoctor.engine.settings import EngineSettings
from babydoctor.model.babydoctor import BabyDoctor
from babydoctor.schema import UserError

needs_operator = pytest.mark.skipif(load_operator() is None, reason="there is no C++ compiler for the CPU operator")


@pytest.fixture(scope="module")
def model() -> BabyDoctor:
    return build_model(num_heads=4).to(torch.bfloat16)


@needs_operator
@pytest.mark.parametrize("is_int8", [False, True])
def test_steps_give_pytorchs_logits(is_int8: bool) -> None:
    assert difference_from_pytorch(is_int8=is_int8) < LARGEST_DIFFERENCE[is_int8]
    assert operator_works()


@needs_operator
@pytest.mark.parametrize("num_rows", [1, 6, 7, 16])
@pytest.mark.parametrize("outputs", [64, 100, 131])
def test_products_of_any_number_of_rows_and_outputs(num_rows: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(outputs)
    weights = [torch.randn(size, 96, generator=generator).bfloat16() for size in (outputs - 40, 40)]
    rows = torch.randn(num_rows, 96, generator=generator).bfloat16()
    operator = load_operator()
    assert operator is not None
    expected = rows.float() @ torch.cat(weights).float().T
    for is_int8, tolerance in ((False, 0.005), (True, 0.02)):
        actual = PackedProduct(operator, weights, is_int8=is_int8)(rows)
        assert actual.shape == (num_rows, outputs) and actual.dtype == torch.bfloat16
        assert (actual.float() - expected).norm() / expected.norm() < tolerance


@needs_operator
@pytest.mark.parametrize("weights", [None, "int8"])
def test_the_engine_gives_the_same_answers_alone_and_in_a_batch(
    model: BabyDoctor, tokenizer: Any, weights: str | None
) -> None:
    """Requests of different lengths, with images, start and end at different times. Each gets its tokens as alone."""
    requests = [build_request(seed, num_images=seed % 3, length=5 + 9 * (seed % 7)) for seed in range(9)]
    options = settings(weights=weights, step_tokens=200)
    with Engine(model, tokenizer, options) as engine:
        assert isinstance(engine.decoder, CpuDecoder) and engine.kv_cache.dtype == torch.bfloat16
        together = [engine.submit(request) for request in requests]
        answers = [tokens_of(handle) for handle in together]
    with Engine(model, tokenizer, replace(options, max_running=1)) as alone:
        assert [tokens_of(alone.submit(request)) for request in requests] == answers


@needs_operator
def test_other_thread_counts_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    difference = difference_from_pytorch(is_int8=False)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert difference_from_pytorch(is_int8=False) == difference


def test_models_that_the_operator_cannot_run_are_refused_by_name(model: BabyDoctor, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="weights=int4 must be int8"):
        EngineSettings(weights="int4")
    with pytest.raises(UserError, match="int8 is not possible: it takes a LLaMA with plain bfloat16 weights"):
        Engine(build_model(), tokenizer, settings(weights="int8"))
    with pytest.raises(UserError, match=r"engine\.kv_dtype=float32, and it needs bfloat16"):
        Engine(model, tokenizer, settings(weights="int8", kv_dtype="float32"))


def test_without_a_compiler_pytorch_computes(
    model: BabyDoctor, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (library.load_operator, check.operator_works):
        function.cache_clear()
    try:
        with caplog.at_level("INFO"), Engine(model, tokenizer, settings()) as engine:
            assert not isinstance(engine.decoder, CpuDecoder)
            assert len(tokens_of(engine.submit(build_request(0)))) == 24
        assert "could not be built" in caplog.text
    finally:
        for function in (library.load_operator, check.operator_works):
            function.cache_clear()
