"""``bench serve``: real requests over HTTP and to the engine alone, and figures that add up."""

from __future__ import annotations

import asyncio

import pytest
import torch
from serving import tiny_worker

from babydoctor.schema import UserError
from babydoctor.serve.bench import Timing, build_questions, drive, run_bench, summarize


def test_figures_add_up():
    figures = summarize(2, [Timing(0.1, 1.1, 11), Timing(0.3, 1.3, 11)], wall_s=2.0)
    assert (figures.tokens_per_s, figures.requests_per_s) == (11.0, 1.0)
    assert figures.first_token_p50_s == pytest.approx(0.2)
    assert figures.per_token_p95_s == pytest.approx(0.1)


def test_questions_and_images_are_all_different():
    questions = build_questions(20)
    assert len({question.text for question in questions}) == len({question.image for question in questions}) == 20


def test_a_worker_is_measured_over_http():
    figures = asyncio.run(drive(tiny_worker().url, "tiny", 2, build_questions(4), max_new_tokens=6))
    assert figures.num_users == 2 and figures.tokens_per_s > 0
    assert 0 < figures.first_token_p50_s <= figures.first_token_p95_s
    with pytest.raises(UserError, match="another"):
        asyncio.run(drive(tiny_worker().url, "another", 1, build_questions(1), max_new_tokens=6))


def test_the_engine_is_measured_alone(tmp_path):
    report = run_bench("mini", tmp_path, users=(2,), requests_per_user=1, max_new_tokens=3, rounds=1, engine_only=True)
    assert report.through == "engine alone" and report.matmul_flops_per_s > 0 and report.peak_bytes > 0
    assert report.figures[0].requests_per_s == pytest.approx(report.figures[0].tokens_per_s / 3)


def test_the_large_preset_says_what_it_needs(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="CUDA"):
            run_bench("7b", tmp_path)
