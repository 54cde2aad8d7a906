"""Plans: the 7B stages fit an A10, refusals name a fix, and predicted memory equals that of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from babydoctor.bench.models import PRESETS
from babydoctor.bench.train import measure_peak, prepare
from babydoctor.config import load_config
from babydoctor.plan.hardware import find_hardware, this_cpu
from babydoctor.plan.lengths import known_statistics, summarize_examples
from babydoctor.plan.model import describe_model
from babydoctor.plan.options import cheapest, list_options
from babydoctor.plan.plan import (
    build_plan,
    check_fits,
    micro_batch_work,
    tensors_by_part,
)
from babydoctor.plan.ranks import RankPlan, plan_ranks
from babydoctor.plan.report import format_options, update_options
from babydoctor.schema import UserError

CONFIGS = Path(__file__).parents[1] / "configs"


def plan_of(name: str, *overrides: str, memory_gib: float | None = None):
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    hardware = find_hardware("a10")
    if memory_gib is not None:
        hardware = replace(hardware, memory_bytes=round(memory_gib * 2**30))
    model = describe_model(config)
    return config, build_plan(
        config, hardware, statistics=known_statistics(config.data, model.shape.num_patches), model=model
    )


@pytest.mark.parametrize("name", ["align", "instruct", "radiology"])
def test_the_7b_stages_fit_an_a10(name):
    config, plan = plan_of(name)
    check_fits(config, plan)
    assert plan.largest_micro_batch >= config.data.max_length
    assert 0 < plan.mfu <= plan.utilization


def test_auto_recomputes_less_if_memory_allows():
    settings = ("train.gradient_checkpointing=auto", "train.micro_batch_tokens=auto")
    _, small = plan_of("radiology", *settings, memory_gib=14)
    _, large = plan_of("radiology", *settings, memory_gib=80)
    assert small.fits and large.fits and large.gradient_checkpointing == "none"
    assert small.gradient_checkpointing != "none"


def test_a_refusal_names_a_setting_that_fits():
    config, plan = plan_of("instruct", memory_gib=12)
    with pytest.raises(UserError, match=r"model\.quantization=nf4"):
        check_fits(config, plan)


def test_options_keep_the_recipe_and_fit(tmp_path):
    """The cheapest option recomputes nothing, and its overrides give the plan that the table shows."""
    config, shipped = plan_of("align")
    options = list_options(config, find_hardware("a10"), shipped.statistics)
    best = cheapest(options)
    assert best is not None and best.plan is not None and best.plan.fits
    assert (best.quantization, best.gradient_checkpointing) == ("none", "none")
    _, again = plan_of("align", *best.overrides.split())
    assert again.memory == best.plan.memory and again.hours == best.plan.hours
    full = next(o.plan for o in options if (o.quantization, o.gradient_checkpointing) == ("none", "full"))
    assert full is not None and full.flops.model / full.flops.total < 0.75 and best.plan.flops.recomputed == 0

    guide = tmp_path / "guide.md"
    guide.write_text("before\n<!-- plan options align a10: begin -->\nold\n<!-- plan options align a10: end -->\nafter")
    update_options(guide, "align", "a10", format_options("align", "a10", options))
    text = guide.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text
    assert f"**{best.plan.hours:.1f}**" in text
    with pytest.raises(UserError, match="markers"):
        update_options(guide, "instruct", "a10", "table")


def test_gradients_replace_activations_in_a_step_of_one_micro_batch():
    config, plan = plan_of("instruct")
    work = micro_batch_work(plan.statistics, 2048)
    alone, several = (
        tensors_by_part(config, plan.model, work, "full", accumulates=accumulates, is_cuda=True)
        for accumulates in (False, True)
    )
    assert several["gradients (float32)"] == 4 * plan.model.trainable
    assert sum(alone.values()) < sum(several.values())


def test_an_unknown_gpu_is_named():
    with pytest.raises(UserError, match="a10"):
        find_hardware("a11")


def planned_and_measured(stage: str, preset: str, overrides: tuple[str, ...], batch_size: int) -> tuple[int, int]:
    """Bytes of tensors at the peak of a training step in one micro-batch: predicted and allocated."""
    job = prepare(stage, preset, "cpu", hardware=this_cpu(), batch_size=batch_size, num_workers=0, overrides=overrides)
    measured = measure_peak(job)
    # Plan for the longer of the two measured steps.
    steps = [
        [job.dataset.encoder.encode(job.dataset.samples[i]) for i in job.dataset.sampler.samples_of_step(step)]
        for step in range(2)
    ]
    means = summarize_examples(max(steps, key=lambda examples: sum(map(len, examples))))
    work = micro_batch_work(means, round(batch_size * means.num_own) + means.num_prefix)
    parts = tensors_by_part(
        job.config, job.plan.model, work, job.plan.gradient_checkpointing, accumulates=False, is_cuda=False
    )
    return sum(parts.values()), measured


@pytest.mark.parametrize("stage", ["align", "instruct", "radiology"])
def test_predicted_memory_is_within_a_tenth_of_the_allocators(stage):
    predicted, measured = planned_and_measured(stage, "mini", (), batch_size=8)
    assert abs(predicted / measured - 1) < 0.1, (predicted, measured)


def test_predicted_memory_holds_for_heads_of_their_own_size_and_norms(monkeypatch):
    """Qwen3: queries wider than the hidden size, grouped keys, and a norm of each head."""
    heads = {"head_dim": 128, "num_key_value_heads": 2, "num_hidden_layers": 4, "model_type": "qwen3"}
    preset = PRESETS["mini"] | {"language": PRESETS["mini"]["language"] | heads}
    monkeypatch.setitem(PRESETS, "qwen3", preset)
    predicted, measured = planned_and_measured("instruct", "qwen3", ("train.fuse=false",), batch_size=4)
    assert abs(predicted / measured - 1) < 0.1, (predicted, measured)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "instruct", "radiology"])
def test_predicted_memory_holds_at_the_widths_of_7b(stage, monkeypatch):
    """The shipped configurations at LLaMA-2-7B's and CLIP-L's hidden sizes, with two layers of each."""
    wide = {
        "language": PRESETS["7b"]["language"] | {"num_hidden_layers": 2},
        "vision": PRESETS["7b"]["vision"] | {"num_hidden_layers": 2},
    }
    monkeypatch.setitem(PRESETS, "wide", wide)
    shipped = load_config(CONFIGS / f"{stage}.yaml")
    overrides = (
        f"model.quantization={shipped.model.quantization}",
        f"lora={shipped.lora.model_dump_json() if shipped.lora else 'null'}",
        f"train.optimizer={shipped.train.optimizer}",
        f"train.gradient_checkpointing={shipped.train.gradient_checkpointing}",
        f"train.micro_batch_tokens={shipped.train.micro_batch_tokens}",
    )
    predicted, measured = planned_and_measured(stage, "wide", overrides, batch_size=3)
    assert abs(predicted / measured - 1) < 0.1, (predicted, measured)


def ranks_of(strategy: str, num_ranks: int, *overrides: str) -> RankPlan:
    config = load_config(CONFIGS / "instruct.yaml", ["train.optimizer=adamw", *overrides])
    model = describe_model(config)
    statistics = known_statistics(config.data, model.shape.num_patches)
    return plan_ranks(
        config, find_hardware("h100"), statistics=statistics, model=model, strategy=strategy, num_ranks=num_ranks
    )


def test_one_rank_is_the_plan_of_one_gpu() -> None:
    alone = ranks_of("ddp", 1)
    assert alone.sent_bytes == 0 and alone.efficiency("NVLink") == 1
    _, plan = plan_of("instruct", "train.optimizer=adamw")
    assert alone.plan.memory == plan.memory


def test_ddp_sends_each_float32_gradient_twice() -> None:
    """A ring all-reduce: every byte is reduced and gathered, less the rank's own share."""
    eight = ranks_of("ddp", 8)
    assert eight.sent_bytes == pytest.approx(2 * 4 * eight.plan.model.trainable * 7 / 8)
    assert eight.efficiency("100 Gb Ethernet") < eight.efficiency("PCIe 4.0 x16") < eight.efficiency("NVLink") < 1


def test_sharding_trades_memory_for_traffic() -> None:
    plans = [ranks_of(strategy, 8) for strategy in ("ddp", "zero2", "fsdp")]
    memory = [plan.plan.total_bytes for plan in plans]
    assert memory == sorted(memory, reverse=True)
    assert plans[2].sent_bytes > 10 * plans[0].sent_bytes
    weights = [sum(plan.plan.memory[part] for part in plan.plan.model.weights) for plan in plans]
    assert weights[2] == pytest.approx(weights[0] / 8, rel=1e-6) and weights[1] == weights[0]
    # 4-bit weights stay whole under FSDP2 and are shared out by ZeRO-3.
    for strategy, share in (("fsdp", 1), ("zero3", 8)):
        plan = ranks_of(strategy, 8, "model.quantization=nf4").plan
        assert plan.memory["decoder layers (NF4)"] == plan.model.weights["decoder layers (NF4)"] // share


def test_unsupported_sharding_is_refused() -> None:
    with pytest.raises(UserError, match="256 GPUs share the 128 samples"):
        ranks_of("ddp", 256)
    with pytest.raises(UserError, match="--strategy 'tp'"):
        ranks_of("tp", 2)
    with pytest.raises(UserError, match=r"set train\.optimizer=adamw"):
        ranks_of("fsdp", 2, "train.optimizer=paged_adamw_8bit")
