"""``bench serve``: real requests over HTTP and to the engine directly, and consistent figures."""

from __future__ import annotations

import asyncio

import pytest
from helpers.serving import tiny_worker

from babydoctor.bench.endurance.soak import SoakReport, run_soak
from babydoctor.bench.serve import run_bench
from babydoctor.bench.serve_figures import SHORT_PROMPT, DecodeCost, Timing, build_questions, summarize
from babydoctor.bench.serve_http import drive
from babydoctor.bench.serve_model import build_prompt, build_tokenizer
from babydoctor.conversation import split_images
from babydoctor.data.tokens import encode
from babydoctor.engine import linear
from babydoctor.schema import UserError


def test_figures_add_up():
    figures = summarize(2, [Timing(0.1, 1.1, 11), Timing(0.3, 1.3, 11)], wall_s=2.0)
    assert (figures.tokens_per_s, figures.requests_per_s) == (11.0, 1.0)
    assert figures.first_token_p50_s == pytest.approx(0.2)
    assert figures.per_token_p95_s == pytest.approx(0.1)


def test_questions_and_images_are_all_different():
    questions = build_questions(20)
    assert len({question.text for question in questions}) == len({question.image for question in questions}) == 20


def test_prompts_can_be_longer():
    short, long = build_questions(1, 3)[0], build_questions(1, 3, prompt_tokens=SHORT_PROMPT + 50)[0]
    tokenizer = build_tokenizer([short.text, long.text])
    lengths = [len(encode(split_images(build_prompt(text)), tokenizer, 256)) for text in (short.text, long.text)]
    assert abs(lengths[0] - SHORT_PROMPT) <= 3 and lengths[1] == lengths[0] + 50


def test_a_worker_is_measured_over_http():
    figures = asyncio.run(drive(tiny_worker().url, "tiny", 2, build_questions(4), max_new_tokens=6))
    assert figures.num_users == 2 and figures.tokens_per_s > 0
    assert 0 < figures.first_token_p50_s <= figures.first_token_p95_s
    with pytest.raises(UserError, match="another"):
        asyncio.run(drive(tiny_worker().url, "another", 1, build_questions(1), max_new_tokens=6))


def test_the_engine_is_measured_alone(tmp_path):
    report = run_bench("mini", tmp_path, users=(2,), requests_per_user=1, max_new_tokens=3, rounds=1, engine_only=True)
    assert report.through == "engine alone" and report.matmul_flops_per_s > 0 and report.peak_bytes > 0
    assert report.preset == "mini bf16" and 0 < report.share_of_ceiling(report.figures[0]) < 2
    assert report.figures[0].requests_per_s == pytest.approx(report.figures[0].tokens_per_s / 3)


def test_a_4_bit_model_reads_fewer_bytes(tmp_path):
    report = run_bench("mini", tmp_path, users=(1,), requests_per_user=1, max_new_tokens=3, rounds=1, nf4=True)
    assert report.preset == "mini NF4"
    heads, decoder = 32_000 * 512 * 2, 8 * (4 * 512 * 512 + 3 * 512 * 1376)
    # Half a byte per weight, and one byte and a little more per block of 64 for the quantized scales.
    assert report.decode_cost.weight_bytes == pytest.approx(heads + decoder * (0.5 + 1 / 64), rel=0.01)


def test_a_ceiling_counts_weights_once_and_keys_and_values_for_each_user():
    cost = DecodeCost(weight_bytes=800, position_bytes=2, num_positions=100)
    assert cost.ceiling(1, bytes_per_s=1000) == 1.0
    assert cost.ceiling(4, bytes_per_s=1000) == pytest.approx(2.5)


def test_a_short_soak_finds_no_fault(tmp_path):
    report = run_soak(None, tmp_path, clients=12, seconds=4)
    assert report.outcomes["answered"] > 0 and report.num_tokens > 0
    # Four seconds are too short to judge memory use.
    assert [fault for fault in report.faults() if "memory grew" not in fault] == []


@pytest.mark.parametrize(
    ("mebibytes", "is_fault"),
    [
        ([60, 90, 95, 95, 95, 98, 98, 98], False),  # one step of the allocator
        ([60, 90, 95, 100, 105, 110, 115, 120], True),
        ([90] * 8, False),
    ],
)
def test_memory_that_keeps_growing_is_a_fault(mebibytes, is_fault):
    report = SoakReport(rss_bytes={"worker": [value * 2.0**20 for value in mebibytes]}, seconds=1.0)
    report.outcomes["answered"] = 1
    assert any("memory grew" in fault for fault in report.faults()) == is_fault
    assert "third quarter" in report.lines()[-1]


@pytest.mark.parametrize(
    ("nf4", "needed"), [(False, "--preset 7b needs 17 GB"), (True, "--preset 7b --nf4 needs 7 GB")]
)
def test_the_large_preset_states_its_requirements(tmp_path, monkeypatch, nf4, needed):
    monkeypatch.setattr(linear, "available_memory_bytes", lambda: 5_000_000_000)
    with pytest.raises(UserError, match=f"{needed} of free memory on a CPU, and 5.0 GB are free"):
        run_bench("7b", tmp_path, nf4=nf4)
