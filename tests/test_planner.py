"""Plans: the 7B stages fit an A10, refusals say the mend, and predicted memory is what training takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from babydoctor.bench.train import measure_peak, prepare
from babydoctor.config import load_config
from babydoctor.plan.hardware import find_hardware, this_cpu
from babydoctor.plan.lengths import known_statistics, summarize_examples
from babydoctor.plan.model import describe_model
from babydoctor.plan.plan import (
    build_plan,
    check_fits,
    gradient_bytes,
    micro_batch_work,
    optimizer_bytes,
    step_bytes,
)
from babydoctor.schema import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


def plan_of(name: str, *overrides: str, memory_gib: float | None = None):
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    hardware = find_hardware("a10")
    if memory_gib is not None:
        hardware = replace(hardware, memory_bytes=round(memory_gib * 2**30))
    model = describe_model(config)
    return config, build_plan(
        config, hardware, statistics=known_statistics(config, model.shape.num_patches), model=model
    )


@pytest.mark.parametrize("name", ["align", "instruct", "radiology"])
def test_the_7b_stages_fit_an_a10(name):
    config, plan = plan_of(name)
    check_fits(config, plan)
    assert plan.largest_micro_batch >= config.data.max_length
    assert 0 < plan.mfu <= plan.utilization


def test_auto_recomputes_less_where_there_is_room():
    settings = ("train.gradient_checkpointing=auto", "train.micro_batch_tokens=auto")
    _, small = plan_of("radiology", *settings, memory_gib=14)
    _, large = plan_of("radiology", *settings, memory_gib=80)
    assert small.fits and large.fits and large.gradient_checkpointing == "none"
    assert small.gradient_checkpointing != "none"


def test_refusal_names_the_setting_that_mends_it():
    config, plan = plan_of("instruct", memory_gib=12)
    with pytest.raises(UserError, match=r"model\.quantization=nf4"):
        check_fits(config, plan)


def test_unknown_gpu_is_named():
    with pytest.raises(UserError, match="a10"):
        find_hardware("a11")


@pytest.mark.parametrize("stage", ["align", "instruct", "radiology"])
def test_predicted_memory_is_within_a_tenth_of_the_allocators(stage):
    job = prepare(stage, "mini", "cpu", hardware=this_cpu(), batch_size=8, num_workers=0)
    measured = measure_peak(job)
    # The larger of the two steps that are measured, so that the lengths are those of the plan.
    heaviest = max(
        (
            [job.dataset.encoder.encode(job.dataset.samples[i]) for i in job.dataset.sampler.samples_of_step(step)]
            for step in range(2)
        ),
        key=lambda examples: sum(map(len, examples)),
    )
    means = summarize_examples(heaviest)
    own = round(8 * means.num_own)
    model = job.plan.model
    step_parts = step_bytes(model.shape, micro_batch_work(means, own + means.num_prefix), 0, is_cuda=False)
    predicted = sum(model.weights.values()) + optimizer_bytes(job.config, model.trainable)
    predicted += sum(step_parts.values()) + gradient_bytes(model, step_parts, accumulates=False)
    assert abs(predicted / measured - 1) < 0.1, (predicted, measured)
